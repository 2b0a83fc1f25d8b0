"""One column of a table: the rules of its values, and their judgement."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from aidefend._core.checks import check_choice, check_int, check_number, refuse
from aidefend.validate.spec_result import remark

Kind = Literal["number", "integer", "boolean", "category", "text"]
Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
_KINDS = ("number", "integer", "boolean", "category", "text")
_PLAIN = (bool, int, float, str, type(None))
_EXACT = 2**53  # floats count one by one up to here
_MOST_INTEGER = 2**63 - 1
_MOST_NUMBER = int(sys.float_info.max)
_NAME = 40


@dataclasses.dataclass(frozen=True)
class Column:
    """The rules of one column of a `TableSpec`.

    Args:
        kind: "number" (finite; becomes float64), "integer" (whole, also where a float holds it; becomes int64),
            "boolean", "category" (one of a closed list) or "text". A bool is no number, and "5" is no number.
        low, high: Closed range of numbers and integers; None = no limit.
        categories: For "category": the allowed values, all texts or all integers.
        max_length: For "text": the largest number of characters.
        missing: Policy for None, NaN and null: "accept" (NaN in numbers; None elsewhere), "reject" or "quarantine".
            An integer column that accepts missing values becomes float64.
        out_of_range: Policy for values outside the range: "reject", "clip" or "quarantine".
        unknown: Policy for values that are no category: "reject" or "quarantine".
        otherwise: The same for values that break any other rule: of another kind, infinite, too long.
    Raises: ConfigurationError: a rule contradicts itself or belongs to another kind.
    Example:
        >>> Column("integer", low=0, high=120).high
        120
    """

    kind: Kind
    low: float | None = None
    high: float | None = None
    categories: tuple[str | int, ...] | None = None
    max_length: int | None = None
    missing: Literal["accept", "reject", "quarantine"] = "reject"
    out_of_range: Literal["reject", "clip", "quarantine"] = "reject"
    unknown: Literal["reject", "quarantine"] = "reject"
    otherwise: Literal["reject", "quarantine"] = "reject"

    def __post_init__(self) -> None:
        check_choice(self.kind, _KINDS, "kind")
        check_choice(self.missing, ("accept", "reject", "quarantine"), "missing")
        check_choice(self.out_of_range, ("reject", "clip", "quarantine"), "out_of_range")
        check_choice(self.unknown, ("reject", "quarantine"), "unknown")
        check_choice(self.otherwise, ("reject", "quarantine"), "otherwise")
        for name in ("low", "high"):
            self._belongs(name, "number", "integer")
            if getattr(self, name) is not None:
                check_number(getattr(self, name), name)
        if self.low is not None and self.high is not None and self.low > self.high:
            raise refuse("low <= high", "low", self.low, "Swap the two")
        self._belongs("max_length", "text")
        if self.max_length is not None:
            check_int(self.max_length, "max_length")
        self._belongs("categories", "category")
        if self.kind == "category":
            object.__setattr__(self, "categories", _checked_categories(self.categories))

    def _belongs(self, name: str, *kinds: str) -> None:
        value = getattr(self, name)
        if value is not None and self.kind not in kinds:
            raise refuse(f"{name} in columns of kind {' or '.join(kinds)} only", name, value, f"Leave out {name}")


def _checked_categories(values: Any) -> tuple[str | int, ...]:
    if not isinstance(values, tuple | list) or not values or {*map(type, values)} not in ({str}, {int}):
        raise refuse("categories that are all texts or all integers", "categories", values, "Pass a list of them")
    if len(set(values)) != len(values):
        raise refuse("categories that differ", "categories", values, "Name each once")
    return tuple(values)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A column after judgement: the values (N,) in the form that `Column` states, and which rows break which rule."""

    values: Array
    broken: dict[str, Mask]


def judge_column(column: Column, name: str, values: Sequence[Any] | Array) -> Judged:
    """Values of a column (N,), a list of Python objects or a one-dimensional array, against its rules."""
    n, wide = len(values), column.kind in ("number", "integer")
    if wide and isinstance(values, np.ndarray) and values.dtype.kind in "iuf" and not _too_wide(values):
        numbers, missing, wrong = _of_array(values, column.kind)
    else:
        objects = values.tolist() if isinstance(values, np.ndarray) else list(values)
        parsed = [_parse(column, value) for value in objects]
        missing = np.fromiter((state is None for _, state in parsed), bool, n)
        wrong = np.fromiter((state is False for _, state in parsed), bool, n)
        if not wide:
            return _finished_objects(column, name, [value for value, _ in parsed], missing, wrong)
        numbers = np.array([value for value, _ in parsed], np.int64 if column.kind == "integer" else np.float64)
    return _finished_numbers(column, name, numbers, missing, wrong)


def _too_wide(values: Array) -> bool:
    """Whether int64 or float64 cannot hold every value."""
    return values.dtype.itemsize > 8 or values.dtype == np.uint64


