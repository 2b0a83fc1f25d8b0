"""Which columns are inputs and which is the label: of tables, and of a table or array with its labels beside it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from aidefend._core.checks import check_same_rows, refuse
from aidefend._core.frames import column_batches, column_widths, is_frame, is_hugging_face, names_of, raw_column
from aidefend._core.samples import (
    INPUT_KEYS,
    LABEL_KEYS,
    Columns,
    Samples,
    class_indices,
    table_inputs,
    tensor_of,
    widths,
)

_ARRAYS = (Tensor, np.ndarray)
_PLAIN = (Tensor, np.ndarray, list, tuple)


def paired(data: Any) -> Any:
    """Inputs and labels that stand apart, as one: (DataFrame, labels) as a table with a label column, (array, labels)
    as two arrays; `Samples` around them keep what they say, and everything else is as it was.

    Labels are a pandas Series or anything else with one entry a row. They belong to the rows by position; where both
    sides have an index, it has to be the same. It is no part of the data. The label column is called as the Series is,
    else y, label, labels, target or targets, whichever the table has not; all columns of the table are inputs.

    Raises: ConfigurationError: other lengths, another index, labels that are a column of the table, too.
    """
    given = data if isinstance(data, Samples) else Samples(data)
    pair = given.data
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not _has_rows(pair[0]) or not _is_labels(*pair):
        return data
    x, y = pair
    if isinstance(x, _PLAIN) and isinstance(y, _PLAIN if isinstance(x, list | tuple) else _ARRAYS):
        return data
    check_same_rows(("x", "y"), len(x), len(y))
    _check_index(x, y)
    labels = _flat(y)
    if is_frame(x):
        return _as_table(given, x, labels, _name_of(y))
    whole = (_as_array(raw_column(x)), _as_array(labels))
    return Samples(whole, given.inputs, given.label, given.decode, given.classes) if data is given else whole


def beside(batch: Any) -> Any:
    """A batch (DataFrame, labels) as (rows of numbers, labels); every other batch as it was."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not is_frame(batch[0]):
        return batch
    named = paired(batch)
    return named.pick(next(column_batches(named.data, max(len(batch[0]), 1))))


def with_names(data: Any) -> Samples:
    """The data with the names of its columns, as far as a table needs them said: see `Samples` for the rule."""
    data = paired(data)
    given = data if isinstance(data, Samples) else Samples(data)
    if isinstance(given.data, np.ndarray) and given.data.dtype.names:
        columns = Columns({name: given.data[name] for name in given.data.dtype.names})
        given = Samples(columns, given.inputs, given.label, given.decode, given.classes)
    names = _widths_of_dict(given.data) if isinstance(given.data, Mapping) else column_widths(given.data)
    if given.inputs is not None or names is None:
        return given
    label = given.label if given.label is not None else next((name for name in LABEL_KEYS if name in names), None)
    return Samples(given.data, table_inputs(names, label), label, given.decode, given.classes)


def columns_of(data: Any) -> dict[str, Any] | None:
    """What has to be told to whoever reads batches of this data elsewhere; None where the data names no column."""
    found = with_names(data)
    names = {"inputs": found.inputs, "label": found.label, "classes": found.classes}
    return None if all(value is None for value in names.values()) else names


def _widths_of_dict(data: Mapping[Any, Any]) -> dict[str, bool] | None:
    """Of a dict of columns of single numbers, where none is called like an input; None for every other dict."""
    named = all(isinstance(name, str) for name in data) and not any(name in data for name in INPUT_KEYS)
    if not named or not all(isinstance(values, _PLAIN) or _is_column(values) for values in data.values()):
        return None
    columns = Columns({name: raw_column(values) for name, values in data.items()})
    if any(np.ndim(values) == 0 for values in columns.values() if isinstance(values, _ARRAYS)):
        return None
    found = widths(columns)
    return None if any(found.values()) else found


def _has_rows(values: Any) -> bool:
    texts = isinstance(values, list | tuple) and len(values) > 0 and isinstance(values[0], str)
    return texts or isinstance(values, _ARRAYS) or is_frame(values) or _is_column(values)


def _is_column(values: Any) -> bool:
    """A pandas Series, an arrow column, and what resembles them."""
    if isinstance(values, type | str | bytes | Mapping) or is_hugging_face(values) or hasattr(values, "columns"):
        return False
    return hasattr(values, "__len__") and (hasattr(values, "to_pylist") or hasattr(values, "to_numpy"))


def _is_labels(x: Any, y: Any) -> bool:
    """Whether this can be labels beside these rows, and not a second table or sample."""
    if is_frame(y):
        return len(names_of(y)) == 1 and not (is_frame(x) and list(map(str, names_of(x))) == [str(names_of(y)[0])])
    if isinstance(y, list | tuple):
        return len(y) > 0 and all(np.ndim(label) == 0 and not isinstance(label, Mapping) for label in y[:1])
    return _is_column(y) or (isinstance(y, _ARRAYS) and y.ndim > 0)


def _name_of(y: Any) -> str | None:
    name = names_of(y)[0] if is_frame(y) else getattr(y, "name", None)
    return None if name is None else str(name)


def _check_index(x: Any, y: Any) -> None:
    given: list[Any] = [getattr(values, "index", None) for values in (x, y)]
    indices = [index for index in given if hasattr(index, "equals")]
    if len(indices) == 2 and not indices[0].equals(indices[1]):
        row = next((row for row in range(len(x)) if indices[0][row] != indices[1][row]), 0)
        found = f"row {row} is {indices[0][row]} in x and {indices[1][row]} in y"
        cure = "Pass (x, y.loc[x.index]) to go by index, or (x, y.to_numpy()) to go by position"
        raise refuse("x and y with one index", "y", found, cure)


def _flat(y: Any) -> Any:
    """Labels (N,) as array or list."""
    labels = raw_column(y[names_of(y)[0]] if is_frame(y) else y)
    if isinstance(labels, _ARRAYS) and labels.ndim > 1:
        numbers: np.ndarray[Any, Any] = class_indices(tensor_of(labels), len(labels)).numpy()
        return numbers
    return labels


def _as_array(values: Any) -> Any:
    return values if isinstance(values, _ARRAYS) else np.asarray(values)


def _as_table(given: Samples, frame: Any, labels: Any, name: str | None) -> Samples:
    columns = [str(column) for column in names_of(frame)]
    if name in columns and _same(raw_column(frame[names_of(frame)[columns.index(name)]]), labels):
        cure = f"Take it out of x: (x.drop(columns=[{name!r}]), y)"
        raise refuse("labels that are no column of x", "y", f"the column {name!r} of x", cure)
    if given.label in columns:
        raise refuse("label to name no column of x", "label", given.label, "Choose another name for the labels in y")
    names = (given.label, name, *LABEL_KEYS)
    label = next((name for name in names if name and name not in columns), "the labels")
    inputs = given.inputs if given.inputs is not None else table_inputs(column_widths(frame) or {}, None)
    return Samples(_with_column(frame, label, labels), inputs, label, given.decode, given.classes)


def _same(column: Any, labels: Any) -> bool:
    return bool(np.array_equal(np.asarray(column), np.asarray(labels)))


def _with_column(frame: Any, name: str, labels: Any) -> Any:
    """The table with one more column, of its own kind where that is known; the given one is not changed."""
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    if hasattr(frame, "assign"):  # pandas
        return frame.assign(**{name: values})
    if hasattr(frame, "append_column"):  # arrow
        return frame.append_column(name, [values])
    return Columns({str(column): raw_column(frame[column]) for column in names_of(frame)} | {name: values})
