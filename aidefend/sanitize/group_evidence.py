"""Five hypotheses under which a group is harmless. A group is called poison only if all of them fall."""

import dataclasses
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
MOSTLY_FOREIGN = 0.6
MANY_TURNED = 1 / 3
KEEPS_TO_ITSELF = 1 / 4


class GroupEvidence(NamedTuple):
    """What speaks against a group. Each p-value belongs to one hypothesis under which the group would be harmless.

    Args:
        foreign: Share of the group that fits another class and not its own; `p_foreign`: of H: at most six
            in ten, or no more than in the rest of its class.
        valley: Rows between the group and the rest, as share of those at the thinner peak; `p_valley`: of H: no gap.
        transfer: Share of ordinary rows of other classes that the group's trigger turns into the class in its best
            form (added, added twice, written, bent), NaN where the two other tests made it needless; `p_transfer`: of
            H: at most a third in any form (Bonferroni).
        apart: Median distance of its rows to the nearest other class over that inside the group, as share of the same
            for the rest of the class; NaN where the other tests made it needless; `p_nearer`: of H: the group lies no
            nearer to other classes than the rest of its class does. Of two parts it tells which is the stranger.
        company: How much more often its rows' neighbours are of the group than they would be if the group were a random
            part of the classes that it looks like, once the trigger is taken off: about 0 for poison, about .5 for a
            style of its own; `p_company`: of H: at least a quarter more often.
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
    def p_value(self) -> float:
        """Of H: the group is harmless in at least one of the five ways (intersection-union test)."""
        return max(self.p_foreign, self.p_valley, self.p_transfer, self.p_nearer, self.p_company)

    @property
    def p_kin(self) -> float:
        """The same without transfer and nearness, for a group whose trigger was proven in another class."""
        return max(self.p_foreign, self.p_valley, self.p_company)


def examine(world: World, group: Group, threshold: float) -> GroupEvidence:
    """All five tests; the dearer three only where the two cheaper ones leave the group suspect."""
    cheap = (*foreign_share(group.foreign, group.inside), *valley_depth(group.log_odds, group.inside))
    dear = (math.nan, 1.0, math.nan, 1.0, math.nan, 1.0)
    if max(cheap[1], cheap[3]) <= threshold:
        bend = bend_of(world, group.label, group.rows[group.inside], group.looks_like[group.inside])
        straight = group
        if bend is not None:
            content = world.view.coordinates(bend.taken_off(world.x[group.rows[group.inside]]))
            straight = dataclasses.replace(group, content=content)
        dear = (*transfer_share(world, group, bend), *nearness(world, group), *_company(world, straight))
    values = dict(zip(("foreign", "p_foreign", "valley", "p_valley"), cheap, strict=True))
    names = ("transfer", "p_transfer", "apart", "p_nearer", "company", "p_company")
    return GroupEvidence(**values, **dict(zip(names, dear, strict=True)))


def more_than(share: float, successes: int, n: int) -> float:
    """Exact p-value of H: the chance of a success is at most `share`."""
    return float(stats.binom.sf(successes - 1, n, share)) if n else 1.0


def foreign_share(foreign: Tensor, inside: Tensor) -> tuple[float, float]:
    """Share of foreign rows and p-value. H: at most six in ten, or no more than in the rest of the class."""
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

    A row's distance to other classes is measured against that to its own part, so that dense parts gain nothing. The
    test compares the ranks of these ratios (Mann, Whitney 1947); nothing is taken off the rows here.
    """
    conformity, inside = world.conformity, group.inside
    points = conformity.coordinates[group.rows]
    beyond = conformity.distance_elsewhere(points, group.label)
    within = torch.zeros(len(points), dtype=points.dtype)
    for part in (inside, ~inside):
        mine = points[part]
        within[part] = kth_distance(mine, mine, conformity.k, torch.arange(len(mine)))
    ratio = beyond / within.clamp(min=1e-12)
    p_value = stats.mannwhitneyu(ratio[inside].numpy(), ratio[~inside].numpy(), alternative="less").pvalue
    return float(ratio[inside].median() / ratio[~inside].median().clamp(min=1e-12)), float(p_value)


def _company(world: World, group: Group) -> tuple[float, float]:
    return own_company(world.conformity, group.label, group.content, group.looks_like[group.inside])


def own_company(conformity: Conformity, label: int, content: Tensor, likeness: Tensor) -> tuple[float, float]:
    """How much more than by chance a group's rows neighbour each other, and the p-value of H: a quarter or more.

    Args:
        conformity: The view.
        label: The group's class.
        content: (m, v) its rows in the view, with what they have in common taken off.
        likeness: (m,) the class that each looks like, -1 for none.
    Source: after the nearest-neighbour two-sample test of Schilling 1986; the mean over rows is taken as normal.
    """
    n = len(content)
    others = torch.cat([rows for other, rows in conformity.banks.items() if other != label])
    among = torch.cdist(content, content).fill_diagonal_(torch.inf)
    gaps = torch.cat([among, torch.cdist(content, conformity.coordinates[others])], dim=1)
    k = min(conformity.k, n - 1)
    observed = (gaps.topk(k, dim=1, largest=False).indices < n).double().mean(dim=1)
    ours = torch.tensor([float((likeness == like).sum()) for like in likeness.tolist()])
    theirs = torch.tensor([float(len(conformity.banks.get(like, ()))) for like in likeness.tolist()])
    excess = observed - ours / (ours + theirs)
    error = max(float(excess.std()) / math.sqrt(n), 1 / (k * n))
    return float(excess.mean()), float(stats.norm.sf((KEEPS_TO_ITSELF - float(excess.mean())) / error))
