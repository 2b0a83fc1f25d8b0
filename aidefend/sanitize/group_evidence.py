"""Five hypotheses under which a group is harmless. A group is called poison only if all of them fall."""

import math
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.bend import Bend
from aidefend.sanitize.groups import SHAPING, Group, bend_of
from aidefend.sanitize.neighbour_disagreement import kth_distance
from aidefend.sanitize.separation import valley_counts
from aidefend.sanitize.trigger import FORMS
from aidefend.sanitize.view import Conformity
from aidefend.sanitize.world import World, turned

TRANSPLANTS = 200
MOSTLY_FOREIGN = 0.5
MANY_TURNED = 1 / 3
KEEPS_TO_ITSELF = 1 / 4
CLEARLY_NEARER = 0.8
EMPTY = 0.1


class GroupEvidence(NamedTuple):
    """What speaks against a group. Each p-value belongs to one hypothesis under which the group would be harmless.

    Args:
        foreign: Share of the group that fits another class and not its own; `p_foreign`: of H: at most half, or no
            more than in the rest of its class.
        valley: Rows between the group and the rest, as share of those at the thinner peak; `p_valley`: of H: no gap.
        transfer: Share of ordinary rows of other classes that the group's trigger turns into the class in its best
            form (added, added twice, written, bent), NaN where nearness made it needless; `p_transfer`: of H: at most
            a third in any form (Bonferroni).
        apart: Median distance of its rows to the nearest other class over that inside the group, as share of the same
            for the rest of the class, less what either part has in common; `p_nearer`: of H: the group lies no nearer
            to other classes than the rest of its class does, and without what either has in common not by a fifth. Of
            two parts it tells which is the stranger.
        company: How much more often its rows' neighbours are of the group than they would be if the group were a random
            part of the classes that it looks like, once the trigger is taken off: about 0 for poison, about .5 for a
            style of its own, NaN where nearness made it needless; `p_company`: of H: at least a quarter more often.
    """

    foreign: float
    valley: float
    transfer: float
    p_foreign: float
    p_valley: float
    p_transfer: float
    apart: float
    p_nearer: float
    company: float
    p_company: float

    @property
    def p_gap(self) -> float:
        """Of H: no gap, where rows lie in it, else 0: cuts that settled show a gap with some rows in any class."""
        return self.p_valley if self.valley > EMPTY else 0.0

    @property
    def p_gate(self) -> float:
        """Of H: harmless in at least one of the ways that every proposal is asked about first."""
        return max(self.p_transfer, self.p_nearer, self.p_company, self.p_gap)

    @property
    def p_rest(self) -> float:
        """Of H: harmless in at least one of the two ways that small groups find hard to refute; an empty gap is one."""
        return max(self.p_foreign, self.p_valley if self.valley <= EMPTY else 0.0)

    @property
    def p_value(self) -> float:
        """Of H: the group is harmless in at least one of the five ways (intersection-union test)."""
        return max(self.p_gate, self.p_rest)


def examine(world: World, group: Group, threshold: float) -> GroupEvidence:
    """All five tests; the dearer two, transfer and company, only where the group lies nearer to other classes."""
    foreign, p_foreign = foreign_share(group.foreign, group.inside)
    valley, p_valley = valley_depth(group.log_odds, group.inside)
    apart, p_nearer = nearness(world, group)
    dear = (math.nan, 1.0, math.nan, 1.0)
    if p_nearer <= threshold:
        bend = bend_of(world, group)
        dear = (*transfer_share(world, group, bend), *_company(world, group, bend))
    transfer, p_transfer, company, p_company = dear
    return GroupEvidence(
        foreign, valley, transfer, p_foreign, p_valley, p_transfer, apart, p_nearer, company, p_company
    )


def with_company(world: World, group: Group, evidence: GroupEvidence) -> GroupEvidence:
    """The evidence with the test of company, where nearness had made it needless."""
    if not math.isnan(evidence.company):
        return evidence
    company, p_company = _company(world, group, bend_of(world, group))
    return evidence._replace(company=company, p_company=p_company)


def more_than(share: float, successes: int, n: int) -> float:
    """Exact p-value of H: the chance of a success is at most `share`."""
    return float(stats.binom.sf(successes - 1, n, share)) if n else 1.0


def foreign_share(foreign: Tensor, inside: Tensor) -> tuple[float, float]:
    """Share of foreign rows and p-value. H: at most half, or no more than in the rest of the class."""
    ours, n = int(foreign[inside].sum()), int(inside.sum())
    others, rest = int(foreign[~inside].sum()), int((~inside).sum())
    excess = float(stats.fisher_exact([[ours, n - ours], [others, rest - others]], alternative="greater").pvalue)
    return ours / n, max(more_than(MOSTLY_FOREIGN, ours, n), excess)


def valley_depth(log_odds: Tensor, inside: Tensor) -> tuple[float, float]:
    """Rows in the valley as share of those at the thinner peak, and its p-value. H: the density is not lower there."""
    between, peak = valley_counts(log_odds, inside)
    return between / max(peak, 1), float(stats.binom.cdf(between, between + peak, 0.5)) if peak else 1.0


