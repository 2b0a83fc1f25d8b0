"""Numbers as a report holds them: as many digits as do not depend on how a machine orders its sums."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_DIGITS = 6


def rounded(values: Tensor) -> Tensor:
    """Floating values to six significant digits; NaN, infinity and whole numbers as they are.

    Matrix products and eigenvectors differ in their last bits with the number of threads. What is equal but for that is
    equal here, but for a value that lies that near to the middle between two roundings.
    """
    if not values.is_floating_point():
        return values
    wide = values.double()
    scale = 10.0 ** (_DIGITS - 1 - wide.abs().clamp(min=1e-300).log10().floor())
    near = torch.where(wide.isfinite(), (wide * scale).round() / scale, wide)
    return near.to(values.dtype)


def rounded_facts(value: Any) -> Any:
    """The same for every float in mappings and lists."""
    if isinstance(value, Mapping):
        return {name: rounded_facts(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(rounded_facts(item) for item in value)
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
