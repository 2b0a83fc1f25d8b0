"""One way through data: (ids, x, y) batches from tensors, data sets, loaders, tables, files and iterators."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from aidefend._core.checks import check_choice, check_int, check_not_empty, check_same_rows, refuse
from aidefend._core.collate import Marking, Rows, strict
from aidefend._core.errors import AidefendError
from aidefend._core.frames import is_frame, is_stored
from aidefend._core.naming import paired, with_names
from aidefend._core.parts import is_map_style, is_pair, is_whole, raw_parts
from aidefend._core.samples import Samples, tensor_of

_NAMES_AT_ONCE = 65_536  # names that are remembered in full


class Batch(NamedTuple):
    """A slice of the data: content ids, inputs (N, ...), labels (N,) int64 or None.

    `broken` lists (row, reason) of samples that could not be read where the caller asked for their rows all the same:
    NaN (0 where the dtype has none) with the label of another row, under the id "unreadable:<number of the sample>".
    """

    ids: tuple[str, ...]
    x: Tensor
    y: Tensor | None
    broken: tuple[tuple[int, str], ...] = ()


class ContentIds:
    """Names rows by their content: equal rows get an ordinal, so every row of a data set has its own id.

    The id of a row is `<hash of x>`, then `-<hash of y>` where there is a label, then `#k` for the k-th repetition. It
    does not depend on order, batching, workers, device or memory layout; it does depend on dtype and shape. Equal rows
    are interchangeable, so their ordinals are stable as a set.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._older: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []  # sorted keys of names seen once

    def of(self, x: Tensor, y: Tensor | None = None) -> tuple[str, ...]:
        """Ids of the rows of x with their labels; call once for each batch of one pass."""
        names = _hash_rows(x)
        if y is not None:
            names = [f"{name}-{tail[:8]}" for name, tail in zip(names, _hash_rows(y), strict=True)]
        older = self._known(names)
        found = tuple(self._with_ordinal(name, int(known)) for name, known in zip(names, older, strict=True))
        if len(self._seen) > _NAMES_AT_ONCE:
            self._compact()
        return found

    def _with_ordinal(self, name: str, older: int) -> str:
        count = self._seen.get(name, older)
        self._seen[name] = count + 1
        return name if count == 0 else f"{name}#{count}"

    def _known(self, names: Sequence[str]) -> list[bool]:
        """Which names were seen once, long ago."""
        if not self._older or not names:
            return [False] * len(names)
        keys, found = _keys(names), np.zeros(len(names), dtype=np.bool_)
        for run in self._older:
            found |= run[np.searchsorted(run, keys).clip(max=len(run) - 1)] == keys
        known: list[bool] = found.tolist()
        return known

    def _compact(self) -> None:
        """Keep 8 bytes of a name that was seen once; those that came again keep their count.

        Two names share these bytes by chance once in 2 ** 64 pairs; the second then gets an ordinal that it needs not.
        """
        run = np.sort(_keys([name for name, count in self._seen.items() if count == 1]))
        self._seen = {name: count for name, count in self._seen.items() if count > 1}
        while self._older and len(self._older[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self._older.pop(), run]))
        if len(run):
            self._older.append(run)


