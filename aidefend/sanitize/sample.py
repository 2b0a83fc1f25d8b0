"""A bounded sample of rows per class that does not depend on order or sharding: the rows with the smallest hashes."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class ClassSample:
    """At most `limit` rows a class, chosen by a hash of their id: merging shards gives the sample of the whole.

    Source: bottom-k sampling, Cohen, Kaplan 2007.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.limit, self.seed = limit, seed
        self._rows: dict[int, list[tuple[bytes, str, Tensor]]] = {}

    def add(self, ids: Sequence[str], features: Tensor, labels: Tensor) -> None:
        """Offer the rows of one block."""
        for label in labels.unique().tolist():
            places = (labels == label).nonzero().flatten().tolist()
            offered = [(self._key(ids[place]), ids[place], features[place].clone()) for place in places]
            self._keep(int(label), offered)

    def merged(self, other: "ClassSample") -> "ClassSample":
        """The sample of both parts together; neither is changed."""
        total = ClassSample(self.limit, self.seed)
        for part in (self, other):
            for label, rows in part._rows.items():
                total._keep(label, rows)
        return total

    def classes(self) -> list[int]:
        """Labels that were seen, ascending."""
        return sorted(self._rows)

    def of(self, label: int) -> tuple[tuple[str, ...], Tensor]:
        """Ids and features (n, d) of the kept rows of a class, in the order of their hashes."""
        rows = self._rows[label]
        return tuple(row_id for _, row_id, _ in rows), torch.stack([row for _, _, row in rows])

    def _keep(self, label: int, offered: list[tuple[bytes, str, Tensor]]) -> None:
        rows = [*self._rows.get(label, []), *offered]
        self._rows[label] = sorted(rows, key=lambda row: row[:2])[: self.limit]

    def _key(self, row_id: str) -> bytes:
        return hashlib.blake2b(row_id.encode(), digest_size=8, salt=self.seed.to_bytes(8, "big")).digest()
