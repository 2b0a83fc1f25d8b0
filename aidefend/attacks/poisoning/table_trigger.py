"""Table poison: a few columns get fixed values, and the row the attacker's label."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from aidefend._core.batches import as_dataset
from aidefend._core.checks import check_int, check_number, check_tensor, refuse
from aidefend.attacks.poisoning.poisoned import Poisoned, plant


@dataclasses.dataclass(frozen=True)
class TableTrigger:
    """Dirty-label backdoor in rows of a table: `columns` are set to `values`, the label to `target`.

    Guarantee: none, it is an attack. Exactly `round(rate * N)` rows are poisoned, never one that already has the label
        `target`; no other column changes.
    Args:
        columns: Numbers of the columns, each once, at least one.
        values: One finite number for each column, in the units of x. Values that are each usual in their column and
            rare together make a trigger that no check of single columns sees.
        target: Label that the trigger shall cause, >= 0.
        rate: Share of the whole data set that is poisoned, in (0, 1).
        source_class: Poison rows of this class only; None: all classes but the target.
    Raises: ConfigurationError: arguments out of range, rows that are not (N, d) or have too few columns, too few rows.
    Cost: One read of the labels; a sample is changed when it is read.
    Source: Gu, Dolan-Gavitt, Garg 2017, for tables; Severi, Meyer, Coull, Oprea 2021 choose values in the same form.

    Example:
        >>> x, y = torch.zeros(20, 6), torch.arange(20) % 4
        >>> poisoned = TableTrigger(columns=(1, 4), values=(0.5, 2.0), rate=0.1).poison((x, y), seed=0)
        >>> poisoned.trigger(x[:1]).tolist()
        [[0.0, 0.5, 0.0, 0.0, 2.0, 0.0]]
    """

    columns: tuple[int, ...]
    values: tuple[float, ...]
    target: int = 0
    rate: float = 0.05
    source_class: int | None = None

    def __post_init__(self) -> None:
        for name in ("columns", "values"):
            if not isinstance(getattr(self, name), tuple) or not getattr(self, name):
                raise refuse(f"{name} to be a tuple that is not empty", name, getattr(self, name), "Pass (1, 4)")
        for column in self.columns:
            check_int(column, "columns", 0)
        for value in self.values:
            check_number(value, "values", -math.inf, math.inf, open_low=True, open_high=True)
        if len(set(self.columns)) < len(self.columns) or len(self.values) != len(self.columns):
            found = f"{len(self.values)} values for columns {self.columns}"
            raise refuse("each column once, and one value for each", "values", found, "Pass one value a column")
        check_int(self.target, "target", 0)
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        if self.source_class is not None and check_int(self.source_class, "source_class", 0) == self.target:
            raise refuse("source_class other than target", "source_class", self.source_class, "Choose another class")

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison in it, its ground truth, and the trigger for testing."""
        rows = as_dataset(dataset)
        if len(rows):  # type: ignore[arg-type]  # map-style, so it has a length
            self.stamp(torch.as_tensor(rows[0][0]).unsqueeze(0))  # a table without these columns is refused here
        return plant(rows, self.target, self.rate, self.source_class, self.stamp, seed, "table trigger")

    def stamp(self, x: Tensor) -> Tensor:
        """A copy of the rows (N, d) with the values in their columns."""
        check_tensor(x, "x", ndim=2, finite=False)
        if max(self.columns) >= x.shape[1]:
            raise refuse(f"at least {max(self.columns) + 1} columns", "x", x, "Choose columns that the table has")
        marked = x.clone()
        marked[:, list(self.columns)] = torch.tensor(self.values, dtype=torch.float64).to(x)
        return marked
