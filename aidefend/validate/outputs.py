"""What a client gets to see: hardened forms of the logits. Each is a plain callable from logits to outputs.

One that also reads the inputs has `uses_inputs = True` and takes (logits, x); `harden` serves both.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_number, check_tensor
from aidefend.validate.detector import wide

Output = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class LabelOnly:
    """The predicted class and nothing else.

    Guarantee: none. It removes confidences. It does not stop membership inference by labels (robustness of the label
        to noise), decision-based evasion (HopSkipJump, boundary attack), or a clone trained on the labels.
    Returns: (N,) int64. In a guard, a refused row has -1.
    Example:
        >>> LabelOnly()(torch.tensor([[0.0, 2.0]])).tolist()
        [1]
    """

    def __call__(self, logits: Tensor) -> Tensor:
        """(N, K) logits to (N,) class indices."""
        return check_tensor(logits, "logits", ndim=2, floating=True, finite=False).argmax(dim=1)


@dataclasses.dataclass(frozen=True)
class TopK:
    """The probabilities of the k largest classes, 0 for all others.

    Guarantee: none. It hides the tail of the distribution. It does not stop membership inference (the largest
        probability stays exact) or distillation, and leaves a clone nearly as good.
    Args:
        k: Classes shown, >= 1; all of them if the model has fewer.
    Returns: (N, K) float, not renormalised. In a guard, a refused row has NaN.
    Example:
        >>> TopK(1)(torch.tensor([[0.0, 0.0, 9.0]])).round(decimals=2).tolist()
        [[0.0, 0.0, 1.0]]
    """

    k: int = 1

    def __post_init__(self) -> None:
        check_int(self.k, "k")

    def __call__(self, logits: Tensor) -> Tensor:
        """(N, K) logits to (N, K) probabilities."""
        shown = _probabilities(logits)
        kept, index = shown.topk(min(self.k, shown.shape[1]), dim=1)
        return torch.zeros_like(shown).scatter(1, index, kept)


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Probabilities rounded to some digits, renormalised, with the predicted class kept.

    Guarantee: the predicted class is that of the logits. Nothing else: repeated queries with tiny moves of the input
        recover what was rounded away. It does not stop membership inference by labels, decision-based evasion, or a
        clone.
    Args:
        digits: Decimal digits, 0 to 6.
    Returns: (N, K) float that sums to 1. In a guard, a refused row has NaN.
    Example:
        >>> Rounded(1)(torch.tensor([[0.50, 0.51]])).argmax().item()
        1
    """

    digits: int = 2

    def __post_init__(self) -> None:
        check_int(self.digits, "digits", 0, 6)

    def __call__(self, logits: Tensor) -> Tensor:
        """(N, K) logits to (N, K) probabilities."""
        exact = _probabilities(logits)
        top = logits.argmax(dim=1, keepdim=True)  # logits that differ little have equal probabilities
        rounded = exact.round(decimals=self.digits)
        rest = rounded.scatter(1, top, -1.0).amax(dim=1, keepdim=True)
        own = rounded.gather(1, top)
        unit = 10.0**-self.digits
        rounded = rounded.scatter(1, top, torch.where(own > rest, own, rest.clamp(min=0) + unit))
        return rounded / rounded.sum(dim=1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class Tempered:
    """Probabilities at a temperature: flatter above 1, sharper below.

    Guarantee: none. The map can be inverted by whoever knows the temperature, so it only costs a careless attacker;
        a temperature that was fitted on held-out data calibrates the confidences, which is its honest use. It does not
        stop membership inference, by labels or else, evasion, or a clone: above 1 it shows a thief more.
    Args:
        temperature: > 0.
    Returns: (N, K) float that sums to 1. In a guard, a refused row has NaN.
    Source: Guo, Pleiss, Sun, Weinberger 2017.
    Example:
        >>> Tempered(2.0)(torch.tensor([[0.0, 2.0]])).round(decimals=2).tolist()
        [[0.27000001072883606, 0.7300000190734863]]
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_number(self.temperature, "temperature", 0.0, open_low=True)

    def __call__(self, logits: Tensor) -> Tensor:
        """(N, K) logits to (N, K) probabilities."""
        exact = _checked(logits)
        # the largest becomes 0 first, so that no quotient overflows
        return torch.softmax((exact - exact.amax(dim=1, keepdim=True)) / self.temperature, dim=1)


def harden(output: Output, logits: Tensor, x: Tensor) -> Tensor:
    """Outputs of the rows x (N, ...) with these logits (N, K)."""
    return output(logits, x) if getattr(output, "uses_inputs", False) else output(logits)


def keep_top(shown: Tensor, top: Tensor) -> Tensor:
    """Probabilities (N, K) whose largest is that of the classes `top` (N,), alone: swapped where it was another."""
    index = top[:, None]
    highest, place = shown.max(dim=1, keepdim=True)
    swapped = shown.scatter(1, place, shown.gather(1, index)).scatter(1, index, highest)
    rest = swapped.scatter(1, index, -1.0).amax(dim=1, keepdim=True)
    own = torch.where(highest > rest, highest, torch.nextafter(rest, torch.full_like(rest, 2.0)))
    return swapped.scatter(1, index, own)


def _probabilities(logits: Tensor) -> Tensor:
    return torch.softmax(_checked(logits), dim=1)


def _checked(logits: Tensor) -> Tensor:
    return wide(check_tensor(logits, "logits", ndim=2, floating=True, finite=False))
