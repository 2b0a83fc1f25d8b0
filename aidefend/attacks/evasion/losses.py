"""What an attack climbs: losses by sample, larger = worse for the model, and what counts as a success."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from aidefend._core.checks import check_choice

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]
IsSuccess = Callable[[Tensor, Tensor], Tensor]
Loss = Literal["cross_entropy", "margin", "dlr"] | PerSampleLoss
_NARROW = (torch.float16, torch.bfloat16)


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample. Its gradient vanishes where the model is very sure: see `margin`.

    Args:
        outputs: Logits (N, K); 16-bit logits are widened first.
        y: Class indices (N,).
    Returns: (N,).
    """
    return functional.cross_entropy(_wide(outputs), y, reduction="none")


def margin(outputs: Tensor, y: Tensor) -> Tensor:
    """Best other logit less the true one: positive = misclassified. Never saturates; any K >= 2.

    Args:
        outputs: Logits (N, K).
        y: Class indices (N,).
    Returns: (N,).
    Source: Carlini, Wagner 2017 (their f6 without the clipping).
    """
    column = y[:, None]
    others = outputs.scatter(1, column, -torch.inf).amax(dim=1)
    return others - outputs.gather(1, column)[:, 0]


def dlr(outputs: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: the margin divided by the gap between the first and the third logit.

    Does not change when the logits are shifted or scaled. With fewer than 3 classes the ratio is undefined: the margin
    is used, as for a targeted attack the negative of this untargeted form.
    Source: Croce, Hein 2020, eq. 5.
    """
    if outputs.shape[1] < 3:
        return margin(outputs, y)
    top = outputs.topk(3, dim=1).values
    return margin(outputs, y) / (top[:, 0] - top[:, 2] + 1e-12)


_BUILT_IN: dict[str, PerSampleLoss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def resolve(loss: Loss) -> PerSampleLoss:
    """The function behind a loss argument."""
    return loss if callable(loss) else _BUILT_IN[loss]


def check_loss(loss: Loss) -> None:
    """Refuse what is neither a callable nor one of the names."""
    if not callable(loss):
        check_choice(loss, tuple(_BUILT_IN), "loss")


def misclassified(outputs: Tensor, y: Tensor) -> Tensor:
    """Rows whose top class is not y, (N,) bool. A row with NaN logits counts as misclassified."""
    return (outputs.argmax(dim=1) != y) | outputs.isnan().any(dim=1)


def hits_target(outputs: Tensor, y: Tensor) -> Tensor:
    """Rows whose top class is the target y, (N,) bool. A row with NaN logits hits nothing."""
    return (outputs.argmax(dim=1) == y) & ~outputs.isnan().any(dim=1)


def _wide(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.dtype in _NARROW else outputs
