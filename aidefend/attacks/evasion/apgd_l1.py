"""Auto-PGD in l1: sparse steps whose number of features follows the best point, in balls that shrink to eps."""

import dataclasses

import torch
from torch import Tensor

from aidefend.attacks.evasion.access import Scored
from aidefend.attacks.evasion.minimum_norm import as_rows
from aidefend.attacks.evasion.search import Search

_PHASES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
_FIRST_SHARE = 0.2
_EVERY = 0.04
_STEADY = 0.95
_SHRINK, _SMALLEST = 1.5, 0.1


def climb_l1(search: Search, steps: int, random_start: bool) -> tuple[Tensor, Scored | None]:
    """One start, `steps` steps; the best point of the last phase, the one inside the threat, with its score.

    Args:
        search: The active rows.
        steps: Gradient steps in all; with less than ten all of them at eps itself.
        random_start: As for `APGD`.
    Source: Croce, Hein 2021 ("Mind the box"), algorithm 2 and section 4.1. Differs: features at their bound
        take no part in a step.
    """
    path = _Path.begin(search, search.start(random_start))
    done = 0
    for factor, count in _plan(steps):
        path.enter(search, factor)
        every = max(1, int(_EVERY * count))
        for turn in range(1, count + 1):
            path.step(search, last=done + turn == steps)
            if turn % every == 0:
                path.adapt(search)
            keep = search.compact(done + turn)
            if keep is not None:
                path.take(keep)
            if search.active == 0:
                return path.best, Scored(path.best_climb, path.best_hit)
        done += count
    return path.best, Scored(path.best_climb, path.best_hit)


def _plan(steps: int) -> list[tuple[float, int]]:
    """Radius as a multiple of eps, and steps, of each phase."""
    if steps < 10:
        return [(1.0, steps)]
    counts = [int(share * steps) for _, share in _PHASES[:-1]]
    return [(3.0, counts[0]), (2.0, counts[1]), (1.0, steps - sum(counts))]


@dataclasses.dataclass
class _Path:
    """One row each: the point, the best point of the phase with its gradient, step size and share of features."""

    point: Tensor
    grad: Tensor
    best: Tensor
    best_climb: Tensor
    best_hit: Tensor
    best_grad: Tensor
    size: Tensor
    share: Tensor
    count: Tensor
    factor: float = 1.0

    @classmethod
    def begin(cls, search: Search, point: Tensor) -> "_Path":
        scored, grad = search.gradient(point)
        one = torch.ones(len(point), 1, dtype=point.dtype, device=point.device)
        features = float(max(1, point[0].numel()))
        climb = scored.ordered
        return cls(point, grad, point, climb, scored.hit, grad, one, one * _FIRST_SHARE, one * features)

    def enter(self, search: Search, factor: float) -> None:
        """A ball of another radius, from the best point so far, which counts again only where it is allowed."""
        self.factor = factor
        self.point = search.advance(self.best, self._radius(search))
        self.grad = self.best_grad
        self.size = torch.ones_like(self.size)
        # What was best in a larger ball is beyond eps: the phase starts its record anew at its first step.
        outside = ~search.threat.with_eps(self._radius(search)).contains(search.snap(self.best), search.x)
        self.best = torch.where(as_rows(outside, self.best), self.point, self.best)
        self.best_climb = torch.where(outside, -torch.inf, self.best_climb)
        self.best_hit = self.best_hit & ~outside

    def step(self, search: Search, *, last: bool) -> None:
        """One step, scored; the last one needs no gradient."""
        step = as_rows(self.size, self.point) * self._radius(search)
        ahead = self.point + step * search.direction(self.grad, self.point, self.share)
        self.point = search.advance(ahead, self._radius(search))
        if last:
            scored, grad = search.score(self.point), self.grad
        else:
            allowed = None if self.factor == 1.0 else search.threat.contains(search.snap(self.point), search.x)
            scored, grad = search.gradient(self.point, allowed)
        self.grad = grad
        climb = scored.ordered
        better = climb > self.best_climb
        self.best = torch.where(as_rows(better, self.best), self.point, self.best)
        self.best_grad = torch.where(as_rows(better, grad), grad, self.best_grad)
        self.best_climb = torch.where(better, climb, self.best_climb)
        self.best_hit = torch.where(better, scored.hit, self.best_hit)

    def adapt(self, search: Search) -> None:
        """Fewer features than before in the best point: go on from it with large steps, else shrink them."""
        count = (search.snap(self.best) != search.x).flatten(1).sum(dim=1, keepdim=True).to(self.count)
        sparser = count / self.count.clamp(min=1) < _STEADY
        smaller = (self.size / _SHRINK).clamp(min=_SMALLEST)
        self.size = torch.where(sparser, 1.0, smaller)
        self.share = count / max(1, search.x[0].numel()) / _SHRINK
        self.count = count
        self.point = torch.where(as_rows(sparser, self.point), self.best, self.point)
        self.grad = torch.where(as_rows(sparser, self.grad), self.best_grad, self.grad)

    def take(self, keep: Tensor) -> None:
        """Keep these rows only."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value[keep])

    def _radius(self, search: Search) -> Tensor:
        return search.threat.radius(search.x) * self.factor
