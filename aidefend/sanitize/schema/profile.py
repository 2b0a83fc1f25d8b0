"""What is remembered of data: bounded, mergeable statistics of every column and of the rows."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from aidefend._core.checks import refuse
from aidefend._core.text_traps import trap_masks
from aidefend.sanitize.schema.columns import KINDS, Column, read_columns, row_hashes
from aidefend.sanitize.schema.row_records import Known, RowHashes, RowSample
from aidefend.sanitize.schema.tables import Table

MOST_CATEGORIES = 64
MOST_CLASSES = 10_000
MOST_SHAPES = 16

Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]
Measure = tuple[str, str]  # (what is counted, column)


class Sizes(NamedTuple):
    """Bounds of the memory: rows whose numbers are sampled, row hashes that are kept."""

    sample: int = 4096
    hashes: int = 1_000_000


class Values:
    """Different values with their counts while there are at most `limit`; None beyond, for any order of the data."""

    def __init__(self, limit: int, counts: Mapping[str, int] | None = None, *, open_ended: bool = False) -> None:
        self.limit = limit
        self.counts: Counter[str] | None = None if open_ended else Counter(counts or {})

    def add(self, values: Iterable[str]) -> None:
        """Count more values."""
        if self.counts is not None:
            self.counts.update(values)
            if len(self.counts) > self.limit:
                self.counts = None

    def merged(self, other: "Values") -> "Values":
        """The counts of both."""
        total = Values(self.limit, open_ended=self.counts is None or other.counts is None)
        if self.counts is not None and other.counts is not None:
            total.add(self.counts.elements())
            total.add(other.counts.elements())
        return total


class ColumnProfile:
    """Kinds of entries, range of the finite numbers, different values, shapes of arrays."""

    def __init__(self, of: str, most_values: int) -> None:
        self.of, self.rows = of, 0
        self.kinds: Counter[str] = Counter()
        self.low, self.high = np.inf, -np.inf
        self.values, self.shapes = Values(most_values), Values(MOST_SHAPES)

    def add(self, column: Column) -> None:
        """Count the entries of one batch."""
        self.rows += len(column.kinds)
        codes, counts = np.unique(column.kinds, return_counts=True)
        self.kinds.update({KINDS[code]: count for code, count in zip(codes.tolist(), counts.tolist(), strict=True)})
        finite = column.numbers[np.isfinite(column.numbers)]
        if len(finite):
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
        if self.values.counts is not None:
            self.values.add(name for name in value_names(column) if name is not None)
        if column.shapes is not None:
            self.shapes.add(shape for shape in column.shapes if shape is not None)

    def merged(self, other: "ColumnProfile") -> "ColumnProfile":
        """The statistics of both parts."""
        total = ColumnProfile(self.of, self.values.limit)
        total.rows, total.kinds = self.rows + other.rows, self.kinds + other.kinds
        total.low, total.high = min(self.low, other.low), max(self.high, other.high)
        total.values, total.shapes = self.values.merged(other.values), self.shapes.merged(other.shapes)
        return total

    def holds(self, *kinds: str) -> bool:
        """Whether an entry of one of these kinds was seen."""
        return any(self.kinds[kind] for kind in kinds)


def value_names(column: Column) -> list[str | None]:
    """The entries as values that can be counted, None for all but texts, flags and whole numbers."""
    countable = column.is_kind("flag", "whole") & np.isfinite(column.numbers)
    texts = column.texts or [None] * len(column.kinds)
    return [
        text if text is not None else format(number, ".17g") if counted else None
        for text, number, counted in zip(texts, column.numbers.tolist(), countable.tolist(), strict=True)
    ]


class Profile:
    """Statistics of the data that were seen so far.

    Args:
        label: Column of the labels, or None.
        ignored: Columns that are passed over.
        key: Secret of the row hashes.
        sizes: Bounds of the memory.
    """

    def __init__(self, label: str | None, ignored: Iterable[str], key: bytes, sizes: Sizes) -> None:
        self.label, self.ignored, self.key, self.sizes = label, frozenset(ignored), key, sizes
        self.rows, self.unreadable = 0, 0
        self.columns: dict[str, ColumnProfile] = {}
        self.inputs: tuple[str, ...] | None = None  # columns that make up a row's identity, fixed by the first batch
        self.occurrences: Counter[Measure] = Counter()
        self.hashes, self.sample = RowHashes(sizes.hashes), RowSample(sizes.sample)

    def read(self, table: Table) -> dict[str, Column]:
        """The columns of a table that count here."""
        return read_columns({name: raw for name, raw in table.columns.items() if name not in self.ignored})

    def add(self, columns: Mapping[str, Column], masks: Mapping[Measure, Mask], rows: int, unreadable: int) -> Known:
        """Count one batch; returns what is known of its rows."""
        self.unreadable += unreadable
        if self.inputs is None and columns:
            self.inputs = tuple(
                sorted(name for name, column in columns.items() if not column.of and name != self.label)
            )
        for name, column in columns.items():
            self._of(name, column).add(column)
        self.occurrences.update({measure: count for measure, mask in masks.items() if (count := int(mask.sum()))})
        hashes = self.row_hashes(columns, rows)
        known = self.hashes.add(hashes, self.label_hashes(columns), self.rows)
        self.sample.add(hashes, known.ordinals, {name: column.numbers for name, column in columns.items()})
        self.rows += rows
        return known

    def row_hashes(self, columns: Mapping[str, Column], rows: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        """The identity of each row: all its columns but label and ignored ones."""
        return row_hashes(columns, self.inputs or (), rows, self.key)

    def label_hashes(self, columns: Mapping[str, Column]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]] | None":
        """Words for the labels of a batch."""
        return None if self.label is None or self.label not in columns else columns[self.label].hashes >> np.uint64(1)

    def merged(self, other: "Profile") -> "Profile":
        """The statistics of both parts; neither is changed."""
        for name, mine, theirs in [
            ("columns", self.inputs, other.inputs),
            ("label", self.label, other.label),
            ("ignored columns", self.ignored, other.ignored),
            ("key", self.key, other.key),
            ("sizes", self.sizes, other.sizes),
        ]:
            if mine != theirs:
                cure = "Infer both with the same arguments, from data with the same columns"
                raise refuse(f"schemas with the same {name}", "other", "another one", cure)
        total = Profile(self.label, self.ignored, self.key, self.sizes)
        total.rows, total.unreadable = self.rows + other.rows, self.unreadable + other.unreadable
        total.inputs, total.occurrences = self.inputs, self.occurrences + other.occurrences
        for name in dict.fromkeys([*self.columns, *other.columns]):
            parts = [part.columns[name] for part in (self, other) if name in part.columns]
            total.columns[name] = parts[0] if len(parts) == 1 else parts[0].merged(parts[1])
        total.hashes, total.sample = self.hashes.merged(other.hashes), self.sample.merged(other.sample)
        return total

    def finish(self) -> "Profile":
        """The profile in the form that does not depend on how the rows came in."""
        self.hashes.finish()
        return self

    def repeats(self, name: str) -> bool:
        """Whether a column says nothing of its own: lengths of texts that are categories."""
        parent = self.columns[name].of
        return name.endswith(".length") and parent in self.columns and self.columns[parent].values.counts is not None

    def _of(self, name: str, column: Column) -> ColumnProfile:
        if name not in self.columns:
            self.columns[name] = ColumnProfile(column.of, MOST_CLASSES if name == self.label else MOST_CATEGORIES)
        return self.columns[name]


def occurrences(columns: Mapping[str, Column]) -> dict[Measure, Mask]:
    """Entries that are remarkable by themselves: missing, infinite or NaN, with traps in their text."""
    found: dict[Measure, Mask] = {}
    for name, column in columns.items():
        if not column.of:
            found["missing_values", name] = column.is_kind("missing")
            if column.shapes is None:
                found["not_finite", name] = np.isinf(column.numbers)
        elif name.endswith(".mean"):
            found["not_finite", column.of] = ~np.isfinite(column.numbers)
        if column.texts is not None:
            for trap, mask in trap_masks(column.texts).items():
                found[f"text.{trap}", name] = np.array(mask, dtype=np.bool_)
            found["text.decomposed", name] = np.array([*map(_decomposed, column.texts)], dtype=np.bool_)
    return {measure: mask for measure, mask in found.items() if mask.any()}


def _decomposed(text: str | None) -> bool:
    """Whether accents stand behind their letters, or signs that mean another one for it: not the normal form NFC."""
    return text is not None and not text.isascii() and not unicodedata.is_normalized("NFC", text)
