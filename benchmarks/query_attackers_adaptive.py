"""Attackers who know a query monitor: steps too wide for its radii, as OARS adapts them, and sequences in disguise."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

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
        for _ in range(self.steps):
            flip = torch.rand(x.shape, generator=stream) < self.share
            trial = torch.where(flip, -signs, signs)
            score = margin(model((x + self.eps * trial).clamp(0, 1)), int(y))
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
        point, slope = x.clone(), torch.zeros_like(x)
        for _ in range(self.steps):
            for _ in range(self.pairs):
                noise = self.sigma * torch.randn(x.shape, generator=stream)
                up, down = model((point + noise).clamp(0, 1)), model((point - noise).clamp(0, 1))
                slope += noise * (margin(up, int(y)) - margin(down, int(y)))
            step = -self.rate * self.eps * slope.sign()
            point = torch.minimum(torch.maximum(point + step, x - self.eps), x + self.eps).clamp(0, 1)
            model(point)


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
                noise = torch.randn(x.shape, generator=stream)
                noise = noise / noise.norm()
                outside = bool(model((point + self.reach * noise).clamp(0, 1)).argmax(dim=1) != y)
                slope += noise if outside else -noise
            length = float((point - x).norm()) / step**0.5
            for number in range(4):
                trial = (point + length / 2**number * slope / slope.norm()).clamp(0, 1)
                if bool(model(trial).argmax(dim=1) != y):
                    point = trial
                    break

    def _pull(self, model: Model, x: Tensor, y: Tensor, point: Tensor) -> Tensor:
        low, high = 0.0, 1.0  # share of the way to x that keeps the other class
        for _ in range(self.bisections):
            middle = (low + high) / 2
            if bool(model(point + middle * (x - point)).argmax(dim=1) == y):
                high = middle
            else:
                low = middle
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
