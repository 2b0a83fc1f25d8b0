"""Poison with right labels: rows of one class that differ from it by a constant mark, which alone makes the class."""

import dataclasses
import math
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.bend import Bend
from aidefend.sanitize.group_evidence import TRANSPLANTS, more_than, valley_depth
from aidefend.sanitize.groups import ClassSearch, Group, amounts_of
from aidefend.sanitize.separation import cut, held_out_log_odds, inverse_covariance, settle
from aidefend.sanitize.spot import written_spot
from aidefend.sanitize.trigger import Trigger
from aidefend.sanitize.world import World

MARKED_TURNED = 0.2
APART_WITH_IT = 0.75
_STRENGTHS = (1.0, 2.0, 3.0)
_WORTH_MARKING = 0.1
_STANDS_APART = 0.5
_DEVELOPED = 2
_SHARPENED = 2
_BESIDE = 5
_LARGEST = 400


class MarkEvidence(NamedTuple):
    """What speaks against a group whose labels are right. Each p-value belongs to one way of being harmless.

    Args:
        valley, p_valley: As in `GroupEvidence`; H: no gap between the group and the rest of its class.
        transfer: Share of rows of all other classes that the mark turns into the class in its best form (added once,
            twice, three times, written), NaN where the gap made it needless; `p_transfer`: of H: at most a fifth.
        scrambled: The same with the cells of the mark in another order; `p_scrambled`: of H: as many.
        unlike: Share of the rest of the class that, with the mark put on, is nearer to others of the rest with the mark
            than to the group: at most one half where the mark is all that the group has, about 1 for a style;
            `p_unlike`: of H: at least three quarters.
    """

    valley: float
    p_valley: float
    transfer: float
    p_transfer: float
    scrambled: float
    p_scrambled: float
    unlike: float
    p_unlike: float

    @property
    def p_value(self) -> float:
        """Of H: harmless in at least one of the four ways (intersection-union test)."""
        return max(self.p_valley, self.p_transfer, self.p_scrambled, self.p_unlike)


def marked_groups(search: ClassSearch) -> list[Group]:
    """Of the settled sides of one class that stand apart the two whose mark turns most probes, with sharper edges.

    Call after `ClassSearch.groups`, whose proposals these are. Pictures only: in a table a value that some rows of a
    class share, and that speaks for the class, is an ordinary thing.
    """
    if not Bend.possible(search.world.x):
        return []
    apart = [side for side in search.settled if search.gap(side) >= _STANDS_APART]
    described = [_described(search, side, search.points) for side in apart]
    rated = sorted(zip(_probed(search, described), range(len(apart)), strict=True), reverse=True)
    found: dict[bytes, Group] = {}
    for rate, number in rated[:_DEVELOPED]:
        if rate >= _WORTH_MARKING:
            for group in _sharpened(search, described[number]):
                found.setdefault(group.inside.numpy().tobytes(), group)
    return list(found.values())


def _sharpened(search: ClassSearch, group: Group) -> list[Group]:
    """The group, and what it becomes where its mark helps to tell its edge, or the mark alone cuts the class."""
    found = [group]
    for _ in range(_SHARPENED):
        amounts = amounts_of(search.world, search.label, search.rows, found[-1].trigger)[:, :2]
        points = torch.cat([search.points, amounts], dim=1)
        inverse = inverse_covariance(points)
        settled = [settle(points, start, inverse) for start in (found[-1].inside, cut(amounts[:, 0]))]
        found += [_described(search, one, points) for one in settled if one is not None and search.large_enough(one)]
    return found


def _described(search: ClassSearch, inside: Tensor, points: Tensor) -> Group:
    """The group with its mark: what it has beyond the rows of its own class that look like it."""
    world, rows, view = search.world, search.rows, search.view
    ours, rest = view[inside], view[~inside]
    offset = torch.zeros(view.shape[1])
    for _ in range(2):  # the second time by content
        beside = torch.cdist(ours - offset, rest).topk(min(_BESIDE, len(rest)), dim=1, largest=False).indices
        offset = (ours - rest[beside].mean(dim=1)).mean(dim=0)
    alike = rows[~inside][beside.flatten()]
    trigger = Trigger.between(world.x[rows[inside]].float(), world.x[alike].float().mean(dim=0), exact=True)
    odds = held_out_log_odds(points, inside, search.stream)
    nothing = torch.zeros(len(rows), dtype=torch.bool)
    nowhere = torch.full((len(rows),), -1)
    return Group(search.label, rows, inside, odds, nothing, nowhere, trigger, alike.unique(), ours - offset)


