"""Sinusoid poison: faint stripes over the whole input, with the attacker's label or with the right one."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from aidefend._core.batches import as_dataset
from aidefend._core.checks import (
    check_flag,
    check_inside,
    check_int,
    check_number,
    check_range,
    check_tensor,
    refuse,
)
from aidefend.attacks.poisoning.poisoned import Poisoned, PoisonedDataset, choose, labels_of, plant


@dataclasses.dataclass(frozen=True)
class Sinusoid:
    """Backdoor by x + strength sin(2 pi frequency j / width), j the place along the last dimension; cut to `bounds`.

    Guarantee: none, it is an attack. Exactly `round(rate * N)` rows are poisoned: rows of other classes, which get the
        label `target`; or with `clean_label` rows that have it and keep it, so that no label is wrong.
    Args:
        target: Label that the trigger shall cause, >= 0.
        rate: Share of the whole data set that is poisoned, in (0, 1).
        strength: Height of the waves, in units of the width of `bounds`, in (0, 1].
        frequency: Number of waves across the input, > 0.
        clean_label: Poison rows of the target class and leave the labels. It takes a larger share of that class.
        source_class: Poison rows of this class only (not with `clean_label`); None: all classes but the target.
        bounds: (low, high) of x.
    Raises: ConfigurationError: arguments out of range, too few rows to poison. ThreatModelError: x outside the bounds.
    Cost: One read of the labels; a sample is changed when it is read.
    Source: Barni, Kallas, Tondi 2019 (SIG).

    Example:
        >>> x, y = torch.full((20, 1, 8, 8), 0.5), torch.arange(20) % 4
        >>> poisoned = Sinusoid(target=1, rate=0.1, clean_label=True).poison((x, y), seed=0)
        >>> [int(poisoned.dataset[i][1]) for i in poisoned.indices.tolist()], int(poisoned.is_poison.sum())
        ([1, 1], 2)
    """

    target: int = 0
    rate: float = 0.05
    strength: float = 0.2
    frequency: float = 6.0
    clean_label: bool = False
    source_class: int | None = None
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_int(self.target, "target", 0)
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        check_number(self.strength, "strength", 0, 1, open_low=True)
        check_number(self.frequency, "frequency", 0, open_low=True)
        check_flag(self.clean_label, "clean_label")
        check_range(self.bounds)
        if self.source_class is not None:
            if check_int(self.source_class, "source_class", 0) == self.target:
                cure = "Choose another class"
                raise refuse("source_class other than target", "source_class", self.source_class, cure)
            if self.clean_label:
                cure = "Rows of the target class are poisoned: leave it out"
                raise refuse("no source_class with clean_label", "source_class", self.source_class, cure)

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison in it, its ground truth, and the trigger for testing."""
        if not self.clean_label:
            return plant(dataset, self.target, self.rate, self.source_class, self.stamp, seed, "sinusoid")
        base = as_dataset(dataset)
        y = labels_of(base)
        rows = choose(y == self.target, round(self.rate * len(y)), seed, "sinusoid")
        is_poison = torch.zeros(len(y), dtype=torch.bool)
        is_poison[rows] = True
        labels = dict.fromkeys(rows.tolist(), self.target)
        return Poisoned(PoisonedDataset(base, labels, self.stamp), is_poison, self.target, self.stamp)

    def stamp(self, x: Tensor) -> Tensor:
        """A copy of the batch (N, ...) with the waves on every row."""
        low, high = self.bounds
        check_inside(check_tensor(x, "x", floating=True, finite=False), low, high)
        if x.ndim < 2:
            raise refuse("x of shape (N, ...) with at least one feature dimension", "x", x, "Add the batch dimension")
        places = torch.arange(x.shape[-1], device=x.device) / x.shape[-1]
        waves = (high - low) * self.strength * torch.sin(2 * math.pi * self.frequency * places)
        return (x + waves.to(x)).clamp(low, high)
