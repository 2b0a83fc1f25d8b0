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
    if metric == "cosine":
        queries, bank = _unit(queries), _unit(bank)
    parts = [
        _nearest_of_block(part, bank, k, metric == "cosine", start * block if exclude_self else None, block)
        for start, part in enumerate(queries.split(block))
    ]
    distances = torch.cat([part[0] for part in parts]) if parts else queries.new_zeros(0, k)
    rows = torch.cat([part[1] for part in parts]) if parts else torch.zeros(0, k, dtype=torch.int64)
    return distances, rows


def _nearest_of_block(
    queries: Tensor, bank: Tensor, k: int, cosine: bool, self_offset: int | None, block: int
) -> tuple[Tensor, Tensor]:
    best = queries.new_full((len(queries), 0), 0.0)
    rows = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), block):
        part = bank[start : start + block]
        gap = (1 - queries @ part.T).clamp(min=0) if cosine else torch.cdist(queries, part)
        if self_offset is not None:
            own = torch.arange(len(queries), device=queries.device) + self_offset - start
            inside = (own >= 0) & (own < len(part))
            gap[inside.nonzero().flatten(), own[inside]] = torch.inf
        best = torch.cat([best, gap], dim=1)
        here = torch.arange(start, start + len(part), device=queries.device).expand(len(queries), -1)
        rows = torch.cat([rows, here], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1, largest=False)
        rows = rows.gather(1, order)
    return best, rows


def _unit(rows: Tensor) -> Tensor:
    """Rows of length one; a zero row stays zero, at right angles to every other."""
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / length.clamp(min=torch.finfo(rows.dtype).tiny)
