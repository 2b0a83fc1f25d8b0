"""The geometry of a threat: the nearest allowed point, with prices, whole numbers and one-hot groups."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aidefend._core.discrete import affordable, best_moves, one_hot, outside, rounded
from aidefend._core.projection import by_row, gain_of, project_l0, project_l1, project_l2

if TYPE_CHECKING:
    from aidefend._core.threat import Threat

ORDERS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


def nearest(threat: Threat, x_adv: Tensor, x: Tensor, eps: Tensor, change: Tensor | None) -> Tensor:
    """The nearest allowed point where only the features of `change` change, as if there were no groups."""
    low, high = threat.limits(x)
    if threat.norm == "linf":
        reach, target = threat.unpriced(eps), x_adv if change is None else torch.where(change.to(x.device), x_adv, x)
        point = torch.clamp(target, x - reach, x + reach)
    else:
        step = x_adv - x if change is None else (x_adv - x) * change.to(x.device)
        point = x + _shortened(threat, step, x - low, high - x, eps)
    point = torch.clamp(point, low, high)
    if threat.integer is None:
        return point
    return _whole(threat, point, x, eps, threat.integer.to(x.device).expand_as(x))


def _shortened(threat: Threat, step: Tensor, down: Tensor, up: Tensor, eps: Tensor) -> Tensor:
    """The nearest step in the ball of l2, l1 or l0 that goes no further than `down` below and `up` above x."""
    step, down, up = (threat.priced(part) for part in (step, down.clamp(min=0), up.clamp(min=0)))
    if threat.norm == "l2":
        step = project_l2(step, down, up, eps)
    elif threat.norm == "l1":
        step = project_l1(step, down, up, eps)
    else:
        step, gain = gain_of(step, down, up)
        step = step * project_l0(gain.flatten(1), by_row(eps, step)).reshape(step.shape)
    return threat.unpriced(step)


def _whole(threat: Threat, point: Tensor, x: Tensor, eps: Tensor, integer: Tensor) -> Tensor:
    """The point with its integer features at whole numbers."""
    places = integer[0].flatten().nonzero()[:, 0]
    price = threat.priced(torch.ones_like(x))
    order = ORDERS.get(threat.norm, 0.0)
    low, high = (part.expand_as(x).flatten(1)[:, places] for part in threat.limits(x))
    reach = (eps / price).expand_as(x).flatten(1)[:, places] * (1 + 4 * torch.finfo(x.dtype).eps)
    left = by_row(eps, x) if threat.norm != "linf" else eps.new_zeros(len(x), 1)
    if order in (1.0, 2.0):
        others = torch.where(integer, 0, price * (point - x)).flatten(1).abs() ** order
        left = left**order - others.sum(dim=1, keepdim=True)
    origin, target = x.flatten(1)[:, places], point.flatten(1).clone()

    def allowed(value: Tensor) -> Tensor:
        inside = (value >= low) & (value <= high)
        return inside & ((value - origin).abs() <= reach) if threat.norm == "linf" else inside

    found = rounded(target[:, places], origin, allowed, price.flatten(1)[:, places], left, order)
    target[:, places] = found
    return target.reshape(x.shape)


def move_groups(threat: Threat, x_adv: Tensor, x: Tensor, groups: tuple[tuple[int, ...], ...]) -> Tensor:
    """Categories first, then the other features with what is left of the radius."""
    origin, limit = x.flatten(1), threat.radius(x)
    price = threat.priced(torch.ones_like(x))
    change = threat.changeable(x).expand_as(x)
    free = outside(groups, origin).reshape(x.shape[1:])
    within = change
    if threat.norm == "linf":
        within = change & (price <= limit * (1 + 4 * torch.finfo(x.dtype).eps))
    moves = best_moves(x_adv.flatten(1), origin, groups, within.flatten(1), price.flatten(1), threat.norm)
    if threat.norm == "linf":
        taken, left = moves.gain > 0, limit
    else:
        low, high = threat.limits(x)
        parts = (x_adv - x) * (change & free), (x - low).clamp(min=0), (high - x).clamp(min=0)
        _, gain = gain_of(*(threat.priced(part) for part in parts))
        taken, left = affordable(moves, gain.flatten(1), by_row(limit, x), threat.norm)
        left = left.reshape(-1, *[1] * (x.ndim - 1))
    moved = one_hot(origin, moves, taken, groups).reshape(x.shape)
    found = torch.where(free, nearest(threat, x_adv, x, left, change & free), moved)
    if threat.norm in ("linf", "l0"):
        return found
    still = torch.where(free, nearest(threat, x_adv, x, limit, change & free), x)
    return torch.where(_gap(still - x_adv, price) < _gap(found - x_adv, price), still, found)


def _gap(step: Tensor, price: Tensor) -> Tensor:
    """Squared length of each row, shaped to broadcast against it."""
    return (step * price).flatten(1).square().sum(dim=1).reshape(-1, *[1] * (step.ndim - 1))


def near(threat: Threat, x_adv: Tensor, x: Tensor, rounding: Tensor, slack: float) -> Tensor:
    """Whether the length is at most eps, for the norms that sum over features."""
    eps = threat.radius(x).double().reshape(-1)
    length = threat.distance(x_adv, x)
    if threat.norm == "l0":
        return length <= eps.floor()
    rounded_off = torch.linalg.vector_norm(threat.priced(rounding).flatten(1), ord=ORDERS[threat.norm], dim=1)
    found: Tensor = length <= eps * (1 + slack) + rounded_off
    return found
