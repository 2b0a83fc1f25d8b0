"""A calibration in plain numbers: what it says about one row costs less than a single tensor operation."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

MOST_ROWS = 16  # from about here on the tensors are quicker
_LOG_2 = math.log(2.0)


class Lookup(NamedTuple):
    """What `JointCalibration` asks for a few rows: the numbers of its tensors, up to rounding.

    The joint statistic of the calibration rows is computed here once more: rows that tie must tie to the last digit.
    Args:
        knots: Q ascending scores for each of D detectors; Q = 0 for one detector.
        heights: Q surprises at the knots.
        slopes: Q surprises for each unit of score behind each knot, for each detector.
        ordered: D + 1 arrays (n,): calibration scores of each detector and of the joint statistic, ascending.
    """

    knots: list[list[float]]
    heights: list[float]
    slopes: list[list[float]]
    ordered: Sequence[np.ndarray[Any, np.dtype[np.float64]]] = ()

    @classmethod
    def of(cls, knots: Tensor, heights: Tensor, slopes: Tensor, scores: Tensor) -> "Lookup":
        """From tensors (D, Q), (Q,), (D, Q) and calibration scores (n, D) on any device."""
        bare = cls(knots.tolist(), heights.tolist(), slopes.tolist())
        joined = [bare.join(row) for row in scores.tolist()]
        return bare._replace(ordered=[np.sort(column) for column in (*scores.cpu().numpy().T, joined)])

    def join(self, scores: Sequence[float]) -> float:
        """The joint statistic of one row from its D scores."""
        if not self.heights:
            return scores[0]
        return reduce(_log_add, map(self._surprise, self.knots, self.slopes, scores))

    def places(self, scores: Sequence[float]) -> list[int]:
        """How many calibration scores are smaller than each of D + 1; all of them than NaN, the strangest."""
        return [
            len(own) if score != score else bisect_left(own, score)
            for own, score in zip(self.ordered, scores, strict=True)
        ]

    def _surprise(self, knots: list[float], slopes: list[float], score: float) -> float:
        place = bisect_right(knots, score, 1) - 1
        return self.heights[place] + (score - knots[place]) * slopes[place]


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a == b:
        return a + _LOG_2
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))
