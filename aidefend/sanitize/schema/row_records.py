"""What is remembered of rows: hashes with their counts and labels, and a bounded random sample of their numbers."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from aidefend.sanitize.schema.columns import Hashes, Numbers

_WHOLE = 2**64
_CONFLICT = _WHOLE - 1  # stands for the label of an input that came with several
_STEP = np.uint64(0x9E3779B97F4A7C15)


class Known(NamedTuple):
    """For each of a batch's rows: its ordinal among equal rows so far, and whether an earlier one had another label."""

    ordinals: Hashes
    conflicts: "np.ndarray[tuple[int], np.dtype[np.bool_]]"


class RowHashes:
    """Hashes of input rows, each with its count and the hash of its label, or a mark that it came with several.

    All rows while there are at most `limit` different ones: an exact set. Beyond, the `limit` smallest hashes, which is
    a uniform sample of the different rows: whether a row is known is then decided for the share `coverage` of rows, the
    same for every order and sharding.

    Source: bottom-k sampling, Cohen, Kaplan 2007.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bound = limit, _WHOLE  # hashes below `bound` are tracked
        self.counts: dict[int, int] = {}
        self.labels: dict[int, int] = {}

    @property
    def coverage(self) -> float:
        """Share of rows about which the set can speak."""
        return self.bound / _WHOLE

    @property
    def rows(self) -> int:
        """Rows behind the tracked hashes."""
        return sum(self.counts.values())

    @property
    def singles(self) -> int:
        """Tracked rows that have no equal."""
        return sum(count == 1 for count in self.counts.values())

    @property
    def clumping(self) -> float:
        """Mean count of a row's input: as many rows as that come and go together (the design effect of Kish 1965)."""
        rows = self.rows
        return sum(count * count for count in self.counts.values()) / rows if rows else 1.0

    @property
    def conflicting(self) -> int:
        """Tracked rows whose input came with several labels."""
        return sum(self.counts[word] for word, label in self.labels.items() if label == _CONFLICT)

    def add(self, hashes: Hashes, labels: Hashes | None, first_row: int) -> Known:
        """Count the rows of a batch; rows above the bound get their row number as ordinal."""
        ordinals = np.zeros(len(hashes), dtype=np.uint64)
        conflicts = np.zeros(len(hashes), dtype=np.bool_)
        given = [0] * len(hashes) if labels is None else labels.tolist()
        for row, (word, label) in enumerate(zip(hashes.tolist(), given, strict=True)):
            if word >= self.bound:
                ordinals[row] = first_row + row
                continue
            ordinals[row] = self.counts.get(word, 0)
            self.counts[word] = int(ordinals[row]) + 1
            if self.labels.setdefault(word, label) != label:
                conflicts[row], self.labels[word] = True, _CONFLICT
        if len(self.counts) > self.limit + self.limit // 4:
            self._shrink()
        return Known(ordinals, conflicts)

    def lookup(self, hashes: Hashes, labels: Hashes | None) -> tuple["np.ndarray[tuple[int], np.dtype[np.bool_]]", ...]:
        """(known, known with another label) for each row; nothing is counted."""
        words = hashes.tolist()
        known = np.array([word in self.counts for word in words], dtype=np.bool_)
        if labels is None:
            return known, np.zeros_like(known)
        other = [self.labels.get(word, label) != label for word, label in zip(words, labels.tolist(), strict=True)]
        return known, np.array(other, dtype=np.bool_)

    def merged(self, other: "RowHashes") -> "RowHashes":
        """The rows of both; neither is changed."""
        total = RowHashes(self.limit)
        total.bound = min(self.bound, other.bound)
        for part in (self, other):
            for word, count in part.counts.items():
                if word < total.bound:
                    total.counts[word] = total.counts.get(word, 0) + count
                    if total.labels.setdefault(word, part.labels[word]) != part.labels[word]:
                        total.labels[word] = _CONFLICT
        total.finish()
        return total

    def finish(self) -> None:
        """Leave at most `limit` hashes, so that the state does not depend on how the rows came in."""
        if len(self.counts) > self.limit:
            self._shrink()

    def _shrink(self) -> None:
        kept = sorted(self.counts)[: self.limit]
        self.bound = kept[-1] + 1
        self.counts = {word: self.counts[word] for word in kept}
        self.labels = {word: self.labels[word] for word in kept}


class RowSample:
    """Numbers of at most `limit` rows, those with the smallest keys: a uniform sample, whatever the order of the rows.

    A row's key follows from its hash and its ordinal among equal rows, so that repeated rows are drawn as often as they
    occur. Rows beyond the bound of the hashes have their row number as ordinal: uniform, too, for one order. Merging
    shards gives the sample of the whole where no row occurs in both; where one does, its copies of equal ordinal are
    drawn together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.keys: Hashes = np.zeros(0, dtype=np.uint64)
        self.columns: dict[str, Numbers] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, hashes: Hashes, ordinals: Hashes, columns: Mapping[str, Numbers]) -> None:
        """Offer the rows of a batch; columns that other batches lack are NaN there."""
        keys = _mixed(hashes, ordinals)
        if len(self) == self.limit and len(keys):
            near = keys < self.keys[-1]
            keys, columns = keys[near], {name: values[near] for name, values in columns.items()}
        self._take(keys, columns)

    def merged(self, other: "RowSample") -> "RowSample":
        """The sample of both together; neither is changed."""
        total = RowSample(self.limit)
        for part in (self, other):
            total._take(part.keys, part.columns)
        return total

    def halves(self, name: str) -> tuple[Numbers, Numbers]:
        """Finite values of a column in two disjoint random halves."""
        values, odd = self.columns[name], (self.keys & np.uint64(1)).astype(np.bool_)
        finite = np.isfinite(values)
        return values[finite & odd], values[finite & ~odd]

    def of(self, name: str) -> Numbers:
        """Finite values of a column, in the order of the keys."""
        values = self.columns.get(name, np.zeros(0))
        return values[np.isfinite(values)]

    def _take(self, keys: Hashes, columns: Mapping[str, Numbers]) -> None:
        joined = np.concatenate([self.keys, keys])
        order = np.argsort(joined, kind="stable")[: self.limit]
        mine, theirs = np.full(len(self.keys), np.nan), np.full(len(keys), np.nan)
        names = dict.fromkeys([*self.columns, *columns])
        self.columns = {
            name: np.concatenate([self.columns.get(name, mine), columns.get(name, theirs)])[order] for name in names
        }
        self.keys = joined[order]


def _mixed(hashes: Hashes, ordinals: Hashes) -> Hashes:
    """Keys that are uniform words and independent for the copies of one row (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        word = hashes + (ordinals + np.uint64(1)) * _STEP
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys: Hashes = word ^ (word >> np.uint64(31))
    return keys
