"""What to do with each row, as one table: keep, quarantine, down-weight, or relabel. Nothing is done by itself."""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice
from aidefend._core.report import Report

Action = Literal["quarantine", "relabel", "down-weight", "keep"]
ACTIONS: tuple[Action, ...] = ("quarantine", "relabel", "down-weight", "keep")
WEIGHT, PROPOSED = "weight", "proposed_label"  # columns of a screen's report
WEAK = 0.5
_NOTHING = "keep: nothing was said against it"


@dataclasses.dataclass(frozen=True, eq=False)
class Decisions:
    """One row for each sample, in the order of the data; a proposal, the data itself is not changed.

    The rules, the first that fits:

    | action | where | weight |
    |---|---|---|
    | quarantine | the row is not kept: structured poison, a named detector, a row that cannot be read | 0 |
    | relabel | a wrong label is likely and another label fits (`ConfidentLearning`) | 1 - score, under its own label |
    | down-weight | a near duplicate: one of m copies | 1 / m |
    | | an outlier, g > 6 robust deviations out (Huber's weight) | 6 / g |
    | | weak evidence: fits another class better, and no proposal | 1 / 2 |
    | | in a poisoned group and kept by a cap | 1 - score |
    | keep | all else; trusted and released rows | 1 |

    Of several weights the smallest counts. A row that is relabelled by the user weighs 1 again: its weight speaks of
    the label that it has.

    Args:
        ids: Content ids (N).
        actions: (N) one of ACTIONS.
        weights: (N,) float32 in [0, 1] for the loss of the row under the label that it has.
        proposed_labels: (N,) int64, -1 where none is proposed.
        reasons: For each row at least one, in words; the first names the decision.

    Example:
        >>> report = Report(["a", "b"], torch.tensor([True, False]), reasons=[(), ("too far",)])
        >>> decisions_of(report).actions, decisions_of(report).reasons[1]
        (('keep', 'quarantine'), ('quarantine', 'too far'))
    """

    ids: tuple[str, ...]
    actions: tuple[Action, ...]
    weights: Tensor
    proposed_labels: Tensor
    reasons: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def counts(self) -> dict[str, int]:
        """Rows of each action."""
        return {action: self.actions.count(action) for action in ACTIONS}

    def rows(self, action: Action) -> Tensor:
        """Row numbers (n,) of one action, ascending.

        Raises: ConfigurationError: no such action.
        """
        check_choice(action, ACTIONS, "action")
        return torch.tensor([row for row, found in enumerate(self.actions) if found == action], dtype=torch.int64)


def decisions_of(report: Report) -> Decisions:
    """The table of a report; of one without the columns of a screen, only its verdicts."""
    n = len(report)
    weights = report.columns.get(WEIGHT, torch.ones(n)).float()
    proposed = report.columns.get(PROPOSED, torch.full((n,), -1))
    weights = torch.where(report.keep, weights, 0.0)
    actions: list[Action] = []
    reasons = []
    for kept, weight, label, said in zip(
        report.keep.tolist(), weights.tolist(), proposed.tolist(), report.reasons, strict=True
    ):
        action = action_of(kept, weight, label)
        words = _in_words(action, weight, label)
        actions.append(action)
        reasons.append((words if action != "keep" or not said else "keep", *said))
    return Decisions(report.ids, tuple(actions), weights, proposed, tuple(reasons))


def action_of(kept: bool, weight: float, label: int) -> Action:
    """The action for one row: whether it is kept, its weight, and the label that is proposed (-1: none)."""
    if not kept:
        return "quarantine"
    if label >= 0:
        return "relabel"
    return "down-weight" if weight < 1 else "keep"


def as_json(kept: bool, weight: float, label: int) -> dict[str, Any]:
    """The decision on one row as JSON types: keep, action, weight, and the proposed label (null where none is)."""
    action = action_of(kept, weight, label)
    return {"keep": kept, "action": action, "weight": weight, "proposed_label": label if label >= 0 else None}


def _in_words(action: Action, weight: float, label: int) -> str:
    if action == "relabel":
        return f"relabel to {label} is proposed; under the label it has, weight {weight:.2f}"
    return {"down-weight": f"down-weight to {weight:.2f}", "keep": _NOTHING, "quarantine": "quarantine"}[action]
