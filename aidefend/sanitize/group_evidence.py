"""Three hypotheses under which a group is harmless. A group is called poison only if all three fall."""

import math
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.groups import Group
from aidefend.sanitize.separation import valley_counts
from aidefend.sanitize.world import World, turned

TRANSPLANTS = 200


class GroupEvidence(NamedTuple):
    """What speaks against a group. Each p-value belongs to one hypothesis under which the group would be harmless.

    Args:
        foreign: Share of the group that fits another class and not its own; `p_foreign`: of H: at most half, or no more
            than in the rest of its class.
        valley: Rows between the group and the rest, as share of those at the thinner peak; `p_valley`: of H: no gap.
        transfer: Share of ordinary rows of other classes that the group's pattern turns into the class, NaN where the
            two other tests made it needless; `p_transfer`: of H: at most half.
        company: How much more its rows keep to themselves, with the pattern taken off, than rows of the classes that
            they look like would; about 0 for poison, NaN where the tests made it needless. Of two groups of one class
            that both stand, this tells which is the stranger.
    """

    foreign: float
    valley: float
    transfer: float
    p_foreign: float
    p_valley: float
    p_transfer: float
    company: float

    @property
    def p_value(self) -> float:
        """Of H: the group is harmless in at least one of the three ways (intersection-union test)."""
        return max(self.p_foreign, self.p_valley, self.p_transfer)


def examine(world: World, group: Group, threshold: float) -> GroupEvidence:
    """All three tests; the pattern is transplanted only where the two cheaper ones leave the group suspect."""
    foreign, p_foreign = foreign_share(group.foreign, group.inside)
    valley, p_valley = valley_depth(group.log_odds, group.inside)
    transfer, p_transfer, company = math.nan, 1.0, math.nan
    if max(p_foreign, p_valley) <= threshold:
        transfer, p_transfer = transfer_share(world, group)
        company = own_company(world, group)
    return GroupEvidence(foreign, valley, transfer, p_foreign, p_valley, p_transfer, company)


def more_than_half(successes: int, n: int) -> float:
    """p-value of H: the share is at most one half."""
    return float(stats.binom.sf(successes - 1, n, 0.5)) if n else 1.0


def foreign_share(foreign: Tensor, inside: Tensor) -> tuple[float, float]:
    """Share of foreign rows and p-value. H: at most half of the group, or no more than in the rest of its class."""
    ours, n = int(foreign[inside].sum()), int(inside.sum())
    others, rest = int(foreign[~inside].sum()), int((~inside).sum())
    excess = float(stats.fisher_exact([[ours, n - ours], [others, rest - others]], alternative="greater").pvalue)
    return ours / n, max(more_than_half(ours, n), excess)


def valley_depth(log_odds: Tensor, inside: Tensor) -> tuple[float, float]:
    """Rows in the valley as share of those at the thinner peak, and its p-value. H: the density is not lower there."""
    between, peak = valley_counts(log_odds, inside)
    return between / max(peak, 1), float(stats.binom.cdf(between, between + peak, 0.5)) if peak else 1.0


def transfer_share(world: World, group: Group) -> tuple[float, float]:
    """Share of ordinary rows that the pattern turns into the class, and its p-value. H: at most half.

    The rows are of the classes that the group looks like, in the same proportions; none of them shaped the pattern.
    """
    stream = make_generator(seed=derive_seed(world.seed, "transplant", group.label) % 2**63)
    free = world.labels != group.label
    free[group.matched] = False
    free[world.probes] = False
    likeness = group.looks_like[group.inside & group.foreign]
    rows = drawn_like(likeness[likeness >= 0], world.labels, free, stream)
    count = int(turned(world, world.x[rows], [group.pattern], group.label)[0].sum())
    return count / max(len(rows), 1), more_than_half(count, len(rows))


def drawn_like(likeness: Tensor, labels: Tensor, free: Tensor, stream: torch.Generator) -> Tensor:
    """About 200 free rows whose labels occur in the proportions of `likeness`."""
    wanted = torch.bincount(likeness, minlength=int(labels.max()) + 1)
    chosen = [torch.zeros(0, dtype=torch.int64)]
    for label in wanted.nonzero().flatten().tolist():
        rows = (free & (labels == label)).nonzero().flatten()
        share = math.ceil(TRANSPLANTS * int(wanted[label]) / int(wanted.sum()))
        chosen.append(rows[torch.randperm(len(rows), generator=stream)[:share]])
    return torch.cat(chosen)


def own_company(world: World, group: Group) -> float:
    """Mean share of the group among its rows' neighbours, less the share that random rows of those classes would have.

    Source: after the nearest-neighbour two-sample test of Schilling 1986.
    """
    conformity, n = world.conformity, len(group.content)
    others = torch.cat([rows for label, rows in conformity.banks.items() if label != group.label])
    among = torch.cdist(group.content, group.content).fill_diagonal_(torch.inf)
    gaps = torch.cat([among, torch.cdist(group.content, conformity.coordinates[others])], dim=1)
    nearest = gaps.topk(min(conformity.k, n - 1), dim=1, largest=False).indices
    likeness = group.looks_like[group.inside]
    ours = torch.tensor([float((likeness == label).sum()) for label in likeness.tolist()])
    bank = torch.tensor([float(len(conformity.banks.get(label, ()))) for label in likeness.tolist()])
    return float((nearest < n).double().mean() - (ours / (ours + bank)).double().mean())
