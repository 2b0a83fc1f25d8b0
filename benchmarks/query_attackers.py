"""Attackers for benchmarks of query monitors: a boundary walk, queries for a copy, and a recorder of queries."""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aidefend import Threat


class Enough(BaseException):
    """The attacker has what it wants, or no queries left."""


class Stalled(BaseException):
    """Every proposal would get the account flagged."""


Make = Callable[[float], Tensor]


def drawn(model: Callable[[Tensor], Tensor], make: Make) -> tuple[Tensor, Tensor]:
    """A proposal of width 1 and its answer; a model with `draw` (an attacker with an oracle) chooses the width."""
    if hasattr(model, "draw"):
        found: tuple[Tensor, Tensor] = model.draw(make)
        return found
    x = make(1.0)
    return x, model(x)


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

            def around(
                stretch: float, gap: Tensor = gap, distance: Tensor = distance, width: float = sideways
            ) -> Tensor:
                noise = torch.randn(x.shape, generator=stream)
                noise = noise - (noise * gap).sum() / distance**2 * gap
                step = x - gap + noise / noise.norm() * width * stretch * distance
                return (x - (x - step) / (x - step).norm() * distance).clamp(self.low, self.high)

            step, answer = drawn(model, around)
            if bool(answer.argmax(dim=1) == y):
                sideways = max(1e-3, sideways * 0.95)
                continue
            sideways = min(0.5, sideways * 1.03)

            def inside(stretch: float, step: Tensor = step, width: float = inwards) -> Tensor:
                return (step + min(0.9, width * stretch) * (x - step)).clamp(self.low, self.high)

            trial, answer = drawn(model, inside)
            if bool(answer.argmax(dim=1) == y):
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


def jacobian_augmented(
    victim: Callable[[Tensor], Tensor],
    seeds: Tensor,
    student: nn.Module,
    queries: int,
    step: float,
    stream: torch.Generator,
) -> Tensor:
    """Queries of Papernot et al. 2017, from the paper: the set doubles along the signs of a copy's input gradients.

    The copy is trained on all answers so far before each doubling; `student` ends as it was before the last one.
    """
    asked = seeds
    labels = victim(seeds).argmax(dim=1)
    while len(asked) < queries:
        optimizer = torch.optim.Adam(student.parameters(), 2e-3)
        for _ in range(6):
            for rows in torch.randperm(len(asked), generator=stream).split(64):
                optimizer.zero_grad()
                cross_entropy(student(asked[rows]), labels[rows]).backward()
                optimizer.step()
        moved = asked.clone().requires_grad_(True)
        student(moved).gather(1, labels[:, None]).sum().backward()
        assert moved.grad is not None
        new = (asked + step * moved.grad.sign()).clamp(0, 1)[: queries - len(asked)]
        asked, labels = torch.cat([asked, new]), torch.cat([labels, victim(new).argmax(dim=1)])
    return asked
