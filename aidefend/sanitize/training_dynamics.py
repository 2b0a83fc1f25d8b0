"""Training dynamics: rows that a model learns too early, and rows that it learns late or forgets again."""

import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_tensor, refuse
from aidefend.sanitize.block import check_kin, read_block

Seeks = Literal["shortcuts", "wrong labels", "both"]


class Trajectory(NamedTuple):
    """One row over the epochs: losses (E,), how often it was right and then wrong, and the first epoch it was right.

    `forgotten` is 0 and `learned` -1 where no block carried logits or the row was never right.
    """

    losses: Tensor
    forgotten: int
    learned: int


class TrainingDynamics:
    """Losses of every row, epoch after epoch: which rows fall unusually early, which late or never.

    Fit it in the training loop, once an epoch, with blocks that carry "losses" (N,) and, if there are some, "logits":
    a trigger is a shortcut that is learnt before the class is, and a wrong label is learnt last, if at all. A block may
    carry "epoch" (a whole number); without it, the k-th block with a row's id is its k-th epoch.

    Guarantee: none. Early is relative: easy honest rows are early, too, and weak triggers are learnt late. A score
        ranks rows inside their class; it condemns nothing.
    Args:
        seeks: "shortcuts": early and low losses score high (loss isolation); "wrong labels": late and high losses and
            forgotten rows do; "both": the larger of the two.
        early: Number of first epochs that count for "shortcuts".
    A score is in robust standard deviations of the class. A row that was never fitted, or whose loss is not finite in
    any epoch, scores NaN (no opinion); a class in which all rows are alike scores 0.
    Cost: no pass of its own; one number a row and epoch in memory, in each shard for its rows.
    Source: Li, Lyu, Koren, Lyu, Li, Ma 2021 (loss isolation); Toneva et al. 2019 (forgetting events). Differs: ranks
        are taken inside the class; no share is isolated, the losses are not flattened.

    Example:
        >>> labels = torch.zeros(5, dtype=torch.int64)
        >>> dynamics = TrainingDynamics("shortcuts")
        >>> for losses in ([2.0, 2.1, 0.1, 1.9, 2.2], [1.0, 1.1, 0.0, 0.9, 1.2]):
        ...     block = {"ids": tuple("abcde"), "features": torch.zeros(5, 1), "labels": labels}
        ...     block["losses"] = torch.tensor(losses)
        ...     dynamics = dynamics.partial_fit(block)
        >>> dynamics.score(block).argmax().item()
        2
    """

    def __init__(self, seeks: Seeks = "both", early: int = 3) -> None:
        self.seeks: Seeks = check_choice(seeks, ("shortcuts", "wrong labels", "both"), "seeks")
        self.early = check_int(early, "early")
        self._labels: dict[str, int] = {}
        self._epochs: dict[str, dict[int, tuple[float, bool | None]]] = {}
        self._usual: dict[int, Tensor] | None = None

    def partial_fit(self, block: Mapping[str, Any]) -> "TrainingDynamics":
        """Add the losses of a block of rows in one epoch; returns self."""
        rows = read_block(block)
        losses, right = _losses(block, len(rows.ids)), _right(block, rows.labels)
        epoch = None if "epoch" not in block else check_int(block["epoch"], "epoch", 0)
        for place, (row_id, label) in enumerate(zip(rows.ids, rows.labels.tolist(), strict=True)):
            if self._labels.setdefault(row_id, label) != label:
                cure = "Give a row one id and one label for the whole training"
                raise refuse(f"label {self._labels[row_id]} for row {row_id}, as before", "labels", label, cure)
            seen = self._epochs.setdefault(row_id, {})
            at = len(seen) if epoch is None else epoch
            if at in seen:
                raise refuse("each row once an epoch", "ids", f"{row_id} again in epoch {at}", "Fit each epoch once")
            seen[at] = (losses[place], None if right is None else right[place])
        self._usual = None
        return self

    def merge(self, other: "TrainingDynamics") -> "TrainingDynamics":
        """A new detector that has seen what both have seen: other rows, or other (numbered) epochs of the same rows."""
        check_kin(self, other, ("seeks", "early"))
        total = TrainingDynamics(self.seeks, self.early)
        for part in (self, other):
            for row_id, epochs in part._epochs.items():
                mine = total._epochs.setdefault(row_id, {})
                if (
                    mine.keys() & epochs.keys()
                    or total._labels.setdefault(row_id, part._labels[row_id]) != (part._labels[row_id])
                ):
                    cure = 'Merge shards of rows, or put the number of the epoch into block["epoch"]'
                    raise refuse("each row once an epoch", "other", f"row {row_id} in both", cure)
                mine.update(epochs)
        return total

    def trajectory(self, row_id: str) -> Trajectory:
        """What one row went through. Raises: ConfigurationError: the row was never fitted."""
        if row_id not in self._epochs:
            raise refuse("the id of a row that was fitted", "row_id", row_id, "Pass an id of the blocks")
        epochs = [self._epochs[row_id][epoch] for epoch in sorted(self._epochs[row_id])]
        right = [bool(flag) for _, flag in epochs]
        forgotten = sum(before and not after for before, after in itertools.pairwise(right))
        learned = right.index(True) if any(right) else -1
        return Trajectory(torch.tensor([loss for loss, _ in epochs], dtype=torch.float64), forgotten, learned)

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64, up = suspicious."""
        rows = read_block(block)
        if self._usual is None:
            self._usual = self._by_class()
        known = [
            row_id in self._epochs and self._labels[row_id] == label
            for row_id, label in zip(rows.ids, rows.labels.tolist(), strict=True)
        ]
        scores = torch.full((len(known),), torch.nan, dtype=torch.float64)
        for place, row_id in enumerate(rows.ids):
            if known[place] and bool(rows.usable[place]):
                scores[place] = self._scored(row_id)
        return scores

    def _scored(self, row_id: str) -> float:
        measures = self._measures(row_id)
        if measures is None or self._usual is None:
            return torch.nan
        middle, spread = self._usual[self._labels[row_id]]
        gaps = torch.where(spread > 0, (torch.tensor(measures, dtype=torch.float64) - middle) / spread, 0.0)
        shortcut, wrong = -float(gaps[0]), float(gaps[1])
        return {"shortcuts": shortcut, "wrong labels": wrong, "both": max(shortcut, wrong)}[self.seeks]

    def _measures(self, row_id: str) -> tuple[float, float] | None:
        """Mean loss of the first epochs; mean loss of all, plus one for each time that the row was forgotten."""
        path = self.trajectory(row_id)
        losses = path.losses[torch.isfinite(path.losses)]
        early = path.losses[: self.early]
        early = early[torch.isfinite(early)]
        if not len(early):
            return None
        return float(early.mean()), float(losses.mean()) + path.forgotten

    def _by_class(self) -> dict[int, Tensor]:
        """(2, 2) a class: median and robust deviation of both measures."""
        measures: dict[int, list[tuple[float, float]]] = {}
        for row_id, label in self._labels.items():
            found = self._measures(row_id)
            if found is not None:
                measures.setdefault(label, []).append(found)
        usual = {}
        for label, values in measures.items():
            table = torch.tensor(values, dtype=torch.float64)
            middle = table.median(dim=0).values
            usual[label] = torch.stack([middle, 1.4826 * (table - middle).abs().median(dim=0).values])
        return usual


def _losses(block: Mapping[str, Any], n: int) -> list[float]:
    if "losses" not in block:
        cure = "Add the losses of this epoch, one a row"
        raise refuse('a block with the key "losses"', "block", sorted(map(str, block)), cure)
    losses = check_tensor(block["losses"], "losses", ndim=1, floating=True, finite=False, rows=n)
    found: list[float] = losses.detach().cpu().double().tolist()
    return found


def _right(block: Mapping[str, Any], labels: Tensor) -> list[bool] | None:
    if block.get("logits") is None:
        return None
    logits = check_tensor(block["logits"], "logits", ndim=2, floating=True, finite=False, rows=len(labels))
    found: list[bool] = (logits.detach().cpu().argmax(dim=1) == labels).tolist() if len(labels) else []
    return found
