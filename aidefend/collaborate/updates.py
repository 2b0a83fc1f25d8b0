"""Updates of clients as rows of one large matrix that is never built: blocks of columns, and inner products."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import refuse

Update = Tensor | Mapping[str, Tensor]
_BLOCK = 1 << 16


class Updates:
    """The well-formed, finite updates among those given.

    The form (names, shapes, dtypes) is the one that most clients share, so a hostile first client cannot make the
    honest ones look malformed. `dropped` maps the number of each other client to the reason.
    """

    def __init__(self, updates: Sequence[Update] | Tensor, max_norm: float | None) -> None:
        rows = list(updates)
        if not rows:
            raise refuse("at least one update", "updates", "none", "Pass the clients' updates")
        forms = [_form(row) for row in rows]
        known = Counter(form for form in forms if form is not None)
        if not known:
            raise refuse("tensors or state dicts", "updates", type(rows[0]).__name__, "Pass dense tensors")
        self.form = known.most_common(1)[0][0]
        self.dropped = {i: "malformed" for i, form in enumerate(forms) if form != self.form}
        parts = {i: _floats(rows[i]) for i in range(len(rows)) if i not in self.dropped}
        norms = {i: _norm(row) for i, row in parts.items()}
        self.dropped |= {i: "not finite" for i, norm in norms.items() if not torch.isfinite(norm)}
        self.numbers = [i for i in parts if i not in self.dropped]
        self._rows = [parts[i] for i in self.numbers]
        self._given = [rows[i] for i in self.numbers]
        self.norms = torch.stack([norms[i] for i in self.numbers]) if self.numbers else torch.zeros(0)
        self.scale = torch.ones_like(self.norms)
        if max_norm is not None:
            self.scale = (max_norm / self.norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)

    def __len__(self) -> int:
        return len(self.numbers)

    def blocks(self, extra: Sequence[Tensor] = ()) -> Iterator[Tensor]:
        """(n, b) float64 column blocks, scaled; `extra` rows (flat, unscaled) follow below."""
        start = 0
        for part in range(len(self._rows[0])):
            size = self._rows[0][part].numel()
            for first in range(0, size, _BLOCK):
                columns = slice(first, min(size, first + _BLOCK))
                block = torch.stack([row[part].reshape(-1)[columns].detach().cpu().double() for row in self._rows])
                whole = slice(start + columns.start, start + columns.stop)
                below = [row[whole].double() for row in extra]
                yield (
                    torch.cat([block * self.scale[:, None], torch.stack(below)])
                    if below
                    else block * self.scale[:, None]
                )
            start += size

    def gram(self, extra: Sequence[Tensor] = ()) -> Tensor:
        """Inner products of all rows, float64."""
        total = torch.zeros(len(self) + len(extra), len(self) + len(extra), dtype=torch.float64)
        for block in self.blocks(extra):
            total += block @ block.T
        return total

    def weighted_sum(self, weights: Tensor, extra: Sequence[Tensor] = ()) -> Tensor:
        """Sum of rows times weights, flat; a row of weight zero is not read into the sum."""
        used = weights != 0
        parts = [weights[used] @ block[used] for block in self.blocks(extra)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def restore(self, flat: Tensor) -> Update:
        """A flat float64 vector in the form of the updates. Integer entries of state dicts take the lower median."""
        first = self._given[0]
        if isinstance(first, Tensor):
            return flat.reshape(first.shape).to(first)
        found: dict[str, Tensor] = {}
        start = 0
        for name in sorted(first):
            value = first[name]
            if value.is_floating_point():
                found[name] = flat[start : start + value.numel()].reshape(value.shape).to(value)
                start += value.numel()
            else:
                found[name] = (
                    torch.stack([self._named(row, name) for row in self._given]).median(dim=0).values.to(value)
                )
        return {name: found[name] for name in first}

    @staticmethod
    def _named(row: Any, name: str) -> Tensor:
        return row[name].detach().cpu().long()


def _form(row: Any) -> tuple[Any, ...] | None:
    """What must agree between clients, or None if it is no update at all."""
    if isinstance(row, Tensor):
        usable = row.layout == torch.strided and row.is_floating_point() and row.numel() > 0
        return ("tensor", tuple(row.shape), row.dtype) if usable else None
    if not isinstance(row, Mapping) or not row:
        return None
    if not all(isinstance(value, Tensor) and value.layout == torch.strided for value in row.values()):
        return None
    if any(value.is_complex() for value in row.values()) or not any(v.is_floating_point() for v in row.values()):
        return None
    return ("state", *sorted((str(name), tuple(value.shape), str(value.dtype)) for name, value in row.items()))


def _floats(row: Update) -> list[Tensor]:
    if isinstance(row, Tensor):
        return [row]
    return [row[name] for name in sorted(row) if row[name].is_floating_point()]


def _norm(parts: Sequence[Tensor]) -> Tensor:
    squares = [part.detach().cpu().double().square().sum() for part in parts]
    return torch.stack(squares).sum().sqrt()
