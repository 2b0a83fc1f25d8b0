"""Whole numbers and one-hot groups: which of them change, and the points where they have."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aidefend._core.projection import project_l0
from aidefend._core.random import uniform

Groups = Sequence[Sequence[int]]


class Moves(NamedTuple):
    """The best other category of every group: by how much it is nearer, its price, its place in the group."""

    gain: Tensor
    cost: Tensor
    choice: Tensor


def rounded(
    point: Tensor, x: Tensor, allowed: Callable[[Tensor], Tensor], price: Tensor, left: Tensor, order: float
) -> Tensor:
    """Values (N, m) at whole numbers: the nearest ones, or the next ones towards x where the radius does not suffice.

    Args:
        point: (N, m), whole numbers at x.
        x: (N, m).
        allowed: Whether a value is allowed by itself: (N, m) bool.
        price: (N, m), length of a change by one.
        left: (N, 1), the radius that other features leave, to the power `order`.
        order: 1 or 2: lengths add up, and the largest fractions are served first. 0, inf: they do not.
    """
    inward = x + (point - x).trunc()
    outward = inward + (point - x).sign()
    share = (point - inward).abs()
    wanted = (share > 0.5) & allowed(outward)
    if order in (1.0, 2.0):
        near, far = ((price * (part - x)).abs() ** order for part in (inward, outward))
        places = torch.where(wanted, share, 0).argsort(dim=1, descending=True, stable=True)
        total = torch.where(wanted, far - near, 0).gather(1, places).cumsum(dim=1)
        slack = 1 + 8 * torch.finfo(x.dtype).eps
        served = total + near.sum(dim=1, keepdim=True) <= left * slack
        wanted = wanted & torch.zeros_like(wanted).scatter(1, places, served)
    return torch.where(wanted, outward, inward)


def best_moves(target: Tensor, x: Tensor, groups: Groups, change: Tensor, price: Tensor, norm: str) -> Moves:
    """The nearest category of each group to the target, among those that may change: each part (N, G).

    Args:
        target: (N, d), like x.
        x: (N, d), one-hot in every group.
        groups: Positions of each group.
        change: (N, d) bool; a category can be reached if it and the present one may change.
        price: (N, d), the length of a change by one.
        norm: Of the threat.
    """
    found = [_best_move(target[:, list(g)], x[:, list(g)], change[:, list(g)], price[:, list(g)], norm) for g in groups]
    gain, cost, choice = (torch.stack(part, dim=1) for part in zip(*found, strict=True))
    return Moves(gain, cost, choice)


def affordable(moves: Moves, others: Tensor, eps: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Which groups change, (N, G) bool, and the radius that is left for the other features, (N, 1).

    Args:
        moves: The best move of each group.
        others: (N, d): what changes of other features would gain; l0 weighs them against the groups.
        eps: (N, 1).
        norm: "l0": the largest gains. "l2", "l1": the largest gain for its price first.
    """
    if norm == "l0":
        taken = project_l0(torch.cat([moves.gain, others], dim=1), eps)[:, : moves.gain.shape[1]]
        return taken, (eps.floor() - taken.sum(dim=1, keepdim=True)).to(eps)
    left = eps**2 if norm == "l2" else eps.clone()
    taken, slack = torch.zeros_like(moves.gain, dtype=torch.bool), 1 + 8 * torch.finfo(eps.dtype).eps
    order = torch.where(moves.gain > 0, moves.gain / moves.cost, -1.0).argsort(dim=1, descending=True, stable=True)
    for place in order.split(1, dim=1):
        cost = moves.cost.gather(1, place)
        fits = (moves.gain.gather(1, place) > 0) & (cost <= left * slack)
        taken.scatter_(1, place, fits)
        left = (left - torch.where(fits, cost, 0)).clamp(min=0)
    return taken, left.sqrt() if norm == "l2" else left


def one_hot(x: Tensor, moves: Moves, taken: Tensor, groups: Groups) -> Tensor:
    """X with the chosen category in every group that changes: (N, d)."""
    point = x.clone()
    for place, group in enumerate(groups):
        hot = torch.nn.functional.one_hot(moves.choice[:, place], len(group)).to(x)
        point[:, list(group)] = torch.where(taken[:, place, None], hot, x[:, list(group)])
    return point


def outside(groups: Groups, x: Tensor) -> Tensor:
    """Features in no group: (d,) bool for x of shape (N, d)."""
    free = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    free[[position for group in groups for position in group]] = False
    return free


def drawn(target: Tensor, groups: Groups, stream: torch.Generator) -> Tensor:
    """The target (N, d) with every second group, by chance, at a category drawn uniformly."""
    target = target.clone()
    for group in groups:
        shares = uniform((len(target), len(group) + 1), stream, target)
        chosen = shares[:, :1] < 0.5
        target[:, list(group)] = torch.where(chosen, shares[:, 1:], target[:, list(group)])
    return target


def changed(step: Tensor, groups: Groups | None) -> Tensor:
    """Which features, and which groups as one each, differ from zero: (N, m) bool."""
    moved = step != 0
    if groups is None:
        return moved
    parts = [moved[:, list(group)].any(dim=1, keepdim=True) for group in groups]
    return torch.cat([moved[:, outside(groups, step)], *parts], dim=1)


def _best_move(target: Tensor, x: Tensor, change: Tensor, price: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    now = x.argmax(dim=1, keepdim=True)
    free = (change & change.gather(1, now)).scatter(1, now, True)
    score = price.square() * (2 * target - 1)  # by this, a one in this place brings the point nearer
    choice = torch.where(free, score, -torch.inf).argmax(dim=1, keepdim=True)
    gain = (score.gather(1, choice) - score.gather(1, now)).clamp(min=0)
    old, new = price.gather(1, now), price.gather(1, choice)
    cost = {"l0": torch.ones_like(old), "l2": old**2 + new**2}.get(norm, old + new)
    return gain[:, 0], cost[:, 0], choice[:, 0]
