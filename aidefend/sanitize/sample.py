"""A bounded sample of rows per class that does not depend on order or sharding: the rows with the smallest hashes."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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
        order = np.argsort(self.keys, kind="stable")
        ordered = self.keys[order]
        if len(ordered) > 1 and bool((ordered[1:] == ordered[:-1]).any()):
            order = np.lexsort((self.ids.astype(str), self.keys))
        return self.at(order[:limit])


class ClassSample:
    """At most `limit` rows a class, chosen by a hash of their id: merging shards gives the sample of the whole.

    Rows wait beside those that were kept and are sorted in when there are as many again: N hashes and about N log N
    comparisons in all, and at most 2 limit + one block rows a class in memory.
    Source: bottom-k sampling, Cohen, Kaplan 2007.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.limit, self.seed = limit, seed
        self._rows: dict[int, list[_Kept]] = {}

    def add(self, ids: Sequence[str], features: Tensor, labels: Tensor) -> None:
        """Offer the rows of one block."""
        keys, names = self._keys(ids), np.array(ids, dtype=object)
        for label in labels.unique().tolist():
            places = (labels == label).nonzero().flatten().numpy()
            kept = self._rows.get(int(label), [])
            if kept and len(kept[0].keys) == self.limit:  # only what is below its last can enter
                places = places[keys[places] <= kept[0].keys[-1]]
            if len(places):
                self._offer(int(label), _Kept(keys[places], names[places], features[torch.from_numpy(places)]))

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
        parts.append(rows if parts else rows.smallest(self.limit))  # the first part is always sorted
        if sum(len(part.keys) for part in parts[1:]) >= self.limit:
            self._settled(label)

    def _settled(self, label: int) -> _Kept:
        parts = self._rows[label]
        if len(parts) > 1:
            keys, ids = np.concatenate([part.keys for part in parts]), np.concatenate([part.ids for part in parts])
            whole = _Kept(keys, ids, torch.cat([part.features for part in parts]))
            self._rows[label] = [whole.smallest(self.limit)]
        return self._rows[label][0]

    def _keys(self, ids: Sequence[str]) -> np.ndarray:
        """(n,) uint64 hashes of the ids, salted with the seed."""
        keyed = hashlib.blake2b(digest_size=8, salt=self.seed.to_bytes(8, "big"))
        digests = bytearray()
        for row_id in ids:
            one = keyed.copy()
            one.update(row_id.encode())
            digests += one.digest()
        return np.frombuffer(bytes(digests), dtype=">u8").astype(np.uint64)
