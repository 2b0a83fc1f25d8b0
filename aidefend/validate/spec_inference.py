"""Reads the form of trusted data: shape, dtype and range, for `InputSpec.infer`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aidefend._core.batches import iterate
from aidefend._core.checks import check_number, refuse

Size = int | tuple[int, int]
Form = tuple[tuple[Size, ...], torch.dtype, float | None, float | None]


def infer_form(data: Any, margin: float, dtypes: Sequence[torch.dtype]) -> Form:
    """Shape of a row, dtype, lowest and highest allowed value."""
    check_number(margin, "margin", 0.0)
    parts = [batch.x for batch in iterate(data) if len(batch.x)]
    low, high = _seen_range(parts, dtypes)
    return _merged_shape(parts), parts[0].dtype, *_widened(low, high, parts[0].dtype, margin)


def _seen_range(parts: list[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[float, float]:
    if not sum(part.numel() for part in parts):
        raise refuse(
            "data with at least one row of at least one number",
            "x",
            "nothing",
            "Infer the rules from data that is not empty",
        )
    if len({(part.dtype, part.ndim) for part in parts}) > 1:
        raise refuse("one dtype and one number of dimensions", "x", "several", "Convert the data to one form")
    if parts[0].dtype not in dtypes:
        raise refuse(f"a dtype among {dtypes}", "x", parts[0], "Convert the data")
    low, high = min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)
    if not (math.isfinite(low) and math.isfinite(high)) or any(bool(part.isnan().any()) for part in parts):
        raise refuse("finite data", "x", f"values in [{low}, {high}]", "Remove the rows with NaN or infinity")
    return low, high


def _widened(low: float, high: float, dtype: torch.dtype, margin: float) -> tuple[float | None, float | None]:
    if dtype == torch.bool:
        return None, None
    if dtype == torch.uint8:
        return 0.0, 255.0
    if not dtype.is_floating_point:
        return min(0.0, low), high
    for bottom, top in ((0.0, 1.0), (-1.0, 1.0)):
        if bottom <= low and high <= top and high - low >= 0.99 * (top - bottom):
            return bottom, top
    room = margin * ((high - low) or max(1.0, abs(high)))
    return low - room, high + room


def _merged_shape(parts: list[Tensor]) -> tuple[Size, ...]:
    columns = zip(*(part.shape[1:] for part in parts), strict=True)
    sizes = [(min(column), max(column)) for column in columns]
    return tuple(low if low == high else (low, high) for low, high in sizes)
