"""Reads the form of trusted data: shape, dtype and range, for `InputSpec.infer`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aidefend._core.batches import iterate
from aidefend._core.checks import check_flag, check_number, refuse
from aidefend.validate.spec_values import Bound, row_extremes

Size = int | tuple[int, int]
Form = tuple[tuple[Size, ...], torch.dtype, Bound, Bound]


def infer_form(data: Any, margin: float, dtypes: Sequence[torch.dtype], by_column: bool) -> Form:
    """Shape of a row, dtype, lowest and highest allowed value, by the first dimension of a row if that is asked."""
    check_number(margin, "margin", 0.0)
    check_flag(by_column, "by_column")
    parts = [batch.x for batch in iterate(data) if len(batch.x)]
    _check_parts(parts, dtypes)
    shape, dtype = _merged_shape(parts), parts[0].dtype
    if dtype == torch.bool:
        return shape, dtype, None, None
    if not by_column:
        return shape, dtype, *widened(*_seen_range([part.flatten()[:, None] for part in parts])[0], dtype, margin)
    if not isinstance(shape[0], int):
        raise refuse("a first dimension of one size", "by_column", by_column, "Use by_column=False")
    columns = [widened(low, high, dtype, margin) for low, high in _seen_range(parts)]
    return shape, dtype, tuple(low for low, _ in columns), tuple(high for _, high in columns)


def widened(low: float, high: float, dtype: torch.dtype, margin: float) -> tuple[float, float]:
    """The range to allow where trusted data of this dtype lies in [low, high]."""
    if dtype == torch.uint8:
        return 0, 255
    if not dtype.is_floating_point:
        return min(0, low), high
    for bottom, top in ((0.0, 1.0), (-1.0, 1.0)):
        if bottom <= low and high <= top and high - low >= 0.99 * (top - bottom):
            return bottom, top
    room = margin * ((high - low) or max(1.0, abs(high)))
    return low - room, high + room


def _check_parts(parts: list[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    if not sum(part.numel() for part in parts):
        cure = "Infer the rules from data that is not empty"
        raise refuse("data with at least one row of at least one number", "x", "nothing", cure)
    if len({(part.dtype, part.ndim) for part in parts}) > 1:
        raise refuse("one dtype and one number of dimensions", "x", "several", "Convert the data to one form")
    if parts[0].dtype not in dtypes:
        raise refuse(f"a dtype among {dtypes}", "x", parts[0], "Convert the data")
    if parts[0].ndim < 2:
        raise refuse("rows with at least one dimension", "x", parts[0], "Pass shape (N, 1) for scalars")


def _seen_range(parts: list[Tensor]) -> list[tuple[float, float]]:
    """Smallest and largest number by column."""
    pairs = [row_extremes(part) for part in parts]
    low = torch.stack([low.amin(0) for low, _ in pairs]).amin(0).tolist()
    high = torch.stack([high.amax(0) for _, high in pairs]).amax(0).tolist()
    if not all(map(math.isfinite, [*low, *high])):
        found = f"values in [{min(low)}, {max(high)}]"
        raise refuse("finite data", "x", found, "Remove the rows with NaN or infinity")
    return list(zip(low, high, strict=True))


def _merged_shape(parts: list[Tensor]) -> tuple[Size, ...]:
    columns = zip(*(part.shape[1:] for part in parts), strict=True)
    sizes = [(min(column), max(column)) for column in columns]
    return tuple(low if low == high else (low, high) for low, high in sizes)
