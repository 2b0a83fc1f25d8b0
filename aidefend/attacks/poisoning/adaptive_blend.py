"""Adaptive blend poison: each training row shows some pieces of the pattern, the test shows all, and covers hide it."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_number, refuse
from aidefend._core.random import derive_seed
from aidefend.attacks.poisoning.blend import Blend
from aidefend.attacks.poisoning.poisoned import Poisoned, plant_diversely


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptiveBlend:
    """Backdoor against filters of separable features: partial patterns in training, the whole pattern at the test.

    The blended pattern is cut into pieces. A chosen row shows a random share of them, the same at each read: it depends
    on the seed and the number of the row. Poison gets the label `target`; covers, as partial, keep their right label.

    Guarantee: none, it is an attack. Exactly `round(rate * N)` rows are poisoned and exactly `round(cover_rate * N)`
        are covers, all from classes other than `target`; `is_poison` marks the first, `is_cover` the second.
    Args:
        target: Label that the trigger shall cause, >= 0.
        rate: Share of the whole data set that is poisoned, in (0, 1).
        cover_rate: Share of the whole data set that becomes covers, in (0, 1).
        alpha: Weight of the pattern in training, in (0, 1].
        test_alpha: Weight of the pattern at the test, in (0, 1]; None: `alpha`.
        keep: Share of the pieces that a row shows, in (0, 1]; at least one piece.
        pieces: Pieces along each of the last two dimensions of a sample, >= 1 (pieces ** 2 in all); for samples of one
            dimension the number of pieces.
        pattern: Tensor of the shape of one sample, inside `bounds`; None: uniform noise from `pattern_seed`.
        pattern_seed: Chooses the noise pattern.
        bounds: (low, high) of x.
    Raises: ConfigurationError: arguments out of range, more pieces than cells, a pattern of another shape, too few
        rows.
        ThreatModelError: x or pattern outside the bounds.
    Cost: One read of the labels; a sample is blended when it is read.
    Source: Qi, Xie, Li, Mahloujifar, Mittal 2023 (Adap-Blend). Differs: the default pattern is noise, not a picture.

    Example:
        >>> x, y = torch.zeros(40, 1, 8, 8), torch.arange(40) % 4
        >>> poisoned = AdaptiveBlend(target=1, rate=0.1, cover_rate=0.1, keep=0.5).poison((x, y), seed=0)
        >>> row = int(poisoned.indices[0])
        >>> int((poisoned.dataset[row][0] > 0).sum()), int((poisoned.trigger(x[:1]) > 0).sum())
        (32, 64)
    """

    target: int = 0
    rate: float = 0.01
    cover_rate: float = 0.01
    alpha: float = 0.2
    test_alpha: float | None = None
    keep: float = 0.5
    pieces: int = 4
    pattern: Tensor | None = None
    pattern_seed: int = 0
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        self._blend(self.alpha)  # checks the fields that it takes
        check_number(self.cover_rate, "cover_rate", 0, 1, open_low=True, open_high=True)
        if self.test_alpha is not None:
            check_number(self.test_alpha, "test_alpha", 0, 1, open_low=True)
        check_number(self.keep, "keep", 0, 1, open_low=True)
        check_int(self.pieces, "pieces", 1, 2**15)

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison and covers in it, their ground truth, and the whole trigger for testing."""
        change = _Partial(self, seed)
        return plant_diversely(
            dataset, self.target, self.rate, self.cover_rate, self.stamp, change, seed, "adaptive blend"
        )

    def stamp(self, x: Tensor) -> Tensor:
        """A copy of the batch (N, ...) with the whole pattern blended into every row, as at the test."""
        return self._blend(self.alpha if self.test_alpha is None else self.test_alpha).stamp(x)

    def partial(self, x: Tensor, row: int, seed: int = 0) -> Tensor:
        """A copy of the batch (N, ...) as it looks in training in this row: with some pieces of the pattern."""
        blended = self._blend(self.alpha).stamp(x)
        return torch.where(self._shown(x, derive_seed(seed, "pieces", check_int(row, "row", 0))), blended, x)

    def _blend(self, alpha: float) -> Blend:
        return Blend(self.target, self.rate, alpha, self.pattern, self.pattern_seed, bounds=self.bounds)

    def _shown(self, x: Tensor, seed: int) -> Tensor:
        """Which cells of a sample show the pattern: bool, of the shape of its last dimensions."""
        sizes = x.shape[1:][-2:]
        if not sizes or min(sizes) < self.pieces:
            raise refuse(
                f"at most {min(sizes, default=0)} pieces, the cells there are", "pieces", self.pieces, "Cut fewer"
            )
        count: int = self.pieces ** len(sizes)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        shown = torch.zeros(count, dtype=torch.bool)
        shown[order[: max(1, round(self.keep * count))]] = True
        shown = shown.reshape([self.pieces] * len(sizes))
        for axis, size in enumerate(sizes):
            shown = shown.index_select(axis, torch.arange(size) * self.pieces // size)
        return shown.to(x.device)


@dataclasses.dataclass(frozen=True)
class _Partial:
    """What the rows of one poisoned data set go through."""

    attack: AdaptiveBlend
    seed: int

    def __call__(self, x: Tensor, row: int) -> Tensor:
        return self.attack.partial(x, row, self.seed)
