"""Tables with categories and gaps: columns of text, bool or category, and missing entries, as rows of numbers."""

import dataclasses
import datetime
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_same_rows, refuse
from aidefend._core.storage import canonical_json
from aidefend.sanitize.block import LARGEST_CLASS
from aidefend.sanitize.raw_table import RawTable, listed, missing
from aidefend.sanitize.table_items import FEWEST, Column

MISSING = "(missing)"
_MOST = 512  # values of a column with a cell of their own
_RARE = 8  # cells that all rarer values share


@dataclasses.dataclass(frozen=True, eq=False)
class MixedTable:
    """A table as numbers, and the way back.

    A column of numbers is one cell, with a second one where entries are missing (1 = missing, the number is then the
    median). A column of categories is one cell for each value that five rows hold, "(missing)" among them, and eight
    cells for all rarer ones, by a hash of the value.

    Args:
        x: (N, d) float32; NaN in rows without a usable label.
        labels: (N,) int64.
        columns: What the cells are; a column of numbers with gaps is two of them.
        classes: Names of the classes in order, where labels are no whole numbers.
        raw: The table as it was.
        broken: (row, reason) of rows that cannot be judged.
    """

    x: Tensor
    labels: Tensor
    columns: tuple[Column, ...]
    classes: tuple[str, ...] | None
    raw: RawTable
    broken: tuple[tuple[int, str], ...]
    _values: tuple[tuple[Any, ...], ...]  # for each column the value of each cell; empty for numbers

    def decoded(self, x: Tensor) -> Any:
        """Rows (n, d) in the form of the table: each category the one whose cell is largest."""
        found: dict[str, Any] = {}
        for column, values in zip(self.columns, self._values, strict=True):
            cells = x[:, list(column.cells)]
            if not column.categories:
                found[column.name] = cells[:, 0].double().tolist()
            elif column.name in found:  # the gaps of a column of numbers
                gaps = (cells[:, 0] > 0.5).tolist()
                found[column.name] = [math.nan if gap else n for n, gap in zip(found[column.name], gaps, strict=True)]
            else:
                found[column.name] = [values[cell] for cell in cells.argmax(dim=1).tolist()]
        return self.raw.rebuilt(found)

    def told(self) -> dict[str, Any]:
        """What has to be known to find the same columns in a batch."""
        classes = None if self.classes is None else list(self.classes)
        return {"inputs": list(self.raw.inputs), "label": self.raw.label, "classes": classes}


def encoded(raw: RawTable) -> MixedTable:
    """The table as rows of numbers."""
    labels, classes, broken = _labels(raw)
    cells: list[np.ndarray] = []
    columns: list[Column] = []
    values: list[tuple[Any, ...]] = []
    for name in raw.inputs:
        numbers = None if name in raw.declared else numbers_of(raw.columns[name])
        parts = _of_categories(name, raw.columns[name]) if numbers is None else _of_numbers(name, numbers)
        for column, block, known in parts:
            start = sum(part.shape[1] for part in cells)
            columns.append(dataclasses.replace(column, cells=tuple(range(start, start + block.shape[1]))))
            cells.append(block)
            values.append(known)
    x = torch.from_numpy(np.concatenate(cells, axis=1).astype(np.float32))
    x[[row for row, _ in broken]] = torch.nan
    return MixedTable(x, labels, tuple(columns), classes, raw, broken, tuple(values))


def numbers_of(values: Any) -> "np.ndarray[Any, Any] | None":
    """(N,) float64 with NaN for gaps; None for a column that holds anything else, bool included."""
    array = np.asarray(values)
    if array.dtype.kind in "iuf":
        return array.astype(np.float64)
    if array.dtype.kind in "mM":
        gaps = np.isnat(array)
        seconds = array.astype(f"{array.dtype.kind}8[s]").astype(np.int64).astype(np.float64)
        return np.where(gaps, np.nan, seconds)
    if array.dtype.kind != "O" or array.ndim != 1:
        return None
    there = [value for value in array if not missing(value)]
    if there and all(isinstance(value, datetime.date) for value in there):
        return numbers_of(np.array([None if missing(value) else value for value in array], dtype="datetime64[s]"))
    if not there or not all(_is_number(value) for value in there):
        return None
    return np.array([math.nan if missing(value) else float(value) for value in array])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_)


