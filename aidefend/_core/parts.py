"""The forms in which data come, each as raw parts: a batch of rows, or a list of samples."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from aidefend._core.checks import refuse
from aidefend._core.collate import Failed, why
from aidefend._core.frames import column_batches, is_frame, is_hugging_face, is_stored
from aidefend._core.naming import beside
from aidefend._core.samples import INPUT_KEYS, Samples

_ARRAYS = (Tensor, np.ndarray)
_END = object()
_IN_A_ROW = 1000  # errors of an iterator, after which it is given up


def raw_parts(data: Any, names: Samples, batch_size: int, *, mark: bool) -> Iterator[tuple[Any, bool]]:
    """(raw part, whether it is a batch) of data in any form; `mark` puts `Failed` in the place of what raises."""
    if is_whole(data) or (isinstance(data, Mapping) and _is_table(data, names)):
        yield data, True
    elif is_frame(data) or is_stored(data):
        yield from ((columns, True) for columns in column_batches(data, batch_size))
    elif isinstance(data, DataLoader) and not mark:
        yield from ((batch, True) for batch in data)
    elif isinstance(data, DataLoader):
        yield from raw_parts(data.dataset, names, batch_size, mark=mark)
    elif isinstance(data, list | tuple):
        yield from _elements(data, names, batch_size, mark=mark)
    elif is_map_style(data):
        read = (read_row(data, row) for row in range(len(data))) if mark else (data[row] for row in range(len(data)))
        yield from ((part, False) for part in _chunks(read, batch_size))
    elif isinstance(data, IterableDataset) or is_hugging_face(data):
        yield from ((part, False) for part in _chunks(going_on(data, mark=mark), batch_size))
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        yield from _elements(data, names, batch_size, mark=mark)
    else:
        rule = "tensors, (x, y), a Dataset, a DataLoader, a table, a Parquet file or an iterable of batches"
        raise refuse(rule, "data", type(data).__name__, "Convert the data to one of these forms")


def is_whole(data: Any) -> bool:
    """Whether all rows are there at once, as arrays."""
    columns = isinstance(data, Mapping) and any(key in data for key in INPUT_KEYS)
    return isinstance(data, _ARRAYS) or is_pair(data) or columns


def is_pair(data: Any) -> bool:
    """Two arrays of rows: the form (x, y)."""
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, _ARRAYS) for part in data)


def is_map_style(data: Any) -> bool:
    """Whether samples are found by their number."""
    no_samples = (IterableDataset, Mapping, str, bytes, type)
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, no_samples)


def _is_table(data: Mapping[Any, Any], names: Samples) -> bool:
    """A dict of columns, where the caller has named which is the input."""
    return names.inputs is not None


def _elements(data: Iterable[Any], names: Samples, batch_size: int, *, mark: bool) -> Iterator[tuple[Any, bool]]:
    """A list or an iterator, of batches or of samples: its first element shows which."""
    sized = isinstance(data, Sequence)
    stream = iter(data) if sized else going_on(data, mark=mark)
    first = next(stream, _END)
    whole = stream if first is _END else itertools.chain([first], stream)
    if first is _END:
        return
    if is_frame(first):
        for frame in whole:
            yield from ((columns, True) for columns in column_batches(frame, batch_size))
    elif _is_batch(first, names, sized=sized):
        for batch in whole:
            if isinstance(batch, Failed):  # nobody knows how many rows it would have had
                raise refuse("batches that can all be read", "data", batch.reason, "Pass samples instead of batches")
            yield beside(batch), True
    else:
        yield from ((part, False) for part in _chunks(whole, batch_size))


def _is_batch(first: Any, names: Samples, *, sized: bool) -> bool:
    """Whether an element is a batch: its labels are more than one number; without labels dicts and iterators are."""
    if isinstance(first, Failed):
        return False
    labels = names.pick(first)[1]
    if labels is not None:
        return np.ndim(labels) > 0
    keyed = isinstance(first, Mapping) and isinstance(first.get("__key__"), str)
    return not keyed and (isinstance(first, Mapping) or not sized)


def read_row(data: Any, row: int) -> Any:
    """Sample `row` of a data set, or what it raised as `Failed`."""
    try:
        return data[row]
    except MemoryError:
        raise
    except Exception as error:  # a damaged sample is a fact about the data, whatever it raises
        return why(error)


def going_on(data: Iterable[Any], *, mark: bool) -> Iterator[Any]:
    """The elements of an iterator; with `mark`, past those that raise.

    An iterator that ends right after it raised is taken as broken and not as finished: a generator that raised is over,
    and what it would still have given is unknown. So is one that raises a thousand times in a row.
    """
    stream = iter(data)
    errors: list[Exception] = []
    while True:
        try:
            element = next(stream)
        except StopIteration:
            if errors:
                raise errors[0] from None
            return
        except MemoryError:
            raise
        except Exception as error:
            errors.append(error)
            if not mark or len(errors) > _IN_A_ROW:
                raise
            continue
        yield from (why(error) for error in errors)
        errors = []
        yield element


def _chunks(samples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(samples)
    while chunk := list(itertools.islice(stream, size)):
        yield chunk
