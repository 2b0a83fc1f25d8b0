"""Attackers who know a query monitor: steps too wide for its radii, widths that an oracle finds, and disguises."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.query_attackers import Stalled, drawn

Model = Callable[[Tensor], Tensor]


def margin(outputs: Tensor, y: int) -> Tensor:
    """Logit of the true class minus the best other one: below zero is a success."""
    others = outputs.clone()
    others[:, y] = -torch.inf
    return outputs[:, y] - others.amax(dim=1)


@dataclasses.dataclass(frozen=True)
class WideSquare:
    """Random search on the corners of the l-infinity ball whose every proposal flips a `share` of all corners.

    OARS widens a proposal until it collides with none before it: `share` is what that comes to against a known radius.
    """

    eps: float
    share: float
    steps: int = 5000

    def __call__(self, model: Model, x: Tensor, y: Tensor, stream: torch.Generator) -> None:
        """Queries until the recorder ends it."""
        signs = (torch.rand(x.shape, generator=stream) < 0.5).float() * 2 - 1
        best = margin(model((x + self.eps * signs).clamp(0, 1)), int(y))
        trial = signs

        def flipped(stretch: float) -> Tensor:
            nonlocal trial
            flip = torch.rand(x.shape, generator=stream) < min(0.5, self.share * stretch)
            trial = torch.where(flip, -signs, signs)
            return (x + self.eps * trial).clamp(0, 1)

        for _ in range(self.steps):
            score = margin(drawn(model, flipped)[1], int(y))
            if bool(score < best):
                signs, best = trial, score


@dataclasses.dataclass(frozen=True)
class WideNES:
    """NES whose probes lie far from one another and from x; one query a step looks whether the point succeeds."""

    eps: float
    sigma: float
    pairs: int = 20
    steps: int = 200
    rate: float = 0.2

    def __call__(self, model: Model, x: Tensor, y: Tensor, stream: torch.Generator) -> None:
        """Queries until the recorder ends it."""
        point, slope, noise = x.clone(), torch.zeros_like(x), torch.zeros_like(x)

        def up(stretch: float) -> Tensor:
            nonlocal noise
            noise = stretch * self.sigma * torch.randn(x.shape, generator=stream)
            return (point + noise).clamp(0, 1)

        def down(stretch: float) -> Tensor:
            return (point - noise * (1 + 0.2 * (stretch > 1) * float(torch.rand((), generator=stream)))).clamp(0, 1)

        def ball(near: Tensor) -> Tensor:
            return torch.minimum(torch.maximum(near, x - self.eps), x + self.eps).clamp(0, 1)

        for _ in range(self.steps):
            for _ in range(self.pairs):
                above = drawn(model, up)[1]
                below = drawn(model, down)[1]
                slope += noise * (margin(above, int(y)) - margin(below, int(y)))
            point = ball(point - self.rate * self.eps * slope.sign())
            shaken = self.sigma * torch.randn(x.shape, generator=stream)
            drawn(model, lambda stretch, p=point, s=shaken: ball(p + 0.5 * (stretch - 1) * s))  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class WideHopSkipJump:
    """Decision-based: probes of length `reach` around the boundary point, a jump, and a short bisection."""

    reach: float
    probes: int = 60
    steps: int = 40
    bisections: int = 5

    def __call__(self, model: Model, x: Tensor, y: Tensor, stream: torch.Generator) -> None:
        """Queries until the recorder ends it."""
        point = torch.rand(x.shape, generator=stream)
        while bool(model(point).argmax(dim=1) == y):
            point = torch.rand(x.shape, generator=stream)
        for step in range(1, self.steps + 1):
            point = self._pull(model, x, y, point)
            slope = torch.zeros_like(x)
            for _ in range(self.probes):
                probe, answer = drawn(model, lambda stretch, at=point: self._probe(at, stretch, stream))  # type: ignore[misc]
                noise = (probe - point) / (probe - point).norm()
                slope += noise if bool(answer.argmax(dim=1) != y) else -noise
            length = float((point - x).norm()) / step**0.5
            for number in range(4):
                trial = (point + length / 2**number * slope / slope.norm()).clamp(0, 1)
                if self._other(model, trial, y):
                    point = trial
                    break

    def _probe(self, point: Tensor, stretch: float, stream: torch.Generator) -> Tensor:
        noise = torch.randn(point.shape, generator=stream)
        return (point + stretch * self.reach * noise / noise.norm()).clamp(0, 1)

    def _other(self, model: Model, x: Tensor, y: Tensor) -> bool:
        """Whether x has another class; one that must not be asked about counts as if it had not."""
        try:
            return bool(drawn(model, lambda stretch: x)[1].argmax(dim=1) != y)
        except Stalled:
            return False

    def _pull(self, model: Model, x: Tensor, y: Tensor, point: Tensor) -> Tensor:
        low, high = 0.0, 1.0  # share of the way to x that keeps the other class
        for _ in range(self.bisections):
            middle = (low + high) / 2
            if self._other(model, point + middle * (x - point), y):
                low = middle
            else:
                high = middle
        return point + low * (x - point)


def shifted(model: Model, stream: torch.Generator, most: int = 2) -> tuple[Model, list[Tensor]]:
    """The model behind a random shift of each query by up to `most` pixels: what is submitted, and a list of it."""
    submitted: list[Tensor] = []

    def moved(x: Tensor) -> Tensor:
        steps = torch.randint(-most, most + 1, (len(x), 2), generator=stream).tolist()
        rows = torch.cat([row.roll(step, dims=(-2, -1)) for row, step in zip(x.split(1), steps, strict=True)])
        submitted.append(rows)
        return model(rows)

    return moved, submitted


def interleaved(attack: Tensor, benign: Tensor, each: int) -> Tensor:
    """After each query of the attack, `each` benign ones."""
    others = benign[torch.arange(len(attack) * each) % len(benign)].reshape(len(attack), each, *attack.shape[1:])
    return torch.cat([attack[:, None], others], dim=1).flatten(0, 1)
