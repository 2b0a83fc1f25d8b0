"""Detectors that read the logits alone: they need no features and learn nothing."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_number
from aidefend.validate.detector import check_fit, check_wide_logits, in_numpy

_FEW = 256  # numbers that plain Python is done with before a tensor operation starts


@dataclasses.dataclass(frozen=True)
class _LogitScore:
    """What they share: nothing to learn, nothing to store."""

    uses_features: ClassVar[bool] = False
    uses_logits: ClassVar[bool] = True

    def settings(self) -> Mapping[str, Any]:
        """Its configuration as JSON types."""
        return dataclasses.asdict(self)

    def arrays(self) -> Mapping[str, Tensor]:
        """Nothing: the score is a fixed formula."""
        return {}


@dataclasses.dataclass(frozen=True)
class Energy(_LogitScore):
    """Negative log-sum-exp of the logits: high where no class claims the row.

    Guarantee: none under attack: an input that is optimised for confidence has a low score. Through `Guard` the rate
        of false positives holds for rows that are exchangeable with the calibration rows.
    Cost: O(N K).
    Source: Liu, Wang, Owens, Li 2020, equation 4 at temperature 1.
    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [0.1, 0.0]])
        >>> Energy().score(torch.zeros(2, 0), logits).round(decimals=1).tolist()
        [-9.0, -0.7]
    """

    name: ClassVar[str] = "energy"

    def fit(self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> "Energy":
        """Checks the rows; there is nothing to learn."""
        check_fit(features, check_wide_logits(features, logits), labels)
        return self

    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """-log sum exp(logits): (N,), higher = stranger."""
        return self.quick_score(features, check_wide_logits(features, logits))

    def quick_score(self, _: Tensor, logits: Tensor) -> Tensor:
        """As `score`, for logits (N, K) that are known to be finite: float64."""
        if logits.numel() <= _FEW and in_numpy(logits):
            return torch.tensor([-_log_sum_exp(row) for row in logits.tolist()], dtype=torch.float64)
        return -logits.double().logsumexp(dim=1)


@dataclasses.dataclass(frozen=True)
class MaxSoftmax(_LogitScore):
    """Negative log of the largest softmax probability: high where the model is unsure.

    Guarantee: none under attack; networks are often sure far away from their data.
    Cost: O(N K).
    Source: Hendrycks, Gimpel 2017. Differs: the logarithm, which keeps the order and does not tie at probability 1.
    Example:
        >>> MaxSoftmax().score(torch.zeros(1, 0), torch.zeros(1, 4)).exp().tolist()
        [4.0]
    """

    name: ClassVar[str] = "max-softmax"

    def fit(self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> "MaxSoftmax":
        """Checks the rows; there is nothing to learn."""
        check_fit(features, check_wide_logits(features, logits), labels)
        return self

    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """-log max softmax(logits): (N,), higher = stranger."""
        return _ranked(check_wide_logits(features, logits)).others.logsumexp(dim=1).exp().log1p()


@dataclasses.dataclass(frozen=True)
class MaxLogit(_LogitScore):
    """Negative largest logit: high where no class responds.

    Guarantee: none under attack.
    Cost: O(N K).
    Source: Hendrycks et al. 2022, "Scaling out-of-distribution detection for real-world settings".
    Example:
        >>> MaxLogit().score(torch.zeros(1, 0), torch.tensor([[1.0, 3.0]])).tolist()
        [-3.0]
    """

    name: ClassVar[str] = "max-logit"

    def fit(self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> "MaxLogit":
        """Checks the rows; there is nothing to learn."""
        check_fit(features, check_wide_logits(features, logits), labels)
        return self

    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """-max logits: (N,), higher = stranger."""
        return -check_wide_logits(features, logits).amax(dim=1)


@dataclasses.dataclass(frozen=True)
class Entropy(_LogitScore):
    """Shannon entropy of the softmax, in nats: high where the model spreads its belief.

    Guarantee: none under attack.
    Cost: O(N K).
    Source: Shannon 1948; as a score of strangeness Macêdo et al. 2021. Every term is summed from positive parts, so
        that rows on which the model is sure to the last digit still differ.
    Example:
        >>> Entropy().score(torch.zeros(1, 0), torch.zeros(1, 4)).exp().tolist()
        [4.0]
    """

    name: ClassVar[str] = "entropy"

    def fit(self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> "Entropy":
        """Checks the rows; there is nothing to learn."""
        check_fit(features, check_wide_logits(features, logits), labels)
        return self

    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """-sum p log p of p = softmax(logits): (N,), higher = stranger."""
        ranked = _ranked(check_wide_logits(features, logits))
        own = ranked.others.logsumexp(dim=1).exp().log1p()
        rest = ranked.log_probability[:, 1:].exp() * ranked.others
        return own - rest.nan_to_num(nan=0.0).sum(dim=1)  # 0 * infinity, where logits are the largest of numbers


@dataclasses.dataclass(frozen=True)
class GEN(_LogitScore):
    """Generalised entropy sum p^gamma (1 - p)^gamma over the likeliest classes: feels small doubts of a sure model.

    Guarantee: none under attack.
    Args:
        gamma: Exponent, in (0, 1); the smaller, the more the small probabilities matter.
        top: How many of the likeliest classes count, >= 1; fewer classes than this count all.
    Cost: O(N K log K).
    Source: Liu, Lochman, Zach 2023, equation 5 with their gamma = 0.1 and M = 100; the sign is turned. 1 - p of the
        likeliest class is summed from the others, so that it is right where p rounds to one.
    Example:
        >>> sure, unsure = GEN().score(torch.zeros(2, 0), torch.tensor([[30.0, 0.0], [0.0, 0.0]])).tolist()
        >>> sure < unsure
        True
    """

    gamma: float = 0.1
    top: int = 100
    name: ClassVar[str] = "gen"

    def __post_init__(self) -> None:
        check_number(self.gamma, "gamma", 0.0, 1.0, open_low=True, open_high=True)
        check_int(self.top, "top")

    def fit(self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> "GEN":
        """Checks the rows; there is nothing to learn."""
        check_fit(features, check_wide_logits(features, logits), labels)
        return self

    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """Sum of p^gamma (1 - p)^gamma: (N,), higher = stranger."""
        ranked = _ranked(check_wide_logits(features, logits))
        first = ranked.others.logsumexp(dim=1, keepdim=True) + ranked.log_probability[:, :1]
        rest = torch.log1p(-ranked.log_probability[:, 1:].exp())  # these are at most one half
        both = ranked.log_probability + torch.cat([first, rest], dim=1)
        return (self.gamma * both[:, : self.top]).exp().sum(dim=1)


def _log_sum_exp(values: list[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


class _Ranked(NamedTuple):
    """Classes from the likeliest on: logits of the others (N, K - 1) less the largest; log softmax (N, K)."""

    others: Tensor
    log_probability: Tensor


def _ranked(logits: Tensor) -> _Ranked:
    """Without the cancellation that log_softmax has where one probability is almost one."""
    ordered = logits.sort(dim=1, descending=True).values
    others = ordered[:, 1:] - ordered[:, :1]
    own = -others.logsumexp(dim=1, keepdim=True).exp().log1p()
    return _Ranked(others, torch.cat([own, others + own], dim=1))
