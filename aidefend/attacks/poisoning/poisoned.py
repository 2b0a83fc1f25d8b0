"""What a poisoning attack returns, and how rows are chosen: exact count, seeded, never a row that already fits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from aidefend._core.batches import as_dataset, iterate
from aidefend._core.checks import check_int, check_not_empty, refuse
from aidefend._core.random import derive_seed

Change = Callable[[Tensor], Tensor]


class PoisonedDataset(Dataset[tuple[Any, Any]]):
    """A map-style view: chosen rows are changed and relabelled when they are read, the others pass through untouched.

    Args:
        base: Map-style data set of (x, y) samples.
        labels: Row number to the new label, for the chosen rows.
        change: Maps a batch (1, ...) of inputs to its poisoned form; None leaves inputs as they are.
    """

    def __init__(self, base: Dataset[Any], labels: dict[int, int], change: Change | None) -> None:
        self.base, self.labels, self.change = base, labels, change

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]  # map-style, so it has a length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} samples")
        index = index % len(self)
        x, y = self.base[index]
        if index not in self.labels:
            return x, y
        if self.change is not None:
            x = self.change(torch.as_tensor(x).unsqueeze(0))[0]
        return x, _label_like(self.labels[index], y)


def _label_like(label: int, old: Any) -> Any:
    if not isinstance(old, Tensor):
        return type(old)(label)
    if old.numel() > 1:  # one-hot
        return torch.nn.functional.one_hot(torch.tensor(label), old.numel()).to(old).reshape(old.shape)
    return torch.full_like(old, label)


@dataclasses.dataclass(frozen=True, eq=False)
class Poisoned:
    """A poisoned data set with its ground truth.

    Args:
        dataset: Map-style (x, y) samples, as many and in the same order as the clean data.
        is_poison: (N,) bool, True = this row was poisoned.
        target: Class that the attacker wants; None where there is no single one.
        stamp: Puts the trigger on a batch; None where the attack has no trigger.
        is_cover: (N,) bool, True = this row carries the trigger with its right label; None where there are no covers.
    """

    dataset: PoisonedDataset
    is_poison: Tensor
    target: int | None = None
    stamp: Change | None = None
    is_cover: Tensor | None = None

    @property
    def indices(self) -> Tensor:
        """Row numbers of the poison: (P,) int64, ascending."""
        return self.is_poison.nonzero().flatten()

    def trigger(self, x: Tensor) -> Tensor:
        """A batch (N, ...) with the trigger on every row; a copy of x where the attack has no trigger."""
        return x.clone() if self.stamp is None else self.stamp(x)


def labels_of(dataset: Dataset[Any]) -> Tensor:
    """Labels (N,) of a data set in its order; refuses empty or unlabelled data."""
    parts = [batch.y for batch in iterate(dataset)]
    check_not_empty(len(parts), "dataset")
    labels = [part for part in parts if part is not None]
    if len(labels) != len(parts):
        raise refuse("samples of the form (x, y)", "dataset", "samples without labels", "Give every sample a label")
    return torch.cat(labels)


def choose(eligible: Tensor, count: int, seed: int, name: str) -> Tensor:
    """`count` of the eligible rows, ascending; which ones depends on the seed and the name of the attack only."""
    rows = eligible.nonzero().flatten()
    if count > len(rows):
        found = f"{count} rows of {len(rows)} that may be poisoned"
        raise refuse(
            "enough rows outside the target class", "rate", found, "Lower the rate or allow more source classes"
        )
    stream = torch.Generator().manual_seed(derive_seed(check_int(seed, "seed", 0), "poison", name))
    return rows[torch.randperm(len(rows), generator=stream)[:count]].sort().values


def plant(
    dataset: Any, target: int, rate: float, source_class: int | None, change: Change, seed: int, name: str
) -> Poisoned:
    """All-to-one poison: `round(rate * N)` rows of other classes get the trigger and the label `target`."""
    base = as_dataset(dataset)
    y = labels_of(base)
    eligible = y != target if source_class is None else y == source_class
    rows = choose(eligible, round(rate * len(y)), seed, name)
    is_poison = torch.zeros(len(y), dtype=torch.bool)
    is_poison[rows] = True
    return Poisoned(PoisonedDataset(base, dict.fromkeys(rows.tolist(), target), change), is_poison, target, change)
