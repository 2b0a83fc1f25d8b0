"""Search for what foreign rows of a class hold in common: a few values, a few words, however usual each is."""

import dataclasses

import numpy as np
import torch
from scipy import sparse, special, stats
from torch import Tensor

from aidefend.sanitize.items import Pattern
from aidefend.sanitize.table_items import FEWEST

_DEPTH = 3
_BEAM = 40
_PROPOSED = 6
_ALIKE = 0.6
_TWINS = 0.9
_TWINS_AT_LEAST = 3


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A pattern, and the number that its p-value must be multiplied with for all that was looked at."""

    pattern: Pattern
    tests: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    pattern: Pattern
    held: np.ndarray  # (n,) bool
    corrected: float
    tests: int


def common_patterns(holds: sparse.csr_matrix, places: Tensor, foreign: Tensor, limit: float) -> list[Proposal]:
    """Patterns of up to three items that the foreign rows of a class hold more often than the others, best first.

    Args:
        holds: (n, M) 0/1, items of the rows of one class.
        places: (M,) where each item stands.
        foreign: (n,) bool.
        limit: Largest corrected p-value of Fisher's exact test that is worth a proposal.
    Returns: At most six, that share less than six tenths of their rows with a better one. `tests` counts what was
        looked at in the search of its depth, times 2, 4, 8: half of the level goes to single items, a quarter to pairs.
    Cost: 3 x 40 sparse products of n x M.
    """
    enough = np.asarray(holds.sum(axis=0)).ravel() >= FEWEST
    numbers = np.flatnonzero(enough)
    columns, where = holds[:, numbers].tocsc(), places.numpy()[numbers]
    hits, found = foreign.numpy().astype(np.float64), []
    front = [_Found((), np.ones(len(hits), dtype=bool), 1.0, 1)]
    for depth in range(_DEPTH if len(numbers) and hits.sum() >= FEWEST else 0):
        front = _narrowed(columns, where, hits, front, 2 ** (depth + 1)) if front else []
        found += front
    return _distinct(found, numbers, limit)


def twin_patterns(holds: sparse.csr_matrix, places: Tensor) -> list[Proposal]:
    """Sets of at least three items that the same rows of a class hold, and no others: a phrase, several cells.

    A trigger of many words outweighs what else its texts say, so that they do not look foreign before it is taken off.

    Args:
        holds: (n, M) 0/1, items of the rows of one class.
        places: (M,) where each item stands.
    Returns: At most six, largest first; `tests` is 8 times the number of items (an eighth of the level).
    """
    counts = np.asarray(holds.sum(axis=0)).ravel()
    numbers = np.flatnonzero((counts >= FEWEST) & (counts <= holds.shape[0] / 2))
    columns, counts = holds[:, numbers], counts[numbers]
    together = (columns.T @ columns).tocoo()
    larger = np.maximum(counts[together.row], counts[together.col])
    alike = together.data >= _TWINS * larger
    pairs = sparse.csr_matrix((alike[alike], (together.row[alike], together.col[alike])), shape=together.shape)
    sets: dict[tuple[int, ...], int] = {}
    for item in np.flatnonzero(np.diff(pairs.indptr) >= _TWINS_AT_LEAST):
        twins = numbers[np.sort(pairs.indices[pairs.indptr[item] : pairs.indptr[item + 1]])]
        first = {int(places[twin]): int(twin) for twin in twins[::-1]}
        if len(first) >= _TWINS_AT_LEAST:
            sets[tuple(sorted(first.values()))] = int(counts[item])
    best = sorted(sets, key=lambda found: (-len(found) * sets[found], found))[:_PROPOSED]
    return [Proposal(found, 8 * max(1, len(numbers))) for found in best]


def _narrowed(
    columns: sparse.csc_matrix, where: np.ndarray, hits: np.ndarray, front: list[_Found], factor: int
) -> list[_Found]:
    """The best patterns with one item more (numbers of columns); one for each set of rows."""
    masks = np.stack([one.held for one in front], axis=1).astype(np.float64)
    counts, caught = columns.T @ masks, columns.T @ (masks * hits[:, None])
    usable = (caught >= FEWEST) & (counts < masks.sum(axis=0))
    for at, one in enumerate(front):
        usable[:, at] &= ~np.isin(where, where[list(one.pattern)])
    tests = max(1, int(usable.sum())) * factor
    order = np.argsort(-np.where(usable, _surprise(caught, counts, hits), -np.inf), axis=None, kind="stable")
    best = np.unravel_index(order[: 4 * _BEAM], counts.shape)
    log_p = stats.hypergeom.logsf(caught[best] - 1, len(hits), int(hits.sum()), counts[best])
    kept: dict[bytes, _Found] = {}
    for item, at, chance in zip(*best, log_p, strict=True):
        if usable[item, at] and len(kept) < _BEAM:
            held = front[at].held & (np.asarray(columns[:, item].todense()).ravel() > 0)
            p_value = float(np.exp(min(0.0, chance + np.log(tests))))
            kept.setdefault(held.tobytes(), _Found((*front[at].pattern, int(item)), held, p_value, tests))
    return list(kept.values())


def _surprise(caught: np.ndarray, counts: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Chernoff's bound on the log of the tail, up to its sign: which exact p-values are worth computing."""
    share, base = caught / np.maximum(counts, 1), max(hits.mean(), 1e-9)
    gain = special.rel_entr(share, base) + special.rel_entr(1 - share, 1 - min(base, 1 - 1e-9))
    surprise: np.ndarray = np.where(share > base, counts * gain, 0.0)
    return surprise


def _distinct(found: list[_Found], numbers: np.ndarray, limit: float) -> list[Proposal]:
    chosen: list[_Found] = []
    for one in sorted(found, key=lambda f: (f.corrected, len(f.pattern), f.pattern)):
        alike = (float((one.held & other.held).sum() / (one.held | other.held).sum()) for other in chosen)
        if one.corrected <= limit and len(chosen) < _PROPOSED and all(share < _ALIKE for share in alike):
            chosen.append(one)
    return [Proposal(tuple(sorted(int(numbers[item]) for item in one.pattern)), one.tests) for one in chosen]


def at_most(values: Tensor, limit: int, stream: torch.Generator) -> Tensor:
    """Up to `limit` of the values, drawn at random, in their order."""
    return values[torch.randperm(len(values), generator=stream)[:limit].sort().values]
