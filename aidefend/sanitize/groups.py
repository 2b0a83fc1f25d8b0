"""Search one class for a group of rows that belong elsewhere: proposals from scores, settled in the features."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.bend import Bend
from aidefend.sanitize.separation import (
    bisections,
    cut,
    discriminant,
    held_out_log_odds,
    held_out_regression,
    inverse_covariance,
    settle,
    valley_counts,
    whiten,
)
from aidefend.sanitize.trigger import Trigger
from aidefend.sanitize.view import p_values, standardised
from aidefend.sanitize.world import World, turned

SHAPING = 100
CARRIER_GROUPS = 2
_TYPICAL = 0.05
_DEVELOPED = 3
_SHARPENED = 2
_WORTH_DEVELOPING = 0.25


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """A part of one class that may be poison.

    Args:
        label: The class.
        rows: Row numbers (n,) of the class in the data.
        inside: (n,) bool, which of them form the group.
        log_odds: (n,) held-out log-odds of being inside.
        foreign: (n,) bool: at home in another class and less so in its own, once the trigger is taken off the group.
        looks_like: (n,) the other class that fits best, -1 where none does.
        trigger: What the group's rows have in common beyond their nearest rows of other classes.
        matched: Row numbers of those nearest rows.
        content: (m, v) the group's own rows in the independent view, with the trigger taken off.
    """

    label: int
    rows: Tensor
    inside: Tensor
    log_odds: Tensor
    foreign: Tensor
    looks_like: Tensor
    trigger: Trigger
    matched: Tensor
    content: Tensor


class ClassSearch:
    """One class: its whitened features, its place in the independent view, and the distances among its rows."""

    def __init__(self, world: World, label: int, rows: Tensor) -> None:
        self.world, self.label, self.rows = world, label, rows
        self.stream = make_generator(seed=derive_seed(world.seed, "search", label) % 2**63)
        self.points = whiten(world.features[rows])
        self.inverse = inverse_covariance(self.points)
        self.view = world.conformity.coordinates[rows]
        self.among = torch.cdist(self.view, self.view).fill_diagonal_(torch.inf)
        self.elsewhere, self.nearest = world.conformity.others(self.view, label)
        self.beside = world.conformity.matched(self.view, label)
        self.proposed = 0
        self.settled: list[Tensor] = []

    def groups(self, scores: Sequence[Tensor]) -> list[Group]:
        """Distinct groups that the scores (each (n,), up = suspicious) and the shape of the features propose.

        `proposed` then holds how many proposals were looked at: the number of tests to correct for; `settled` what
        became of them in the features.
        """
        sides = self._proposals(scores)
        self.proposed = len(sides)
        found: dict[bytes, Group] = {}
        for side in self._ranked(sides):
            for group in self._developed(side):
                found.setdefault(group.inside.numpy().tobytes(), group)
        return list(found.values())

    def carriers(self, trigger: Trigger) -> list[Group]:
        """Groups of rows that carry a trigger from elsewhere: `CARRIER_GROUPS` at most, by its amount and by its spot.

        Where the model turns few rows into this class the class's own proposals are not developed; these are.
        """
        amounts = amounts_of(self.world, self.label, self.rows, trigger)
        return [
            group for column in range(CARRIER_GROUPS) for group in self._settled_with(cut(amounts[:, column]), amounts)
        ]

    def mislabelled(self) -> Tensor:
        """(n,) bool: rows that are strange to their own class (p <= .01) and typical of another (p > .1)."""
        own = self._own(torch.zeros(len(self.rows), dtype=torch.bool))
        return (own <= 0.01) & (self.elsewhere > 0.1)

    def _proposals(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Rows whose features predict that they are foreign; the upper part of each score; clusters of all sizes."""
        foreign = self._foreign(torch.zeros(len(self.rows), dtype=torch.bool), self.elsewhere)
        sides = []
        if bool(foreign.any()) and not bool(foreign.all()):
            sides.append(cut(held_out_regression(self.points, foreign, self.stream)))
        sides += [cut(torch.where(score.isnan(), score.nan_to_num().min(), score)) for score in scores]
        for node in bisections(self.points[:, -10:]):
            side = torch.zeros(len(self.rows), dtype=torch.bool)
            side[node] = True
            sides.append(side)
        return [side for side in sides if self.large_enough(side)]

    def _ranked(self, sides: list[Tensor]) -> list[Tensor]:
        """The few proposals to develop, settled: foreign ones that stand apart and whose pattern turns most probes.

        Poison often falls into several clusters that share one pattern, so the union of those that work is among them.
        Proposals whose pattern turns less than a quarter of the probes are left: they could not turn a third later.
        """
        settled = self.settled = self._settled(sides)
        rates = self._probed(settled)
        if max(rates, default=0.0) < _WORTH_DEVELOPING:
            return []
        worth = [rate * self._foreign_without_offset(side) for side, rate in zip(settled, rates, strict=True)]
        top = max(worth)
        works = [side for side, value in zip(settled, worth, strict=True) if value >= 0.8 * top]
        union = self._settled([torch.stack(works).any(dim=0)])
        rated = [(s, v) for s, v, rate in zip(settled, worth, rates, strict=True) if rate >= _WORTH_DEVELOPING]
        rated += [(side, top) for side in union]
        rated.sort(key=lambda pair: (-pair[1] * self.gap(pair[0]), -int(pair[0].sum())))
        return [side for side, _ in rated[:_DEVELOPED]]

    def _foreign_without_offset(self, side: Tensor) -> float:
        """Share of the side that fits another class better than the rest of its own, less its common offset."""
        conformity, view = self.world.conformity, self.view[side]
        offset = (view - conformity.coordinates[self.beside[side]].mean(dim=1)).mean(dim=0)
        fits = self.elsewhere.clone()
        fits[side] = conformity.others(view - offset, self.label)[0]
        return float(self._foreign(side, fits)[side].double().mean())

    def _settled(self, sides: list[Tensor]) -> list[Tensor]:
        """Each side settled in the features; equal ones once."""
        found = [settle(self.points, side, self.inverse) for side in sides]
        kept = {side.numpy().tobytes(): side for side in found if side is not None and self.large_enough(side)}
        return list(kept.values())

    def gap(self, side: Tensor) -> float:
        """How empty the space between a side and the rest is: 1 where no row is halfway, 0 where it is no gap."""
        direction, offset = discriminant(self.points, side, self.inverse)
        between, peak = valley_counts(self.points @ direction + offset, side)
        return max(0.0, 1 - between / max(peak, 1))

    def _probed(self, sides: list[Tensor]) -> list[float]:
        """For each side the share of probes that its pattern turns: of all, or of those that look like it if more."""
        world, matched = self.world, self.beside[:, 0]
        ours, theirs = world.x[self.rows].float(), world.x[matched].float()
        triggers = [Trigger.between(ours[side], theirs[side].mean(dim=0)) for side in sides]
        probes = world.probes[world.labels[world.probes] != self.label]
        rates = []
        for side, moved in zip(sides, turned(world, world.x[probes], triggers, self.label), strict=True):
            weight = torch.bincount(world.labels[matched[side]], minlength=int(world.labels.max()) + 1)
            alike = weight[world.labels[probes]].double()
            by_likeness = moved.double() @ alike / alike.sum().clamp(min=1)
            rates.append(max(float(moved.double().mean(dim=1).max()), float(by_likeness.max())))
        return rates

    def _developed(self, side: Tensor) -> list[Group]:
        """The group whose edge features and common pattern agree on, and the one that the pattern alone would cut.

        Twice: a sharper group tells its pattern better, and the pattern the group's edge.
        """
        group = self.described(side)
        found = [group]
        amounts = amounts_of(self.world, self.label, self.rows, group.trigger)
        for start in (cut(amounts[:, 0]), cut(amounts[:, 1]), side):
            found += self._settled_with(start, amounts)
        for _ in range(_SHARPENED):
            group, bend = found[-1], bend_of(self.world, found[-1])
            amounts = amounts_of(self.world, self.label, self.rows, group.trigger, bend)
            found += self._settled_with(group.inside, amounts, bend)
        return found

    def _settled_with(self, side: Tensor, amounts: Tensor, bend: Bend | None = None) -> list[Group]:
        """The side settled in the features and the amounts of a trigger, if it survives."""
        points = torch.cat([self.points, amounts], dim=1)
        settled = settle(points, side, inverse_covariance(points))
        return [self.described(settled, bend)] if settled is not None and self.large_enough(settled) else []

    def described(self, inside: Tensor, bend: Bend | None = None) -> Group:
        """The group of these rows (n,) of the class; `bend` counts in its log-odds."""
        trigger, offset, matched = self._common(inside)
        points = torch.cat([self.points, amounts_of(self.world, self.label, self.rows, trigger, bend)], dim=1)
        fits, which = self.elsewhere.clone(), self.nearest.clone()
        content = self.view[inside] - offset
        fits[inside], which[inside] = self.world.conformity.others(content, self.label)
        foreign = self._foreign(inside, fits)
        odds = held_out_log_odds(points, inside, self.stream)
        return Group(self.label, self.rows, inside, odds, foreign, which, trigger, matched, content)

    def _common(self, inside: Tensor) -> tuple[Trigger, Tensor, Tensor]:
        """What the group has beyond its content, in the inputs and in the view, and the rows that told its content."""
        offset, matched = self.world.conformity.common(self.view[inside], self.label)
        beside = self.world.x[matched.flatten()].float().mean(dim=0)
        ours = self.world.x[self.rows[inside]].float()
        return Trigger.between(ours, beside, exact=True), offset, matched.unique()

    def _own(self, inside: Tensor) -> Tensor:
        """(n,) p-value of fitting the rows of the class that are outside the group."""
        k = self.world.conformity.k
        distance = self.among.masked_fill(inside, torch.inf).topk(k, dim=1, largest=False).values[:, -1]
        return p_values(distance, distance[~inside].sort().values)

    def _foreign(self, inside: Tensor, elsewhere: Tensor) -> Tensor:
        """(n,) bool: typical of another class and fitting its own less, where own means its rows outside the group."""
        return (elsewhere > self._own(inside)) & (elsewhere > _TYPICAL)

    def large_enough(self, side: Tensor) -> bool:
        """Six rows, and enough outside to tell what is usual."""
        return int(side.sum()) >= 6 and int((~side).sum()) > self.world.conformity.k + 1


