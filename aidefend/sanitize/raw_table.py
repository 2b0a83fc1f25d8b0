"""Tables as they come, all columns in memory: DataFrames, arrow, Parquet, Hugging Face, structured arrays, dicts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aidefend._core.checks import refuse
from aidefend._core.frames import column_batches, column_widths, is_frame, is_hugging_face, is_stored
from aidefend._core.naming import paired
from aidefend._core.samples import INPUT_KEYS, LABEL_KEYS, Columns, Samples, widths

_AT_ONCE = 65_536


@dataclasses.dataclass(frozen=True, eq=False)
class RawTable:
    """Columns by name.

    Args:
        columns: Each an array or a list with one entry a row.
        inputs: Names of the input columns, in order.
        label: Name of the label column, or None.
        classes: All labels in order, where the user named them.
        declared: Columns whose type says that they are categories, whatever they hold.
        kind: Makes a table of this kind from a dict of columns, or None.
    """

    columns: Mapping[str, Any]
    inputs: tuple[str, ...]
    label: str | None
    classes: Sequence[Any] | None
    declared: frozenset[str]
    kind: Any = None

    def rebuilt(self, columns: dict[str, Any]) -> Any:
        """Columns as a table of the kind that the user passed, or as they are."""
        return columns if self.kind is None else self.kind(columns)


def raw_table(data: Any) -> RawTable | None:
    """The table, or None where the data is none, has one input column of its own (x, image), or wide columns."""
    data = paired(data)
    given = data if isinstance(data, Samples) else Samples(data)
    columns = _columns(given.data)
    if columns is None or given.decode is not None or not columns:
        return None
    if given.inputs is None and any(widths(columns).values()):
        return None
    inputs, label = given.columns_in(columns)
    if isinstance(given.inputs, str) or any(widths(Columns({name: columns[name] for name in inputs})).values()):
        return None
    frame = given.data if hasattr(given.data, "iloc") else None
    return RawTable(
        columns, tuple(inputs), label, given.classes, _declared(given.data), None if frame is None else type(frame)
    )


def named_rows(data: Any) -> list[tuple[dict[str, Any], Any]]:
    """The rows of a table as (dict from column to value, label).

    Raises: ConfigurationError: the data is no table.
    """
    table = raw_table(data)
    if table is None or table.label is None:
        raise refuse("the table that was judged", "dataset", type(data).__name__, "Pass the same table")
    rows = rows_of(table.columns, (*table.inputs, table.label))
    return [(dict(zip(table.inputs, row[:-1], strict=True)), row[-1]) for row in rows]


def rows_of(columns: Mapping[str, Any], names: Sequence[str]) -> list[tuple[Any, ...]]:
    """The rows of some columns, each as a tuple."""
    return list(zip(*(listed(columns[name]) for name in names), strict=True))


def listed(values: Any) -> list[Any]:
    """A column as a list; points in time as `datetime`, whichever library holds them."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "M":
        values = values.astype("datetime64[us]")
    return list(values.tolist() if hasattr(values, "tolist") else values)


def class_numbers(labels: Any) -> tuple[Any, tuple[str, ...] | None]:
    """Labels in words as numbers, in the order of their sorted names, and the names; other labels as they are."""
    words = isinstance(labels, list | tuple) or (isinstance(labels, np.ndarray) and labels.ndim == 1)
    given = listed(labels) if words else []
    if not given or not all(isinstance(label, str) for label in given):
        return labels, None
    names = tuple(sorted(set(given)))
    place = {name: number for number, name in enumerate(names)}
    return np.array([place[label] for label in given], dtype=np.int64), names


def missing(value: Any) -> bool:
    """Whether an entry says that there is none: None, NaN, NaT, NA."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, np.datetime64 | np.timedelta64):
        return bool(np.isnat(value))
    return isinstance(value, float | np.floating) and bool(np.isnan(value))


def _columns(data: Any) -> Columns | None:
    if isinstance(data, np.ndarray):
        if not data.dtype.names or data.ndim != 1:
            return None
        parts = {name: data[name] for name in data.dtype.names}
        texts = {
            name: np.char.decode(part, "utf-8", "replace") for name, part in parts.items() if part.dtype.kind == "S"
        }
        return Columns(parts | texts)
    if isinstance(data, Mapping):
        return _of_dict(data)
    if hasattr(data, "read_next_batch"):  # it can be read once only, and not by us
        return None
    if not (is_hugging_face(data) or is_frame(data) or is_stored(data)) or any((column_widths(data) or {}).values()):
        return None  # pictures and lists are not read to find out that they are no table
    if is_hugging_face(data):
        return Columns(data.with_format(None)[:]) if hasattr(data, "__len__") else None
    return _joined(list(column_batches(data, _AT_ONCE)))


def _of_dict(data: Mapping[Any, Any]) -> Columns | None:
    """A dict of columns of single entries, its label among them; other dicts are samples, or have an input column."""
    named = all(isinstance(name, str) for name in data) and not any(name in data for name in INPUT_KEYS)
    listed = named and all(isinstance(values, list | tuple | np.ndarray) for values in data.values())
    same = listed and len({len(values) for values in data.values()}) == 1 and any(name in data for name in LABEL_KEYS)
    return Columns(data) if same and all(len(values) for values in data.values()) else None


def _joined(parts: Sequence[Columns]) -> Columns | None:
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    return Columns({name: [value for part in parts for value in listed(part[name])] for name in parts[0]})


def _declared(data: Any) -> frozenset[str]:
    """Columns of pandas' category type, and of arrow's dictionary type."""
    if hasattr(data, "iloc"):
        return frozenset(str(name) for name, kind in data.dtypes.items() if str(kind) == "category")
    schema = getattr(data, "schema", None)
    if schema is None or not hasattr(data, "column_names"):
        return frozenset()
    return frozenset(field.name for field in schema if str(field.type).startswith("dictionary"))
