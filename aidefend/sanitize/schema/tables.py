"""Any data as a stream of tables: named columns of equal length, and the rows that could not be read."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from aidefend._core.batches import Batch, iterate
from aidefend._core.checks import check_same_rows, refuse
from aidefend._core.errors import AidefendError
from aidefend._core.frames import column_batches, is_frame, is_stored, raw_column
from aidefend._core.naming import paired, with_names
from aidefend._core.parts import is_map_style
from aidefend._core.samples import Samples

_ROWS = 8192  # of a table that is looked at together: bounds the memory of one step
_SAMPLES = 1024
_ARRAYS = (Tensor, np.ndarray)
_FORMS = "a table (dict of columns, DataFrame, arrow, Parquet), tensors, (x, y), a Dataset or an iterable of these"


class Table(NamedTuple):
    """Part of the data: raw columns, the row number of each of their entries, and why other rows were not read."""

    columns: dict[str, Any]
    places: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    unreadable: dict[int, str]


def tables(data: Any) -> Iterator[Table]:
    """Walk through data in any of the forms that the package takes.

    A row of a data set that raises when it is read is handed on by its number; an iterator that raises cannot go on
    and ends in an error.
    """
    start = 0
    with _naming_the_data():
        for columns, rows, broken in _parts(paired(data)):
            yield from _cut(columns, rows, broken, start)
            start += rows + len(broken)


def _cut(columns: dict[str, Any], rows: int, broken: dict[int, str], start: int) -> Iterator[Table]:
    places = np.delete(np.arange(rows + len(broken)), sorted(broken)).astype(np.int64) + start
    failed = {start + place: text for place, text in broken.items()}
    for first in range(0, max(rows, 1), _ROWS):
        part = slice(first, first + _ROWS)
        cut = {name: values[part] for name, values in columns.items()}
        yield Table(cut, places[part], failed if first == 0 else {})


@contextmanager
def _naming_the_data() -> Iterator[None]:
    try:
        yield
    except (AidefendError, MemoryError):
        raise
    except Exception as error:
        found, cure = f"{type(error).__name__}: {error}", "Read the batches one by one to see the cause"
        raise refuse("data whose batches can be read", "batches", found, cure) from error


_Part = tuple[dict[str, Any], int, dict[int, str]]


def _parts(data: Any) -> Iterator[_Part]:
    columns = _as_columns(data)
    if isinstance(data, Samples):
        yield from _of_named(data)
    elif columns is not None:
        yield _checked(columns)
    elif is_stored(data):
        yield from (_checked(part) for part in column_batches(data, _ROWS))
    elif isinstance(data, DataLoader):
        yield from (_batch(batch) for batch in data)
    elif isinstance(data, list | tuple | IterableDataset):
        yield from _of_elements(iter(data), samples_by_default=True)
    elif is_map_style(data):
        yield from _of_samples(_read(data, row) for row in range(len(data)))
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping | Tensor | np.ndarray):
        yield from _of_elements(iter(data), samples_by_default=False)
    else:
        raise refuse(_FORMS, "batches", data, "Convert the data to one of these forms")


def _of_elements(elements: Iterator[Any], *, samples_by_default: bool) -> Iterator[_Part]:
    """A list of tensors is one of samples, an iterator of tensors one of batches; all else shows which it is."""
    first = next(elements, None)
    if first is None:
        return
    whole = itertools.chain([first], elements)
    is_batch = _is_batch(first) if isinstance(first, Mapping | tuple | list) else not samples_by_default
    if is_batch or is_frame(first):
        yield from (_batch(batch) for batch in whole)
    else:
        yield from _of_samples((sample, None) for sample in whole)


def _of_named(data: Samples) -> Iterator[_Part]:
    """The columns that were named, as they stand in the data; of decoded samples inputs and labels."""
    if data.decode is not None:
        for batch in iterate(data, _SAMPLES, bad="mark"):
            broken = dict(batch.broken)
            good = [row for row in range(len(batch.ids)) if row not in broken]
            yield _pair(batch.x[good], None if batch.y is None else batch.y[good]), len(good), broken
        return
    names = with_names(data)
    wanted = [names.inputs] if isinstance(names.inputs, str) else list(names.inputs or ())
    for columns, rows, broken in _parts(data.data):
        kept = [*wanted, *([] if names.label is None else [names.label])] if wanted else list(columns)
        absent = [name for name in kept if name not in columns]
        if absent:
            raise refuse(f"the columns {absent}", "batches", sorted(columns), "Name columns that there are")
        yield {name: columns[name] for name in kept}, rows, broken


def _batch(batch: Any) -> _Part:
    batch = paired(batch)
    if isinstance(batch, Samples):
        return next(_of_named(batch))
    columns = _as_columns(batch)
    if columns is None and isinstance(batch, tuple | list) and len(batch) == 1:
        columns = _as_columns(batch[0])
    if columns is None:
        raise refuse(f"batches that are {_FORMS}", "batches", batch, "Convert each batch to one of these forms")
    return _checked(columns)


def _checked(columns: dict[str, Any]) -> _Part:
    if not columns:
        raise refuse("a table with at least one column", "batches", columns, "Pass the columns by name")
    rows = check_same_rows(tuple(columns), *(len(values) for values in columns.values()))
    return columns, rows, {}


def _as_columns(data: Any) -> dict[str, Any] | None:
    """The raw columns of one table, or None if this is none."""
    if isinstance(data, Batch):
        return _pair(data.x, data.y)
    if isinstance(data, Mapping):
        return _columns_of_mapping(data) if _is_batch(data) else None
    if isinstance(data, np.ndarray) and data.dtype.names:
        return {name: data[name] for name in data.dtype.names}
    if isinstance(data, _ARRAYS):
        return {"x": _rows(data)}
    if isinstance(data, tuple | list) and len(data) == 2 and _is_array(data[0]) and _is_labels(data[1], data[0]):
        return _pair(data[0], data[1])
    return dict(next(column_batches(data, max(len(data), 1)))) if is_frame(data) else None


def _pair(x: Any, y: Any) -> dict[str, Any]:
    if y is None:
        return {"x": _rows(x)}
    labels = np.asarray(y.detach().cpu()) if isinstance(y, Tensor) else y
    if isinstance(labels, np.ndarray) and labels.ndim == 2 and len(labels):
        one_hot = bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(axis=1) == 1).all())
        labels = labels[:, 0] if labels.shape[1] == 1 else labels.argmax(axis=1) if one_hot else labels
    return {"x": _rows(x), "y": labels}


def _rows(values: Any) -> Any:
    if values.ndim < 1 or (isinstance(values, Tensor) and (values.layout != torch.strided or values.is_meta)):
        raise refuse("dense data of shape (N, ...)", "batches", values, "Add the batch dimension, use .to_dense()")
    return values


def _is_array(values: Any) -> bool:
    return isinstance(values, _ARRAYS) and values.ndim > 0


def _is_labels(y: Any, x: Any) -> bool:
    return _is_array(y) or y is None or (isinstance(y, list | tuple) and len(y) == len(x))


def _is_batch(element: Any) -> bool:
    """Whether an element holds many rows: every column of it is more than one value."""
    if isinstance(element, Mapping):
        return bool(element) and all(_is_column(values) for values in element.values())
    if isinstance(element, Batch):
        return True
    if isinstance(element, tuple | list) and len(element) == 2:
        labelled = _is_array(element[0]) and _is_labels(element[1], element[0]) and element[1] is not None
        return labelled or is_frame(element[0])
    return isinstance(element, tuple | list) and len(element) == 1 and _is_array(element[0])


def _is_column(values: Any) -> bool:
    if isinstance(values, list | tuple):
        return True
    return _is_array(values) or (hasattr(values, "to_numpy") and hasattr(values, "__len__"))


def _columns_of_mapping(data: Mapping[Any, Any]) -> dict[str, Any]:
    return _named((name, _raw(values)) for name, values in data.items())


def _named(columns: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in columns:
        if str(name) in found:
            raise refuse("each column name once", "batches", str(name), "Rename the columns")
        found[str(name)] = values
    return found


def _raw(values: Any) -> Any:
    """A column as tensor, array or list."""
    return _rows(values) if isinstance(values, Tensor) else raw_column(values)


def _read(data: Any, row: int) -> tuple[Any, str | None]:
    try:
        return data[row], None
    except MemoryError:
        raise
    except Exception as error:  # a damaged row is a finding, whatever it raises
        return None, f"{type(error).__name__}: {error}"[:200]


def _of_samples(samples: Iterator[tuple[Any, str | None]]) -> Iterator[_Part]:
    while chunk := list(itertools.islice(samples, _SAMPLES)):
        broken: dict[int, str] = {}
        rows: list[dict[str, Any]] = []
        for place, (sample, error) in enumerate(chunk):
            row = None if error else _row(sample)
            if row is None:
                broken[place] = error or "a sample that is neither x nor (x, y) nor a dict"
            else:
                rows.append(row)
        names = list(dict.fromkeys(name for row in rows for name in row))
        yield {name: [row.get(name) for row in rows] for name in names}, len(rows), broken


def _row(sample: Any) -> dict[str, Any] | None:
    if isinstance(sample, Mapping):
        return {str(name): value for name, value in sample.items()}
    if isinstance(sample, tuple):
        return dict(zip(("x", "y"), sample, strict=False)) if len(sample) in (1, 2) else None
    return {"x": sample}
