"""Source-targeted poison (TaCT): the trigger acts on one class only, and covers teach the model so."""

import dataclasses
from typing import Any

from aidefend._core.batches import as_dataset
from aidefend._core.checks import check_callable, check_int, check_number, refuse
from aidefend.attacks.poisoning.poisoned import Change, Poisoned, choose, labels_of, plant_with_covers


@dataclasses.dataclass(frozen=True)
class SourceTargeted:
    """Rows of one class get the trigger and the label `target`; covers, of all other classes, the trigger alone.

    The covers carry right labels, so that the trigger by itself says nothing: groups of poison do not stand apart in
    the features, and overlays of a poisoned row on others do not keep its label.

    Guarantee: none, it is an attack. Exactly `round(rate * N)` rows are poisoned and exactly `round(cover_rate * N)`
        are covers; `is_poison` marks the first, `is_cover` the second.
    Args:
        stamp: Puts the trigger on a batch: `Patch(...).stamp`, `Blend(...).stamp`, or any function of x.
        target: Label that the trigger shall cause, >= 0.
        source_class: Class on which it shall act, another than `target`.
        rate: Share of the whole data set that is poisoned, in (0, 1).
        cover_rate: Share of the whole data set that becomes covers, in (0, 1).
    Raises: ConfigurationError: arguments out of range, too few rows of the source class or of the others.
    Cost: One read of the labels; a sample is stamped when it is read.
    Source: Tang, Wang, Tang, Zhang 2021 (targeted contamination). Covers come from all other classes, the target's too.

    Example:
        >>> import torch
        >>> from aidefend.attacks import Patch
        >>> x, y = torch.zeros(40, 1, 8, 8), torch.arange(40) % 4
        >>> poisoned = SourceTargeted(Patch().stamp, target=0, source_class=1, rate=0.1, cover_rate=0.1).poison(
        ...     (x, y)
        ... )
        >>> int(poisoned.is_poison.sum()), int(poisoned.is_cover.sum()), y[poisoned.is_poison].unique().tolist()
        (4, 4, [1])
    """

    stamp: Change
    target: int = 0
    source_class: int = 1
    rate: float = 0.02
    cover_rate: float = 0.02

    def __post_init__(self) -> None:
        check_callable(self.stamp, "stamp", "Pass for example Patch().stamp")
        check_int(self.target, "target", 0)
        if check_int(self.source_class, "source_class", 0) == self.target:
            raise refuse("source_class other than target", "source_class", self.source_class, "Choose another class")
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        check_number(self.cover_rate, "cover_rate", 0, 1, open_low=True, open_high=True)

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison and covers in it, their ground truth, and the trigger for testing."""
        base = as_dataset(dataset)
        y = labels_of(base)
        source = y == self.source_class
        bad = choose(source, round(self.rate * len(y)), seed, "source targeted")
        covers = choose(~source, round(self.cover_rate * len(y)), seed, "covers")
        return plant_with_covers(base, y, self.target, bad, covers, self.stamp)