def _of_numbers(name: str, numbers: "np.ndarray[Any, Any]") -> list[tuple[Column, np.ndarray, tuple[Any, ...]]]:
    gaps = np.isnan(numbers)
    known = numbers[~gaps & np.isfinite(numbers)]
    filled = np.where(gaps, np.median(known) if len(known) else 0.0, numbers)
    parts = [(Column(name, ()), filled[:, None], ())]
    if gaps.any():
        parts.append((Column(name, (), (MISSING,)), gaps[:, None].astype(np.float64), ()))
    return parts


def _of_categories(name: str, values: Any) -> list[tuple[Column, np.ndarray, tuple[Any, ...]]]:
    entries = [None if missing(value) else value for value in listed(values)]
    keys = [MISSING if value is None else str(value) for value in entries]
    counts = Counter(keys)
    common = [key for key, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= FEWEST]
    place = {key: cell for cell, key in enumerate(common[:_MOST])}
    rare = len(place) < len(counts)
    where = np.array([place.get(key, len(place) + _bucket(key) if rare else 0) for key in keys], dtype=np.int64)
    width = len(place) + (_RARE if rare else 0)
    block = np.zeros((len(keys), width))
    block[np.arange(len(keys)), where] = 1.0
    first: dict[int, Any] = {}
    for cell, value in zip(where.tolist(), entries, strict=True):
        first.setdefault(cell, value)
    names = (*place, *(f"(a rare value, {number + 1} of {_RARE})" for number in range(width - len(place))))
    return [(Column(name, (), names), block, tuple(first.get(cell, entries[0]) for cell in range(width)))]


def _bucket(key: str) -> int:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=4).digest()[0] % _RARE


def _labels(raw: RawTable) -> tuple[Tensor, tuple[str, ...] | None, tuple[tuple[int, str], ...]]:
    """Class numbers (N,), names of the classes where labels are no whole numbers, and rows without a label."""
    if raw.label is None:
        raise refuse("a table with a label column", "dataset", list(raw.inputs), "Name it y, label or target")
    given = listed(raw.columns[raw.label])
    check_same_rows((raw.label, *raw.inputs), len(given), *(len(raw.columns[name]) for name in raw.inputs))
    there = [value for value in given if not missing(value)]
    if not there:
        raise refuse("at least one row with a label", raw.label, "none", "Pass labelled rows")
    numbers = raw.classes is None and all(class_of(value) is not None for value in there)
    names = tuple(map(str, raw.classes)) if raw.classes is not None else class_names(there)
    place = {name: number for number, name in enumerate(names)}
    found = [None if missing(v) else class_of(v) if numbers else place.get(str(v)) for v in given]
    known = [label for label in found if label is not None]
    if not known:
        raise refuse(f"labels among {list(names)[:20]}", raw.label, there[0], "Correct classes=")
    broken = tuple((row, f"no usable label: {given[row]!r}"[:200]) for row, label in enumerate(found) if label is None)
    labels = torch.tensor([known[0] if label is None else label for label in found], dtype=torch.int64)
    return labels, None if numbers else names, broken


def class_of(value: Any) -> int | None:
    """The class number that a label is: a whole number from 0 to LARGEST_CLASS, or a bool."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    return int(value) if _is_whole(value) and 0 <= value <= LARGEST_CLASS else None


def class_names(labels: Iterable[Any]) -> tuple[str, ...]:
    """Each different label once, as text: numbers in their order, all else in that of the alphabet."""
    values = {str(label): label for label in labels}
    whole = all(_is_whole(label) for label in values.values())
    return tuple(sorted(values, key=(lambda name: int(values[name])) if whole else None))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value) and int(value) == value


def row_text(names: Sequence[str], values: Sequence[Any]) -> str:
    """A row in words, the same for every library that held it: what its id is a hash of."""
    return canonical_json([[name, _canonical(value)] for name, value in zip(names, values, strict=True)])


def _canonical(value: Any) -> Any:
    if missing(value):
        return None
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | float | np.number):
        return str(int(value)) if math.isfinite(value) and int(value) == value else repr(float(value))
    return ["text", str(value)]
