"""How far a column's numbers may lie from those that were seen: tails extrapolated as heavy as they look."""

import math
from typing import NamedTuple

import numpy as np

from aidefend.sanitize.schema.columns import Numbers

_CHANCE = 1e-4  # of one value beyond a limit, in as many new rows as were seen, where the tail is as it looks
_FEWEST = 20  # values beyond the median that show the form of a tail
_WIDE = 10.0  # times the seen range, where a tail is too thin to show its form
_SURE = 0.05  # share of equal values at an extreme that makes it an end
_CONSTANT = 300  # rows of one value that make it the only one
_COUNTS = 5  # zeros at the low end of whole numbers that make them counts
_SHORTEST = -0.2  # index of a tail with an end: shorter ones would put limits onto the extremes that were seen


class Limits(NamedTuple):
    """Values outside [low, high] do not belong to a column."""

    low: float
    high: float


def far_limits(sample: Numbers, low: float, high: float, rows: int, *, whole: bool) -> Limits:
    """Limits of a column, never inside the range [low, high] that was seen.

    The upper tail of the sample is described by its median, its k-th largest and its largest value and an index of heaviness
    (moment estimator); the limit is the value that as many new rows exceed with probability 1e-4. Columns of one value, over
    three hundred rows, have that value as both limits.

    Source: Dekkers, Einmahl, de Haan 1989 (moment estimator). Differs: the quantile is anchored at two order
        statistics; the index moves by its standard error to the heavy side, by three in a short tail, and is -0.2 at least.
    Args:
        sample: (n,) finite values, n >= 1.
        low, high: Smallest and largest value that was seen.
        rows: Number of values that were seen, >= n.
        whole: The column holds whole numbers only.
    """
    upper = _beyond(np.sort(sample), high, high - low, rows, whole)
    lower = -_beyond(np.sort(-sample), -low, high - low, rows, whole)
    if whole and low == 0 and int((sample == 0).sum()) >= _COUNTS:
        lower = 0.0
    return Limits(min(low, lower), max(high, upper))


def _beyond(ordered: Numbers, high: float, width: float, rows: int, whole: bool) -> float:
    """The upper limit, from ascending values."""
    if width == 0.0:
        return high if rows >= _CONSTANT else high + _WIDE * max(1.0, abs(high))
    n, median, largest = len(ordered), float(ordered[len(ordered) // 2]), float(ordered[-1])
    above = int((ordered > median).sum())
    has_end = int((ordered == largest).sum()) >= max(_FEWEST, _SURE * n)
    slack = 1.0 if whole and not has_end else 0.0
    if above < _FEWEST:
        return high if has_end else high + _WIDE * width
    k = min(above // 2, max(_FEWEST, round(n ** (2 / 3))))
    start = float(ordered[-k - 1])
    if largest <= start:
        return high + slack
    index = _heaviness(ordered[-k:] - median, start - median)
    ratio = max(k * rows / (n * _CHANCE), 2.0 * k)
    reach = (largest - start) * _grown(index, ratio) / _grown(index, float(k))
    return max(high, start + reach) + slack


def _heaviness(tail: Numbers, start: float) -> float:
    """Extreme value index with its error on the safe side; 0 where it is near 0."""
    if start <= 0.0:
        return 0.0
    logs = np.log(tail / start)
    first, second = float(logs.mean()), float((logs**2).mean())
    if second <= first**2 * (1 + 1e-9):
        return 0.0
    index = first + 1 - 0.5 / (1 - first**2 / second)
    error = math.sqrt((1 + index**2) / len(tail))
    return index + error if index > 0 else max(_SHORTEST, min(0.0, index + 3 * error))


def _grown(index: float, ratio: float) -> float:
    """How far the tail reaches where it is `ratio` times rarer: (ratio^index - 1) / index."""
    return math.log(ratio) if abs(index) < 1e-9 else math.expm1(min(index * math.log(ratio), 600.0)) / index


def fences(values: Numbers) -> Limits | None:
    """Median half widened three times on each side; None where it has no width.

    Source: Tukey 1977 ("far out").
    """
    if len(values) < _FEWEST:
        return None
    first, third = (float(value) for value in np.quantile(values, [0.25, 0.75]))
    width = third - first
    return Limits(first - 3 * width, third + 3 * width) if width > 0 else None
