"""Label flips: inputs stay as they are, labels lie."""

import dataclasses
from typing import Any

import torch

from aidefend._core.batches import as_dataset
from aidefend._core.checks import check_int, check_number, refuse
from aidefend._core.random import derive_seed
from aidefend.attacks.poisoning.poisoned import Poisoned, PoisonedDataset, choose, labels_of


@dataclasses.dataclass(frozen=True)
class LabelFlip:
    """Wrong labels without a trigger: towards one class, by pairs of classes, or to any other class at random.

    Guarantee: none, it is an attack. Exactly `round(rate * N)` rows get a label other than their own.
    Args:
        rate: Share of the whole data set that is flipped, in (0, 1).
        target: Label that flipped rows get (rows that have it are not chosen); None: any other label that occurs in
            the data, at random.
        source_class: Flip rows of this class only; None: all.
        pairs: (from, to) classes, each `from` once: rows of the classes `from` get the label `to` (asymmetric flips, of
            classes that are easily mistaken); in place of `target` and `source_class`. Rows of all `from` classes
            are eligible, each as likely as any other; no class that is `to` alone loses a row.
    Raises: ConfigurationError: arguments out of range, too few rows, only one class in the data, a class of `pairs`
        that no row has.
    Cost: One read of the labels.
    Source: Biggio, Nelson, Laskov 2011 (random flips).

    Example:
        >>> x, y = torch.zeros(20, 3), torch.arange(20) % 4
        >>> poisoned = LabelFlip(rate=0.1).poison((x, y), seed=0)
        >>> [int(poisoned.dataset[i][1]) != int(y[i]) for i in poisoned.indices.tolist()]
        [True, True]
    """

    rate: float = 0.05
    target: int | None = None
    source_class: int | None = None
    pairs: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        for name in ("target", "source_class"):
            if getattr(self, name) is not None:
                check_int(getattr(self, name), name, 0)
        if self.target is not None and self.target == self.source_class:
            raise refuse("source_class other than target", "source_class", self.source_class, "Choose another class")
        if self.pairs is not None:
            self._check_pairs()

    def _check_pairs(self) -> None:
        rule, cure = "pairs ((from, to), ...) of different classes, each from once", "Pass for example ((1, 7), (4, 9))"
        pairs = self.pairs
        if not isinstance(pairs, tuple) or not pairs or any(not isinstance(p, tuple) or len(p) != 2 for p in pairs):
            raise refuse(rule, "pairs", pairs, cure)
        for pair in pairs:
            for label in pair:
                check_int(label, "pairs", 0)
        if any(a == b for a, b in pairs) or len(dict(pairs)) < len(pairs):
            raise refuse(rule, "pairs", pairs, cure)
        if self.target is not None or self.source_class is not None:
            raise refuse("pairs alone", "target", self.target, "Leave target and source_class out")

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with wrong labels in it, and its ground truth. There is no trigger."""
        base = as_dataset(dataset)
        y = labels_of(base)
        eligible = torch.ones(len(y), dtype=torch.bool) if self.source_class is None else y == self.source_class
        if self.pairs is not None:
            _check_classes(self.pairs, y)
            eligible = torch.isin(y, torch.tensor([before for before, _ in self.pairs]))
        if self.target is not None:
            eligible = eligible & (y != self.target)
        rows = choose(eligible, round(self.rate * len(y)), seed, "label flip")
        is_poison = torch.zeros(len(y), dtype=torch.bool)
        is_poison[rows] = True
        labels = dict(zip(rows.tolist(), self._wrong(y, rows, seed), strict=True))
        return Poisoned(PoisonedDataset(base, labels, None), is_poison, self.target)

    def _wrong(self, y: torch.Tensor, rows: torch.Tensor, seed: int) -> list[int]:
        if self.target is not None:
            return [self.target] * len(rows)
        if self.pairs is not None:
            change = dict(self.pairs)
            return [change[label] for label in y[rows].tolist()]
        classes = y.unique()
        if len(classes) < 2:
            raise refuse("labels of at least two classes", "dataset", f"classes {classes.tolist()}", "Pass a target")
        stream = torch.Generator().manual_seed(derive_seed(seed, "wrong label"))
        place = torch.searchsorted(classes, y[rows])
        step = torch.randint(1, len(classes), (len(rows),), generator=stream)
        wrong: list[int] = classes[(place + step) % len(classes)].tolist()
        return wrong


def _check_classes(pairs: tuple[tuple[int, int], ...], y: torch.Tensor) -> None:
    found = y.unique().tolist()
    missing = sorted({label for pair in pairs for label in pair} - set(found))
    if missing:
        raise refuse(f"pairs of classes that occur in the data, {found}", "pairs", pairs, f"Leave out {missing}")
