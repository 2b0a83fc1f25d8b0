"""JSON Schema (draft 2020-12) of a batch of tensors that is sent as nested arrays."""

from collections.abc import Sequence
from typing import Any

import torch

from aidefend.validate.spec_values import Limits, knows_subnormals

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def tensor_schema(
    shape: Sequence[int | tuple[int, int]],
    dtype: torch.dtype,
    limits: Limits | None,
    max_rows: int,
    no_denormals: bool,
) -> dict[str, Any]:
    """Arrays of arrays of the sizes of a row, with the range that holds at the innermost numbers."""
    small = no_denormals and knows_subnormals(dtype)
    if limits is None or not isinstance(limits[0], list):
        row = _nested(shape, _number(dtype, limits, small))
    else:
        parts = [_nested(shape[1:], _number(dtype, pair, small)) for pair in zip(*limits, strict=True)]
        row = {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts), "maxItems": len(parts)}
    return {"$schema": _DIALECT, "type": "array", "maxItems": max_rows, "items": row}


def _nested(shape: Sequence[int | tuple[int, int]], leaf: dict[str, Any]) -> dict[str, Any]:
    for size in reversed(shape):
        least, most = size if isinstance(size, tuple) else (size, size)
        leaf = {"type": "array", "minItems": least, "maxItems": most, "items": leaf}
    return leaf


def _number(dtype: torch.dtype, limits: tuple[float, float] | None, no_denormals: bool) -> dict[str, Any]:
    if dtype == torch.bool:
        return {"type": "boolean"}
    kind = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    low, high = limits or (kind.min, kind.max)
    name = "number" if dtype.is_floating_point else "integer"
    number: dict[str, Any] = {"type": name, "minimum": max(low, kind.min), "maximum": min(high, kind.max)}
    if no_denormals:
        smallest = torch.finfo(dtype).tiny
        number["anyOf"] = [{"const": 0}, {"minimum": smallest}, {"maximum": -smallest}]
    return number
