"""Attackers for benchmarks of query monitors: a boundary walk, a recorder of queries, and disguises of a sequence."""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from aidefend import Threat


class Enough(BaseException):
    """The attacker has what it wants, or no queries left."""


class Recorder:
    """A model of one row at a time that keeps every query, and ends the attack at its success.

    Success is a query inside the threat whose top class is wrong: what the attacker could hand on.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: int, threat: Threat, most: int) -> None:
        self.model, self.x, self.y, self.threat, self.most = model, x, y, threat, most
        self.queries: list[Tensor] = []
        self.count = 0
        self.success = False

    def __call__(self, x: Tensor) -> Tensor:
        """The answer to (n, ...) queries, asked one after the other."""
        with torch.no_grad():
            outputs = self.model(x)
        hit = (outputs.argmax(dim=1) != self.y) & self.threat.contains(x, self.x.expand_as(x))
        first = int(hit.float().argmax()) if bool(hit.any()) else len(x) - 1
        self.success = bool(hit.any())
        room = self.most - self.count
        self.queries.append(x[: min(first + 1, room)].detach().clone())
        self.count += len(self.queries[-1])
        if self.success and first + 1 > room:
            self.success = False
        if self.success or self.count >= self.most:
            raise Enough
        return outputs


def record(
    attack: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, torch.Generator], object],
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: Threat,
    most: int,
    seed: int,
) -> tuple[Tensor, bool]:
    """All queries of an attack on one row (1, ...), in order, and whether the last one is a success."""
    recorder = Recorder(model, x, int(y), threat, most)
    with contextlib.suppress(Enough):
        attack(recorder, x, y, torch.Generator().manual_seed(seed))
    return torch.cat(recorder.queries), recorder.success


@dataclasses.dataclass(frozen=True)
class Boundary:
    """The boundary attack of Brendel, Rauber, Bethge 2018, from the paper: orthogonal steps, then steps inwards."""

    steps: int = 5000
    sideways: float = 0.1
    inwards: float = 0.05
    low: float = 0.0
    high: float = 1.0

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, stream: torch.Generator) -> Tensor:
        """The closest point of another class, by decisions alone, for one row."""
        point = self._start(model, x, y, stream)
        sideways, inwards = self.sideways, self.inwards
        for _ in range(self.steps):
            gap = x - point
            distance = gap.norm()
            noise = torch.randn(x.shape, generator=stream)
            noise = noise - (noise * gap).sum() / distance**2 * gap
            step = point + noise / noise.norm() * sideways * distance
            step = (x - (x - step) / (x - step).norm() * distance).clamp(self.low, self.high)
            if bool(model(step).argmax(dim=1) == y):
                sideways = max(1e-3, sideways * 0.95)
                continue
            sideways = min(0.5, sideways * 1.03)
            trial = (step + inwards * (x - step)).clamp(self.low, self.high)
            if bool(model(trial).argmax(dim=1) == y):
                inwards = max(1e-3, inwards * 0.9)
                continue
            point, inwards = trial, min(0.5, inwards * 1.1)
        return point

    def _start(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, stream: torch.Generator) -> Tensor:
        """Noise of another class, pulled towards x while it keeps it."""
        point = torch.rand(x.shape, generator=stream)
        while bool(model(point).argmax(dim=1) == y):
            point = torch.rand(x.shape, generator=stream)
        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            if bool(model(point + middle * (x - point)).argmax(dim=1) == y):
                high = middle
            else:
                low = middle
        return point + low * (x - point)