def amounts_of(world: World, label: int, rows: Tensor, trigger: Trigger, bend: Bend | None = None) -> Tensor:
    """(n, 3 or 4), standardised, of rows of one class.

    How much of the pattern is in each row, how exactly its spot is hit, how strange it is to its class; and with a bend
    how much nearer to other classes it comes if it is bent back.
    """
    x, conformity = world.x[rows], world.conformity
    columns = [world.view.amount(x, trigger.pattern), trigger.hit(x), conformity.strangeness(rows, label)]
    if bend is not None:
        near = conformity.distance_elsewhere(world.view.coordinates(bend.taken_off(x)), label).clamp(min=1e-12)
        columns.append(standardised((conformity.away(rows, label).clamp(min=1e-12) / near).double().log()))
    return torch.stack(columns, dim=1)


def bend_of(world: World, group: Group) -> Bend | None:
    """The displacement that explains a group of rows better than an added pattern does; None where none does.

    Each class that the group looks like gives a pair of means: of its own rows, and of the group's rows like it.
    """
    if not Bend.possible(world.x):
        return None
    x, looks_like = world.x[group.rows[group.inside]].float(), group.looks_like[group.inside]
    sources, aims, weights = [], [], []
    for other, bank in world.conformity.banks.items():
        like = looks_like == other
        if bool(like.any()) and other != group.label:
            sources.append(world.x[bank[:SHAPING]].float().mean(dim=0))
            aims.append(x[like].mean(dim=0))
            weights.append(float(like.sum()))
    if not sources:
        return None
    bend = Bend.between(torch.stack(sources), torch.stack(aims), torch.tensor(weights))
    return bend if bend.left < bend.left_by_adding else None


def extended(world: World, group: Group, rows: Tensor) -> Group:
    """The group on all rows of its class, where the search saw a sample: each is judged by the group's discriminant."""
    if len(rows) == len(group.rows):
        return group
    points = torch.cat([whiten(world.features[rows]), amounts_of(world, group.label, rows, group.trigger)], dim=1)
    place = torch.searchsorted(rows, group.rows)
    direction, offset = discriminant(points[place], group.inside, inverse_covariance(points[place]))
    odds = points @ direction + offset
    foreign, looks_like = torch.zeros(len(rows), dtype=torch.bool), torch.full((len(rows),), -1)
    foreign[place], looks_like[place] = group.foreign, group.looks_like
    return dataclasses.replace(group, rows=rows, inside=odds > 0, log_odds=odds, foreign=foreign, looks_like=looks_like)
