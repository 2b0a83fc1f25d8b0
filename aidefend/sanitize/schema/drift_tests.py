"""Tests of new data against remembered data. Each p-value is valid by itself; `holm` corrects them together."""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from aidefend.sanitize.schema.columns import Numbers

_LEAST = 5.0  # rows that a cell of a chi-square test is expected to hold on each side (Cochran 1954)
_EXACT_PRODUCT = 1_000_000  # of the two sizes
_FEWEST = 8  # rows on a side below which nothing is tested


def kolmogorov_smirnov(reference: Numbers, new: Numbers) -> tuple[float, float] | None:
    """(distance, p-value) of two samples; None with too few rows. Conservative where values repeat.

    Source: Kolmogorov 1933, Smirnov 1939; exact for small samples, else the law of one sample of the effective size.
    """
    n, m = len(reference), len(new)
    if min(n, m) < _FEWEST:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's note that it fell back to the other law
        test = stats.ks_2samp(reference, new, method="exact" if n * m <= _EXACT_PRODUCT else "asymp")
    return float(test.statistic), float(test.pvalue)


def chi_square(reference: Mapping[str, int], new: Mapping[str, int]) -> tuple[float, float] | None:
    """(Cramer's V, p-value) of two lists of counts; rare values are pooled. None where one cell is left.

    Source: Pearson 1900, as a test of homogeneity.
    """
    n, m = sum(reference.values()), sum(new.values())
    if min(n, m) < _FEWEST:
        return None
    names = sorted({*reference, *new})
    table = np.array([[reference.get(name, 0) for name in names], [new.get(name, 0) for name in names]], dtype=float)
    common = table.sum(axis=0) * (min(n, m) / (n + m)) >= _LEAST
    rest = table[:, ~common].sum(axis=1, keepdims=True)
    pooled = table[:, common]
    if rest.sum() * (min(n, m) / (n + m)) >= _LEAST:
        pooled = np.concatenate([pooled, rest], axis=1)
    if pooled.shape[1] < 2 or (pooled.sum(axis=1) == 0).any():
        return None
    expected = pooled.sum(axis=1, keepdims=True) * pooled.sum(axis=0, keepdims=True) / pooled.sum()
    statistic = float(((pooled - expected) ** 2 / expected).sum())
    return math.sqrt(statistic / pooled.sum()), float(stats.chi2.sf(statistic, pooled.shape[1] - 1))


def rates(count: int, n: int, new_count: int, m: int, *, both_sides: bool = False) -> float:
    """p-value of: the new rate is not larger (with `both_sides`, is the same).

    Source: Fisher 1935, exact.
    """
    side = "two-sided" if both_sides else "greater"
    return float(stats.fisher_exact([[new_count, m - new_count], [count, n - count]], alternative=side).pvalue)


def beyond_extremes(outside: int, m: int, n: int) -> float:
    """p-value of `outside` of m new values beyond the smallest or largest of n old ones, all exchangeable.

    The share of a continuous law beyond both extremes is Beta(2, n - 1); ties make the test conservative.
    Source: Wilks 1942.
    """
    if outside == 0 or n < 2:
        return 1.0
    return float(stats.betabinom.sf(outside - 1, m, 2, n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down rule: valid together under every dependence.

    Source: Holm 1979.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    result: list[float] = adjusted.tolist()
    return result
