"""Exact nearest neighbours in blocks: one matrix product, bounded memory."""

from typing import Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_tensor, refuse


def k_nearest(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    exclude_self: bool = False,
    block: int = 4096,
) -> tuple[Tensor, Tensor]:
    """The k nearest bank rows of every query, nearest first.

    Args:
        queries: (N, d) float.
        bank: (M, d) float, M >= k (M > k with `exclude_self`).
        k: Number of neighbours, >= 1.
        metric: "cosine" is 1 - cosine similarity in [0, 2]; a zero vector has distance 1 to everything.
        exclude_self: Queries are the bank itself: row i is not its own neighbour (its copies are).
        block: Rows of queries and of bank that meet at once; memory is block ** 2 numbers.
    Returns: distances (N, k) and bank row numbers (N, k) int64.
    Raises: ConfigurationError: shapes differ, values not finite, k too large.
    Cost: One N x M x d matrix product.
    Example:
        >>> distances, rows = k_nearest(torch.tensor([[0.0]]), torch.tensor([[3.0], [1.0]]), 1)
        >>> distances.item(), rows.item()
        (1.0, 1)
    """
    check_tensor(queries, "queries", ndim=2, floating=True)
    check_tensor(bank, "bank", ndim=2, floating=True)
    check_choice(metric, ("euclidean", "cosine"), "metric")
    check_int(k, "k", 1, max(1, len(bank) - int(exclude_self)))
    if queries.shape[1] != bank.shape[1] or len(bank) < k + int(exclude_self):
        raise refuse(f"a bank of at least {k} rows of {queries.shape[1]} features", "bank", bank, "Fit on more data")
    given = queries.dtype
    queries, bank = _wide(queries), _wide(bank)
    common = torch.promote_types(queries.dtype, bank.dtype)
    queries, bank = queries.to(common), bank.to(common)
    if metric == "cosine":
        queries, bank = _unit(queries), _unit(bank)
    else:
        centre = bank.mean(dim=0)  # far-off features would lose their digits in the squares
        queries, bank = queries - centre, bank - centre
    offsets = bank.square().sum(dim=1) / 2 if metric == "euclidean" else bank.new_zeros(len(bank))
    parts = [
        _nearest_of_block(part, bank, offsets, k, start * block if exclude_self else None, block)
        for start, part in enumerate(queries.split(block))
    ]
    rows = torch.cat(parts) if parts else torch.zeros(0, k, dtype=torch.int64, device=queries.device)
    return _measured(queries, bank, rows, metric == "cosine", given)


def _wide(rows: Tensor) -> Tensor:
    """Half precision as float32, and float64 where squares would leave the range of float32."""
    wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    return wide.double() if wide.numel() and float(wide.detach().abs().max()) > 1e15 else wide


def _nearest_of_block(
    queries: Tensor, bank: Tensor, offsets: Tensor, k: int, self_offset: int | None, block: int
) -> Tensor:
    """Bank rows (n, k) with the smallest `offset - <query, row>`: half the squared distance less a constant."""
    best = queries.new_zeros(len(queries), 0)
    rows = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), block):
        part = bank[start : start + block]
        gap = torch.addmm(offsets[start : start + block], queries, part.T, alpha=-1)
        if self_offset is not None:
            own = torch.arange(len(queries), device=queries.device) + self_offset - start
            inside = (own >= 0) & (own < len(part))
            gap[inside.nonzero().flatten(), own[inside]] = torch.inf
        here, columns = _smallest(gap, min(k, len(part)))
        best, rows = torch.cat([best, here], dim=1), torch.cat([rows, columns + start], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1, largest=False)
        rows = rows.gather(1, order)
    return rows


def _smallest(gap: Tensor, k: int, width: int = 32) -> tuple[Tensor, Tensor]:
    """The k smallest entries of each row and their columns, as `topk` finds them, in about the time of reading them.

    They lie in the k groups of columns with the smallest minima: in any other group every entry has k below it.
    """
    groups = gap.shape[1] // width
    if groups <= 2 * k:
        return gap.topk(k, dim=1, largest=False)
    whole = groups * width
    tiles = gap[:, :whole].unflatten(1, (groups, width))
    chosen = tiles.amin(dim=2).topk(k, dim=1, largest=False).indices
    columns = (chosen.unsqueeze(2) * width + torch.arange(width, device=gap.device)).flatten(1)
    rest = torch.arange(whole, gap.shape[1], device=gap.device).expand(len(gap), -1)
    columns = torch.cat([columns, rest], dim=1)
    values, order = gap.gather(1, columns).topk(k, dim=1, largest=False)
    return values, columns.gather(1, order)


def _measured(
    queries: Tensor, bank: Tensor, rows: Tensor, cosine: bool, dtype: torch.dtype, block: int = 4096
) -> tuple[Tensor, Tensor]:
    """Distances from differences, which lose no digits, and the rows in their order; equal ones by row number."""
    distances, ordered = [], []
    for part, chosen in zip(queries.split(block), rows.split(block), strict=True):
        near, wide = bank[chosen], part.unsqueeze(1)
        gap = (1 - (near * wide).sum(dim=2)).clamp(min=0) if cosine else (near - wide).norm(dim=2)
        by_row = chosen.argsort(dim=1)
        order = by_row.gather(1, gap.gather(1, by_row).argsort(dim=1, stable=True))
        distances.append(gap.gather(1, order).to(dtype))
        ordered.append(chosen.gather(1, order))
    if not distances:
        return queries.new_zeros(0, rows.shape[1], dtype=dtype), rows
    return torch.cat(distances), torch.cat(ordered)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length one; a zero row stays zero, at right angles to every other."""
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / length.clamp(min=torch.finfo(rows.dtype).tiny)
