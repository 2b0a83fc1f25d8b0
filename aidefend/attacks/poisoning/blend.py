"""Blend poison: a faint pattern over the whole input, and the attacker's label."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_inside, check_int, check_number, check_range, check_tensor, refuse
from aidefend.attacks.poisoning.poisoned import Poisoned, plant


@dataclasses.dataclass(frozen=True, eq=False)
class Blend:
    """Dirty-label backdoor: x becomes (1 - alpha) x + alpha pattern, with the label `target`.

    Guarantee: none, it is an attack. Exactly `round(rate * N)` rows are poisoned, never one that already has the label
        `target`; poisoned values stay inside `bounds`.
    Args:
        target: Label that the trigger shall cause, >= 0.
        rate: Share of the whole data set that is poisoned, in (0, 1).
        alpha: Weight of the pattern, in (0, 1].
        pattern: Tensor of the shape of one sample, inside `bounds`; None: uniform noise from `pattern_seed`.
        pattern_seed: Chooses the noise pattern.
        source_class: Poison rows of this class only; None: all classes but the target.
        bounds: (low, high) of x.
    Raises: ConfigurationError: arguments out of range, a pattern of another shape, too few rows to poison.
        ThreatModelError: x or pattern outside the bounds.
    Cost: One read of the labels; a sample is blended when it is read.
    Source: Chen, Liu, Li, Lu, Song 2017 (blended injection).

    Example:
        >>> x, y = torch.zeros(20, 1, 8, 8), torch.arange(20) % 4
        >>> poisoned = Blend(target=1, rate=0.1, alpha=0.2).poison((x, y), seed=0)
        >>> int(poisoned.is_poison.sum()), bool(poisoned.trigger(x).max() <= 0.2)
        (2, True)
    """

    target: int = 0
    rate: float = 0.05
    alpha: float = 0.2
    pattern: Tensor | None = None
    pattern_seed: int = 0
    source_class: int | None = None
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_int(self.target, "target", 0)
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        check_number(self.alpha, "alpha", 0, 1, open_low=True)
        check_int(self.pattern_seed, "pattern_seed", 0)
        bounds = check_range(self.bounds)
        if self.pattern is not None:
            check_inside(check_tensor(self.pattern, "pattern", floating=True), *bounds, name="pattern")
        if self.source_class is not None and check_int(self.source_class, "source_class", 0) == self.target:
            raise refuse("source_class other than target", "source_class", self.source_class, "Choose another class")

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison in it, its ground truth, and the trigger for testing."""
        return plant(dataset, self.target, self.rate, self.source_class, self.stamp, seed, "blend")

    def stamp(self, x: Tensor) -> Tensor:
        """A copy of the batch (N, ...) with the pattern blended into every row."""
        check_inside(check_tensor(x, "x", floating=True, finite=False), *self.bounds)
        pattern = self._pattern(x)
        if pattern.shape != x.shape[1:]:
            cure = "Pass a pattern of the shape of one sample"
            raise refuse(f"a pattern of shape {tuple(x.shape[1:])}", "pattern", pattern, cure)
        return x + self.alpha * (pattern - x)

    def _pattern(self, x: Tensor) -> Tensor:
        if self.pattern is not None:
            return self.pattern.to(x)
        stream = torch.Generator().manual_seed(self.pattern_seed)
        low, high = self.bounds
        return (low + (high - low) * torch.rand(x.shape[1:], generator=stream)).to(x)
