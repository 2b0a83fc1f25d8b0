"""Turns detector scores into p-values and one decision whose rate of false positives is exact."""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

from scipy import stats as scipy_stats
from torch import Tensor, nn

from aidefend._core.checks import check_probability, check_tensor, refuse
from aidefend._core.stats import Interval, conformal_p_values
from aidefend.validate.tail_surprise import Tails

COMBINED = "combined"


class JointCalibration(nn.Module):
    """The scores of rows that were used for nothing else, and the statistic that joins several detectors.

    Each score s becomes a surprise -log P(score >= s), read off the reference rows as a piecewise linear function with
    an exponential tail; the surprises are joined by log-sum-exp (the harmonic mean of the tail probabilities). This
    function is fixed before the calibration rows are looked at, so the joint statistic is as exchangeable as the rows:
    its conformal threshold is exact, whatever the dependence between the detectors.
    Guarantee: a row that is exchangeable with the calibration rows is refused with probability
        floor(alpha (n + 1)) / (n + 1), and less than this only where scores tie. Given one calibration set, the
        probability is Beta(r, n + 1 - r) distributed, r = floor(alpha (n + 1)). Drift and attack void both.
    Args:
        names: Names of the D detectors.
        scores: (n, D) calibration scores, finite.
        knots: (D, Q) ascending scores at tail probabilities `heights`, from the reference rows; Q = 0 for one detector.
        heights: (Q,) surprise at the knots.
        slopes: (D, Q) surprise for each unit of score behind each knot, > 0.
        alpha: Rate of false positives, in (0, 1).
    """

    def __init__(
        self, names: Sequence[str], scores: Tensor, knots: Tensor, heights: Tensor, slopes: Tensor, alpha: float
    ) -> None:
        super().__init__()
        _check_arrays(len(names), scores, knots, heights, slopes)
        self.names = tuple(names)
        self.alpha = check_probability(alpha, "alpha")
        self.rank = rank_for(alpha, len(scores))
        for name, array in (("scores", scores), ("knots", knots), ("heights", heights), ("slopes", slopes)):
            self.register_buffer(name, array.double())
        joined = self.join(cast(Tensor, self.scores))
        self.register_buffer("joined", joined)
        self.register_buffer("threshold", joined.sort(descending=True).values[self.rank - 1])

    @classmethod
    def of(cls, names: Sequence[str], scores: Tensor, reference: Tensor, alpha: float) -> "JointCalibration":
        """From calibration scores (n, D) and reference scores (m, D); one detector needs no reference rows."""
        if len(names) == 1:
            nothing = scores.new_zeros(1, 0)
            return cls(names, scores, nothing, nothing[0], nothing, alpha)
        return cls(names, scores, *Tails.of(reference), alpha)

    @property
    def n(self) -> int:
        """Number of calibration rows."""
        return len(cast(Tensor, self.scores))

    @property
    def level(self) -> float:
        """The rate of false positives that n rows can express: floor(alpha (n + 1)) / (n + 1), at most alpha."""
        return self.rank / (self.n + 1)

    def interval(self, confidence: float = 0.95) -> Interval:
        """The rate of false positives given this very calibration set: where it lies with this confidence (Beta)."""
        rate = scipy_stats.beta(self.rank, self.n + 1 - self.rank)
        return Interval(self.level, float(rate.ppf((1 - confidence) / 2)), float(rate.ppf((1 + confidence) / 2)))

    def join(self, scores: Tensor) -> Tensor:
        """The joint statistic of scores (N, D): (N,) float64, higher = stranger; differentiable."""
        tails = Tails(*(cast(Tensor, getattr(self, name)) for name in ("knots", "heights", "slopes")))
        if tails.knots.shape[1] == 0:
            return scores.to(tails.knots.device).double()[:, 0]
        return tails.surprises(scores).logsumexp(dim=1)

    def margin(self, scores: Tensor) -> Tensor:
        """Joint statistic minus threshold: > 0 exactly for refused rows; NaN scores count as strangest."""
        return self.over_threshold(self.join(scores))

    def over_threshold(self, joined: Tensor) -> Tensor:
        """The margin of a joint statistic (N,) that is at hand."""
        return joined.nan_to_num(nan=math.inf) - cast(Tensor, self.threshold)

    def p_values(self, scores: Tensor, joined: Tensor | None = None) -> dict[str, Tensor]:
        """Conformal p-value of each detector and of the joint statistic (`join(scores)`), each (N,) float64."""
        own = cast(Tensor, self.scores)
        wide = scores.to(own.device)
        found = {name: conformal_p_values(wide[:, i], own[:, i]) for i, name in enumerate(self.names)}
        joint = self.join(wide) if joined is None else joined
        return found | {COMBINED: conformal_p_values(joint, cast(Tensor, self.joined))}


class Shares(NamedTuple):
    """How many rows serve which purpose."""

    fit: int
    reference: int
    calibration: int


def share_rows(n: int, own_fit: bool, detectors: int, alpha: float) -> Shares:
    """Split n rows: 40 % to fit (none if there is other data for it), some for reference, the rest to calibrate.

    Several detectors need reference rows: a fifth of what remains after the fit, 20 to 500, but never so many that too
    few are left to calibrate at alpha.
    Raises: ConfigurationError: too few rows for alpha; names how many are needed.
    """
    least, least_reference = least_rows(alpha), 20 if detectors > 1 else 0
    fit = 0 if own_fit else round(0.4 * n)
    free = n - fit - least
    if free < least_reference:
        needed = least + least_reference if own_fit else math.ceil((least + least_reference) / 0.6 + 1)
        rule = f"at least {needed} different rows to calibrate at alpha={alpha:g} (n >= 1 / alpha - 1 = {least} after"
        rule += f" {least_reference} reference rows{'' if own_fit else ' and 40 % to fit the detectors'})"
        cure = "Calibrate on more rows" + ("" if own_fit else ", pass fit=") + ", or raise alpha"
        raise refuse(rule, "calibration_loader", f"{n} rows", cure)
    wanted = min(500, (n - fit) // 5) if detectors > 1 else 0
    reference = max(least_reference, min(wanted, free))
    return Shares(fit, reference, n - fit - reference)


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


def _check_arrays(detectors: int, scores: Tensor, knots: Tensor, heights: Tensor, slopes: Tensor) -> None:
    check_tensor(scores, "scores", ndim=2, floating=True)
    check_tensor(heights, "heights", ndim=1, floating=True)
    check_tensor(knots, "knots", ndim=2, floating=True, rows=detectors)
    check_tensor(slopes, "slopes", ndim=2, floating=True, rows=detectors)
    count = len(heights)
    if scores.shape[1] != detectors or knots.shape[1] != count or slopes.shape[1] != count:
        raise refuse(f"one column for each of {detectors} detectors", "scores", scores, "Score with the same detectors")
    if (detectors != 1 and count == 0) or bool((knots.diff(dim=1) <= 0).any()) or bool((slopes <= 0).any()):
        raise refuse("ascending knots and rising slopes", "knots", knots, "Calibrate on scores that vary")
