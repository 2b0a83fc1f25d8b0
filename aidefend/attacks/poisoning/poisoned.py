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
RowChange = Callable[[Tensor, int], Tensor]


class PoisonedDataset(Dataset[tuple[Any, Any]]):
    """A map-style view: chosen rows are changed and relabelled when they are read, the others pass through untouched.

    Args:
        base: Map-style data set of (x, y) samples.
        labels: Row number to the new label, for the chosen rows.
        change: Maps a batch (1, ...) of inputs to its poisoned form; None leaves inputs as they are.
        row_change: In place of `change`, where rows are changed each in its own way: maps a batch (1, ...) and the
            number of its row.
    """

    def __init__(
        self,
        base: Dataset[Any],
        labels: dict[int, int],
        change: Change | None,
        row_change: RowChange | None = None,
    ) -> None:
        self.base, self.labels, self.change, self.row_change = base, labels, change, row_change

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]  # map-style, so it has a length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} samples")
        index = index % len(self)
        x, y = self.base[index]
        if index not in self.labels:
            return x, y
        return self._changed(x, index), _label_like(self.labels[index], y)

    def _changed(self, x: Any, row: int) -> Any:
        if self.row_change is not None:
            return self.row_change(torch.as_tensor(x).unsqueeze(0), row)[0]
        return x if self.change is None else self.change(torch.as_tensor(x).unsqueeze(0))[0]


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


def plant_with_covers(
    base: Dataset[Any],
    y: Tensor,
    target: int,
    poison: Tensor,
    covers: Tensor,
    stamp: Change,
    row_change: RowChange | None = None,
) -> Poisoned:
    """These rows (row numbers) get the trigger and the label `target`, the covers the trigger and their own label.

    `stamp` is the trigger of the test; rows of the data carry it too, unless `row_change` gives them one of their own.
    """
    labels = dict.fromkeys(poison.tolist(), target) | dict(zip(covers.tolist(), y[covers].tolist(), strict=True))
    data = PoisonedDataset(base, labels, stamp, row_change)
    return Poisoned(data, _marked(len(y), poison), target, stamp, _marked(len(y), covers))


def plant_diversely(
    dataset: Any,
    target: int,
    rate: float,
    cover_rate: float,
    stamp: Change,
    row_change: RowChange,
    seed: int,
    name: str,
) -> Poisoned:
    """Poison and covers from all classes but the target, no row both; every row carries a trigger of its own."""
    base = as_dataset(dataset)
    y = labels_of(base)
    poison = choose(y != target, round(rate * len(y)), seed, name)
    left = (y != target) & ~_marked(len(y), poison)
    covers = choose(left, round(cover_rate * len(y)), seed, f"{name} covers")
    return plant_with_covers(base, y, target, poison, covers, stamp, row_change)


def _marked(n: int, rows: Tensor) -> Tensor:
    marks = torch.zeros(n, dtype=torch.bool)
    marks[rows] = True
    return marks
