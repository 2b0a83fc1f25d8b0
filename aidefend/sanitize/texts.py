"""Data sets of texts: where texts and labels stand in them, and which of their rows hold none."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from aidefend._core.batches import content_ids
from aidefend._core.checks import check_items, check_same_rows, refuse
from aidefend._core.collate import Failed
from aidefend._core.frames import is_frame, is_hugging_face, is_stored, raw_column
from aidefend._core.naming import paired
from aidefend._core.parts import going_on, is_map_style, read_row
from aidefend._core.samples import LABEL_KEYS, Samples
from aidefend.sanitize.block import LARGEST_CLASS
from aidefend.sanitize.mixed_table import class_names, class_of
from aidefend.sanitize.raw_table import listed, missing, raw_table

TEXT_KEYS = ("text", "texts", "sentence", "document")
_LOOK_AT = 100  # samples, for the first that can be read


@dataclasses.dataclass(frozen=True, eq=False)
class TextRows:
    """Texts (N) and labels (N) as they stand; `Failed` in both where a sample could not be read.

    `inputs` and `label` are the names of their columns, where somebody said them; `classes` likewise.
    """

    texts: list[Any]
    labels: list[Any]
    inputs: str | None = None
    label: str | None = None
    classes: Sequence[Any] | None = None

    def usable(self) -> tuple[list[str], Tensor, tuple[str, ...] | None, dict[int, str]]:
        """Texts ("" where there is none), class numbers (N,) int64, names of the classes, and why rows have neither.

        Raises: ConfigurationError: no usable row; texts of another kind in a list of texts.
        """
        broken = {row: text.reason for row, text in enumerate(self.texts) if isinstance(text, Failed)}
        broken |= {row: "there is no text" for row, text in enumerate(self.texts) if missing(text)}
        texts = ["" if row in broken else text for row, text in enumerate(self.texts)]
        check_items(texts, str, "texts", "Pass a list of texts")
        names = self._names()
        place = None if names is None else {name: number for number, name in enumerate(names)}
        found = [None if missing(y) else class_of(y) if place is None else place.get(str(y)) for y in self.labels]
        for row, label in enumerate(found):
            if label is None and row not in broken:
                broken[row] = f"no usable label: {self.labels[row]!r}"[:200]
        first = next((label for row, label in enumerate(found) if row not in broken and label is not None), None)
        if first is None:
            raise refuse(
                "at least one text with a label", "dataset", next(iter(broken.values()), "no text"), "Pass one"
            )
        labels = [first if row in broken or label is None else label for row, label in enumerate(found)]
        return texts, torch.tensor(labels, dtype=torch.int64), names, broken

    def _names(self) -> tuple[str, ...] | None:
        """Names of the classes in order: as they were given, or sorted where labels are words or too large numbers."""
        if self.classes is not None:
            return tuple(map(str, self.classes))
        there = [y for y in self.labels if not missing(y) and not isinstance(y, Failed)]
        numbers = [y for y in there if isinstance(y, int | np.integer) and y > LARGEST_CLASS]
        words = bool(there) and all(isinstance(y, str) for y in there)
        return class_names(there) if words or numbers else None


def read_texts(dataset: Any) -> tuple[TextRows | None, Any]:
    """The texts of a data set, or None where it holds none; and the data set, of which nothing was lost by looking.

    Texts are a pair (texts, labels), a dict or a table with one of TEXT_KEYS (or the column that `Samples` names) and a
    label column, or samples, of any kind of data set or iterator, of the form (text, label) or {text, label}.
    Raises: ConfigurationError: texts without labels.
    """
    dataset = paired(dataset.dataset if isinstance(dataset, DataLoader) else dataset)
    names = _with_one_name(dataset if isinstance(dataset, Samples) else Samples(dataset))
    data = names.data
    if names.decode is not None or (names.inputs is not None and not isinstance(names.inputs, str)):
        return None, dataset
    if isinstance(data, Mapping):
        return _of_columns(data, names), dataset
    if isinstance(data, tuple | list) and len(data) == 2 and _are_texts(data[0]):
        check_same_rows(("texts", "labels"), len(data[0]), len(data[1]))
        return TextRows(listed(data[0]), listed(raw_column(data[1])), classes=names.classes), dataset
    if is_frame(data) or is_stored(data) or (is_hugging_face(data) and hasattr(data, "__len__")):
        return _of_table(names), dataset
    if isinstance(data, np.ndarray | Tensor | str | bytes):
        return None, dataset
    if is_map_style(data):
        looked_at = (read_row(data, row) for row in range(min(len(data), _LOOK_AT)))
        first = next((sample for sample in looked_at if not isinstance(sample, Failed)), None)
        whole = (read_row(data, row) for row in range(len(data)))
        return _of_samples(whole, names) if _holds_text(first, names) else None, dataset
    return _of_stream(data, names, dataset) if isinstance(data, Iterable) else (None, dataset)


def _with_one_name(names: Samples) -> Samples:
    """Inputs that are the one column of texts, by its name: a frame of texts beside its labels names a list of one."""
    columns = names.inputs
    if isinstance(columns, list | tuple) and len(columns) == 1 and columns[0] in TEXT_KEYS:
        return dataclasses.replace(names, inputs=columns[0])
    return names


def refuse_texts(data: Any) -> None:
    """For calls that take numbers only: refuse a pair, a dict or a table of texts, and say what to do.

    Raises: ConfigurationError: these are texts.
    """
    names = data if isinstance(data, Samples) else Samples(data)
    in_memory = isinstance(names.data, tuple | list | Mapping) or is_frame(names.data)
    if names.decode is None and in_memory and read_texts(data)[0] is not None:
        cure = "Encode them, as (TextEncoder()(texts), labels), or call screen, which takes texts"
        raise refuse("inputs of numbers", "data", "texts", cure)


def text_rows(dataset: Any) -> list[tuple[Any, Any]]:
    """The rows of a data set of texts as (text, label), as they stand.

    Raises: ConfigurationError: it holds no texts, or can be read once only.
    """
    found = None if isinstance(dataset, Iterator) else read_texts(dataset)[0]
    if found is None:
        raise refuse("the texts that were judged", "dataset", type(dataset).__name__, "Pass the same texts")
    return list(zip(found.texts, found.labels, strict=True))


def text_id(text: Any, label: Any) -> str | None:
    """The id of a text with its label, without an ordinal; None for what is no text or no whole number."""
    try:
        number = int(label)
    except (TypeError, ValueError, RuntimeError):
        return None
    if not isinstance(text, str) or number != label:
        return None
    raw = text.encode("utf-8", "surrogatepass")
    row = torch.tensor(list(raw), dtype=torch.uint8).reshape(1, len(raw))
    return content_ids(row, torch.tensor([number]))[0]


def text_ids(texts: Sequence[str], labels: Tensor, broken: Iterable[int] = ()) -> tuple[str, ...]:
    """The id of each text with its label, and an ordinal where it comes again; broken rows are named by number."""
    seen: Counter[str] = Counter()
    unreadable, found = frozenset(broken), []
    for row, (text, label) in enumerate(zip(texts, labels.tolist(), strict=True)):
        name = f"unreadable:{row}" if row in unreadable else str(text_id(text, label))
        found.append(f"{name}#{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return tuple(found)


def _of_columns(data: Mapping[Any, Any], names: Samples) -> TextRows | None:
    key = names.inputs if names.inputs in data else next((key for key in TEXT_KEYS if key in data), None)
    if key is None or not _are_texts(data[key]):
        return None
    label = names.label if names.label in data else next((key for key in LABEL_KEYS if key in data), None)
    if label is None:
        raise refuse(f"a label column among {LABEL_KEYS}", "dataset", sorted(map(str, data)), "Name the labels")
    texts, labels = listed(raw_column(data[key])), listed(raw_column(data[label]))
    check_same_rows(("texts", "labels"), len(texts), len(labels))
    return TextRows(texts, labels, str(names.inputs) if names.inputs else None, names.label, names.classes)


def _of_table(names: Samples) -> TextRows | None:
    """A table of one column of texts, by its name or because `Samples` names it."""
    named = names.inputs is not None
    raw = raw_table(dataclasses.replace(names, inputs=[str(names.inputs)]) if named else names)
    if raw is None or raw.label is None or len(raw.inputs) != 1 or not (named or raw.inputs[0] in TEXT_KEYS):
        return None
    texts = listed(raw.columns[raw.inputs[0]])
    if not _are_texts(texts):
        return None
    labels = listed(raw.columns[raw.label])
    return TextRows(texts, labels, raw.inputs[0] if named else None, names.label, names.classes)


def _of_stream(data: Iterable[Any], names: Samples, dataset: Any) -> tuple[TextRows | None, Any]:
    """Of an iterable; one that can be read once is handed on with what was looked at put back."""
    stream = iter(data)
    again = _PutBack(stream)
    first = again.first if isinstance(again.first, tuple | list | Mapping) else None
    if _holds_text(first, names):
        return _of_samples(going_on(again, mark=True), names), dataset
    if stream is not data:
        return None, dataset
    return None, dataclasses.replace(names, data=again) if isinstance(dataset, Samples) else again


class _PutBack:
    """An iterator of which the first element that could be read was looked at, and what was raised before it."""

    def __init__(self, stream: Iterator[Any]) -> None:
        self._stream, self.first = stream, None
        self._waiting: list[Any] = []
        while len(self._waiting) < _LOOK_AT and self.first is None:
            try:
                self.first = next(stream)
                self._waiting.append(self.first)
            except StopIteration:
                break
            except Exception as error:
                self._waiting.append(_Raised(error))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        found = self._waiting.pop(0) if self._waiting else next(self._stream)
        if isinstance(found, _Raised):
            raise found.error
        return found


class _Raised(NamedTuple):
    """In the place of an element."""

    error: Exception


def _of_samples(samples: Iterable[Any], names: Samples) -> TextRows:
    texts: list[Any] = []
    labels: list[Any] = []
    for sample in samples:
        text, label = _parts(sample, names)
        if isinstance(text, list | tuple) and not isinstance(text, Failed):  # a batch
            check_same_rows(("texts", "labels"), len(text), len(label))
            texts.extend(text)
            labels.extend(listed(raw_column(label)))
        else:
            texts.append(text)
            labels.append(label.item() if hasattr(label, "item") else label)
    named = names.inputs if isinstance(names.inputs, str) else None
    return TextRows(texts, labels, named, names.label, names.classes)


def _parts(sample: Any, names: Samples) -> tuple[Any, Any]:
    """(text, label) of a sample, or of a batch; `Failed` twice where it holds none."""
    if isinstance(sample, Failed):
        return sample, sample
    found: tuple[Any, Any] = (None, None)
    if isinstance(sample, Mapping):
        key = names.inputs if names.inputs in sample else next((key for key in TEXT_KEYS if key in sample), None)
        label = names.label if names.label in sample else next((key for key in LABEL_KEYS if key in sample), None)
        found = sample.get(key), sample.get(label)
    elif isinstance(sample, tuple | list) and len(sample) == 2:
        found = sample[0], sample[1]
    if missing(found[0]) or isinstance(found[0], str) or _are_texts(found[0]):
        return found
    failed = Failed(f"the sample is no text but {type(found[0]).__name__}")
    return failed, failed


def _holds_text(sample: Any, names: Samples) -> bool:
    """Whether a sample is a text with one label, or a batch of texts; (key, x) is neither."""
    if not isinstance(sample, tuple | list | Mapping) or (isinstance(sample, Mapping) and "__key__" in sample):
        return False
    text, label = _parts(sample, names)
    if isinstance(text, Failed):
        return False
    if isinstance(text, str):
        return label is not None and np.ndim(label) == 0 and not isinstance(label, bytes | Mapping)
    return _are_texts(text) and label is not None


def _are_texts(values: Any) -> bool:
    """Whether a column holds texts, by its first entry that is there."""
    if isinstance(values, str | bytes | Mapping | Tensor) or not hasattr(values, "__len__"):
        return False
    if not isinstance(values, list | tuple) and getattr(values, "ndim", 1) != 1:
        return False
    if not isinstance(values, list | tuple | np.ndarray) and not hasattr(values, "to_numpy"):
        return False
    entries = listed(raw_column(values))
    nested = any(np.ndim(one) > 0 or isinstance(one, bytes | Mapping) for one in entries[:3])
    return not nested and isinstance(next((one for one in entries if not missing(one)), None), str)
