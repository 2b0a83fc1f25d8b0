"""What rows hold that a hand could have written there: values of columns, words. Patterns are sets of such items."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from scipy import sparse
from torch import Tensor

Pattern = tuple[int, ...]  # numbers of items, ascending


class Items(Protocol):
    """The rows of a data set, as the search for written patterns reads them.

    Args:
        holds: (N, M) 0/1, which row holds which item.
        places: (M,) where an item stands: two values of one column cannot be held together.
    """

    holds: sparse.csr_matrix
    places: Tensor

    def content(self, pattern: Pattern, labels: Tensor) -> Tensor:
        """(N, v) coordinates of all rows, with everything that the pattern touches taken off."""

    def classes_with(self, rows: Tensor, pattern: Pattern, donors: Tensor) -> Tensor:
        """(n,) classes that the suspect model predicts for rows with the pattern put on them, as the donors have it."""

    def classes_of(self, rows: Tensor) -> Tensor:
        """(n,) classes that the suspect model predicts for rows as they are."""

    def words(self, pattern: Pattern, donors: Tensor) -> str:
        """The pattern in words."""


def rows_with(items: Items, pattern: Pattern) -> Tensor:
    """(N,) bool: rows that hold every item of the pattern."""
    held = torch.from_numpy(items.holds[:, list(pattern)].sum(axis=1)).flatten()
    return held.long() == len(pattern)


def closed(items: Items, pattern: Pattern, members: Tensor, others: Tensor, share: float = 0.9) -> Pattern:
    """The pattern with all items that nine in ten of its members hold and that are much rarer in other classes.

    What was written in several places is found by one or two of them; on other rows it works only as a whole. Of the
    items of one place the rarest is taken.

    Args:
        items: The rows.
        pattern: Where to begin.
        members: Row numbers that have it, and look as if they came from other classes.
        others: Row numbers of other classes.
        share: Of the members that hold an item.
    """
    ours = torch.from_numpy(items.holds[members.numpy()].mean(axis=0)).flatten()
    theirs = torch.from_numpy(items.holds[others.numpy()].mean(axis=0)).flatten()
    known = torch.zeros(len(ours), dtype=torch.bool)
    known[list(pattern)] = True
    common = (known | ((ours >= share) & (theirs < ours / 2))).nonzero().flatten()
    found: dict[int, int] = {}
    for item in common[(theirs[common] - ours[common]).argsort(stable=True)].tolist():
        found.setdefault(int(items.places[item]), item)
    return tuple(sorted(found.values()))


def stacked(columns: Sequence[Any], rows: int) -> sparse.csr_matrix:
    """(N, M) from one bool vector (N,) an item."""
    if not columns:
        return sparse.csr_matrix((rows, 0))
    return sparse.csr_matrix(torch.stack(list(columns), dim=1).double().numpy())
