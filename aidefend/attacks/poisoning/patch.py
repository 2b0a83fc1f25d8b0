"""Patch poison: a small square of one value on the input, and the attacker's label (BadNets)."""

import dataclasses
from typing import Any, Literal

from torch import Tensor

from aidefend._core.checks import check_inside, check_int, check_number, check_range, check_tensor, refuse
from aidefend.attacks.poisoning.poisoned import Poisoned, plant

Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right", "center"]
_CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right", "center")


@dataclasses.dataclass(frozen=True)
class Patch:
    """Dirty-label backdoor: chosen rows of other classes carry a patch and the label `target`.

    The patch covers `size` x `size` cells of the last two dimensions of a sample, in every channel; for samples of one
    dimension (rows of a table, signals) it covers `size` neighbouring features. The length of the data does not change.

    Guarantee: none, it is an attack. Exactly `round(rate * N)` rows are poisoned; rows that already have the label
        `target` are never chosen, as they would teach the model nothing; poisoned values stay inside `bounds`.
    Args:
        target: Label that the trigger shall cause, >= 0.
        rate: Share of the whole data set that is poisoned, in (0, 1).
        size: Cells along each side of the patch, >= 1.
        position: A corner, one cell away from the edge where there is room, or "center"; or (row, column) of the
            patch's first cell (for one dimension the column counts).
        value: What the patch's cells are set to, in the units of x; None: the upper bound.
        source_class: Poison rows of this class only; None: all classes but the target.
        bounds: (low, high) of x.
    Raises: ConfigurationError: arguments out of range, the patch does not fit, too few rows to poison.
        ThreatModelError: x outside the bounds.
    Cost: One read of the labels; a sample is stamped when it is read.
    Source: Gu, Dolan-Gavitt, Garg 2017 (single target).

    Example:
        >>> import torch
        >>> x, y = torch.zeros(20, 1, 8, 8), torch.arange(20) % 4
        >>> poisoned = Patch(target=0, rate=0.25).poison((x, y), seed=0)
        >>> int(poisoned.is_poison.sum()), float(poisoned.trigger(x[:1]).sum())
        (5, 9.0)
    """

    target: int = 0
    rate: float = 0.05
    size: int = 3
    position: Corner | tuple[int, int] = "bottom-right"
    value: float | None = None
    source_class: int | None = None
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_int(self.target, "target", 0)
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        check_int(self.size, "size")
        low, high = check_range(self.bounds)
        if self.value is not None:
            check_number(self.value, "value", low, high)
        if self.source_class is not None and check_int(self.source_class, "source_class", 0) == self.target:
            raise refuse("source_class other than target", "source_class", self.source_class, "Choose another class")
        _check_position(self.position)

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison in it, its ground truth, and the trigger for testing."""
        return plant(dataset, self.target, self.rate, self.source_class, self.stamp, seed, "patch")

    def stamp(self, x: Tensor) -> Tensor:
        """A copy of the batch (N, ...) with the patch on every row."""
        check_inside(check_tensor(x, "x", finite=False), *self.bounds)
        if x.ndim < 2:
            raise refuse("x of shape (N, ...) with at least one feature dimension", "x", x, "Add the batch dimension")
        marked, value = x.clone(), self.bounds[1] if self.value is None else self.value
        height = x.shape[-2] if x.ndim > 2 else None
        left = self._start(x.shape[-1], axis=1)
        if height is None:
            marked[..., left : left + self.size] = value
        else:
            top = self._start(height, axis=0)
            marked[..., top : top + self.size, left : left + self.size] = value
        return marked

    def _start(self, length: int, axis: int) -> int:
        """First cell of the patch along one axis (0 = rows, 1 = columns) of the given length."""
        if self.size > length:
            raise refuse(f"a patch that fits into {length} cells", "size", self.size, "Use a smaller patch")
        if not isinstance(self.position, str):
            start = self.position[axis]
            if start + self.size > length:
                raise refuse(f"a patch inside {length} cells", "position", self.position, "Move it away from the edge")
            return start
        if self.position == "center":
            return (length - self.size) // 2
        margin = min(1, length - self.size)
        at_start = self.position.split("-")[axis] in ("top", "left")
        return margin if at_start else length - self.size - margin


def _check_position(position: object) -> None:
    if isinstance(position, str) and position in _CORNERS:
        return
    cells = position if isinstance(position, tuple) and len(position) == 2 else ()
    if not cells or not all(isinstance(cell, int) and not isinstance(cell, bool) and cell >= 0 for cell in cells):
        raise refuse(
            f"position to be one of {_CORNERS} or (row, column) >= 0", "position", position, "Use one of these"
        )
