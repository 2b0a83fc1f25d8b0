"""One way through data: (ids, x, y) batches from tensors, a Dataset, a DataLoader or an iterator of dict batches."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from aidefend._core.checks import check_int, check_not_empty, check_same_rows, refuse
from aidefend._core.errors import AidefendError

INPUT_KEYS = ("x", "image", "images", "input", "inputs", "features", "pixel_values", "data")
LABEL_KEYS = ("y", "label", "labels", "target", "targets")


class Batch(NamedTuple):
    """A slice of the data: content ids, inputs (N, ...), labels (N,) int64 or None."""

    ids: tuple[str, ...]
    x: Tensor
    y: Tensor | None


class ContentIds:
    """Names rows by their content: equal rows get an ordinal, so every row of a data set has its own id.

    The id of a row is `<hash of x>`, then `-<hash of y>` where there is a label, then `#k` for the k-th repetition. It
    does not depend on order, batching, workers, device or memory layout; it does depend on dtype and shape. Equal rows
    are interchangeable, so their ordinals are stable as a set.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def of(self, x: Tensor, y: Tensor | None = None) -> tuple[str, ...]:
        """Ids of the rows of x with their labels; call once for each batch of one pass."""
        names = _hash_rows(x)
        if y is not None:
            names = [f"{name}-{tail[:8]}" for name, tail in zip(names, _hash_rows(y), strict=True)]
        return tuple(self._with_ordinal(name) for name in names)

    def _with_ordinal(self, name: str) -> str:
        count = self._seen.get(name, 0)
        self._seen[name] = count + 1
        return name if count == 0 else f"{name}#{count}"


def content_ids(x: Tensor, y: Tensor | None = None) -> tuple[str, ...]:
    """Content ids of one complete set of rows.

    Example:
        >>> ids = content_ids(torch.tensor([[1.0], [2.0], [1.0]]))
        >>> ids[2] == ids[0] + "#1"
        True
    """
    return ContentIds().of(x, y)


def input_id(row_id: str) -> str:
    """The part of a content id that names the input alone, without label and ordinal."""
    return row_id.partition("#")[0].partition("-")[0]


def _hash_rows(rows: Tensor) -> list[str]:
    array = rows.detach().cpu().contiguous()
    header = f"{array.dtype}{tuple(array.shape[1:])}".encode()
    flat = array.reshape(len(array), -1).view(torch.uint8) if array.numel() else array.new_zeros(len(array), 0)
    data = flat.numpy()
    return [hashlib.blake2b(header + row.tobytes(), digest_size=16).hexdigest() for row in data]


def iterate(data: Any, batch_size: int = 256) -> Iterator[Batch]:
    """Walk through any data once, in its own order.

    Args:
        data: A tensor or array (N, ...); a pair (x, y); a map-style or iterable Dataset whose samples are x, (x, y) or
            dicts; a DataLoader or any iterable of batches in these forms. Dict keys: see INPUT_KEYS, LABEL_KEYS. A list
            is taken as batches if the labels of its first element are more than one number, else as samples.
        batch_size: Rows a batch, where the data does not come in batches already.
    Returns: Batches; labels are class indices (one-hot rows are converted), or None where there are none.
    Raises: ConfigurationError: the data has none of these forms, rows of several shapes, labels for a part of the rows
        only, or raises when it is read (the cause is kept).
    Cost: One hash of each row; no copy of tensors that are on the CPU already.
    """
    check_int(batch_size, "batch_size")
    names = ContentIds()
    with _naming_the_data():
        for x, y in _pairs(data, batch_size):
            yield Batch(names.of(x, y), x, y)


@contextmanager
def _naming_the_data() -> Iterator[None]:
    """Turn whatever a user's data raise when they are read into an error that names them and keeps the cause."""
    try:
        yield
    except (AidefendError, MemoryError):
        raise
    except Exception as error:
        found, cure = f"{type(error).__name__}: {error}", "Read each sample by itself to see the cause"
        raise refuse("data whose samples can be read and have one shape", "data", found, cure) from error


def gather(data: Any, batch_size: int = 1024) -> Batch:
    """The whole data as one batch in memory; refuses empty data."""
    parts = list(iterate(data, batch_size))
    check_not_empty(sum(len(part.ids) for part in parts), "data")
    ids = tuple(row_id for part in parts for row_id in part.ids)
    labels = [part.y for part in parts if part.y is not None]
    if labels and len(labels) != len(parts):
        raise refuse("labels in every batch", "data", "labels in some batches", "Give every sample a label, or none")
    with _naming_the_data():
        return Batch(ids, torch.cat([part.x for part in parts]), torch.cat(labels) if labels else None)


def gather_labelled(data: Any, name: str = "data") -> tuple[Tensor, Tensor]:
    """All inputs and labels in memory; refuses data that is empty or has no labels."""
    batch = gather(data)
    if batch.y is None:
        raise refuse(f"{name} with labels", name, "inputs alone", "Pass (x, y) or a data set of (x, y) samples")
    return batch.x, batch.y


