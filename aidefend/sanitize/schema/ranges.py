"""How far a column's numbers may lie from those that were seen: tails extrapolated as heavy as they look."""

import math
from typing import NamedTuple

import numpy as np

from aidefend.sanitize.schema.columns import Numbers

_CHANCE = 1e-5  # of one value beyond a limit, in as many new rows as were seen, where the tail is as it looks
_FEWEST = 20  # values beyond the median that show the form of a tail
_WIDE = 10.0  # times the seen range, where a tail is too thin to show its form
_SURE = 12  # n s^2 of a share s at an extreme that makes it an end: counts (Poisson) would have shown 6 values beyond
_CONSTANT = 300  # rows of one value that make it the only one
_COUNTS = 5  # zeros at the low end of whole numbers that make them counts
_SHORTEST = -0.2  # index of a tail with an end: shorter ones would put limits onto the extremes that were seen


class Limits(NamedTuple):
    """Values outside [low, high] do not belong to a column."""

    low: float
    high: float


def far_limits(sample: Numbers, low: float, high: float, rows: int, *, whole: bool) -> Limits:
    """Limits of a column, never inside the range [low, high] that was seen.

    The k largest values of the sample give a generalised Pareto tail (moment estimator); the limit is the value that as
    many new rows as were seen exceed with probability 1e-5. Columns of one value, over three hundred rows, have that
    value as both limits.

    Source: Dekkers, Einmahl, de Haan 1989. Differs: values count from the median; a tail that is not heavy has its mean
        excess as scale; the index moves by its standard error to the heavy side, by three in a short tail, and is -0.2
        at least; whole numbers are spread over their unit first.
    Args:
        sample: (n,) finite values, n >= 1.
        low: Smallest value that was seen.
        high: Largest value that was seen.
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
    has_end = int((ordered == largest).sum()) ** 2 >= _SURE * n
    slack = 1.0 if whole and not has_end else 0.0
    if above < _FEWEST:
        return high if has_end else high + _WIDE * width
    k = min(above // 2, max(_FEWEST, round(n ** (2 / 3))))
    if largest <= float(ordered[-k - 1]):
        return high + slack
    tail = _spread(ordered)[-k - 1 :] if whole else ordered[-k - 1 :]
    start = float(tail[0])
    index, scale = _tail(tail[1:], start, median)
    ratio = k * rows / (n * _CHANCE)  # how much rarer the limit is than the start of the tail
    grown = math.log(ratio) if index == 0.0 else math.expm1(min(index * math.log(ratio), 600.0)) / index
    return max(high, start + scale * grown) + slack


def _spread(ordered: Numbers) -> Numbers:
    """Whole numbers with ties spread evenly over their unit: a tail in steps looks heavier than it is."""
    _, first, counts = np.unique(ordered, return_index=True, return_counts=True)
    place = np.arange(len(ordered)) - np.repeat(first, counts)
    spread: Numbers = ordered + (place + 0.5) / np.repeat(counts, counts)
    return spread


def _tail(tail: Numbers, start: float, median: float) -> tuple[float, float]:
    """(index, scale) of a generalised Pareto tail beyond `start`, the index with its error on the safe side."""
    excess, from_median = float((tail - start).mean()), start - median
    if from_median <= 0.0:
        return 0.0, excess
    logs = np.log((tail - median) / from_median)
    first, second = float(logs.mean()), float((logs**2).mean())
    if second <= first**2 * (1 + 1e-9):
        return 0.0, excess
    index = first + 1 - 0.5 / (1 - first**2 / second)
    error = math.sqrt((1 + index**2) / len(tail))
    if index > 0.0:
        return index + error, max(excess * (1 - index), from_median * first)
    short = max(_SHORTEST, min(0.0, index + 3 * error))
    return short, excess * (1 - short)


def fences(values: Numbers) -> Limits | None:
    """Median half widened three times on each side; None where it has no width.

    Source: Tukey 1977 ("far out").
    """
    if len(values) < _FEWEST:
        return None
    first, third = (float(value) for value in np.quantile(values, [0.25, 0.75]))
    width = third - first
    return Limits(first - 3 * width, third + 3 * width) if width > 0 else None