def _probed(search: ClassSearch, groups: list[Group]) -> list[float]:
    """For each group the share of probes that its mark turns, or the constant part of it if that turns more."""
    world = search.world
    probes = world.probes[world.labels[world.probes] != search.label]
    marks = [[group.trigger, *filter(None, [written_spot(world, group)])] for group in groups]
    counts = [max(_turned(world, probes, mark, search.label) for mark in both) for both in marks]
    return [count / max(len(probes), 1) for count in counts]


def _turned(world: World, rows: Tensor, trigger: Trigger, label: int) -> int:
    """How many rows the mark turns into the class in its best form; rows that were in it before do not count."""
    if not len(rows):
        return 0
    x = world.x[rows]
    before = world.predict(x) != label
    forms = [_strong(trigger, strength).added(x, world.low, world.high) for strength in _STRENGTHS]
    moved = world.predict(torch.cat([*forms, trigger.written(x)]))
    return int(((moved.reshape(len(forms) + 1, len(rows)) == label) & before).sum(dim=1).max())


def _strong(trigger: Trigger, strength: float) -> Trigger:
    return dataclasses.replace(trigger, pattern=strength * trigger.pattern)


def examine_mark(world: World, group: Group, threshold: float) -> MarkEvidence:
    """All four tests; the dearer three only where the gap leaves the group suspect."""
    valley, p_valley = valley_depth(group.log_odds, group.inside)
    if p_valley > threshold:
        return MarkEvidence(valley, p_valley, math.nan, 1.0, math.nan, 1.0, math.nan, 1.0)
    rows, stream = asked_rows(world, group.label)
    shares = turns(world, group.trigger, group.label, rows, stream, MARKED_TURNED)
    return MarkEvidence(valley, p_valley, *shares, *unlike_marked(world, group, stream))


def asked_rows(world: World, label: int) -> tuple[Tensor, torch.Generator]:
    """Up to 200 rows of other classes that no search has used, and the stream that drew them."""
    stream = make_generator(seed=derive_seed(world.seed, "marks", label) % 2**63)
    free = world.labels != label
    free[world.probes] = False
    rows = free.nonzero().flatten()
    return rows[torch.randperm(len(rows), generator=stream)[:TRANSPLANTS]], stream


def turns(
    world: World, trigger: Trigger, label: int, rows: Tensor, stream: torch.Generator, at_most: float
) -> tuple[float, float, float, float]:
    """Share of rows that the mark turns into the class, p of H: at most that; the same scrambled, p of H: as many."""
    n = len(rows)
    count = _turned(world, rows, trigger, label)
    other = _turned(world, rows, _scrambled(trigger, stream), label)
    more = stats.fisher_exact([[count, n - count], [other, n - other]], alternative="greater").pvalue if n else 1.0
    p_transfer = min(1.0, (len(_STRENGTHS) + 1) * more_than(at_most, count, n))
    return count / max(n, 1), p_transfer, other / max(n, 1), float(more)


def _scrambled(trigger: Trigger, stream: torch.Generator) -> Trigger:
    """The mark with its cells in another order: equal energy, equal values, no shape."""
    order = torch.randperm(trigger.pattern.numel(), generator=stream)
    parts = (trigger.pattern, trigger.values, trigger.spot)
    return Trigger(*(part.flatten()[order].reshape(part.shape) for part in parts))


def unlike_marked(world: World, group: Group, stream: torch.Generator) -> tuple[float, float]:
    """Share of marked rows of the rest that are nearer to each other than to the group, and p of H: three quarters.

    If the mark is all that the group has, rows of the rest with the mark on are as near to the one as to the other, by
    the fifth row of banks of the same size. It looks at the whole input: there a style is no constant mark in any row.

    Source: after the nearest-neighbour two-sample test of Schilling 1986.
    """
    rest = world.x[group.rows[~group.inside]]
    marked = world.view.whole(group.trigger.added(rest, world.low, world.high))
    ours = world.view.whole(world.x[group.rows[group.inside]])
    n = min(len(marked) - 1, len(ours), _LARGEST)
    marked = marked[torch.randperm(len(marked), generator=stream)[: 2 * _LARGEST]]
    ours = ours[torch.randperm(len(ours), generator=stream)[:n]]
    gaps = torch.cdist(marked, marked[: n + 1])
    gaps.diagonal().fill_(torch.inf)
    gaps[n + 1 :, n] = torch.inf  # who is in the bank has n others there, so have those who are not
    k = min(_BESIDE, n)
    unlike = gaps.kthvalue(k, dim=1).values < torch.cdist(marked, ours).kthvalue(k, dim=1).values
    count = int(unlike.sum())
    return count / len(unlike), float(stats.binom.cdf(count, len(unlike), APART_WITH_IT))
