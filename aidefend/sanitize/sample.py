"""A bounded sample of rows per class that does not depend on order or sharding: the rows with the smallest hashes."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from aidefend.sanitize.id_keys import id_keys


@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    """Rows of one class: keys (n,) uint64, ids (n,) text, features (n, d)."""

    keys: np.ndarray
    ids: np.ndarray
    features: Tensor

    def at(self, places: np.ndarray) -> "_Kept":
        return _Kept(self.keys[places], self.ids[places], self.features[torch.from_numpy(places)])

    def smallest(self, limit: int) -> "_Kept":
        """The `limit` rows with the smallest keys, ascending; equal keys by id."""
        return self.at(_smallest(self.keys, self.ids, limit))


def _by_label(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each label that occurs, ascending, with the places of its rows."""
    if not len(labels):
        return
    narrow = labels.astype(np.uint16) if labels.max() < 2**16 else labels  # sorted digit by digit, in one pass
    order, counts = np.argsort(narrow, kind="stable"), np.bincount(labels)
    ends = np.cumsum(counts)
    for label in np.flatnonzero(counts).tolist():
        yield label, order[ends[label] - counts[label] : ends[label]]


def _smallest(keys: np.ndarray, ids: np.ndarray, limit: int) -> np.ndarray:
    order = np.argsort(keys)
    ordered = keys[order]
    if len(ordered) > 1 and bool((ordered[1:] == ordered[:-1]).any()):
        order = np.lexsort((ids.astype(str), keys))
    return order[:limit]


class ClassSample:
    """At most `limit` rows a class, chosen by a hash of their id: merging shards gives the sample of the whole.

    Rows wait beside those that were kept and are sorted in when there are as many again: N hashes and about N log N
    comparisons in all, and at most 2 limit + one block rows a class in memory.
    Source: bottom-k sampling, Cohen, Kaplan 2007; the hashes are those of `id_keys`.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.limit, self.seed = limit, seed
        self._rows: dict[int, list[_Kept]] = {}

    def add(self, ids: Sequence[str], features: Tensor, labels: Tensor) -> None:
        """Offer the rows of one block."""
        keys, names = id_keys(ids, self.seed), np.array(ids, dtype=object)
        for label, places in _by_label(labels.numpy()):
            kept = self._rows.get(label, [])
            if kept and len(kept[0].keys) == self.limit:  # only what is below its last can enter
                places = places[keys[places] <= kept[0].keys[-1]]
            if not kept:  # the first part is sorted at once, and copied once
                places = places[_smallest(keys[places], names[places], self.limit)]
            if len(places):
                self._offer(
                    label, _Kept(keys[places], names[places], features.index_select(0, torch.from_numpy(places)))
                )

    def merged(self, other: "ClassSample") -> "ClassSample":
        """The sample of both parts together; neither is changed."""
        total = ClassSample(self.limit, self.seed)
        for part in (self, other):
            for label in part.classes():
                total._offer(label, part._settled(label))
        return total

    def classes(self) -> list[int]:
        """Labels that were seen, ascending."""
        return sorted(self._rows)

    def of(self, label: int) -> tuple[tuple[str, ...], Tensor]:
        """Ids and features (n, d) of the kept rows of a class, in the order of their hashes."""
        rows = self._settled(label)
        return tuple(rows.ids.tolist()), rows.features

    def _offer(self, label: int, rows: _Kept) -> None:
        parts = self._rows.setdefault(label, [])
        parts.append(rows)
        if sum(len(part.keys) for part in parts[1:]) >= self.limit:
            self._settled(label)

    def _settled(self, label: int) -> _Kept:
        parts = self._rows[label]
        if len(parts) > 1:
            keys, ids = np.concatenate([part.keys for part in parts]), np.concatenate([part.ids for part in parts])
            whole = _Kept(keys, ids, torch.cat([part.features for part in parts]))
            self._rows[label] = [whole.smallest(self.limit)]
        return self._rows[label][0]