def as_dataset(data: Any) -> Dataset[Any]:
    """A map-style data set over the same samples: tensors and arrays are wrapped, a DataLoader gives its data set."""
    if isinstance(data, DataLoader):
        data = data.dataset
    if isinstance(data, Tensor | np.ndarray):
        return TensorDataset(_rows(_tensor(data)))
    if _is_pair(data):
        x, y = (_rows(_tensor(part)) for part in data)
        check_same_rows(("x", "y"), len(x), len(y))
        return TensorDataset(x, y)
    if _is_map_style(data):
        return data  # type: ignore[no-any-return]  # it has the methods of a map-style data set
    rule = "a map-style data set, tensors or arrays"
    raise refuse(rule, "dataset", type(data).__name__, "Pass data with a length that can be indexed")


def _pairs(data: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    if isinstance(data, Tensor | np.ndarray) or _is_pair(data) or _is_table(data):
        yield from _slices(*_split(data), batch_size)
    elif isinstance(data, DataLoader) or (isinstance(data, list | tuple) and _holds_batches(data)):
        yield from (_split(batch) for batch in data)
    elif _is_map_style(data):
        yield from _chunks((data[i] for i in range(len(data))), batch_size)
    elif isinstance(data, IterableDataset):
        yield from _chunks(iter(data), batch_size)
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        yield from (_split(batch) for batch in data)
    else:
        rule = "tensors, (x, y), a Dataset, a DataLoader or an iterable of batches"
        raise refuse(rule, "data", type(data).__name__, "Convert the data to one of these forms")


def _slices(x: Tensor, y: Tensor | None, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        yield x[part], None if y is None else y[part]


def _chunks(samples: Iterator[Any], batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    chunk: list[Any] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == batch_size:
            yield _collate(chunk)
            chunk = []
    if chunk:
        yield _collate(chunk)


def _collate(samples: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    pairs = [_pick(sample) for sample in samples]
    x = torch.stack([_tensor(pair[0]) for pair in pairs])
    if all(pair[1] is None for pair in pairs):
        return x, None
    return x, _labels(torch.stack([_tensor(pair[1]) for pair in pairs]), len(x))


def _split(batch: Any) -> tuple[Tensor, Tensor | None]:
    inputs, labels = _pick(batch)
    x = _tensor(inputs)
    return x, None if labels is None else _labels(_tensor(labels), len(x))


def _pick(sample: Any) -> tuple[Any, Any]:
    """(inputs, labels or None) of a sample or of a batch, by position or by key."""
    if isinstance(sample, Mapping):
        found = next((key for key in INPUT_KEYS if key in sample), None)
        if found is None:
            raise refuse(f"a key among {INPUT_KEYS}", "data", sorted(map(str, sample)), "Name the input column so")
        return sample[found], next((sample[key] for key in LABEL_KEYS if key in sample), None)
    if isinstance(sample, tuple | list):
        if len(sample) not in (1, 2):
            raise refuse("samples of the form x or (x, y)", "data", f"{len(sample)} parts", "Return (x, y)")
        return sample[0], sample[1] if len(sample) == 2 else None
    return sample, None


def _labels(y: Tensor, n: int) -> Tensor:
    """Class indices (N,) int64 from indices or from one-hot rows."""
    if len(y) != n:
        raise refuse(f"{n} labels", "y", y, "Pass one label for each sample")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and bool(((y == 0) | (y == 1)).all()) and bool((y.sum(dim=1) == 1).all()):
        y = y.argmax(dim=1)
    if y.ndim != 1 or y.is_complex() or (y.is_floating_point() and not bool((y == y.round()).all())):
        raise refuse("labels as class indices (N,) or one-hot rows", "y", y, "Convert the labels to integers")
    return y.long()


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise refuse("dense tensors", "data", value, "Convert them with .to_dense() first")
        return value.detach()
    try:
        return torch.from_numpy(np.ascontiguousarray(value))
    except (TypeError, ValueError) as error:
        rule = "numbers that fit a tensor"
        raise refuse(rule, "data", type(value).__name__, "Convert the samples to tensors first") from error


def _rows(values: Tensor) -> Tensor:
    if values.ndim < 1:
        raise refuse("data of shape (N, ...)", "data", values, "Add the batch dimension")
    return values


def _is_pair(data: Any) -> bool:
    """Two arrays of rows: the form (x, y)."""
    arrays = (Tensor, np.ndarray)
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, arrays) for part in data)


def _is_map_style(data: Any) -> bool:
    """Whether samples are found by their number."""
    no_samples = (IterableDataset, Mapping, str, bytes, type)
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, no_samples)


def _holds_batches(data: Sequence[Any]) -> bool:
    """Whether a list is one of batches and not of samples: the labels of its first element are more than one number."""
    if not data:
        return False
    labels = _pick(data[0])[1]
    return isinstance(data[0], Mapping) if labels is None else np.ndim(labels) > 0


def _is_table(data: Any) -> bool:
    return isinstance(data, Mapping) and any(key in data for key in INPUT_KEYS)


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, batch_size: int = 256) -> Tensor:
    """Apply a function to slices of x and join the results."""
    return torch.cat([function(part) for part in x.split(batch_size)]) if len(x) else function(x)
