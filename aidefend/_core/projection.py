"""Nearest points of a norm ball inside a box, in coordinates whose origin is the clean sample."""

import torch
from torch import Tensor

_BALL_STEPS = 12


def project_l2(step: Tensor, down: Tensor, up: Tensor, eps: Tensor) -> Tensor:
    """Nearest step of Euclidean length at most eps with -down <= step <= up: clip(t * step), t in (0, 1] the largest.

    The length of clip(t * step) grows with t; the features that stop at the box are found from below, so every iterate
    is feasible and the active set grows until it is exact.
    """
    room, size = torch.where(step >= 0, up, down), step.abs()
    if step.numel() == 0 or bool((_length(torch.minimum(size, room)) <= eps).all()):
        return step.sign() * torch.minimum(size, room)
    tiny = torch.finfo(step.dtype).tiny
    t = (eps / _length(step).clamp(min=tiny)).clamp(max=1.0)
    for _ in range(_BALL_STEPS):
        stopped = t * size > room
        left = (eps**2 - _length(torch.where(stopped, room, 0)) ** 2).clamp(min=0)
        free = _length(torch.where(stopped, 0, size))
        following = torch.where(free > tiny, left.sqrt() / free.clamp(min=tiny), 1.0).clamp(max=1.0)
        following = torch.maximum(t, following)
        if bool(((following - t) <= 1e-7 * following).all()):
            break
        t = following
    return step.sign() * torch.minimum(t * size, room)


def project_l1(step: Tensor, down: Tensor, up: Tensor, eps: Tensor) -> Tensor:
    """Nearest step of absolute sum at most eps with -down <= step <= up: each size falls by a common amount.

    The sum of clip(size - fall, 0, room) is piecewise linear in `fall`, with a corner where a feature leaves its bound
    (size - room) and one where it reaches zero (size). One sort of the corners gives the exact fall.
    """
    if step.numel() == 0:
        return step
    wide = torch.promote_types(step.dtype, torch.float32)
    size = step.abs().to(wide).flatten(1)
    room = torch.minimum(torch.where(step >= 0, up, down).to(wide).flatten(1), size)
    limit = by_row(eps.to(wide), step)
    if bool((room.sum(dim=1, keepdim=True) <= limit).all()):
        return (step.sign().flatten(1) * room.to(step.dtype)).reshape(step.shape)
    fall = _fall(size, room, limit)
    kept = torch.minimum((size - fall).clamp(min=0), room)
    total = kept.sum(dim=1, keepdim=True)
    kept = kept * (limit / total.clamp(min=torch.finfo(wide).tiny)).clamp(max=1.0)  # what rounding left too much
    return (step.sign().flatten(1) * kept.to(step.dtype)).reshape(step.shape)


def project_l0(gain: Tensor, eps: Tensor) -> Tensor:
    """Which items of each row may change, (N, m) bool: the floor(eps) largest positive gains; ties by position."""
    order = gain.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    places = torch.arange(gain.shape[1], device=gain.device).expand_as(order)
    rank.scatter_(1, order, places)
    return (rank < eps.reshape(-1, 1).floor()) & (gain > 0)


def gain_of(step: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The clipped step, and by how much taking it reduces the squared distance to the target: both (N, ...)."""
    clipped = step.sign() * torch.minimum(step.abs(), torch.where(step >= 0, up, down))
    return clipped, clipped * (2 * step - clipped)


def by_row(eps: Tensor, x: Tensor) -> Tensor:
    """One radius a sample: (N, 1)."""
    return eps.expand(len(x), *[1] * (x.ndim - 1)).reshape(-1, 1)


def _fall(size: Tensor, room: Tensor, limit: Tensor) -> Tensor:
    """The fall at which the sum of clip(size - fall, 0, room) is `limit`; zero where it is below it anyway: (N, 1)."""
    corners, order = torch.cat([size - room, size], dim=1).sort(dim=1)
    turn = torch.cat([torch.ones_like(size), -torch.ones_like(size)], dim=1).gather(1, order)
    active = turn.cumsum(dim=1)[:, :-1]  # features that shrink between a corner and the next one
    lost = torch.cat([torch.zeros_like(limit), (active * corners.diff(dim=1)).cumsum(dim=1)], dim=1)
    excess = (room.sum(dim=1, keepdim=True) - limit).clamp(min=0)
    at = (torch.searchsorted(lost.contiguous(), excess) - 1).clamp(0, corners.shape[1] - 2)
    rate = active.gather(1, at).clamp(min=1)
    fall = corners.gather(1, at) + (excess - lost.gather(1, at)) / rate
    return torch.where(excess > 0, fall, 0).clamp(min=0)


def _length(step: Tensor) -> Tensor:
    """Euclidean length over all but the batch dimension, shaped to broadcast against it."""
    length: Tensor = step.flatten(1).norm(dim=1)
    return length.reshape(-1, *[1] * (step.ndim - 1))
