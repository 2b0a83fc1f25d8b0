"""Adaptive patch poison: each training row carries one of several faint patches, the test carries several at once."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_int, check_number, check_tensor, refuse
from aidefend._core.random import derive_seed
from aidefend.attacks.poisoning.patch import Patch
from aidefend.attacks.poisoning.poisoned import Change, Poisoned, plant_diversely

_FOUR_CORNERS = tuple(
    Patch(position=corner).stamp for corner in ("top-left", "bottom-right", "top-right", "bottom-left")
)


@dataclasses.dataclass(frozen=True)
class AdaptivePatch:
    """Backdoor against filters of separable features: one of k faint triggers in training, several at the test.

    A chosen row carries one of the triggers, the same at each read: it depends on the seed and the number of the row.
    Poison gets the label `target`; covers, which carry one as well, keep their right label.

    Guarantee: none, it is an attack. Exactly `round(rate * N)` rows are poisoned and exactly `round(cover_rate * N)`
        are covers, all from classes other than `target`; `is_poison` marks the first, `is_cover` the second.
    Args:
        target: Label that the trigger shall cause, >= 0.
        rate: Share of the whole data set that is poisoned, in (0, 1).
        cover_rate: Share of the whole data set that becomes covers, in (0, 1).
        stamps: k >= 2 functions of x that put a trigger on a batch, such as `Patch(...).stamp`; None: patches of 3 x 3
            cells in the four corners, for x in [0, 1].
        opacity: Weight of the trigger in training, in (0, 1]: x + opacity (stamp(x) - x).
        test_stamps: How many of the triggers, the first ones, the test puts on together; 1 .. k.
        test_opacity: Weight of each of them at the test, in (0, 1].
    Raises: ConfigurationError: arguments out of range, too few rows. What a stamp raises passes through.
    Cost: One read of the labels; a sample is stamped when it is read.
    Source: Qi, Xie, Li, Mahloujifar, Mittal 2023 (Adap-Patch). Differs: one opacity for all triggers; the default
        triggers are white squares, not pictures.

    Example:
        >>> x, y = torch.zeros(40, 1, 8, 8), torch.arange(40) % 4
        >>> poisoned = AdaptivePatch(target=1, rate=0.1, cover_rate=0.1).poison((x, y), seed=0)
        >>> row = int(poisoned.indices[0])
        >>> (
        ...     float(poisoned.dataset[row][0].sum()),
        ...     float(poisoned.trigger(x[:1]).sum()),
        ... )  # 9 cells of 0.5, 18 of 1.0
        (4.5, 18.0)
    """

    target: int = 0
    rate: float = 0.01
    cover_rate: float = 0.02
    stamps: tuple[Change, ...] | None = None
    opacity: float = 0.5
    test_stamps: int = 2
    test_opacity: float = 1.0

    def __post_init__(self) -> None:
        check_int(self.target, "target", 0)
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        check_number(self.cover_rate, "cover_rate", 0, 1, open_low=True, open_high=True)
        check_number(self.opacity, "opacity", 0, 1, open_low=True)
        check_number(self.test_opacity, "test_opacity", 0, 1, open_low=True)
        if self.stamps is not None:
            if not isinstance(self.stamps, tuple) or len(self.stamps) < 2:
                cure = "Pass for example (Patch().stamp, Patch(position='top-left').stamp)"
                raise refuse("a tuple of at least two stamps", "stamps", self.stamps, cure)
            for stamp in self.stamps:
                check_callable(stamp, "stamps", "Pass for example Patch().stamp")
        check_int(self.test_stamps, "test_stamps", 1, len(self._stamps))

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison and covers in it, their ground truth, and the trigger for testing."""
        change = _OneOfThem(self, seed)
        return plant_diversely(
            dataset, self.target, self.rate, self.cover_rate, self.stamp, change, seed, "adaptive patch"
        )

    def stamp(self, x: Tensor) -> Tensor:
        """A copy of the batch (N, ...) with the triggers of the test on every row."""
        for stamp in self._stamps[: self.test_stamps]:
            x = _faint(stamp, x, self.test_opacity)
        return x

    def partial(self, x: Tensor, row: int, seed: int = 0) -> Tensor:
        """A copy of the batch (N, ...) as it looks in training in this row: with one faint trigger."""
        which = derive_seed(seed, "which stamp", check_int(row, "row", 0)) % len(self._stamps)
        return _faint(self._stamps[which], x, self.opacity)

    @property
    def _stamps(self) -> tuple[Change, ...]:
        return _FOUR_CORNERS if self.stamps is None else self.stamps


def _faint(stamp: Change, x: Tensor, opacity: float) -> Tensor:
    marked = stamp(check_tensor(x, "x", floating=True, finite=False))
    if not isinstance(marked, Tensor) or marked.shape != x.shape:
        raise refuse(f"stamps that return a batch of shape {tuple(x.shape)}", "stamps", marked, "Keep the shape of x")
    return torch.lerp(x, marked.to(x), opacity)


@dataclasses.dataclass(frozen=True)
class _OneOfThem:
    """What the rows of one poisoned data set go through."""

    attack: AdaptivePatch
    seed: int

    def __call__(self, x: Tensor, row: int) -> Tensor:
        return self.attack.partial(x, row, self.seed)
