"""What a specification says about one batch, whatever the batch is made of."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Reasons = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class SpecResult:
    """What an `InputSpec`, `TextSpec`, `TableSpec` or `ImageSpec` says about one batch.

    Args:
        fault: Why the batch as a whole was refused, or None. Then no row was looked at.
        accepted: (N,) bool, True = the row satisfies every rule. After a fault one False is shown N times.
        reasons: For each row the rules that it breaks; empty after a fault. A reason begins with "input:", or with
            "quarantine:" where the policy of the rule is to keep the row for a person to look at.
        x: What may go on. `InputSpec`: all rows, those refused included, clipped where the rule says so. The other
            three: the accepted rows alone, in order, in the form that each states. None after a fault.
    """

    fault: str | None
    accepted: Tensor
    reasons: Sequence[Reasons]
    x: Any

    @property
    def quarantined(self) -> Tensor:
        """(N,) bool: the row is refused and a rule that it breaks asks to keep it aside: `raw[i]` for these i."""
        return quarantined_rows(self.reasons, self.accepted)


def refused_batch(fault: str, rows: int = 1) -> SpecResult:
    """The result where nothing was looked at: constant memory, whatever `rows` is."""
    return SpecResult(fault, torch.zeros(1, dtype=torch.bool).expand(rows), (), None)


def quarantined_rows(reasons: Sequence[Reasons], like: Tensor) -> Tensor:
    """(N,) bool on the device of `like` (N,): which rows carry a reason of a rule with the policy "quarantine"."""
    if len(reasons) != len(like) or (len(reasons) and like.stride(0) == 0):  # a fault: no rule of a row was asked
        return torch.zeros_like(like)
    found = [any(reason.startswith("quarantine:") for reason in row) for row in reasons]
    return torch.tensor(found, dtype=torch.bool, device=like.device)


def remark(policy: str, rule: str) -> str:
    """The reason of a row that breaks a rule with this policy."""
    return f"{'quarantine' if policy == 'quarantine' else 'input'}: {rule}"
