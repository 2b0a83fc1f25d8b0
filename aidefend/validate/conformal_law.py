"""What n exchangeable scores allow to say about one more: p-values, ranks and the law of the rate, by mode."""

import math
from typing import Literal

import torch
from scipy import stats as scipy_stats
from torch import Tensor

from aidefend._core.checks import check_choice, check_probability, refuse
from aidefend._core.stats import Interval

Mode = Literal["marginal", "class-conditional", "calibration-conditional"]
MODES = ("marginal", "class-conditional", "calibration-conditional")


def least_calibration_rows(alpha: float, mode: Mode = "marginal", delta: float = 0.05) -> int:
    """The smallest n that can express alpha: 1 / alpha - 1, or where (1 - alpha)^n <= delta in the third mode.

    Args:
        alpha: Rate of false alarms.
        mode: As in `Calibration`; "class-conditional" needs as many in each class.
        delta: As in `Calibration`.
    Example:
        >>> least_calibration_rows(0.01), least_calibration_rows(0.01, "calibration-conditional")
        (99, 299)
    """
    check_probability(delta, "delta")
    if check_choice(mode, MODES, "mode") != "calibration-conditional":
        return least_rows(alpha)
    return max(1, math.ceil(math.log(delta) / math.log1p(-check_probability(alpha, "alpha")) - 1e-9))


def p_of_counts(n: int, mode: Mode, delta: float) -> Tensor:
    """The p-value of a score that k of n calibration scores reach, k = 0 .. n: (n + 1,), rising.

    Given the calibration set, the rate above its (k + 1)-th largest score is Beta(k + 1, n - k): the third mode takes
    the 1 - delta quantile, so that at any one alpha, fixed beforehand, p <= alpha is a decision of rate at most alpha.
    """
    k = torch.arange(n + 1, dtype=torch.float64)
    if mode != "calibration-conditional":
        return (1 + k) / (n + 1)
    below = k[:-1].numpy()
    return torch.cat([torch.from_numpy(scipy_stats.beta.ppf(1 - delta, below + 1, n - below)), k.new_ones(1)])


def rank_of(n: int, alpha: float, mode: Mode, delta: float) -> int:
    """The rank r: a row is refused if its score is above the r-th largest of n; 0 if n is too small for alpha."""
    if n < least_calibration_rows(alpha, mode, delta):
        return 0
    if mode != "calibration-conditional":
        return rank_for(alpha, n)
    return int(at_most(p_of_counts(n, mode, delta), alpha).sum())


def at_most(p: Tensor, alpha: float) -> Tensor:
    """P <= alpha up to rounding; false for NaN."""
    return p <= alpha * (1 + 1e-9)


def rate_interval(rank: int, n: int, confidence: float) -> Interval:
    """The rate above the rank-th largest of n scores: r / (n + 1), and its range over calibration sets (Beta)."""
    rate = scipy_stats.beta(rank, n + 1 - rank)
    return Interval(rank / (n + 1), float(rate.ppf((1 - confidence) / 2)), float(rate.ppf((1 + confidence) / 2)))


def rank_for(alpha: float, n: int) -> int:
    """The rank r = floor(alpha (n + 1)) >= 1: a row is refused if fewer than r calibration rows are as strange.

    Raises: ConfigurationError: n < 1 / alpha - 1; even the strangest row could not be refused.
    """
    rank = math.floor(check_probability(alpha, "alpha") * (n + 1) + 1e-9)
    if rank < 1:
        rule = f"at least {least_rows(alpha)} calibration rows for alpha={alpha:g} (n >= 1 / alpha - 1)"
        raise refuse(rule, "n", n, "Calibrate on more rows, or raise alpha")
    return rank


def least_rows(alpha: float) -> int:
    """The smallest n with floor(alpha (n + 1)) >= 1."""
    return max(1, math.ceil(1 / check_probability(alpha, "alpha") - 1 - 1e-9))
