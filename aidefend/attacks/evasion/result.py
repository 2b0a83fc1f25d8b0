"""What an attack found for each sample, and what it cost."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class AttackResult:
    """The outcome of one run; row i belongs to x[i].

    Args:
        x_adv: (N, ...), dtype and device of x, inside the threat.
        success: (N,) bool. Misclassified (or the target class was hit, or `is_success` said so) at x_adv.
        loss: (N,) the attack's loss at x_adv.
        forwards: (N,) int64, forward passes that held this row, clean pass included where the run made one.
        backwards: (N,) int64, backward passes (to the input only) that held this row.
    """

    x_adv: Tensor
    success: Tensor
    loss: Tensor
    forwards: Tensor
    backwards: Tensor
