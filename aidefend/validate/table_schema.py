"""JSON Schema (draft 2020-12) of a table that is sent as a list of rows."""

from collections.abc import Mapping
from typing import Any

from aidefend.validate.table_columns import Column

_TYPES = {"number": "number", "integer": "integer", "boolean": "boolean", "text": "string"}
_EXACT = 2**53  # as in a column that becomes float64
_MOST = {"number": 1.7976931348623157e308, "integer": 2**63 - 1}


def table_schema(columns: Mapping[str, Column], extra: str, max_rows: int) -> dict[str, Any]:
    """A list of objects with one property for each column."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "array",
        "minItems": 1,
        "maxItems": max_rows,
        "items": {
            "type": "object",
            "properties": {name: _property(column) for name, column in columns.items()},
            "required": [name for name, column in columns.items() if column.missing != "accept"],
            "additionalProperties": extra == "drop",
        },
    }


def _property(column: Column) -> dict[str, Any]:
    rule = _rule(column)
    return {"anyOf": [rule, {"type": "null"}]} if column.missing == "accept" else rule


def _rule(column: Column) -> dict[str, Any]:
    if column.kind == "category":
        kind = "string" if isinstance((column.categories or ("",))[0], str) else "integer"
        return {"type": kind, "enum": list(column.categories or ())}
    rule: dict[str, Any] = {"type": _TYPES[column.kind]}
    if column.max_length is not None:
        rule["maxLength"] = column.max_length
    if column.kind in _MOST:
        clipped = column.out_of_range == "clip"
        exact = column.kind == "integer" and column.missing == "accept"  # becomes float64, which must hold it
        most = _EXACT if exact else _MOST[column.kind]
        rule["minimum"] = -most if column.low is None or clipped else max(column.low, -most)
        rule["maximum"] = most if column.high is None or clipped else min(column.high, most)
    return rule