def transfer_share(world: World, group: Group, bend: Bend | None = None) -> tuple[float, float]:
    """Share of ordinary rows that the trigger turns into the class, and its p-value. H: at most a third, in each form.

    The rows are of the classes that the group looks like, in the same proportions; none of them shaped the trigger.
    """
    stream = make_generator(seed=derive_seed(world.seed, "transplant", group.label) % 2**63)
    free = world.labels != group.label
    free[group.matched] = False
    free[world.probes] = False
    likeness = group.looks_like[group.inside & group.foreign]
    if bend is not None:
        free[torch.cat([bank[:SHAPING] for bank in world.conformity.banks.values()])] = False
    rows = drawn_like(likeness[likeness >= 0], world.labels, free, stream)
    counts = turned(world, world.x[rows], [group.trigger], group.label)[0].sum(dim=1).tolist()
    if bend is not None and len(rows):
        moved = world.predict(bend.put_on(world.x[rows])) == group.label
        counts.append(int((moved & (world.predict(world.x[rows]) != group.label)).sum()))
    p_value = more_than(MANY_TURNED, max(counts), len(rows))
    return max(counts) / max(len(rows), 1), min(1.0, (FORMS + 1) * p_value)


def drawn_like(likeness: Tensor, labels: Tensor, free: Tensor, stream: torch.Generator) -> Tensor:
    """About 200 free rows whose labels occur in the proportions of `likeness`."""
    wanted = torch.bincount(likeness, minlength=int(labels.max()) + 1)
    chosen = [torch.zeros(0, dtype=torch.int64)]
    for label in wanted.nonzero().flatten().tolist():
        rows = (free & (labels == label)).nonzero().flatten()
        share = math.ceil(TRANSPLANTS * int(wanted[label]) / int(wanted.sum()))
        chosen.append(rows[torch.randperm(len(rows), generator=stream)[:share]])
    return torch.cat(chosen)


def nearness(world: World, group: Group) -> tuple[float, float]:
    """How far the group is from other classes, relative to the rest of its class, and the p-value of H: no nearer.

    Asked twice (Bonferroni): of the rows as they are; and with what either part has in common taken off, where a loud
    trigger carries its rows away from all classes and makes the clean part look the nearer one. There any part may
    gain, so the group must be nearer by a fifth. A row's distance to other classes is measured against that to its
    own part, so that dense parts gain nothing. The tests compare the ranks of these ratios (Mann, Whitney 1947). The
    first figure is that of the second question.
    """
    conformity, inside = world.conformity, group.inside
    points = conformity.coordinates[group.rows]
    without = points.clone()
    for part in (inside, ~inside):
        without[part] -= conformity.common(points[part], group.label)[0]
    as_they_are = conformity.away(group.rows, group.label) / _within(conformity, group, points)
    bare = conformity.distance_elsewhere(without, group.label) / _within(conformity, group, without)
    scaled = torch.where(inside, bare / CLEARLY_NEARER, bare)
    p_values = [_ranked_lower(values, inside) for values in (as_they_are, scaled)]
    return float(bare[inside].median() / bare[~inside].median().clamp(min=1e-12)), min(1.0, 2 * min(p_values))


def _within(conformity: Conformity, group: Group, points: Tensor) -> Tensor:
    """(n,) distance of each row to its own part."""
    within = torch.zeros(len(points), dtype=points.dtype)
    for part in (group.inside, ~group.inside):
        mine = points[part]
        within[part] = kth_distance(mine, mine, conformity.k, torch.arange(len(mine)))
    return within.clamp(min=1e-12)


def _ranked_lower(values: Tensor, inside: Tensor) -> float:
    """p-value of H: the values inside are no lower than the others."""
    return float(stats.mannwhitneyu(values[inside].numpy(), values[~inside].numpy(), alternative="less").pvalue)


def _company(world: World, group: Group, bend: Bend | None) -> tuple[float, float]:
    """The company of a group in the one of two comparisons where it mixes better (Bonferroni).

    What it has in common is taken off its rows, or, as a stamp hides what was under it and to take it off does not
    bring that back, written on the others.
    """
    conformity, mine, likeness = world.conformity, group.rows[group.inside], group.looks_like[group.inside]
    if bend is not None:
        straight = world.view.coordinates(bend.taken_off(world.x[mine]))
        return own_company(conformity, group.label, straight, likeness)
    marked = world.view.coordinates(group.trigger.written(world.x[conformity.beside(group.label)]))
    found = [
        own_company(conformity, group.label, group.content, likeness),
        own_company(conformity, group.label, conformity.coordinates[mine], likeness, marked),
    ]
    company, p_value = min(found, key=lambda one: one[1])
    return company, min(1.0, 2 * p_value)


def own_company(
    conformity: Conformity, label: int, content: Tensor, likeness: Tensor, others: Tensor | None = None
) -> tuple[float, float]:
    """How much more than by chance a group's rows neighbour each other, and the p-value of H: a quarter or more.

    Args:
        conformity: The view.
        label: The group's class.
        content: (m, v) its rows in the view, with what they have in common taken off.
        likeness: (m,) the class that each looks like, -1 for none.
        others: (b, v) the rows of `conformity.beside(label)`, changed; None: as they are.
    Source: after the nearest-neighbour two-sample test of Schilling 1986; the mean over rows is taken as normal.
    """
    n = len(content)
    beside = conformity.coordinates[conformity.beside(label)] if others is None else others
    among = torch.cdist(content, content).fill_diagonal_(torch.inf)
    gaps = torch.cat([among, torch.cdist(content, beside)], dim=1)
    k = min(conformity.k, n - 1)
    observed = (gaps.topk(k, dim=1, largest=False).indices < n).double().mean(dim=1)
    ours = torch.tensor([float((likeness == like).sum()) for like in likeness.tolist()])
    theirs = torch.tensor([float(len(conformity.banks.get(like, ()))) for like in likeness.tolist()])
    excess = observed - ours / (ours + theirs)
    error = max(float(excess.std()) / math.sqrt(n), 1 / (k * n))
    return float(excess.mean()), float(stats.norm.sf((KEEPS_TO_ITSELF - float(excess.mean())) / error))