def _keys(names: Sequence[str]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """One word a name: 64 bits of the hash of x, mixed with those of the label."""
    words = [int(name[:16], 16) ^ int(name[33:41] or "0", 16) * 0x9E3779B97F4A7C15 % 2**64 for name in names]
    return np.array(words, dtype=np.uint64)


def content_ids(x: Tensor, y: Tensor | None = None) -> tuple[str, ...]:
    """Content ids of one complete set of rows.

    Example:
        >>> ids = content_ids(torch.tensor([[1.0], [2.0], [1.0]]))
        >>> ids[2] == ids[0] + "#1"
        True
    """
    return ContentIds().of(x, y)


def sample_id(row_id: str) -> str:
    """The part of a content id that names input and label, without the ordinal of equal rows."""
    return row_id.partition("#")[0]


def input_id(row_id: str) -> str:
    """The part of a content id that names the input alone, without label and ordinal."""
    return sample_id(row_id).partition("-")[0]


def _hash_rows(rows: Tensor) -> list[str]:
    array = rows.detach().cpu().contiguous()
    header = f"{array.dtype}{tuple(array.shape[1:])}".encode()
    flat = array.reshape(len(array), -1).view(torch.uint8) if array.numel() else array.new_zeros(len(array), 0)
    data = flat.numpy()
    return [hashlib.blake2b(header + row.tobytes(), digest_size=16).hexdigest() for row in data]


def iterate(data: Any, batch_size: int = 256, *, bad: Literal["raise", "mark"] = "raise") -> Iterator[Batch]:
    """Walk through any data once, in its own order.

    Args:
        data: A tensor or array (N, ...); a pair (x, y), also of a DataFrame and a Series (see `paired`); a map-style
            or iterable Dataset whose samples are x, (x, y), (key, x, y) or dicts; a DataFrame, arrow table or Hugging
            Face data set; the path of a Parquet file or of a folder of them; a DataLoader or any iterable of batches in
            these forms; or `Samples`, which names columns.
            A list is taken as batches if the labels of its first element are more than one number, else as samples; an
            iterator likewise, and as batches where it has no labels.
        batch_size: Rows a batch, where the data does not come in batches already.
        bad: "raise": a sample that cannot be read ends the walk. "mark": it gets a row all the same, see
            `Batch.broken`, so that row i stays sample i; of a DataLoader its data set is read, sample by sample.
    Returns: Batches; labels are class indices (one-hot rows are converted), or None where there are none.
    Raises: ConfigurationError: the data has none of these forms, rows of several shapes, labels for a part of the rows
        only, or raises when it is read (the cause is kept). With "mark" only: no form, no sample that can be read, or a
        generator that raised: it cannot go on, and nobody knows how many samples it would still have had.
    Cost: One hash of each row; no copy of tensors that are on the CPU already.
    """
    check_int(batch_size, "batch_size")
    mark = check_choice(bad, ("raise", "mark"), "bad") == "mark"
    names, start = ContentIds(), 0
    with _naming_the_data():
        for x, y, broken in _rows_of(data, batch_size, mark=mark):
            yield Batch(_ids(names, x, y, broken, start), x, y, tuple(broken.items()))
            start += len(x)


def _rows_of(data: Any, batch_size: int, *, mark: bool) -> Iterator[Rows]:
    samples = with_names(data)
    marking = Marking(samples)
    whole = is_whole(samples.data) or isinstance(samples.data, Mapping)
    for raw, batch in raw_parts(samples.data, samples, batch_size, mark=mark):
        if not batch and not raw:
            continue
        rows = marking.rows(raw, batch=batch) if mark else strict(samples, raw, batch=batch)
        if rows is not None:
            yield from _cut(rows, batch_size) if len(rows.x) > batch_size and whole else [rows]
    if marking.waiting:
        cure = "Repair the data, or say how a sample is read in Samples(data, decode=...)"
        raise refuse("at least one sample that can be read", "data", marking.waiting[0], cure)


def _cut(rows: Rows, batch_size: int) -> Iterator[Rows]:
    """A whole table in parts."""
    for start in range(0, len(rows.x), batch_size):
        part = slice(start, start + batch_size)
        broken = {row - start: why for row, why in rows.broken.items() if start <= row < start + batch_size}
        yield Rows(rows.x[part], None if rows.y is None else rows.y[part], broken)


def _ids(names: ContentIds, x: Tensor, y: Tensor | None, broken: Mapping[int, str], start: int) -> tuple[str, ...]:
    """Content ids; a row that could not be read has no content and is named by its number."""
    if not broken:
        return names.of(x, y)
    good = [row for row in range(len(x)) if row not in broken]
    found = iter(names.of(x[good], None if y is None else y[good]))
    return tuple(f"unreadable:{start + row}" if row in broken else next(found) for row in range(len(x)))


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


def gather(data: Any, batch_size: int = 1024, *, bad: Literal["raise", "mark"] = "raise") -> Batch:
    """The whole data as one batch in memory; refuses empty data. `bad`: see `iterate`."""
    parts = list(iterate(data, batch_size, bad=bad))
    check_not_empty(sum(len(part.ids) for part in parts), "data")
    ids = tuple(row_id for part in parts for row_id in part.ids)
    labels = [part.y for part in parts if part.y is not None]
    if labels and len(labels) != len(parts):
        raise refuse("labels in every batch", "data", "labels in some batches", "Give every sample a label, or none")
    starts = itertools.accumulate((len(part.ids) for part in parts), initial=0)
    broken = tuple((start + row, why) for start, part in zip(starts, parts, strict=False) for row, why in part.broken)
    with _naming_the_data():
        return Batch(ids, torch.cat([part.x for part in parts]), torch.cat(labels) if labels else None, broken)


def gather_labelled(data: Any, name: str = "data") -> tuple[Tensor, Tensor]:
    """All inputs and labels in memory; refuses data that is empty or has no labels."""
    batch = gather(data)
    if batch.y is None:
        raise refuse(f"{name} with labels", name, "inputs alone", "Pass (x, y) or a data set of (x, y) samples")
    return batch.x, batch.y


def as_dataset(data: Any) -> Dataset[Any]:
    """A map-style data set over the same samples: tensors and arrays are wrapped, a DataLoader gives its data set.

    Tables (dicts of columns, too), Parquet files and `Samples` become tensors in memory, rows that cannot be read as
    placeholders among them.
    """
    data = paired(data.dataset if isinstance(data, DataLoader) else data)
    structured = isinstance(data, np.ndarray) and data.dtype.names is not None
    if isinstance(data, Tensor | np.ndarray) and not structured:
        return TensorDataset(_rows(tensor_of(data)))
    if is_pair(data):
        x, y = (_rows(tensor_of(part)) for part in data)
        check_same_rows(("x", "y"), len(x), len(y))
        return TensorDataset(x, y)
    if structured or isinstance(data, Samples | Mapping) or is_frame(data) or is_stored(data):
        whole = gather(data, bad="mark")
        return TensorDataset(whole.x) if whole.y is None else TensorDataset(whole.x, whole.y)
    if is_map_style(data):
        return data  # type: ignore[no-any-return]  # it has the methods of a map-style data set
    rule = "a map-style data set, tensors or arrays"
    raise refuse(rule, "dataset", type(data).__name__, "Pass data with a length that can be indexed")


def _rows(values: Tensor) -> Tensor:
    if values.ndim < 1:
        raise refuse("data of shape (N, ...)", "data", values, "Add the batch dimension")
    return values


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, batch_size: int = 256) -> Tensor:
    """Apply a function to slices of x and join the results."""
    return torch.cat([function(part) for part in x.split(batch_size)]) if len(x) else function(x)
