"""Probabilities that are pulled towards each other on purpose, so that a clone learns from wrong confidences."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_number, check_tensor
from aidefend.validate.detector import wide
from aidefend.validate.outputs import keep_top

_SMALLEST = 1e-12


@dataclasses.dataclass(frozen=True)
class ReverseSigmoid:
    """Probabilities minus a sigmoid of their own logits: y - beta (sigmoid(gamma logit(y)) - 1/2), renormalised.

    Guarantee: the predicted class is that of the logits, and equal inputs get equal answers. Nothing else: it is no
        random function, so whoever knows beta and gamma inverts most of it by a table; it does not stop attacks by
        labels, a clone from labels, or membership inference by labels. It spoils the confidences for honest clients.
    Args:
        beta: Size of the perturbation, in (0, 1].
        gamma: Steepness of the sigmoid, > 0.
    Returns: (N, K) float that sums to 1. In a guard, a refused row has NaN.
    Source: Lee, Edwards, Molloy, Su 2019, equation 3. Ours: negative values become 0, and where the map would move the
        largest probability to another class, the two are swapped back.
    Example:
        >>> ReverseSigmoid()(torch.tensor([[0.0, 6.0]])).round(decimals=2).tolist()
        [[0.1899999976158142, 0.8100000023841858]]
    """

    beta: float = 0.7
    gamma: float = 0.2

    def __post_init__(self) -> None:
        check_number(self.beta, "beta", 0.0, 1.0, open_low=True)
        check_number(self.gamma, "gamma", 0.0, open_low=True)

    def __call__(self, logits: Tensor) -> Tensor:
        """(N, K) logits to (N, K) probabilities."""
        check_tensor(logits, "logits", ndim=2, floating=True, finite=False)
        exact = wide(logits)
        y = exact.double().softmax(dim=1).clamp(_SMALLEST, 1 - _SMALLEST)
        pulled = (y - self.beta * (torch.sigmoid(self.gamma * torch.logit(y)) - 0.5)).clamp(min=0)
        shown = pulled / pulled.sum(dim=1, keepdim=True)
        return keep_top(shown.to(exact), exact.argmax(dim=1))
