"""Forms in which one layer's per-example gradients are held: their lengths, and their weighted sum over the rows."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

KEPT_NUMBERS = 1 << 24  # per-example gradients up to this size are kept between the two uses, larger ones made twice
_BLOCK_NUMBERS = 1 << 22


class GradientPart(Protocol):
    """Per-example gradients of some parameters of one layer."""

    def norm_squared(self) -> Tensor:
        """Squared length of each row's gradient, (n,); never below the true one by more than rounding."""
        ...

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """Sum over the rows of weights[i] * gradient[i], by parameter name."""
        ...


def wide(tensor: Tensor) -> Tensor:
    """At least 32 bits: lengths and sums of 16-bit numbers would lose the bound."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class Rows:
    """Gradients that are small enough to hold: (n, *shape)."""

    def __init__(self, name: str, gradients: Tensor) -> None:
        self._name, self._gradients = name, gradients

    def norm_squared(self) -> Tensor:
        """See `GradientPart`."""
        return self._gradients.flatten(1).square().sum(dim=1)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """See `GradientPart`."""
        return {self._name: torch.einsum("n,n...->...", weights, self._gradients)}


class Outer:
    """A matrix weight that each row used once: its gradient is an outer product, whose length is a product."""

    def __init__(self, name: str, inputs: Tensor, outputs: Tensor) -> None:
        self._name, self._inputs, self._outputs = name, inputs, outputs

    def norm_squared(self) -> Tensor:
        """See `GradientPart`."""
        return self._inputs.square().sum(dim=1) * self._outputs.square().sum(dim=1)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """See `GradientPart`."""
        return {self._name: (self._outputs * weights[:, None]).T @ self._inputs}


class Gram:
    """A matrix weight that each row used at several positions, by inner products of positions: (n, P, in), (n, P, out).

    Positions may cancel. Inner products are taken in float64, and the rounding of the final float32 sum is added to the
    length, so that not even a row built to cancel gets past its bound.
    """

    def __init__(self, name: str, inputs: Tensor, outputs: Tensor) -> None:
        self._name, self._inputs, self._outputs = name, inputs, outputs

    def norm_squared(self) -> Tensor:
        """See `GradientPart`."""
        a, g = self._inputs.double(), self._outputs.double()
        squared = (a @ a.mT * (g @ g.mT)).sum(dim=(1, 2)).clamp(min=0)
        size = (a.norm(dim=2) * g.norm(dim=2)).sum(dim=1)
        return guarded(squared, size, self._inputs.dtype)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """See `GradientPart`."""
        weighted = self._outputs * weights[:, None, None]
        return {self._name: weighted.flatten(0, 1).T @ self._inputs.flatten(0, 1)}


class Lookup:
    """A table of which each row used some entries: ids (n, P), gradients (n, P, d). Equal ids of one row add up."""

    def __init__(self, name: str, ids: Tensor, outputs: Tensor, entries: int) -> None:
        self._name, self._ids, self._outputs, self._entries = name, ids, outputs, entries

    def norm_squared(self) -> Tensor:
        """See `GradientPart`."""
        g = self._outputs.double()
        same = self._ids[:, :, None] == self._ids[:, None, :]
        squared = (g @ g.mT * same).sum(dim=(1, 2)).clamp(min=0)
        return guarded(squared, g.norm(dim=2).sum(dim=1), self._outputs.dtype)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """See `GradientPart`."""
        weighted = (self._outputs * weights[:, None, None]).flatten(0, 1)
        total = weighted.new_zeros(self._entries, weighted.shape[1])
        return {self._name: total.index_add_(0, self._ids.flatten(), weighted)}


class Blocks:
    """Gradients that are made by `make(rows)` as {name: (k, *shape)}, a block of rows at a time.

    `numbers` is what one row needs in memory. The same numbers serve for the lengths and for the sum.
    """

    def __init__(self, make: Callable[[slice], dict[str, Tensor]], rows: int, numbers: int) -> None:
        self._make, self._rows = make, rows
        size = max(1, _BLOCK_NUMBERS // max(1, numbers))
        self._slices = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
        self._keep = rows * numbers <= KEPT_NUMBERS or len(self._slices) == 1
        self._kept: list[dict[str, Tensor]] = []

    def norm_squared(self) -> Tensor:
        """See `GradientPart`."""
        lengths = []
        for rows in self._slices:
            block = self._make(rows)
            lengths.append(torch.stack([g.flatten(1).square().sum(dim=1) for g in block.values()]).sum(dim=0))
            if self._keep:
                self._kept.append(block)
        return torch.cat(lengths)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """See `GradientPart`."""
        total: dict[str, Tensor] = {}
        for index, rows in enumerate(self._slices):
            block = self._kept[index] if self._kept else self._make(rows)
            for name, gradients in block.items():
                part = (weights[rows] @ gradients.flatten(1)).reshape(gradients.shape[1:])
                total[name] = total[name] + part if name in total else part
        return total


def guarded(squared: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """The squared length, enlarged by what rounding in `dtype` can add to a sum of terms of total length `size`."""
    slack = 8 * torch.finfo(dtype).eps
    return (squared.sqrt() + slack * size).square().to(dtype)
