"""The length that gradients are clipped to: fixed, or led by a noisy count of the rows beyond it."""

import math

from aidefend.privacy.config import LEAST_BOUND, PrivacyConfig
from aidefend.privacy.ranks import Ranks
from aidefend.privacy.run_draws import draw_noise

_LEARNING_RATE = 0.2
_SUM_SHARE = 1.01  # the noise of the sum grows by this factor, which pays for the count
_FURTHEST = 1e6  # from the first bound, either way


class ClipBound:
    """The clip norm of a run and the noise that goes with it.

    "adaptive": after each step the bound follows the median length of the gradients, of which only a noisy count is
    seen. Sum and count together are one Gaussian mechanism with the noise multiplier z of the configuration: the sum
    has z1 = 1.01 z, and the count, which one row moves by at most a half, has a standard deviation s such that
    1 / z^2 = 1 / z1^2 + 1 / (2 s)^2. The share is taken of the public batch size, never of the true one.

    Source: Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially private learning with adaptive clipping",
    theorem 1 and algorithm 1 (geometric update); the noise of the count follows z here in place of the batch size.
    """

    def __init__(self, config: PrivacyConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self.value = config.max_grad_norm

    @property
    def noise_deviation(self) -> float:
        """Standard deviation of the noise of the clipped sum."""
        return self._config.multiplier * self.value * (_SUM_SHARE if self._adaptive else 1.0)

    @property
    def count_deviation(self) -> float:
        """Standard deviation of the noise of the count of rows, each -1/2 or +1/2."""
        return self._config.multiplier / (2 * math.sqrt(1 - 1 / _SUM_SHARE**2))

    def follow(self, balance: float, step: int) -> None:
        """Move the bound after a step in which `balance` is the sum of +1/2 for each row within it and -1/2 beyond."""
        if not self._adaptive:
            return
        share = self._ranks.number(balance + self._count_noise(step)) / self._config.expected_batch_size
        first = self._config.max_grad_norm
        moved = self.value * math.exp(-_LEARNING_RATE * max(-10.0, min(10.0, share)))
        self.value = max(first / _FURTHEST, LEAST_BOUND, min(first * _FURTHEST, moved))

    @property
    def _adaptive(self) -> bool:
        return self._config.clipping == "adaptive"

    def _count_noise(self, step: int) -> float:
        if not self._ranks.first:
            return 0.0
        return float(draw_noise(self._config, (1,), self.count_deviation, "count", step))
