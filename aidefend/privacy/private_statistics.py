"""Means, histograms and quantiles of private data, each paid for: what preprocessing may know of the rows."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_kind, check_number, check_tensor, refuse
from aidefend._core.random import secure_normal, secure_uniform
from aidefend.privacy.ledger import PrivacyLedger

Array = npt.NDArray[np.float64]


def private_mean(
    values: Tensor,
    low: float,
    high: float,
    *,
    public_size: int,
    noise_multiplier: float,
    ledger: PrivacyLedger | None = None,
) -> Tensor:
    """The mean of each feature, clipped and noisy.

    Guarantee: a Gaussian mechanism with this noise multiplier where a row is added or removed:
        `epsilon([(noise_multiplier, 1.0, 1)], delta)`. Bounds or a size that were read from the rows void it.
    Args:
        values: (N, ...) numbers; clipped to the bounds; one that is NaN counts as the middle between them.
        low: Public lower bound, finite.
        high: Public upper bound, finite, above `low`.
        public_size: A published number of rows, >= 1, by which the sum is divided; the true one is private.
        noise_multiplier: > 0, of all features together.
        ledger: Charged before the rows are looked at; None: count it yourself.
    Returns: (...) float64, within the bounds.
    Raises: ConfigurationError: an argument out of range. BudgetExceeded: the ledger has no room.
    Cost: One pass over the values.

    Example:
        >>> ages = torch.tensor([30.0, 41.0, 52.0]).repeat(2_000)
        >>> abs(float(private_mean(ages, 0, 100, public_size=6_000, noise_multiplier=5.0)) - 41) < 1
        True
    """
    check_tensor(values, "values", floating=True, finite=False)
    low, high = check_bounds(low, high)
    check_int(public_size, "public_size")
    noise_multiplier = charged("private_mean", noise_multiplier, ledger)
    centred = centred_rows(values, low, high)
    noisy = centred.sum(dim=0) + noise_for(centred[0:0].sum(dim=0), math.sqrt(_features(values)) * noise_multiplier)
    middle, half = (low + high) / 2, (high - low) / 2
    return (middle + half * noisy / public_size).clamp(low, high)


def private_histogram(
    labels: Tensor, num_bins: int, *, noise_multiplier: float, ledger: PrivacyLedger | None = None
) -> Tensor:
    """How many rows have each label, noisy.

    Guarantee: a Gaussian mechanism with this noise multiplier where a row is added or removed. A number of bins that
        was read from the rows (the largest label that occurs) voids it.
    Args:
        labels: (N,) integers; rows with labels outside of 0 .. num_bins - 1 are left out.
        num_bins: Public number of labels, >= 1.
        noise_multiplier: > 0: the standard deviation of each count.
        ledger: Charged before the rows are looked at; None: count it yourself.
    Returns: (num_bins,) float64; may be negative, and is no whole number.
    Raises: ConfigurationError: an argument out of range. BudgetExceeded: the ledger has no room.
    Cost: One pass over the labels.

    Example:
        >>> private_histogram(torch.tensor([0, 1, 1]), 4, noise_multiplier=1.0).shape
        torch.Size([4])
    """
    check_tensor(labels, "labels", ndim=1, floating=False)
    check_int(num_bins, "num_bins")
    noise_multiplier = charged("private_histogram", noise_multiplier, ledger)
    inside = labels[(labels >= 0) & (labels < num_bins)].long()
    counts = torch.bincount(inside, minlength=num_bins).double()
    return counts + noise_for(counts, noise_multiplier)


def private_quantile(
    values: Tensor, share: float, low: float, high: float, *, pure_epsilon: float, ledger: PrivacyLedger | None = None
) -> float:
    """A number with about `share` of the values below it.

    Guarantee: pure epsilon-differential privacy where a row is added or removed (twice that where one is exchanged).
        Bounds that were read from the rows void it; the last bits of the answer are not protected (Mironov 2012).
    Args:
        values: (N,) numbers; clipped to the bounds; NaN is left out.
        share: In [0, 1]; 0.5 is the median.
        low: Public lower bound, finite.
        high: Public upper bound, finite, above `low`.
        pure_epsilon: > 0.
        ledger: Charged before the rows are looked at; None: count it yourself.
    Returns: A number within the bounds.
    Raises: ConfigurationError: an argument out of range. BudgetExceeded: the ledger has no room.
    Cost: One sort.

    Source: exponential mechanism over the gaps between values: Smith 2011, algorithm 2.

    Example:
        >>> heights = torch.linspace(150, 190, 5_001)
        >>> abs(private_quantile(heights, 0.5, 0, 300, pure_epsilon=1.0) - 170) < 2
        True
    """
    check_tensor(values, "values", ndim=1, floating=True, finite=False)
    low, high = check_bounds(low, high)
    share = check_number(share, "share", 0.0, 1.0)
    pure_epsilon = check_number(pure_epsilon, "pure_epsilon", 0.0, open_low=True)
    _check_ledger(ledger)
    if ledger is not None:
        ledger.charge("private_quantile", epsilon=pure_epsilon)
    kept = values[~values.isnan()].double().clamp(low, high).sort().values.cpu().numpy()
    edges: Array = np.concatenate([[float(low)], kept, [float(high)]])
    below = np.arange(len(kept) + 1)
    distance = np.abs(below - share * len(kept))
    # one row more moves a distance by at most max(share, 1 - share)
    weights = -pure_epsilon * distance / (2 * max(share, 1 - share))
    with np.errstate(divide="ignore"):
        logs = np.log(np.diff(edges)) + weights
    gumbel = -np.log(-np.log(secure_uniform(len(logs))))
    gap = int(np.argmax(logs + gumbel))
    inside = float(secure_uniform(1)[0])
    return float(edges[gap] + inside * (edges[gap + 1] - edges[gap]))


def centred_rows(values: Tensor, low: float, high: float) -> Tensor:
    """Values moved and scaled to [-1, 1], float64; NaN becomes the middle."""
    middle, half = (low + high) / 2, (high - low) / 2
    return ((values.double().clamp(low, high) - middle) / half).nan_to_num(0.0)


def noise_for(like: Tensor, deviation: float) -> Tensor:
    """Secure Gaussian noise, float64."""
    return secure_normal(tuple(like.shape), like.device, torch.float64) * deviation


def charged(name: str, noise_multiplier: float, ledger: PrivacyLedger | None) -> float:
    """Pay for one Gaussian release; its noise multiplier."""
    noise_multiplier = check_number(noise_multiplier, "noise_multiplier", 0.0, open_low=True)
    _check_ledger(ledger)
    if ledger is not None:
        ledger.charge(name, noise_multiplier=noise_multiplier)
    return noise_multiplier


def _features(values: Tensor) -> int:
    return math.prod(values.shape[1:])


def check_bounds(low: float, high: float) -> tuple[float, float]:
    """Public bounds in order."""
    low, high = check_number(low, "low"), check_number(high, "high")
    if not low < high:
        cure = "State public bounds, from the meaning of the feature and not from the rows"
        raise refuse("low < high", "high", high, cure)
    return low, high


def _check_ledger(ledger: PrivacyLedger | None) -> None:
    if ledger is not None:
        check_kind(ledger, PrivacyLedger, "ledger", "Open PrivacyLedger(path)")
