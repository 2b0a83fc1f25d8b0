"""Standardised inputs whose mean and deviation were computed with noise."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_int, check_number, check_tensor, refuse
from aidefend.privacy.ledger import PrivacyLedger
from aidefend.privacy.private_statistics import centred_rows, charged, check_bounds, noise_for

_LEAST_SHARE = 0.01


class DPStandardizer(nn.Module):
    """Takes the mean from each feature and divides by its standard deviation, both learnt with differential privacy.

    Tables (N, d) have one pair for each feature; signals and images (N, C, ...) one for each channel.

    Guarantee: fitting is one Gaussian mechanism with this noise multiplier where a row is added or removed; using the
        fitted module costs nothing. Bounds or a size that were read from the rows void it.
    Args:
        low: Public lower bound of all values, finite.
        high: Public upper bound, finite, above `low`.
        public_size: A published number of rows, >= 1; the true one is private.
        noise_multiplier: > 0.
        ledger: Charged when `fit` begins; None: count it yourself.
    Raises: ConfigurationError: an argument out of range. BudgetExceeded: the ledger has no room (`fit`).

    Example:
        >>> x = torch.rand(5_000, 3) * torch.tensor([1.0, 2.0, 4.0])
        >>> scale = DPStandardizer(0.0, 4.0, public_size=5_000, noise_multiplier=5.0).fit(x)
        >>> bool((scale(x).std(dim=0) - 1).abs().max() < 0.2)
        True
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        low: float,
        high: float,
        *,
        public_size: int,
        noise_multiplier: float,
        ledger: PrivacyLedger | None = None,
    ) -> None:
        super().__init__()
        self.low, self.high = check_bounds(low, high)
        self.public_size = check_int(public_size, "public_size")
        self.noise_multiplier = check_number(noise_multiplier, "noise_multiplier", 0.0, open_low=True)
        self._ledger = ledger
        self.register_buffer("mean", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("deviation", torch.zeros(0, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, x: Tensor) -> "DPStandardizer":
        """Learn from all rows at once, (N, d) or (N, C, ...). Each call is paid for.

        A row's part is the mean of its values and of their squares, in each channel: a vector no longer than
        sqrt(5 / 4 * channels) once the values lie in [-1, 1] and the squares are moved by a half.
        """
        check_tensor(x, "x", floating=True, finite=False)
        if x.ndim < 2 or not x.shape[1:].numel():
            raise refuse("rows (N, d) or (N, C, ...) with features", "x", x, "Add the dimension of the features")
        charged("DPStandardizer", self.noise_multiplier, self._ledger)
        values = centred_rows(x, self.low, self.high).reshape(len(x), x.shape[1], x.shape[2:].numel())
        sums = torch.stack([values.mean(dim=2).sum(dim=0), (values.square().mean(dim=2) - 0.5).sum(dim=0)])
        longest = math.sqrt(1.25 * x.shape[1])
        first, second = (sums + noise_for(sums, self.noise_multiplier * longest)) / self.public_size
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        centre = first.clamp(-1, 1)
        variance = second + 0.5 - centre.square()
        self.mean = middle + half * centre
        self.deviation = half * variance.clamp(min=_LEAST_SHARE**2).sqrt()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The same values, standardised; same shape and dtype."""
        if not len(self.mean):
            raise refuse("a fitted DPStandardizer", "mean", None, "Call fit(x) first, or load its state")
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x - self.mean.reshape(shape).to(x)) / self.deviation.reshape(shape).to(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("mean", "deviation"):
            if prefix + name in state_dict:
                setattr(self, name, state_dict[prefix + name].clone())
        super()._load_from_state_dict(state_dict, prefix, *rest)
