"""Intervals and p-values. Every measured number in a report carries an interval from here and its n."""

import math
from typing import Literal, NamedTuple

import torch
from scipy import stats as scipy_stats
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_not_empty, check_probability, check_tensor, refuse


class Interval(NamedTuple):
    """A value with its two-sided interval."""

    value: float
    low: float
    high: float


def _check_counts(successes: int, n: int, confidence: float) -> None:
    check_int(n, "n", 1)
    check_int(successes, "successes", 0, n)
    check_probability(confidence, "confidence")


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion.

    Args:
        successes: Count, 0 <= successes <= n.
        n: Number of trials, >= 1.
        confidence: Two-sided level in (0, 1).
    Returns: The share with its interval; always inside [0, 1] and never of zero width.
    Source: Wilson 1927.
    Example:
        >>> [round(v, 4) for v in wilson(50, 100)]
        [0.5, 0.4038, 0.5962]
    """
    _check_counts(successes, n, confidence)
    z = float(scipy_stats.norm.ppf(0.5 + confidence / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact (conservative) interval of a proportion.

    Source: Clopper, Pearson 1934.

    Example:
        >>> [round(v, 4) for v in clopper_pearson(0, 10)]
        [0.0, 0.0, 0.3085]
    """
    _check_counts(successes, n, confidence)
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(scipy_stats.beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(scipy_stats.beta.ppf(1 - tail, successes + 1, n - successes))
    return Interval(successes / n, low, high)


def conformal_p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """Conformal p-values (1 + k) / (n + 1), k = number of calibration scores >= the score.

    Guarantee: if a row is exchangeable with the calibration rows, P(p <= a) <= a for every a. Drift voids it.
    Args:
        scores: (N,), higher = stranger. A NaN score counts as strangest: p = 1 / (n + 1).
        calibration: (n,), n >= 1, finite, from data that was used for nothing else.
    Returns: (N,) float64 in [1 / (n + 1), 1].
    Cost: O((n + N) log n).
    Source: Vovk, Gammerman, Shafer 2005.
    Example:
        >>> conformal_p_values(torch.tensor([0.5, 9.0]), torch.arange(9.0)).tolist()
        [0.9, 0.1]
    """
    check_tensor(scores, "scores", ndim=1, finite=False)
    check_tensor(calibration, "calibration", ndim=1)
    check_not_empty(len(calibration), "calibration")
    ordered = calibration.detach().double().sort().values
    row = scores.detach().double().nan_to_num(nan=math.inf)
    at_least = len(ordered) - torch.searchsorted(ordered, row.contiguous(), side="left")
    return (1 + at_least).double() / (len(ordered) + 1)


def combine_p_values(
    p_values: Tensor, method: Literal["bonferroni", "cauchy", "geometric", "harmonic"] = "bonferroni"
) -> Tensor:
    """One p-value for each row out of several dependent ones.

    Guarantee: `bonferroni` holds under every dependence; `geometric` (times e) and `harmonic` (times e ln M) too;
        `cauchy` is valid in the limit of small p only, so prefer to calibrate the combined statistic itself.
    Args:
        p_values: (N, M), in (0, 1], M >= 1.
        method: How to combine.
    Returns: (N,) float64 in (0, 1].
    Raises: ConfigurationError: a p-value outside (0, 1].
    Source: Vovk, Wang 2020 (geometric, harmonic); Liu, Xie 2020 (Cauchy).
    Example:
        >>> combine_p_values(torch.tensor([[0.01, 0.5]], dtype=torch.float64)).tolist()
        [0.02]
    """
    check_choice(method, ("bonferroni", "cauchy", "geometric", "harmonic"), "method")
    check_tensor(p_values, "p_values", ndim=2, floating=True)
    if p_values.shape[1] == 0 or bool((p_values <= 0).any()) or bool((p_values > 1).any()):
        raise refuse("p_values in (0, 1] with at least one column", "p_values", p_values, "Pass valid p-values")
    p, m = p_values.double(), p_values.shape[1]
    if m == 1:
        return p[:, 0].clone()
    if method == "bonferroni":
        return (p.min(dim=1).values * m).clamp(max=1.0)
    if method == "geometric":
        return (math.e * p.log().mean(dim=1).exp()).clamp(max=1.0)
    if method == "harmonic":
        return (math.e * math.log(m) * m / (1 / p).sum(dim=1)).clamp(max=1.0)
    statistic = torch.tan((0.5 - p.clamp(max=1 - 1e-15)) * math.pi).mean(dim=1)
    return (0.5 - torch.atan(statistic) / math.pi).clamp(1e-300, 1.0)


def false_positive_interval(alpha: float, calibration_n: int, test_n: int, confidence: float = 0.95) -> Interval:
    """Range in which the false-positive share measured on `test_n` rows falls when a conformal threshold is exact.

    Covers both samplings: the share given one calibration set is Beta, the count on the test set is beta-binomial.
    Source: Vovk 2012 (conditional validity of split conformal prediction).
    Example:
        >>> interval = false_positive_interval(0.01, 1000, 1000, 0.99)
        >>> interval.low < 0.01 < interval.high
        True
    """
    check_probability(alpha, "alpha")
    check_probability(confidence, "confidence")
    rank = math.floor(alpha * (calibration_n + 1))
    if rank < 1:
        raise refuse(
            f"calibration_n >= 1 / alpha - 1 = {math.ceil(1 / alpha - 1)}",
            "calibration_n",
            calibration_n,
            "Calibrate on more rows or raise alpha",
        )
    count = scipy_stats.betabinom(test_n, rank, calibration_n + 1 - rank)
    low, high = count.ppf((1 - confidence) / 2), count.ppf((1 + confidence) / 2)
    return Interval(alpha, float(low) / test_n, float(high) / test_n)


def roc_auc(positive: Tensor, negative: Tensor, confidence: float = 0.95) -> Interval:
    """Area under the ROC curve (ties count half) with DeLong's interval.

    Args:
        positive: (P,) scores of the positive class, higher = more positive.
        negative: (M,) scores of the negative class.
        confidence: Two-sided level.
    Returns: The area with its interval, clipped to [0, 1].
    Source: DeLong, DeLong, Clarke-Pearson 1988, in the rank form of Sun, Xu 2014.
    Example:
        >>> roc_auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 2.0])).value
        0.875
    """
    check_not_empty(len(positive), "positive")
    check_not_empty(len(negative), "negative")
    check_probability(confidence, "confidence")
    pos, neg = positive.detach().double().cpu(), negative.detach().double().cpu()
    p, m = len(pos), len(neg)
    ranks = torch.from_numpy(scipy_stats.rankdata(torch.cat([pos, neg]).numpy()))
    of_pos = torch.from_numpy(scipy_stats.rankdata(pos.numpy()))
    of_neg = torch.from_numpy(scipy_stats.rankdata(neg.numpy()))
    above = (ranks[:p] - of_pos) / m
    below = 1 - (ranks[p:] - of_neg) / p
    area = float(above.mean())
    spread = (above.var().item() / p if p > 1 else 0.25) + (below.var().item() / m if m > 1 else 0.25)
    half = float(scipy_stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt(spread)
    return Interval(area, max(0.0, area - half), min(1.0, area + half))


def tpr_at_fpr(positive: Tensor, negative: Tensor, fpr: float, confidence: float = 0.95) -> Interval:
    """True-positive rate at the threshold that admits at most `fpr` of the negatives, with its Wilson interval.

    The threshold is read off the negatives themselves; the interval covers the sampling of the positives only.
    Example:
        >>> tpr_at_fpr(torch.tensor([5.0, 6.0]), torch.arange(5.0), 0.1).value
        1.0
    """
    check_not_empty(len(positive), "positive")
    check_not_empty(len(negative), "negative")
    check_probability(fpr, "fpr")
    allowed = math.floor(fpr * len(negative))
    threshold = negative.detach().double().sort(descending=True).values[allowed]
    return wilson(int((positive.detach().double() > threshold).sum()), len(positive), confidence)
