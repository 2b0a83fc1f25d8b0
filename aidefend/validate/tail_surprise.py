"""Scores of several detectors on one scale: how surprising each is, read off clean reference rows."""

from typing import NamedTuple

import torch
from torch import Tensor

_TAILS = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
_ROWS_IN_TAIL = 5
_ROUNDING = 1e-5  # of a score: what batch size, thread count and the way of summing change in float32, with room
_LEAST_ROUNDING = 1e-6  # of scores that are differences of numbers around 1, such as a cosine distance
_MOST_ROUNDING = 1e-3  # of the spread of the scores: so little moves the rate by a share of about as much


class Tails(NamedTuple):
    """For D detectors a piecewise linear map from score to surprise, -log P(score >= s).

    Args:
        knots: (D, Q) ascending scores at the tail probabilities.
        heights: (Q,) surprise at the knots.
        slopes: (D, Q) surprise for each unit of score behind each knot, > 0.
    """

    knots: Tensor
    heights: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, reference: Tensor) -> "Tails":
        """From the scores (m, D) of clean rows on which no detector was fitted; m >= 10."""
        levels = [tail for tail in _TAILS if tail * len(reference) >= _ROWS_IN_TAIL]
        heights = -torch.tensor(levels, dtype=torch.float64, device=reference.device).log()
        parts = [_knots(column, levels, heights) for column in reference.double().T]
        knots, slopes = (torch.stack([part[i] for part in parts]) for i in (0, 1))
        return cls(knots, heights, slopes)

    def surprises(self, scores: Tensor) -> Tensor:
        """-log P(score >= s) of scores (N, D): (N, D) float64, rising; beyond the ends with the slopes there."""
        s = scores.to(self.knots).T.contiguous()
        place = torch.searchsorted(self.knots[:, 1:].contiguous(), s.detach(), right=True)
        excess = s - self.knots.gather(1, place)
        return (self.heights[place] + excess * self.slopes.gather(1, place)).T


def _knots(scores: Tensor, levels: list[float], heights: Tensor) -> tuple[Tensor, Tensor]:
    """Scores at the tail levels, ascending and apart, and the slope behind each; the last one is the mean excess."""
    spread = float(scores.max() - scores.min()) or max(1.0, float(scores.abs().max()))
    knots = scores.quantile(torch.tensor([1 - level for level in levels]).to(scores))
    least = torch.arange(len(levels)).to(scores) * 1e-6 * spread
    knots = (knots - least).cummax(dim=0).values + least
    excess = (scores[scores > knots[-1]] - knots[-1]).mean().nan_to_num(nan=0.0)
    last = 1 / torch.clamp(excess, min=1e-6 * spread)
    return knots, torch.cat([heights.diff() / knots.diff(), last[None]])


def rounding_of(scores: Tensor) -> Tensor:
    """How far rounding may move a score, for each detector: (D,), from scores of clean rows (n, D), n >= 1."""
    rounding = (_ROUNDING * scores.abs().median(dim=0).values).clamp(min=_LEAST_ROUNDING)
    return torch.minimum(rounding, _MOST_ROUNDING * scores.std(dim=0, correction=0)).nan_to_num(nan=0.0)
