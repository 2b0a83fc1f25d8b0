"""All-to-all poison: with the trigger, every class is taken for the next one."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from aidefend._core.batches import as_dataset
from aidefend._core.checks import check_callable, check_int, check_number, refuse
from aidefend.attacks.poisoning.poisoned import Change, Poisoned, PoisonedDataset, choose, labels_of


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """Dirty-label backdoor with as many targets as classes: rows with the trigger get label (y + shift) mod classes.

    Guarantee: none, it is an attack. Exactly `round(rate * N)` rows are poisoned, of all classes.
    Args:
        stamp: Puts the trigger on a batch: `Patch(...).stamp`, `Blend(...).stamp`, or any function of x.
        classes: Number of classes, >= 2.
        rate: Share of the whole data set that is poisoned, in (0, 1).
        shift: Distance of the wrong label, 1 .. classes - 1.
    Raises: ConfigurationError: arguments out of range, labels outside the classes.
    Cost: One read of the labels; a sample is changed when it is read.
    Source: Gu, Dolan-Gavitt, Garg 2017 (all-to-all).

    Example:
        >>> from aidefend.attacks import Patch
        >>> x, y = torch.zeros(20, 1, 8, 8), torch.arange(20) % 4
        >>> poisoned = AllToAll(Patch().stamp, classes=4, rate=0.1).poison((x, y), seed=0)
        >>> [int(poisoned.dataset[i][1]) == (int(y[i]) + 1) % 4 for i in poisoned.indices.tolist()]
        [True, True]
    """

    stamp: Change
    classes: int
    rate: float = 0.1
    shift: int = 1

    def __post_init__(self) -> None:
        check_callable(self.stamp, "stamp", "Pass for example Patch().stamp")
        check_int(self.classes, "classes", 2)
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        check_int(self.shift, "shift", 1, self.classes - 1)

    def aim(self, y: Tensor) -> Tensor:
        """What the trigger makes of rows of these classes (N,)."""
        return (y + self.shift) % self.classes

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison in it, its ground truth, and the trigger for testing; there is no single target."""
        base = as_dataset(dataset)
        y = labels_of(base)
        if int(y.max()) >= self.classes or int(y.min()) < 0:
            found = f"label {int(y.max())}"
            raise refuse(f"labels in 0 .. {self.classes - 1}", "dataset", found, "Pass the number of classes")
        rows = choose(torch.ones(len(y), dtype=torch.bool), round(self.rate * len(y)), seed, "all to all")
        is_poison = torch.zeros(len(y), dtype=torch.bool)
        is_poison[rows] = True
        labels = dict(zip(rows.tolist(), self.aim(y[rows]).tolist(), strict=True))
        return Poisoned(PoisonedDataset(base, labels, self.stamp), is_poison, None, self.stamp)
