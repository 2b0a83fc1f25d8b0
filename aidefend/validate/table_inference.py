"""The rules of one column from trusted values, for `TableSpec.infer`."""

import math
from typing import Any

import numpy as np

from aidefend._core.checks import refuse
from aidefend.validate.table_columns import Column, Kind, judge_column


def infer_column(name: str, values: Any, margin: float, most_categories: int) -> Column:
    """The tightest kind that all values are of, with room at the ends of its range.

    Raises: ConfigurationError: the values are of no kind together, or none of them is there.
    """
    for kind in _candidates(values):
        judged = judge_column(Column(kind, missing="accept"), name, values)
        if judged.broken:
            continue
        present = [value for value in judged.values.tolist() if value is not None and value == value]
        if not present:
            break
        missing = len(present) < len(judged.values)
        return _column(kind, present, missing, margin, most_categories)
    raise refuse(
        "columns of one kind: finite numbers, integers, booleans or texts", "table", name, "Convert or drop this column"
    )


def _candidates(values: Any) -> tuple[Kind, ...]:
    return (
        ("number",)
        if isinstance(values, np.ndarray) and values.dtype.kind == "f"
        else (
            "boolean",
            "integer",
            "number",
            "text",
        )
    )


def _column(kind: Kind, present: list[Any], missing: bool, margin: float, most_categories: int) -> Column:
    policy: Any = "accept" if missing else "reject"
    if kind == "boolean":
        return Column("boolean", missing=policy)
    if kind == "text":
        distinct = sorted(set(present))
        if len(distinct) <= most_categories and 2 * len(distinct) <= len(present):
            return Column("category", categories=tuple(distinct), missing=policy)
        longest = max(map(len, present))
        return Column("text", max_length=math.ceil(longest * (1 + margin)) or 1, missing=policy)
    low, high = min(present), max(present)
    room = margin * ((high - low) or max(1.0, abs(high)))
    if kind == "number":
        return Column("number", low - room, high + room, missing=policy)
    least = math.floor(low - room)
    return Column("integer", max(0, least) if low >= 0 else least, math.ceil(high + room), missing=policy)
