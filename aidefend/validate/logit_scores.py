"""Detectors that read the logits alone: they need no features and learn nothing."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from aidefend.validate.detector import check_fit, check_outputs, wide


@dataclasses.dataclass(frozen=True)
class _LogitScore:
    """What the three share: nothing to learn, nothing to store."""

    uses_features: ClassVar[bool] = False

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
        [-9.0, -0.699999988079071]
    """

    name: ClassVar[str] = "energy"

    def fit(self, features: Tensor, logits: Tensor, labels: Tensor | None = None) -> "Energy":
        """Checks the rows; there is nothing to learn."""
        check_fit(features, logits, labels)
        return self

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """-log sum exp(logits): (N,), higher = stranger."""
        check_outputs(features, logits)
        return -wide(logits).logsumexp(dim=1)


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

    def fit(self, features: Tensor, logits: Tensor, labels: Tensor | None = None) -> "MaxSoftmax":
        """Checks the rows; there is nothing to learn."""
        check_fit(features, logits, labels)
        return self

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """-log max softmax(logits): (N,), higher = stranger."""
        check_outputs(features, logits)
        return -torch.log_softmax(wide(logits), dim=1).amax(dim=1)


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

    def fit(self, features: Tensor, logits: Tensor, labels: Tensor | None = None) -> "MaxLogit":
        """Checks the rows; there is nothing to learn."""
        check_fit(features, logits, labels)
        return self

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """-max logits: (N,), higher = stranger."""
        check_outputs(features, logits)
        return -wide(logits).amax(dim=1)
