"""Model inversion: search for inputs that the model takes for typical members of a class."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from aidefend._core.checks import (
    check_int,
    check_items,
    check_labels,
    check_not_empty,
    check_number,
    check_range,
    check_tensor,
    refuse,
)
from aidefend._core.errors import ThreatModelError
from aidefend._core.modules import Model, freeze, preserve
from aidefend._core.random import make_generator, normal
from aidefend.attacks.inversion.gradients import Estimate, Exact, Gradients

Method = Literal["gradient", "estimate", "none"]


@dataclasses.dataclass(frozen=True, eq=False)
class InversionResult:
    """What was reconstructed.

    Args:
        x: (N, ...) reconstructions, inside the bounds.
        y: (N,) int64, the class that each was made for.
        confidence: (N,) float64, the model's probability of that class at x; for outputs that are labels 0 or 1.
        start_confidence: (N,) the same at the starting points.
        method: "gradient" (through the model), "estimate" (from outputs alone), "none" (the outputs did not move with
            the input, so that there was nothing to follow).
        status: "measured", or "not shown" where nothing could be followed: this is no evidence of safety.
        forwards: Forward passes for each row.
        backwards: Backward passes for each row.
    """

    x: Tensor
    y: Tensor
    confidence: Tensor
    start_confidence: Tensor
    method: Method
    status: Literal["measured", "not shown"]
    forwards: int
    backwards: int


@dataclasses.dataclass(frozen=True)
class ClassInversion:
    """Climbs the log-probability of a class under priors for natural inputs.

    Guarantee: none. A reconstruction shows what a class looks like to the model. It is a threat to privacy where a
        class is a person; otherwise compare it with real training samples (`aidefend.audit.audit_inversion`).
    Args:
        steps: Steps of ascent, >= 1.
        step_size: Length of a step, as a share of the range of the bounds.
        total_variation: Weight of the mean absolute difference of neighbouring pixels (x of shape (C, H, W)).
        l2: Weight of the mean squared distance from `start`, in units of the range of the bounds.
        bounds: Lowest and highest allowed value.
        directions: Pairs of random probes a step where the model gives no gradient.
        probe: Size of these probes, as a share of the range.
        start_noise: Deviation of the noise on the starting point, as a share of the range.
    Raises: ConfigurationError: a number out of range; classes that the model does not have.
    Cost: steps forward and backward passes; without gradients 2 * directions forward passes a step.

    Source: Fredrikson, Jha, Ristenpart 2015 (MI-Face) with the total-variation prior of Mahendran, Vedaldi 2015; black
        box by antithetic evolution strategies (Salimans et al. 2017; Ilyas et al. 2018). Differs: Adam steps.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> result = ClassInversion(steps=5, total_variation=0.0)(
        ...     model, torch.tensor([0, 1]), shape=(4,), seed=0
        ... )
        >>> result.x.shape, bool((result.confidence >= result.start_confidence).all())
        (torch.Size([2, 4]), True)
    """

    steps: int = 200
    step_size: float = 0.05
    total_variation: float = 0.5
    l2: float = 0.1
    bounds: tuple[float, float] = (0.0, 1.0)
    directions: int = 16
    probe: float = 0.1
    start_noise: float = 0.05

    def __post_init__(self) -> None:
        check_int(self.steps, "steps")
        check_int(self.directions, "directions")
        for name in ("step_size", "probe"):
            check_number(getattr(self, name), name, 0.0, open_low=True)
        for name in ("total_variation", "l2", "start_noise"):
            check_number(getattr(self, name), name, 0.0)
        check_range(self.bounds, error=ThreatModelError)

    def __call__(
        self,
        model: Model,
        y: Tensor,
        *,
        shape: tuple[int, ...] | None = None,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> InversionResult:
        """Reconstruct one input for each entry of y.

        Args:
            model: Any callable from (N, ...) to logits or probabilities (N, K).
            y: (N,) int64 classes to reconstruct.
            shape: Shape of one input; the search then starts from the middle of the bounds.
            start: Instead of `shape`: one input (...) or one for each row (N, ...), such as a public mean image.
            generator: Random numbers of starts and probes.
            seed: The same as a number.
        """
        labels = check_labels(y, check_not_empty(len(check_tensor(y, "y")), "y"))
        stream = make_generator(generator, seed)
        anchor = self._anchor(labels, shape, start)
        with torch.inference_mode(False), preserve(model):
            freeze(model)
            return self._search(model, labels, anchor, stream)

    def _search(self, model: Model, y: Tensor, anchor: Tensor, stream: torch.Generator) -> InversionResult:
        low, high = self.bounds
        x = (anchor + (high - low) * self.start_noise * normal(tuple(anchor.shape), stream, anchor)).clamp(low, high)
        source: Gradients = Exact(model, y)
        start_score, slope = source.climb(x)
        exact = not bool((slope == 0).all())
        if not exact:
            size = self.probe * (high - low)
            source = Estimate(model, y, size=size, directions=self.directions, bounds=self.bounds, stream=stream)
        best, best_objective = x.clone(), start_score - self._prior(x, anchor)
        momentum, energy, moved = torch.zeros_like(x), torch.zeros_like(x), False
        for step in range(1, self.steps + 1):
            score, slope = source.climb(x)
            moved = moved or bool((slope != 0).any())
            best, best_objective = _better(best, best_objective, x, score - self._prior(x, anchor))
            total = slope - self._prior_slope(x, anchor)
            momentum, energy = 0.9 * momentum + 0.1 * total, 0.99 * energy + 0.01 * total.square()
            update = (momentum / (1 - 0.9**step)) / ((energy / (1 - 0.99**step)).sqrt() + 1e-12)
            x = (x + self.step_size * (high - low) * update).clamp(low, high)
        final = source.score(x)
        best, _ = _better(best, best_objective, x, final - self._prior(x, anchor))
        method: Method = "none" if not moved else ("gradient" if exact else "estimate")
        return InversionResult(
            best,
            y.clone(),
            source.score(best).exp(),
            start_score.exp(),
            method,
            "measured" if moved else "not shown",
            1 + source.forwards + (0 if exact else 1),
            source.backwards,
        )

    def _anchor(self, y: Tensor, shape: tuple[int, ...] | None, start: Tensor | None) -> Tensor:
        low, high = self.bounds
        if (shape is None) == (start is None):
            raise refuse("either shape or start", "shape, start", (shape, start), "Pass exactly one of them")
        if start is None:
            sizes = [check_int(size, "shape") for size in check_items(shape, int, "shape", "Pass (channels, ...)")]
            return torch.full((len(y), *sizes), (low + high) / 2, device=y.device)
        if (
            not check_tensor(start, "start").is_floating_point()
            or bool((start < low).any())
            or bool((start > high).any())
        ):
            raise refuse("start to be floating point inside the bounds", "start", start, "Scale it", ThreatModelError)
        whole = start if start.ndim and len(start) == len(y) and start.ndim > 1 else start.expand(len(y), *start.shape)
        return whole.detach().clone()

    def _prior(self, x: Tensor, anchor: Tensor) -> Tensor:
        """Penalty (N,) float64."""
        with torch.no_grad():
            return self._penalty(x, anchor)

    def _prior_slope(self, x: Tensor, anchor: Tensor) -> Tensor:
        with torch.enable_grad():
            variable = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._penalty(variable, anchor).sum(), variable)
        return slope

    def _penalty(self, x: Tensor, anchor: Tensor) -> Tensor:
        span = self.bounds[1] - self.bounds[0]
        penalty = self.l2 * ((x - anchor) / span).square().flatten(1).mean(dim=1)
        if x.ndim == 4 and self.total_variation:
            down = (x[:, :, 1:] - x[:, :, :-1]).abs().flatten(1)
            right = (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().flatten(1)
            penalty = penalty + self.total_variation / span * torch.cat([down, right], dim=1).mean(dim=1)
        return penalty.double()


def _better(best: Tensor, value: Tensor, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row, the point with the larger objective."""
    wins = other > value
    return torch.where(wins.reshape(-1, *[1] * (x.ndim - 1)), x, best), torch.where(wins, other, value)
