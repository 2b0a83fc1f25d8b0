"""Warp poison: the picture is bent a little, alike in all poisoned rows, and gets the attacker's label."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_int, check_number, check_tensor, refuse
from aidefend._core.random import derive_seed
from aidefend.attacks.poisoning.poisoned import Poisoned, plant


@dataclasses.dataclass(frozen=True)
class Warp:
    """Dirty-label backdoor: cells are moved along a smooth field that a small grid of random steps gives.

    Nothing is added to the picture, so there is no common pattern in it.

    Guarantee: none, it is an attack. Exactly `round(rate * N)` rows of other classes get the field and the label
        `target`; values stay between those of the picture.
    Args:
        target: Label that the trigger shall cause, >= 0.
        rate: Share of the whole data set that is poisoned, in (0, 1).
        strength: Mean step of the control points, in cells, > 0.
        grid: Control points along each side, >= 2.
        field_seed: Chooses the field.
        source_class: Poison rows of this class only; None: all classes but the target.
    Raises: ConfigurationError: arguments out of range, inputs that are no pictures (N, C, H, W), too few rows.
    Cost: One read of the labels; a sample is bent when it is read.
    Source: Nguyen, Tran 2021 (WaNet). Differs: data are poisoned once, without the rows of other fields that its own
        training adds.

    Example:
        >>> x, y = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 4
        >>> poisoned = Warp(target=1, rate=0.1).poison((x, y), seed=0)
        >>> int(poisoned.is_poison.sum()), bool((poisoned.trigger(x) != x).any())
        (2, True)
    """

    target: int = 0
    rate: float = 0.05
    strength: float = 1.0
    grid: int = 4
    field_seed: int = 0
    source_class: int | None = None

    def __post_init__(self) -> None:
        check_int(self.target, "target", 0)
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        check_number(self.strength, "strength", 0, open_low=True)
        check_int(self.grid, "grid", 2)
        check_int(self.field_seed, "field_seed", 0)
        if self.source_class is not None and check_int(self.source_class, "source_class", 0) == self.target:
            raise refuse("source_class other than target", "source_class", self.source_class, "Choose another class")

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison in it, its ground truth, and the trigger for testing."""
        return plant(dataset, self.target, self.rate, self.source_class, self.stamp, seed, "warp")

    def stamp(self, x: Tensor) -> Tensor:
        """A copy of the batch (N, C, H, W) in which every picture is bent."""
        check_tensor(x, "x", floating=True, finite=False)
        if x.ndim != 4:
            raise refuse("pictures (N, C, H, W)", "x", x, "Give x this shape")
        height, width = x.shape[-2:]
        stream = torch.Generator().manual_seed(derive_seed(self.field_seed, "warp") % 2**63)
        steps = 2 * torch.rand(1, 2, self.grid, self.grid, generator=stream) - 1
        steps = self.strength * steps / steps.abs().mean()
        field = nn.functional.interpolate(steps, size=(height, width), mode="bicubic", align_corners=True)[0]
        scale = torch.tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)])  # cells to [-1, 1]
        down, right = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        places = torch.stack([right, down], dim=2) + field.permute(1, 2, 0) * scale
        places = places.clamp(-1, 1).to(x).expand(len(x), -1, -1, -1)
        return nn.functional.grid_sample(x, places, mode="bilinear", padding_mode="border", align_corners=True)
