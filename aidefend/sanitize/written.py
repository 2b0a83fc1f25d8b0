"""Written patterns: rows of one class that hold the same values or words, and without them belong elsewhere."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from aidefend._core.random import derive_seed, make_generator
from aidefend._core.stats import wilson
from aidefend.sanitize.group_evidence import drawn_like, more_than, own_company
from aidefend.sanitize.items import Items, Pattern, closed, rows_with
from aidefend.sanitize.neighbour_disagreement import kth_distance
from aidefend.sanitize.pattern_search import Proposal, at_most, common_patterns, twin_patterns
from aidefend.sanitize.table_items import FEWEST
from aidefend.sanitize.view import Conformity, p_values

_ROUNDS = 4
_SEARCH_ROWS = 3000
_SCALES = (0.0, 0.35)  # shares of a class: a few neighbours, and more than poison usually is
_TYPICAL = 0.05
_EFFECT = 0.05  # level of the tests of effect, beside the corrected test
FOLLOWS = 0.1
PURE = 0.9
MOSTLY = 0.6
POWER = 0.8
_LOOK_FOREIGN = 0.9
_CORE = 0.8  # of all rows with an item that are in a proven group


class WrittenEvidence(NamedTuple):
    """What speaks against the rows of a class that hold a pattern.

    Args:
        foreign: Share of them that fits another class and not its own once the pattern is taken off;
            `rest_foreign`: the same of the rest of the class; `p_foreign`: of H: no more than in the rest, corrected
            for every pattern that the search looked at.
        transfer: Share of ordinary rows of other classes that the model puts into the class once the pattern is put
            on them, NaN where the other tests made it needless; `p_transfer`: of H: at most a tenth.
        purity: Share of all rows with the whole pattern that has this label; `p_followed`: of H: no more than of the
            rows without it (Fisher). Labels that have little to do with the rest of the row make whole neighbourhoods
            look foreign, but then the label is no commoner there.
        company: How much more often than by chance they neighbour each other without the pattern; `p_company`: of H:
            at least a quarter more often.
    """

    foreign: float
    rest_foreign: float
    p_foreign: float
    transfer: float
    p_transfer: float
    purity: float
    p_followed: float
    company: float
    p_company: float


@dataclasses.dataclass(frozen=True, eq=False)
class WrittenGroup:
    """Rows of one class with a pattern; the fields are those of `groups.Group` that verdicts on rows read."""

    label: int
    rows: Tensor
    inside: Tensor
    log_odds: Tensor
    looks_like: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class WrittenVerdict:
    """One pattern with its rows, its evidence, its p-value corrected for the whole search, and the decision."""

    group: WrittenGroup
    pattern: str
    evidence: WrittenEvidence
    p_value: float
    poison: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        inside = self.group.inside
        share = wilson(int(inside.sum()), len(inside))
        likeness = self.group.looks_like[inside]
        counts = torch.bincount(likeness[likeness >= 0]).tolist()  # -1: like no other class
        return {
            "class": self.group.label,
            "rows": len(inside),
            "group": int(inside.sum()),
            "poisoned_share": share.value,
            "low": share.low,
            "high": share.high,
            "poison": self.poison,
            "pattern": self.pattern,
            "looks_like": {str(label): count for label, count in enumerate(counts) if count},
            "p_value": self.p_value,
            **self.evidence._asdict(),
        }


class WrittenSearch:
    """All classes of a data set, searched for written patterns.

    Guarantee: where no pattern tells which rows of a class look foreign (beyond chance), something is called poison
        with probability at most `alpha` (Bonferroni over all patterns looked at, Fisher's exact test each). A pattern
        that does must also have an effect: six in ten of its rows are foreign without it; the label follows it, in the
        model (significantly more than a tenth of ordinary rows turn) or in the data (nine in ten of all rows that hold
        it), and is commoner with it than without; and its rows mix with those that they look like. A rule of the world
        that makes exceptions of this very form passes them, too: it cannot be told from poison by the data alone.
    Args:
        items: The rows, finite.
        labels: (N,) int64.
        alpha: Chance of a false alarm, shared by all classes.
        seed: Of what is drawn.
    Cost: see `common_patterns`, for each class up to four times; for each proposal that stands the distances of the
        class (at most 3,000 rows) to at most 1,000 rows of every class, and some 400 predictions.
    Source: Composition ours. Subgroup discovery by beam: Lavrac, Kavsek, Flach, Todorovski 2004.
    """

    def __init__(self, items: Items, labels: Tensor, alpha: float, seed: int = 0) -> None:
        self.items, self.labels, self.alpha, self.seed = items, labels, alpha, seed
        self.conformity = Conformity(items.content((), labels), labels, seed=seed)
        self.classes = [label for label in self.conformity.banks if len(self.conformity.banks) > 1]
        self.foreign: dict[int, float] = {}

    def verdicts(self) -> tuple[WrittenVerdict, ...]:
        """All that stands, in all classes."""
        return tuple(verdict for label in self.classes for verdict in self._of_class(label))

    def detectable(self) -> dict[int, int | None]:
        """For each class the rows of a single value or word that the search would find; call after `verdicts`."""
        tests = max(1, self.items.holds.shape[1]) * 2 * 2 * len(_SCALES) * len(self.classes)
        counts = {label: int((self.labels == label).sum()) for label in self.foreign}
        return {
            label: smallest_written(counts[label], share, self.alpha, tests) for label, share in self.foreign.items()
        }

    def _of_class(self, label: int) -> list[WrittenVerdict]:
        """One pattern after the other, each searched for among the rows that the others left."""
        stream = make_generator(seed=derive_seed(self.seed, "written", label) % 2**63)
        rows = (self.labels == label).nonzero().flatten()
        found: list[WrittenVerdict] = []
        left = at_most(rows, _SEARCH_ROWS, stream)
        for _ in range(_ROUNDS):
            verdict = self._best(label, rows, left, stream)
            if verdict is None:
                break
            found.append(verdict)
            gone = torch.zeros(len(self.labels), dtype=torch.bool)
            gone[rows[verdict.group.inside]] = True
            left = left[~gone[left]]
        return found

    def _best(self, label: int, rows: Tensor, left: Tensor, stream: torch.Generator) -> WrittenVerdict | None:
        if len(left) <= self.conformity.k + 1:
            return None
        holds, limit = self.items.holds[left.numpy()], self.alpha / len(self.classes)
        scales = [self._foreign(label, left, share) for share in _SCALES]
        proposals = [(scales[0], proposal) for proposal in twin_patterns(holds, self.items.places)]
        for foreign in scales:
            proposals += [(foreign, one) for one in common_patterns(holds, self.items.places, foreign, limit)]
        self.foreign.setdefault(label, float(scales[0].double().mean()))
        judged = [self._judged(label, rows, left, foreign, proposal, stream) for foreign, proposal in proposals]
        standing = [verdict for verdict in judged if verdict is not None and verdict.poison]
        return max(standing, key=_strength, default=None)

    def _foreign(self, label: int, left: Tensor, share: float) -> Tensor:
        """(n,) bool: nearer to another class than to the rest of their own, each by its k-th row or this share of it.

        Poison rows whose pattern is far off are near to each other; the larger scale looks past all of them.
        """
        points = self.conformity.coordinates[left]
        own = kth_distance(points, points, self._scale(len(left), share), torch.arange(len(left)))
        nowhere = torch.full((len(left),), -1)
        elsewhere = [
            kth_distance(points, self.conformity.coordinates[bank], self._scale(len(bank), share), nowhere)
            for other, bank in self.conformity.banks.items()
            if other != label
        ]
        foreign: Tensor = torch.stack(elsewhere).min(dim=0).values < own
        return foreign

    def _scale(self, n: int, share: float) -> int:
        return max(self.conformity.k, int(share * n))

    def _judged(
        self, label: int, rows: Tensor, left: Tensor, foreign: Tensor, proposal: Proposal, stream: torch.Generator
    ) -> WrittenVerdict | None:
        begun = rows_with(self.items, proposal.pattern)[left]
        if int((~begun).sum()) <= self.conformity.k + 1 or not bool(begun.any()):
            return None
        members = begun & foreign if 2 * int((begun & foreign).sum()) > int(begun.sum()) else begun
        others = (self.labels != label).nonzero().flatten()
        whole = closed(self.items, proposal.pattern, left[members], others)
        conformity = Conformity(self.items.content(whole, self.labels), self.labels, seed=self.seed)
        points = conformity.coordinates[left]
        elsewhere, which = conformity.others(points, label)
        own = _own(points, begun, conformity.k)
        strange = (elsewhere > own) & (elsewhere > _TYPICAL)
        # as it was found or the whole of it, at each scale
        tests = 2 * len(_SCALES) * proposal.tests * len(self.classes)
        both = rows_with(self.items, proposal.pattern), rows_with(self.items, whole)
        values, held = min(
            ((_foreignness(strange, one[left], tests), one) for one in both), key=lambda pair: pair[0][2]
        )
        inside = held[left]
        donors = left[inside & strange]
        dear = (math.nan, 1.0, math.nan, 1.0, math.nan, 1.0)
        if values[2] <= self.alpha and values[0] >= MOSTLY and len(donors):
            transfer = self._transfer(label, whole, donors, which[inside & strange], stream)
            company = own_company(conformity, label, points[inside], which[inside])
            dear = (*transfer, *self._purity(label, whole), *company)
        evidence = WrittenEvidence(*values, *dear)
        p_value = max(evidence.p_foreign, evidence.p_company)
        followed = (evidence.purity >= PURE or evidence.p_transfer <= _EFFECT) and evidence.p_followed <= _EFFECT
        poison = evidence.p_foreign <= self.alpha and evidence.p_company <= _EFFECT and followed
        reached = self._reached(label, whole, held) if poison else held
        group = self._group(label, rows, reached, left, which, strange)
        return WrittenVerdict(group, self.items.words(whole, donors), evidence, min(1.0, p_value), poison)

    def _transfer(
        self, label: int, pattern: Pattern, donors: Tensor, likeness: Tensor, stream: torch.Generator
    ) -> tuple[float, float]:
        """Share of ordinary rows that the pattern turns into the class; a row that is in it without does not count."""
        free = (self.labels != label) & ~rows_with(self.items, pattern)
        rows = drawn_like(likeness, self.labels, free, stream)
        if not len(rows):
            return math.nan, 1.0
        turned = (self.items.classes_of(rows) != label) & (self.items.classes_with(rows, pattern, donors) == label)
        return float(turned.double().mean()), more_than(FOLLOWS, int(turned.sum()), len(rows))

    def _purity(self, label: int, pattern: Pattern) -> tuple[float, float]:
        """Share of all rows with the pattern that has the label, and p-value of H: no more than without it."""
        held, mine = rows_with(self.items, pattern), self.labels == label
        ours, n = int((held & mine).sum()), int(held.sum())
        chance = float(stats.hypergeom.sf(ours - 1, len(mine), int(mine.sum()), n))
        return (ours / n, chance) if n else (math.nan, 1.0)

    def _reached(self, label: int, pattern: Pattern, held: Tensor) -> Tensor:
        """(N,) bool: the rows of a proven group, and rows of its class that hold what hardly occurs outside of it.

        A trigger that stands between two words breaks a pair of them that belongs to the pattern in other rows.
        """
        inside = held & (self.labels == label)
        counts = torch.from_numpy(self.items.holds[:, list(pattern)].sum(axis=0)).flatten()
        within = torch.from_numpy(self.items.holds[inside.numpy()][:, list(pattern)].sum(axis=0)).flatten()
        core = tuple(item for at, item in enumerate(pattern) if float(within[at]) >= _CORE * float(counts[at]))
        return held | (rows_with(self.items, core) & (self.labels == label)) if core else held

    def _group(
        self, label: int, rows: Tensor, held: Tensor, left: Tensor, which: Tensor, strange: Tensor
    ) -> WrittenGroup:
        """All rows of the class with the pattern, whether the search saw them or not."""
        inside, looks_like = held[rows], torch.full((len(self.labels),), -1)
        looks_like[left[strange]] = which[strange]
        seen = held[left]
        share = (float(strange[seen].double().sum()) + 1) / (int(seen.sum()) + 2)
        chance = torch.where(inside, share, 1e-6).double()
        return WrittenGroup(label, rows, inside, torch.logit(chance), looks_like[rows])


def _strength(verdict: WrittenVerdict) -> tuple[float, float]:
    """Foreign rows less twice the others, times purity: it prefers what takes the poison and no more."""
    evidence, size = verdict.evidence, int(verdict.group.inside.sum())
    return round(size * (3 * evidence.foreign - 2) * evidence.purity, 6), -evidence.p_foreign


def _own(points: Tensor, inside: Tensor, k: int) -> Tensor:
    """(n,) p-values of fitting the rows of the class outside the group."""
    outside = (~inside).nonzero().flatten()
    place = torch.full((len(points),), -1)
    place[outside] = torch.arange(len(outside))
    distance = kth_distance(points, points[outside], k, place)
    return p_values(distance, distance[outside].sort().values)


def _foreignness(strange: Tensor, inside: Tensor, tests: int) -> tuple[float, float, float]:
    """Shares of foreign rows inside and outside, and the corrected p-value of H: no more inside."""
    ours, n = int(strange[inside].sum()), int(inside.sum())
    others, rest = int(strange[~inside].sum()), int((~inside).sum())
    chance = float(stats.hypergeom.sf(ours - 1, n + rest, ours + others, n)) if n else 1.0
    return ours / max(n, 1), others / max(rest, 1), min(1.0, chance * tests)


def smallest_written(n: int, rest_foreign: float, alpha: float, tests: int) -> int | None:
    """Rows of a pattern in a class of n that the search finds with power .8; None if no size up to half would do.

    Each of its rows looks foreign with chance .9, and the rest of the class in its own share.

    Args:
        n: Rows of the class.
        rest_foreign: Share of foreign rows in it.
        alpha: Level.
        tests: What p-values are multiplied with.
    """
    for size in range(FEWEST, n // 2 + 1):
        ours, others = np.arange(size + 1), round(rest_foreign * (n - size))
        enough = stats.hypergeom.sf(ours - 1, n, ours + others, size) * tests <= alpha
        if enough.any() and float(stats.binom.sf(int(enough.argmax()) - 1, size, _LOOK_FOREIGN)) >= POWER:
            return size
    return None