def _of_array(values: Array, kind: str) -> tuple[Array, Mask, Mask]:
    """Numbers (N,), and which rows are missing or of the wrong kind."""
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    if kind == "number":
        return values.astype(np.float64), missing, np.zeros(len(values), bool)
    if values.dtype.kind != "f":
        return values.astype(np.int64), missing, np.zeros(len(values), bool)
    numbers = values.astype(np.float64)
    infinite = np.isinf(numbers)
    wrong = ~missing & ~infinite & ((numbers != np.floor(numbers)) | (np.abs(numbers) > _EXACT))
    whole = np.where(missing | wrong | infinite, 0.0, numbers).astype(np.int64)
    return whole, missing, wrong | infinite


def _parse(column: Column, value: Any) -> tuple[Any, bool | None]:
    """(value, True) if it is of the kind, (a stand-in, None) if it is missing, (a stand-in, False) if it is wrong."""
    stand_in = 0 if column.kind in ("number", "integer") else None
    value = value.item() if issubclass(type(value), np.generic) else value
    if value is None or (type(value) is float and math.isnan(value)):
        return stand_in, None
    if type(value) not in _PLAIN:  # a subclass may run its own code
        return stand_in, None if _is_null(value) else False
    if column.kind == "boolean":
        return (value, True) if type(value) is bool else (None, False)
    if column.kind == "text":
        return (value, True) if type(value) is str else (None, False)
    return _category(value, column) if column.kind == "category" else _number(value, column.kind)


def _category(value: Any, column: Column) -> tuple[Any, bool]:
    kind = type((column.categories or ("",))[0])
    if kind is int and type(value) is float:  # what a library makes of integers among which some are missing
        return _whole(value)
    return (value, True) if type(value) is kind else (None, False)


def _is_null(value: Any) -> bool:
    """pandas.NA and NaT, known by their identity; pandas is not imported for the question."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and (value is pandas.NA or value is pandas.NaT)


def _number(value: Any, kind: str) -> tuple[Any, bool]:
    if type(value) is int and kind == "integer":
        return (value, True) if abs(value) <= _MOST_INTEGER else (0, False)
    if type(value) is int:
        return (float(value), True) if abs(value) <= _MOST_NUMBER else (0, False)
    if type(value) is not float:
        return 0, False
    return (value, True) if kind == "number" else _whole(value)


def _whole(value: float) -> tuple[int, bool]:
    exact = math.isfinite(value) and value.is_integer() and abs(value) <= _EXACT
    return (int(value), True) if exact else (0, False)


def _limits(column: Column) -> tuple[float, float]:
    """The range as numbers of the column's own kind: integers are compared as such, so that none is rounded."""
    if column.kind == "number":
        return -math.inf if column.low is None else column.low, math.inf if column.high is None else column.high
    low = -_MOST_INTEGER if column.low is None else math.ceil(column.low)
    high = _MOST_INTEGER if column.high is None else math.floor(column.high)
    return max(low, -_MOST_INTEGER), min(high, _MOST_INTEGER)


def _finished_numbers(column: Column, name: str, values: Array, missing: Mask, wrong: Mask) -> Judged:
    low, high = _limits(column)
    infinite = np.isinf(values) if column.kind == "number" else np.zeros(len(values), bool)
    if column.kind == "integer" and column.missing == "accept":  # becomes float64, which must hold it
        wrong = wrong | (values > _EXACT) | (values < -_EXACT)
    outside = ((values < low) | (values > high)) & ~missing & ~wrong & ~infinite
    if column.out_of_range == "clip" and outside.any():
        values, outside = np.clip(values, low, high), np.zeros_like(outside)
    if column.missing == "accept":
        values = values.astype(np.float64)
        values[missing] = np.nan
    broken = {
        _named(column.otherwise, name, f"not of kind {column.kind}"): wrong,
        _named(column.otherwise, name, "not finite"): infinite,
        _named(column.out_of_range, name, "out of range"): outside,
    }
    return _finished(column, name, values, missing, broken)


def _finished_objects(column: Column, name: str, values: list[Any], missing: Mask, wrong: Mask) -> Judged:
    broken = {_named(column.otherwise, name, f"not of kind {column.kind}"): wrong}
    good = [value is not None for value in values]
    if column.kind == "category":
        known = frozenset(column.categories or ())
        strange = [ok and value not in known for ok, value in zip(good, values, strict=True)]
        broken[_named(column.unknown, name, "unknown category")] = np.array(strange, bool)
    if column.max_length is not None:
        most = column.max_length
        long = [ok and len(value) > most for ok, value in zip(good, values, strict=True)]
        broken[_named(column.otherwise, name, "too long")] = np.array(long, bool)
    array = np.empty(len(values), object)
    array[:] = values
    return _finished(column, name, array, missing, broken)


def _finished(column: Column, name: str, values: Array, missing: Mask, broken: dict[str, Mask]) -> Judged:
    if column.missing != "accept":
        broken[_named(column.missing, name, "missing")] = missing
    return Judged(values, {rule: mask for rule, mask in broken.items() if mask.any()})


def _named(policy: str, name: str, rule: str) -> str:
    return remark(policy, f"column {name[:_NAME]!r}: {rule}")
