"""Where an inversion gets its slope from: through the model, or from probes of its outputs alone."""

from typing import Protocol

import torch
from torch import Tensor

from aidefend._core.checks import check_labels
from aidefend._core.modules import Model
from aidefend._core.random import normal
from aidefend.attacks.membership.outputs import read


class Gradients(Protocol):
    """Score and slope of the log-probability of the wanted class."""

    forwards: int
    backwards: int

    def score(self, x: Tensor) -> Tensor:
        """(N,) float64."""
        ...

    def climb(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) float64 score and the slope in the shape of x; all zero where there is nothing to follow."""
        ...


class Exact:
    """By backpropagation to the input; a model that does not pass gradients gives zeros."""

    def __init__(self, model: Model, y: Tensor) -> None:
        self._model, self._y = model, y
        self.forwards = self.backwards = 0

    def score(self, x: Tensor) -> Tensor:
        """One forward pass."""
        self.forwards += 1
        with torch.no_grad():
            return _log_probability(self._model, x, self._y)

    def climb(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One forward and one backward pass."""
        self.forwards += 1
        with torch.enable_grad():
            variable = x.detach().requires_grad_()
            score = _log_probability(self._model, variable, self._y)
            if not score.requires_grad:
                return score, torch.zeros_like(x)
            (slope,) = torch.autograd.grad(score.sum(), variable, allow_unused=True, materialize_grads=True)
        self.backwards += 1
        return score.detach(), slope.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


class Estimate:
    """By differences of the outputs at antithetic normal probes. Labels alone suffice where probes change the label."""

    def __init__(
        self,
        model: Model,
        y: Tensor,
        *,
        size: float,
        directions: int,
        bounds: tuple[float, float],
        stream: torch.Generator,
    ) -> None:
        self._model, self._y, self._size, self._stream = model, y, size, stream
        self._directions, self._bounds = directions, bounds
        self.forwards = self.backwards = 0

    def score(self, x: Tensor) -> Tensor:
        """One forward pass."""
        self.forwards += 1
        with torch.no_grad():
            return _log_probability(self._model, x, self._y)

    def climb(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """2 * directions + 1 forward passes."""
        slope = torch.zeros_like(x)
        for _ in range(self._directions):
            direction = normal(tuple(x.shape), self._stream, x)
            up, down = ((x + sign * self._size * direction).clamp(*self._bounds) for sign in (1.0, -1.0))
            gain = self.score(up) - self.score(down)
            slope += gain.to(x).reshape(-1, *[1] * (x.ndim - 1)) * direction
        return self.score(x), slope / (2 * self._size * self._directions)


def _log_probability(model: Model, x: Tensor, y: Tensor) -> Tensor:
    log_probability = read(model, x, int(y.max()) + 1)
    check_labels(y, len(y), log_probability.shape[1])
    return log_probability.gather(1, y[:, None])[:, 0]
