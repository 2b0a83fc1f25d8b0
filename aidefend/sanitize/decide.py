"""From groups to verdicts: which are structured poison, how much of a class they are, and what would go unseen."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from aidefend._core.random import derive_seed, make_generator
from aidefend._core.stats import wilson
from aidefend.sanitize.group_evidence import (
    EMPTY,
    MANY_TURNED,
    MOSTLY_FOREIGN,
    TRANSPLANTS,
    GroupEvidence,
    examine,
    foreign_share,
    transfer_share,
    with_company,
)
from aidefend.sanitize.groups import CARRIER_GROUPS, ClassSearch, Group, bend_of, extended
from aidefend.sanitize.levels import FIRST, Levels, in_turn
from aidefend.sanitize.own_marks import MarkEvidence, examine_mark, marked_groups
from aidefend.sanitize.own_spots import SpotEvidence, examine_spot
from aidefend.sanitize.trigger import FORMS, Trigger
from aidefend.sanitize.world import World
from aidefend.sanitize.written import WrittenVerdict

SMALLEST_CLASS = 24
POWER = 0.8
_FOUND_SHARE = 0.95
_SEARCH_ROWS = 3000
_FURTHER = 0.01
_KIN = 0.7  # half of the energy in common
_TRIGGERS = 2
_FOR_MARKS = 0.2  # of alpha
_FEW_SHARED, _MOSTLY = 0.1, 0.9
_ASKED = 2  # ways in which a group with right labels is judged
_RIGHT_LABELS = {GroupEvidence: False, MarkEvidence: True, SpotEvidence: None}  # None: nobody asked


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """One group with its evidence, the p-value corrected for all groups of the screen, and the decision.

    `kin`: the trigger was proven in another class, so two of the five hypotheses were not asked again.
    With a `MarkEvidence` the labels of the group are right; with a `SpotEvidence` they are not asked for.
    """

    group: Group
    evidence: GroupEvidence | MarkEvidence | SpotEvidence
    p_value: float
    poison: bool
    kin: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON types: the class, the estimated poisoned share of its rows with interval, and the evidence."""
        share = wilson(int(self.group.inside.sum()), len(self.group.inside))
        likeness = self.group.looks_like[self.group.inside]
        counts = torch.bincount(likeness[likeness >= 0]).tolist()  # -1: like no other class
        return {
            "class": self.group.label,
            "rows": len(self.group.inside),
            "group": int(self.group.inside.sum()),
            "poisoned_share": share.value,
            "low": share.low,
            "high": share.high,
            "poison": self.poison,
            "proven_in_another_class": self.kin,
            "right_labels": _RIGHT_LABELS[type(self.evidence)],
            "looks_like": {str(label): count for label, count in enumerate(counts) if count},
            "p_value": self.p_value,
            **self.evidence._asdict(),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """What was found in the usable rows.

    Args:
        poison: The verdicts that stand: in a class at most one on wrong labels, and one on each mark.
        harmless: For each other class that was searched the group that came closest.
        mislabelled: (N,) bool, rows that look mislabelled on their own (a remark, no verdict).
        searched: Classes that were searched, with their number of rows.
        threshold: Level at which the share of foreign rows and the gap of one more group would have been tested.
        gate: Level of the other three tests of wrong labels, and of a gap that rows lie in.
        kin_threshold: As `threshold`, of a group that carries a trigger proven in another class.
        tests: Number of proposals, with those that triggers of other classes may make.
        written: Patterns of values or words that stand, any number a class.
        written_detectable: For each class that was searched for them, the smallest number of rows that would do.
    """

    poison: tuple[Verdict, ...]
    harmless: tuple[Verdict, ...]
    mislabelled: Tensor
    searched: dict[int, int]
    threshold: float
    gate: float
    kin_threshold: float
    tests: int
    written: tuple[WrittenVerdict, ...] = ()
    written_detectable: Mapping[int, int | None] = dataclasses.field(default_factory=dict)

    @property
    def quarantined(self) -> tuple[Verdict | WrittenVerdict, ...]:
        """All verdicts that take rows out."""
        return (*self.poison, *self.written)


def decide(world: World, scores: Sequence[Tensor], alpha: float) -> Decision:
    """Search every class that is large enough, test what the searches propose, and keep what stands.

    Args:
        world: The data.
        scores: Detector scores (N,) over the same rows; they propose groups.
        alpha: Chance of quarantining anything where each proposal is harmless in at least one of the five ways
            (of three ways for groups whose trigger was proven in another class), and in one of the four ways of marks:
            four fifths of it are for wrong labels, one fifth for right ones. As far as the tests of the gate (see
            `verdicts_on`) tell nothing of foreign rows and gaps of harmless groups.
    """
    stream = make_generator(seed=derive_seed(world.seed, "sample") % 2**63)
    groups: list[Group] = []
    marked: list[Group] = []
    mislabelled = torch.zeros(len(world.x), dtype=torch.bool)
    searched: dict[int, int] = {}
    sample: dict[int, Tensor] = {}
    tests = proposed = 0
    for label, rows in _classes(world):
        searched[label] = len(rows)
        seen = sample[label] = rows[torch.randperm(len(rows), generator=stream)[:_SEARCH_ROWS]].sort().values
        search = ClassSearch(world, label, seen)
        groups += search.groups([score[seen] for score in scores])
        mislabelled[seen] = search.mislabelled()
        marked += marked_groups(search)
        proposed += search.proposed
        tests += search.proposed + _TRIGGERS * CARRIER_GROUPS
    levels = Levels.of((1 - _FOR_MARKS) * alpha, tests)
    verdicts, classes = verdicts_on(groups, [examine(world, group, levels.gate) for group in groups], levels)
    verdicts = _with_kin(world, verdicts, _carriers(world, verdicts, sample), levels)
    by_class = [mine for label in searched if (mine := _strongest_first(verdicts, label))]
    marks = _marks(world, marked, alpha, proposed)
    wrong = [_whole(world, _joined(world, mine, levels.gate)) for mine in by_class if mine[0].poison]
    poison = (*wrong, *(mark for mark in marks if all(_shared(mark, one) < _MOSTLY for one in wrong)))
    convicted = {verdict.group.label for verdict in poison}
    harmless = tuple(mine[0] for mine in by_class if mine[0].group.label not in convicted)
    thresholds = FIRST * levels.rest / (classes + 1), levels.gate, FIRST * levels.kin / max(len(searched) - 1, 1)
    return Decision(poison, harmless, mislabelled, searched, *thresholds, tests)


def _carriers(world: World, verdicts: Sequence[Verdict], sample: Mapping[int, Tensor]) -> list[Group]:
    """Groups that carry one of the strongest triggers proven so far, of the classes where nothing stands."""
    proven = sorted((verdict for verdict in verdicts if verdict.poison), key=_effect, reverse=True)
    triggers: list[Trigger] = []
    for verdict in proven:
        if len(triggers) < _TRIGGERS and not any(verdict.group.trigger.likeness(one) >= _KIN for one in triggers):
            triggers.append(verdict.group.trigger)
    convicted = {verdict.group.label for verdict in proven}
    found = []
    for label, rows in sample.items():
        if triggers and label not in convicted:
            search = ClassSearch(world, label, rows)
            found += [group for trigger in triggers for group in search.carriers(trigger)]
    return found


def _marks(world: World, marked: Sequence[Group], alpha: float, proposed: int) -> tuple[Verdict, ...]:
    """The groups with a mark that stand, strongest first; those that share rows with a stronger one are left out.

    Their gap must be empty: one half of a class of many shapes leaves a gap with rows in it, and what it has beyond the
    other half turns more than a fifth of rows of a class that is hard to tell from it (shirts from coats).
    """
    level = _FOR_MARKS * alpha / max(_ASKED * proposed, 1)
    standing = []
    for group in marked:
        for evidence in (examine_mark(world, group, level), examine_spot(world, group, level)):
            if evidence is not None and evidence.valley <= EMPTY and evidence.p_value <= level:
                p_value = min(1.0, evidence.p_value * alpha / level)
                standing.append(Verdict(group, evidence, p_value, poison=True))
    found: list[Verdict] = []
    for verdict in sorted(standing, key=_effect, reverse=True):
        if not any(_shared(verdict, other) > _FEW_SHARED for other in found):
            found.append(verdict)
    return tuple(_whole(world, verdict) for verdict in found)


def _shared(verdict: Verdict, other: Verdict) -> float:
    """Share of the rows of a verdict that another one on the same class takes, too."""
    if verdict.group.label != other.group.label:
        return 0.0
    return float(other.group.inside[verdict.group.inside].double().mean())


def undecided(n: int = 0) -> Decision:
    """About n rows, none of which was searched for groups."""
    return Decision((), (), torch.zeros(n, dtype=torch.bool), {}, 0.0, 0.0, 0.0, 0)


def _classes(world: World) -> list[tuple[int, Tensor]]:
    """Classes with enough rows, where at least one other class can be compared with."""
    found = [(int(label), (world.labels == label).nonzero().flatten()) for label in world.labels.unique()]
    banks = set(world.conformity.banks)
    return [(label, rows) for label, rows in found if len(rows) >= SMALLEST_CLASS and banks - {label}]


def verdicts_on(
    groups: Sequence[Group], evidence: Sequence[GroupEvidence], levels: Levels, kin: bool = False
) -> tuple[list[Verdict], int]:
    """A verdict on each group, and how many classes had groups past the gate.

    The gate keeps out most groups at a small share of alpha, and says nothing of how many of their rows are foreign,
    nor of their gap. So the rest of alpha is for those that are past it: equal parts for their classes, and in a class
    in turn, those first that are nearest to other classes (to a tenth: honest rows in a group move it away), the larger
    of equal ones first. Of kin company and a gap with rows in it are the gate.
    """
    gates = [max(one.p_company, one.p_gap) if kin else one.p_gate for one in evidence]
    past: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        if gates[place] <= levels.gate:
            past.setdefault(group.label, []).append(place)
    share = (levels.kin if kin else levels.rest) / max(len(past), 1)
    own = dict.fromkeys(range(len(groups)), share)
    for places in past.values():
        places.sort(key=lambda place: (round(evidence[place].apart, 1), -int(groups[place].inside.sum())))
        own |= zip(places, in_turn([evidence[place].p_rest for place in places], share), strict=True)
    found = []
    for place, (group, one) in enumerate(zip(groups, evidence, strict=True)):
        excess = max(gates[place] / levels.gate, one.p_rest / own[place])
        found.append(Verdict(group, one, min(1.0, excess * levels.alpha / (1 - _FOR_MARKS)), excess <= 1, kin))
    return found, len(past)


def _with_kin(world: World, verdicts: Sequence[Verdict], carriers: Sequence[Group], levels: Levels) -> list[Verdict]:
    """The verdicts, where a trigger that was proven in one class need not be proven again in another.

    All-to-all poison is a small group in every class, all with one pattern. A group that carries it is foreign, stands
    apart and mixes with what it looks like; how often its trigger turns rows, and which part of the class is the
    stranger, is known from the other class.
    """
    proven = [verdict.group for verdict in verdicts if verdict.poison]
    known = [*verdicts, *(Verdict(group, examine(world, group, -1.0), 1.0, poison=False) for group in carriers)]
    kin = [
        (place, verdict.group, verdict.evidence)
        for place, verdict in enumerate(known)
        if isinstance(verdict.evidence, GroupEvidence)
        and not verdict.poison
        and any(_alike(verdict.group, other) for other in proven)
    ]
    evidence = [with_company(world, group, found) for _, group, found in kin]
    judged, _ = verdicts_on([group for _, group, _ in kin], evidence, levels, kin=True)
    for (place, _, _), verdict in zip(kin, judged, strict=True):
        if verdict.poison:
            known[place] = verdict
    return known


def _alike(group: Group, other: Group) -> bool:
    return group.label != other.label and group.trigger.likeness(other.trigger) >= _KIN


def _strongest_first(verdicts: Sequence[Verdict], label: int) -> list[Verdict]:
    """The verdicts on one class: those that stand first, then by effect, then by size."""
    mine = (verdict for verdict in verdicts if verdict.group.label == label)
    return sorted(mine, key=lambda v: (v.poison, round(_effect(v), 2), int(v.group.inside.sum())), reverse=True)


def _effect(verdict: Verdict) -> float:
    """How much of a group is foreign, stands apart, and works, as one number in [0, 1]."""
    evidence = verdict.evidence
    if not isinstance(evidence, GroupEvidence):
        return max(0.0, 1 - evidence.valley) * evidence.transfer
    return evidence.foreign * max(0.0, 1 - evidence.valley) * (evidence.transfer if verdict.poison else 1.0)


def _joined(world: World, verdicts: Sequence[Verdict], gate: float) -> Verdict:
    """The strongest group, and what others that stand have beyond it, where that is foreign and works by itself.

    Poison from several classes forms several clusters; a group that merely grew into the clean part adds honest rows,
    which the pattern taken off makes foreign.
    """
    strongest = verdicts[0]
    whole = strongest.group
    for verdict in verdicts[1:]:
        group = verdict.group
        further = group.inside & ~whole.inside
        if verdict.poison and _works_alone(world, whole, further, gate):
            whole = dataclasses.replace(
                whole,
                inside=whole.inside | group.inside,
                log_odds=torch.maximum(whole.log_odds, group.log_odds),
                foreign=torch.where(further, group.foreign, whole.foreign),
                looks_like=torch.where(further, group.looks_like, whole.looks_like),
            )
    return dataclasses.replace(strongest, group=whole)


def _works_alone(world: World, whole: Group, further: Tensor, gate: float) -> bool:
    """Whether further rows of the class, judged without what is proven, are foreign and have a trigger in common.

    Which part is the stranger is known by then, and the rest may hold more poison that is much like them.
    """
    left = ~whole.inside
    search = ClassSearch(world, whole.label, whole.rows[left])
    if not search.large_enough(further[left]):
        return False
    group = search.described(further[left])
    _, p_foreign = foreign_share(group.foreign, group.inside)
    return p_foreign <= _FURTHER and transfer_share(world, group, bend_of(world, group))[1] <= gate


def _whole(world: World, verdict: Verdict) -> Verdict:
    rows = (world.labels == verdict.group.label).nonzero().flatten()
    return dataclasses.replace(verdict, group=extended(world, verdict.group, rows))


def smallest_detectable(n: int, threshold: float, gate: float) -> int | None:
    """Rows of a group in a class of n that the tests find with 80 % power; None where no size up to n / 2 would do.

    Assumes that a proposal hits the group, that it is apart from the class in the features (nothing in between, 80 % of
    it at its peak), that 95 % of its rows are recognised as foreign and 95 % of transplants turned, and that it lies
    nearer to other classes and mixes with them.
    """
    if _power(TRANSPLANTS, MANY_TURNED, gate / (FORMS + 1)) < POWER:
        return None
    return smallest_kin(n, threshold)


def smallest_kin(n: int, threshold: float) -> int | None:
    """The same where transfer need not be shown, as the trigger was proven in another class."""
    fits = (size for size in range(6, n // 2 + 1) if _power(size, MOSTLY_FOREIGN, threshold) >= POWER)
    return next((size for size in fits if 0.5 ** int(0.8 * size) <= threshold), None)


def _power(n: int, share: float, threshold: float) -> float:
    """Chance that n trials that succeed with .95 each refute a success share of at most `share` at this level."""
    needed = int(stats.binom.isf(threshold, n, share)) + 1
    return float(stats.binom.sf(needed - 1, n, _FOUND_SHARE))
