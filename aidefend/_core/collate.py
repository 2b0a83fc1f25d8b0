"""From raw samples to tensors: strictly, or with the bad ones marked and replaced, so that N samples stay N rows."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aidefend._core.samples import Samples

_LONGEST = 200


class Failed(NamedTuple):
    """In the place of a sample that could not be read."""

    reason: str


class Rows(NamedTuple):
    """Inputs (N, ...), labels (N,) int64 or None, and why rows among them are placeholders."""

    x: Tensor
    y: Tensor | None
    broken: dict[int, str]


def why(error: Exception) -> Failed:
    """What a person reads about a sample that raised, the same in every run."""
    said = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(error).__name__}: {error}")
    return Failed(f"the sample cannot be read ({said})"[:_LONGEST])


def strict(names: Samples, raw: Any, *, batch: bool) -> Rows:
    """All rows of a batch, or of a list of samples, or an error."""
    if batch:
        inputs, labels = names.pick(raw)
        x = _stacked([names.input_of(one) for one in inputs]) if names.decode is not None else names.input_of(inputs)
        return Rows(x, None if labels is None else names.labels_of(labels, len(x)), {})
    pairs = [names.pick(sample) for sample in raw]
    x = torch.stack([names.input_of(pair[0]) for pair in pairs])
    if all(pair[1] is None for pair in pairs):
        return Rows(x, None, {})
    if names.classes is not None:
        return Rows(x, names.labels_of([_plain(pair[1]) for pair in pairs], len(x)), {})
    return Rows(x, names.labels_of(torch.stack([names_free(pair[1]) for pair in pairs]), len(x)), {})


def names_free(label: Any) -> Tensor:
    """One label as a tensor of its own, whatever holds it."""
    return Samples(None).input_of(label)


def _plain(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(rows)) if rows else torch.zeros(0, 0)


class Marking:
    """Collates one stream: a sample that raises, has another shape than the rest, or no usable label is marked.

    The shape and dtype of the stream are those of most rows of the first part that has a readable one. A marked row
    holds NaN (0 where the dtype has none), and the label of some readable row, so that it adds no class.
    """

    def __init__(self, names: Samples) -> None:
        self._names = names
        self._form: tuple[torch.Size, torch.dtype] | None = None
        self._labelled: bool | None = None
        self._label = 0
        self._waiting: list[str] = []  # reasons of rows before the first that shows the form

    @property
    def waiting(self) -> Sequence[str]:
        """Reasons of rows that could not be handed on, since no row of the stream could be read so far."""
        return self._waiting

    def rows(self, raw: Any, *, batch: bool) -> Rows | None:
        """The rows of a batch or of a list of samples, `Failed` ones among them; None where all have to wait."""
        try:
            found = strict(self._names, raw, batch=batch)
        except MemoryError:
            raise
        except Exception as error:
            return self._one_by_one(self._pairs(raw, error, batch=batch))
        if not self._fits(found):
            return self._one_by_one(self._pairs(raw, None, batch=batch))
        self._learn(list(found.x[:1]), found.y)
        return self._with_waiting(found)

    def _fits(self, rows: Rows) -> bool:
        """Whether every row can be handed on as it is."""
        if self._form is not None and (rows.x.shape[1:], rows.x.dtype) != self._form:
            return False
        if self._labelled is not None and (rows.y is not None) != self._labelled:
            return False
        return rows.y is None or not bool((rows.y < 0).any())

    def _pairs(self, raw: Any, error: Exception | None, *, batch: bool) -> list[Any]:
        """Raw (input, label) pairs, `Failed` where even they cannot be told apart."""
        if not batch:
            return [self._pair(sample) for sample in raw]
        try:
            return self._rows_of_table(raw) if isinstance(raw, Mapping) else self._rows_of_arrays(raw)
        except Exception:
            if error is not None:
                raise error from None  # not a batch at all: there are no rows to mark
            raise

    def _rows_of_arrays(self, raw: Any) -> list[Any]:
        inputs, labels = self._names.pick(raw)
        return list(zip(inputs, [None] * len(inputs) if labels is None else labels, strict=True))

    def _rows_of_table(self, raw: Mapping[str, Any]) -> list[Any]:
        inputs, label = self._names.columns_in(raw)
        used = [*inputs, *([] if label is None else [label])]
        one = dataclasses.replace(self._names, inputs=self._names.inputs or (inputs[0] if len(inputs) == 1 else inputs))
        rows = zip(*(raw[name] for name in used), strict=True)
        return [self._pair(dict(zip(used, row, strict=True)), one) for row in rows]

    def _pair(self, sample: Any, names: Samples | None = None) -> Any:
        if isinstance(sample, Failed):
            return sample
        try:
            return (names or self._names).pick(sample)
        except MemoryError:
            raise
        except Exception as error:
            return why(error)

    def _one_by_one(self, pairs: Sequence[Any]) -> Rows | None:
        labelled = self._labelled
        if labelled is None:
            labelled = any(not isinstance(pair, Failed) and pair[1] is not None for pair in pairs)
        read = [pair if isinstance(pair, Failed) else self._read(pair, labelled) for pair in pairs]
        good = [row for row in read if not isinstance(row, Failed)]
        if not good and self._form is None:
            self._waiting += [row.reason for row in read if isinstance(row, Failed)]
            return None
        labels = torch.tensor([row[1] for row in good], dtype=torch.int64) if labelled else None
        self._learn([row[0] for row in good], labels)
        broken: dict[int, str] = {}
        x = [self._placed(row, place, broken) for place, row in enumerate(read)]
        given = [self._label if place in broken else row[-1] for place, row in enumerate(read)]
        y = torch.tensor(given, dtype=torch.int64) if labelled else None
        return self._with_waiting(Rows(torch.stack(x), y, broken))

    def _read(self, pair: tuple[Any, Any], labelled: bool) -> Any:
        """(input, label) of one sample, or why not."""
        try:
            x, label = self._names.input_of(pair[0]), 0
            if labelled and pair[1] is None:
                return Failed("the sample has no label")
            if labelled:
                given = [_plain(pair[1])] if self._names.classes is not None else names_free(pair[1])[None]
                label = int(self._names.labels_of(given, 1)[0])
            return Failed(f"the label {label} is below 0") if label < 0 else (x, label)
        except MemoryError:
            raise
        except Exception as error:
            return why(error)

    def _learn(self, inputs: Sequence[Tensor], labels: Tensor | None) -> None:
        if self._form is None and len(inputs):
            self._form = Counter((x.shape, x.dtype) for x in inputs).most_common(1)[0][0]
            self._labelled = labels is not None
            self._label = int(labels[0]) if labels is not None else 0

    def _placed(self, row: Any, place: int, broken: dict[int, str]) -> Tensor:
        shape, dtype = self._form or (torch.Size(), torch.float32)
        if isinstance(row, Failed):
            broken[place] = row.reason
        elif row[0].shape != shape:
            broken[place] = f"the shape {tuple(row[0].shape)} is not that of the others, {tuple(shape)}"
        elif not torch.can_cast(row[0].dtype, dtype):
            broken[place] = f"the type {row[0].dtype} is not that of the others, {dtype}"
        else:
            return row[0].to(dtype)  # type: ignore[no-any-return]  # the input of a sample
        return self._empty(shape, dtype)

    @staticmethod
    def _empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype)

    def _with_waiting(self, rows: Rows) -> Rows:
        count = len(self._waiting)
        if not count or self._form is None:
            return rows
        x = torch.cat([torch.stack([self._empty(*self._form)] * count), rows.x])
        y = None if rows.y is None else torch.cat([rows.y.new_full((count,), self._label), rows.y])
        broken = dict(enumerate(self._waiting)) | {place + count: reason for place, reason in rows.broken.items()}
        self._waiting = []
        return Rows(x, y, broken)
