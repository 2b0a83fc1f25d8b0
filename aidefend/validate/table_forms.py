"""Any table as named columns of one length: dict of arrays, structured array, DataFrame, arrow table, list of rows."""

import sys
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from aidefend.validate.arrow_columns import MOST_BYTES, arrow_values
from aidefend.validate.no_table import NoTable
from aidefend.validate.spec_header import kind_fault, memory_fault

Columns = dict[str, Any]


def columns_of(
    data: Any, most_rows: int, most_columns: int, wanted: Collection[str] | None = None
) -> tuple[Columns, int]:
    """The columns by name and N; None for a column that is not wanted, which is never converted.

    Sizes are asked for before anything is converted.
    Raises: NoTable.
    """
    if type(data) in (list, tuple):
        return _of_rows(data, most_rows, most_columns, wanted)
    if type(data) is dict:
        columns = data
    elif type(data) in (np.ndarray, np.recarray) and data.dtype.names and data.ndim == 1:
        columns = {name: data[name] for name in data.dtype.names}
    elif _is(data, "pandas", "DataFrame"):
        return _of_pandas(data, most_rows, most_columns, wanted)
    elif _is(data, "pyarrow", "Table") or _is(data, "pyarrow", "RecordBatch"):
        return _of_arrow(data, most_rows, most_columns, wanted)
    else:
        raise NoTable("input: not a table")
    _check_names(list(columns), most_columns)
    rows = {_length(values) for values in columns.values()}
    if len(rows) != 1:
        raise NoTable("input: columns of different lengths")
    n = _capped(rows.pop(), most_rows)
    _check_bytes(sum(values.nbytes for values in columns.values() if type(values) is np.ndarray))
    return {name: _readable(values) if _is_wanted(name, wanted) else None for name, values in columns.items()}, n


def _is_wanted(name: str, wanted: Collection[str] | None) -> bool:
    return wanted is None or name in wanted


def _of_rows(data: Any, most_rows: int, most_columns: int, wanted: Collection[str] | None) -> tuple[Columns, int]:
    n = _capped(len(data), most_rows)
    if not n or any(type(row) is not dict for row in data):
        raise NoTable("input: not a table" if n else "input: no rows and no columns")
    names: dict[str, None] = {}
    for row in data:
        _check_names(list(row), most_columns)
        names |= dict.fromkeys(row)
        if len(names) > most_columns:
            raise NoTable("input: too many columns")
    return {name: [row.get(name) for row in data] if _is_wanted(name, wanted) else None for name in names}, n


def _of_pandas(data: Any, most_rows: int, most_columns: int, wanted: Collection[str] | None) -> tuple[Columns, int]:
    names = list(data.columns)
    _check_names(names, most_columns)
    if len(set(names)) != len(names):
        raise NoTable("input: a column occurs twice")
    n = _capped(len(data), most_rows)
    return {name: _readable(_array_of(data[name])) if _is_wanted(name, wanted) else None for name in names}, n


def _array_of(series: Any) -> Any:
    values = series.array
    if isinstance(series.dtype, np.dtype) and series.dtype.kind in "iufb":
        return series.to_numpy()
    return arrow_values(values.__arrow_array__()) if type(values).__name__.startswith("Arrow") else list(values)


def _of_arrow(data: Any, most_rows: int, most_columns: int, wanted: Collection[str] | None) -> tuple[Columns, int]:
    names = list(data.column_names)
    _check_names(names, most_columns)
    if len(set(names)) != len(names):
        raise NoTable("input: a column occurs twice")
    n = _capped(data.num_rows, most_rows)
    _check_bytes(data.nbytes)
    return {name: arrow_values(data.column(i)) if _is_wanted(name, wanted) else None for i, name in enumerate(names)}, n


def _is(data: object, library: str, name: str) -> bool:
    """Whether data is of exactly this class of a library, which is not imported for the question."""
    return type(data) is getattr(sys.modules.get(library), name, None)


def _check_names(names: Sequence[object], most: int) -> None:
    if len(names) > most:
        raise NoTable("input: too many columns")
    if any(type(name) is not str for name in names):
        raise NoTable("input: a name of a column is no text")


def _length(values: Any) -> int:
    if type(values) in (list, tuple):
        return len(values)
    if type(values) is np.ndarray and values.ndim == 1:
        return len(values)
    if type(values) is Tensor:
        fault = kind_fault(values) or memory_fault(values)
        if fault is not None:
            raise NoTable(fault)
        if values.ndim == 1 and values.device.type == "cpu":
            return len(values)
    raise NoTable("input: a column that is no list or one-dimensional array")


def _capped(n: int, most: int) -> int:
    if n > most:
        raise NoTable("input: too many rows")
    return n


def _check_bytes(count: int) -> None:
    if count > MOST_BYTES:
        raise NoTable("input: too many bytes")


def _readable(values: Any) -> Any:
    """A list or an array without memory of another kind."""
    if type(values) is Tensor:
        values = Tensor.numpy(values)
    if type(values) is np.ndarray and values.dtype.kind not in "iufbUO":
        raise NoTable("input: a column of a kind that no rule knows")
    return values
