"""Blacklight (Li et al. 2022), written from the paper as a baseline: hashes of quantised windows, the largest kept."""

import hashlib

import torch
from torch import Tensor

WINDOW, STEP, KEPT, NEEDED = 20, 50, 50, 25
LATEST = 50  # queries that one hash is looked up in, so that blank windows do not cost the square of the traffic


def fingerprint(row: Tensor, salt: Tensor) -> set[bytes]:
    """The 50 largest hashes over all windows of 20 values of the salted row, quantised in steps of 50 of 256."""
    values = ((row.flatten() * 255).long() + salt) % 256 // STEP * STEP
    data = values.to(torch.uint8).numpy().tobytes()
    windows = {data[i : i + WINDOW] for i in range(len(data) - WINDOW + 1)}
    return set(sorted(hashlib.sha256(window).digest() for window in windows)[-KEPT:])


class Blacklight:
    """One store for all accounts: a query that shares 25 hashes with an earlier one is a hit."""

    def __init__(self, features: int, seed: int) -> None:
        self.salt = torch.randint(256, (features,), generator=torch.Generator().manual_seed(seed))
        self.owners: dict[bytes, list[int]] = {}
        self.count = 0

    def hit(self, row: Tensor) -> bool:
        """Whether the query is like an earlier one; remembers it."""
        own = fingerprint(row, self.salt)
        shared: dict[int, int] = {}
        for mark in own:
            for query in self.owners.get(mark, ())[-LATEST:]:
                shared[query] = shared.get(query, 0) + 1
        for mark in own:
            self.owners.setdefault(mark, []).append(self.count)
        self.count += 1
        return max(shared.values(), default=0) >= NEEDED

    def hits(self, rows: Tensor) -> list[int]:
        """How many hits there were after each of the queries of one account."""
        found, total = [], 0
        for row in rows:
            total += self.hit(row)
            found.append(total)
        return found
