"""Updates of clients as rows of one large matrix that is never built: it is read in blocks of columns."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_not_empty, refuse

Update = Tensor | Mapping[str, Tensor]
_BLOCK = 1 << 22  # numbers in a block: 32 MiB of float64
_LONGEST = 1e150  # sums of squares of longer rows could overflow
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Updates:
    """The well-formed, finite updates among those given.

    The form (names, shapes, dtypes) is the one that most clients share, or that of `like`: a hostile client cannot make
    the honest ones look malformed. `dropped` maps the number of each other client to the reason.
    """

    def __init__(self, updates: Sequence[Update] | Tensor, like: Update | None = None) -> None:
        rows = _listed(updates)
        check_not_empty(len(rows), "updates")
        forms = [form_of(row) for row in rows]
        form = _commonest([form for form in forms if form is not None]) if like is None else form_of(like)
        if form is None:
            cure = "Pass dense float tensors or state dicts"
            raise refuse("tensors or state dicts", "updates", type(rows[0]).__name__, cure)
        self.dropped = {i: "malformed" for i, other in enumerate(forms) if other != form}
        self._like = like
        self._take({i: row for i, row in enumerate(rows) if i not in self.dropped})

    def _take(self, rows: Mapping[int, Any]) -> None:
        self.numbers, self._given = list(rows), list(rows.values())

    def measure(self, max_norm: float | None = None) -> None:
        """Read the values: drop what is not finite, and find how much each row is scaled.

        Not before it is known that enough rows are well-formed: the form may be a hostile one until then, and huge.
        """
        parts = [_floats(row) for row in self._given]
        norms = [_norm(row) for row in parts]
        good = [norm <= _LONGEST for norm in norms]
        self.dropped |= {i: "not finite, or too long" for i, fine in zip(self.numbers, good, strict=True) if not fine}
        self._take({i: row for i, row, fine in zip(self.numbers, self._given, good, strict=True) if fine})
        self._rows = [row for row, fine in zip(parts, good, strict=True) if fine]
        self.norms = torch.tensor([norm for norm in norms if norm <= _LONGEST], dtype=torch.float64)
        self.scale = torch.ones_like(self.norms)
        if max_norm is not None:
            self.scale = (float(max_norm) / self.norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)

    def __len__(self) -> int:
        return len(self.numbers)

    def blocks(self) -> Iterator[Tensor]:
        """(n, b) float64 column blocks, scaled."""
        width = max(1, _BLOCK // len(self))
        for part, row in enumerate(self._rows[0]):
            for first in range(0, len(row), width):
                block = torch.stack([each[part][first : first + width].cpu().double() for each in self._rows])
                yield block.mul_(self.scale[:, None])

    def split(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The blocks with the matching pieces of a flat vector."""
        start = 0
        for block in self.blocks():
            yield block, flat[start : start + block.shape[1]]
            start += block.shape[1]

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum of rows times weights, flat; a row of weight zero is left out."""
        return torch.cat([add_rows(block, weights) for block in self.blocks()])

    def inner(self, flat: Tensor) -> Tensor:
        """Inner product of each row with a flat vector."""
        total = torch.zeros(len(self), dtype=torch.float64)
        for block, piece in self.split(flat):
            total += block @ piece
        return total

    def distances(self, flat: Tensor) -> Tensor:
        """Euclidean distance of each row to a flat vector."""
        total = torch.zeros(len(self), dtype=torch.float64)
        for block, piece in self.split(flat):
            total += (block - piece).square().sum(dim=1)
        return total.sqrt()

    def restore(self, flat: Tensor) -> Update:
        """A flat float64 vector in the form of the updates, in the order of names and on the device that most have.

        Integer entries of state dicts are those of `like`, else the lower median over the clients.
        """
        model = self._model()
        if isinstance(model, Tensor):
            return flat.reshape(model.shape).to(model.device, model.dtype)
        found: dict[str, Tensor] = {}
        start = 0
        for name in sorted(model):
            value = model[name]
            if value.is_floating_point():
                found[name] = flat[start : start + value.numel()].reshape(value.shape).to(value.device, value.dtype)
                start += value.numel()
            else:
                found[name] = self._integers(name).reshape(value.shape).to(value.device, value.dtype)
        return {name: found[name] for name in model}

    def _model(self) -> Update:
        """The row after which the result is modelled."""
        if self._like is not None:
            return self._like
        outsides = [_outside(row) for row in self._given]
        model: Update = self._given[outsides.index(_commonest(outsides))]
        return model

    def _integers(self, name: str) -> Tensor:
        sources: list[Any] = self._given if self._like is None else [self._like]
        rows = [row[name].detach().reshape(-1) for row in sources]
        width = max(1, _BLOCK // len(rows))
        middle = (len(rows) - 1) // 2
        parts = [torch.zeros(0, dtype=torch.int64)]
        for first in range(0, len(rows[0]), width):
            block = torch.stack([row[first : first + width].cpu().long() for row in rows])
            parts.append(block.sort(dim=0).values[middle])
        return torch.cat(parts)


def add_rows(block: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the rows of a block, in the order of rows: the bits do not depend on the width of the block."""
    total = torch.zeros(block.shape[1], dtype=torch.float64)
    for weight, row in zip(weights.tolist(), block, strict=True):
        if weight != 0:
            total += row * weight
    return total


def form_of(row: Any) -> tuple[Any, ...] | None:
    """What must agree between clients, or None if it is no update at all."""
    if _is_plain(row):
        return ("tensor", tuple(row.shape), row.dtype) if row.dtype in _FLOATS and row.numel() else None
    if not isinstance(row, Mapping) or not all(isinstance(name, str) and _is_plain(row[name]) for name in row):
        return None
    if not any(value.dtype in _FLOATS and value.numel() for value in row.values()):
        return None
    return ("state", *sorted((name, tuple(value.shape), str(value.dtype)) for name, value in row.items()))


def _listed(updates: Any) -> list[Any]:
    if isinstance(updates, Tensor):
        if not _is_plain(updates) or updates.ndim < 2:
            raise refuse("a dense tensor of shape (n, ...)", "updates", updates, "Pass one row for each client")
        return list(updates.unbind())
    if isinstance(updates, str | bytes | Mapping) or not isinstance(updates, Iterable):
        raise refuse("one update for each client", "updates", type(updates).__name__, "Pass a list of updates")
    rows = list(updates)
    if not rows:
        raise refuse("at least one update", "updates", "none", "Pass the clients' updates")
    return rows


def _is_plain(value: Any) -> bool:
    """A dense tensor in memory; subclasses may behave in any way, so they are none."""
    if type(value) not in (Tensor, nn.Parameter) or value.is_nested or value.is_meta:
        return False
    return value.layout == torch.strided and value.dtype in _FLOATS + _INTEGERS


def _floats(row: Update) -> list[Tensor]:
    """The flat floating point parts, in the order of names."""
    parts = [row] if isinstance(row, Tensor) else [row[name] for name in sorted(row)]
    return [part.detach().reshape(-1) for part in parts if part.dtype in _FLOATS]


def _outside(row: Update) -> tuple[Any, ...]:
    """What the form leaves open: order of names, and devices."""
    return (row.device,) if isinstance(row, Tensor) else tuple((name, row[name].device) for name in row)


def _norm(parts: Sequence[Tensor]) -> float:
    squares = (float(piece.cpu().double().square().sum()) for part in parts for piece in part.split(_BLOCK))
    return math.sqrt(sum(squares))


def _commonest(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0] if values else None
