"""A bounded sample of rows per class that does not depend on order or sharding: the rows with the smallest hashes."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from aidefend.sanitize.id_keys import id_keys


@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    """Rows of one class: keys (n,) uint64, places (n,) of their ids in `ids`, features (n, d)."""

    keys: np.ndarray
    ids: Sequence[str]
    places: np.ndarray
    features: Tensor

    def names(self) -> list[str]:
        """Their ids. Looked up when needed: of a large block most ids are never looked at."""
        return [self.ids[place] for place in self.places.tolist()]

    @classmethod
    def of(cls, keys: np.ndarray, ids: Sequence[str], places: np.ndarray, features: Tensor) -> "_Kept":
        """Rows of a block by their places in it."""
        return cls(keys[places], ids, places, features.index_select(0, torch.from_numpy(places)))

    @classmethod
    def joined(cls, parts: Sequence["_Kept"], limit: int) -> "_Kept":
        """The `limit` rows of all parts with the smallest keys, ascending; equal keys by id."""
        keys, ids = np.concatenate([part.keys for part in parts]), [name for part in parts for name in part.names()]
        places = _smallest(keys, ids, np.arange(len(keys)), limit)
        names = tuple(ids[place] for place in places.tolist())
        features = torch.cat([part.features for part in parts])[torch.from_numpy(places)]
        return cls(keys[places], names, np.arange(len(names)), features)


def _by_label(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each label that occurs, ascending, with the places of its rows."""
    if not len(labels):
        return
    narrow = labels.astype(np.uint16) if labels.max() < 2**16 else labels  # sorted digit by digit, in one pass
    order = np.argsort(narrow, kind="stable")
    ordered = labels[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    yield from zip(ordered[starts].tolist(), np.split(order, starts[1:]), strict=True)


def _smallest(keys: np.ndarray, ids: Sequence[str], places: np.ndarray, limit: int) -> np.ndarray:
    """Those of the places that have the smallest keys, ascending; equal keys by id."""
    here = keys[places]
    if len(here) > limit:
        within = np.flatnonzero(here <= np.partition(here, limit - 1)[limit - 1])
        places, here = places[within], here[within]
    order = np.argsort(here)
    ordered = here[order]
    if len(ordered) > 1 and bool((ordered[1:] == ordered[:-1]).any()):
        order = np.lexsort((np.array([ids[place] for place in places.tolist()]), here))
    chosen: np.ndarray = places[order[:limit]]
    return chosen


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
        keys = id_keys(ids, self.seed)
        for label, places in _by_label(labels.numpy()):
            kept = self._rows.get(label, [])
            if kept and len(kept[0].keys) == self.limit:  # only what is below its last can enter
                places = places[keys[places] <= kept[0].keys[-1]]
            if not kept:  # the first part is sorted at once, and copied once
                self._rows[label] = [_Kept.of(keys, ids, _smallest(keys, ids, places, self.limit), features)]
            elif len(places):
                few = _Kept.of(keys, ids, places, features)
                names = tuple(few.names())  # without the rest of the block, which need not stay in memory
                self._offer(label, dataclasses.replace(few, ids=names, places=np.arange(len(names))))

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
        return tuple(rows.names()), rows.features

    def features(self, label: int) -> Tensor:
        """(n, d) of the kept rows of a class, in the order of their hashes."""
        return self._settled(label).features

    def _offer(self, label: int, rows: _Kept) -> None:
        parts = self._rows.setdefault(label, [])
        parts.append(rows)
        if sum(len(part.keys) for part in parts[1:]) >= self.limit:
            self._settled(label)

    def _settled(self, label: int) -> _Kept:
        parts = self._rows[label]
        if len(parts) > 1:
            self._rows[label] = [_Kept.joined(parts, self.limit)]
        return self._rows[label][0]
