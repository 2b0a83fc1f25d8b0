"""The region of inputs that filters around the rows of a class let pass, and the nearest point inside it."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

Filter = Literal["sphere", "slab", "subspace", "ellipsoid", "range", "loss"]
_VARIANCE = 0.95  # share of the variance that the kept directions of "subspace" hold
_SHRINKAGE = 0.02  # of a covariance towards a multiple of the identity, so that its inverse exists
_SWEEPS = 30


class Convex(Protocol):
    """A convex set of points (d,)."""

    def nearest(self, point: Tensor) -> Tensor:
        """The point of the set that lies nearest."""


@dataclasses.dataclass(frozen=True, eq=False)
class Quadric:
    """Points whose coordinates along some axes have a weighted length of at most `radius`.

    Args:
        center: (d,).
        axes: (d, m), orthonormal columns; None: all coordinates.
        weights: (m,) > 0, of the squared coordinates; a number where all are alike.
        radius: >= 0.
    """

    center: Tensor
    axes: Tensor | None
    weights: Tensor
    radius: Tensor

    def length(self, points: Tensor) -> Tensor:
        """(n,) weighted lengths of points (n, d): what the filter calls suspicious."""
        along: Tensor = self._along(points)
        return (self.weights * along.square()).sum(dim=-1).sqrt()

    def nearest(self, point: Tensor) -> Tensor:
        """Lagrange's multiplier by Newton's method on one over the length: exact at once where the weights are one."""
        along = self._along(point)
        multiplier = torch.zeros((), dtype=point.dtype)
        shrunk = along
        for _ in range(50):
            shrunk = along / (1 + multiplier * self.weights)
            length = (self.weights * shrunk.square()).sum().sqrt()
            if length <= self.radius * (1 + 1e-9):
                break
            if not float(self.radius) > 0:
                shrunk = torch.zeros_like(along)
                break
            slope = (self.weights.square() * shrunk.square() / (1 + multiplier * self.weights)).sum()
            multiplier = multiplier + length.square() / slope * (length / self.radius - 1)
        moved = shrunk - along
        return point + (moved if self.axes is None else self.axes @ moved)

    def _along(self, points: Tensor) -> Tensor:
        offset = points - self.center
        return offset if self.axes is None else offset @ self.axes


@dataclasses.dataclass(frozen=True, eq=False)
class Box:
    """Points between two corners (d,)."""

    low: Tensor
    high: Tensor

    def nearest(self, point: Tensor) -> Tensor:
        """Clipped."""
        return point.clamp(self.low, self.high)


@dataclasses.dataclass(frozen=True, eq=False)
class HalfSpace:
    """Points with normal . point >= least."""

    normal: Tensor
    least: Tensor

    def nearest(self, point: Tensor) -> Tensor:
        """Moved along the normal as far as it lacks."""
        lacking = (self.least - self.normal @ point).clamp(min=0)
        found: Tensor = point + self.normal * lacking / (self.normal @ self.normal).clamp(min=1e-300)
        return found


def region(own: Tensor, other: Tensor, filters: Sequence[str], removed: float) -> list[Convex]:
    """What filters that drop the share `removed` of the class with the rows `own` (n, d) let pass of it."""
    made: list[Convex] = []
    for name in filters:
        if name == "range":
            both = torch.cat([own, other])
            made.append(Box(both.amin(dim=0), both.amax(dim=0)))
        elif name != "loss":  # depends on a model
            made.append(_cut(_shape(name, own, other), own, removed))
    return made


def nearest(point: Tensor, sets: Sequence[Convex]) -> Tensor:
    """The nearest point of the intersection, to the accuracy of some sweeps, then one that lies inside all sets.

    Source: Boyle, Dykstra 1986; the last part is plain alternation, which ends inside.
    """
    kept = [torch.zeros_like(point) for _ in sets]
    for _ in range(_SWEEPS):
        before = point
        for place, one in enumerate(sets):
            wanted = point + kept[place]
            point = one.nearest(wanted)
            kept[place] = wanted - point
        if (point - before).norm() <= 1e-6 * (1 + point.norm()):
            break
    for _ in range(_SWEEPS):
        before = point
        for one in sets:
            point = one.nearest(point)
        if torch.equal(point, before):
            break
    return point


def _shape(name: str, own: Tensor, other: Tensor) -> Quadric:
    center, one, any_radius = own.mean(dim=0), own.new_ones(()), own.new_zeros(())
    if name == "sphere":
        return Quadric(center, None, one, any_radius)
    if name == "slab":
        between = other.mean(dim=0) - center
        return Quadric(center, (between / between.norm().clamp(min=1e-300))[:, None], one, any_radius)
    if name == "ellipsoid":
        covariance = _covariance(own)
        level = covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance), dtype=own.dtype)
        spreads, axes = torch.linalg.eigh((1 - _SHRINKAGE) * covariance + _SHRINKAGE * level)
        return Quadric(center, axes, 1 / spreads, any_radius)
    both = torch.cat([own, other])
    spreads, axes = torch.linalg.eigh(_covariance(both))  # ascending
    outside = spreads.cumsum(dim=0) <= (1 - _VARIANCE) * spreads.sum()
    return Quadric(both.mean(dim=0), axes[:, outside], one, any_radius)


def _covariance(x: Tensor) -> Tensor:
    """(d, d), also where d = 1."""
    centred = x - x.mean(dim=0)
    return centred.T @ centred / len(x)


def _cut(shape: Quadric, own: Tensor, removed: float) -> Quadric:
    """The radius that leaves the share `removed` of the rows outside."""
    return dataclasses.replace(shape, radius=torch.quantile(shape.length(own), 1 - removed))
