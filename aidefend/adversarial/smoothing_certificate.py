"""The statistics of randomised smoothing: exact bounds, looks with shares of the error budget, and the certificate."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats as scipy_stats
from scipy.special import ndtr, ndtri
from torch import Tensor

from aidefend._core.checks import check_int, check_items, check_labels, check_not_empty, check_number, refuse
from aidefend._core.evidence import Evidence, Finding
from aidefend._core.stats import Interval, clopper_pearson

_SHARE_OF_A_LOOK = 0.1


class Look(NamedTuple):
    """A moment fixed in advance: after `samples` draws, a claim may spend `alpha` of the error budget."""

    samples: int
    alpha: float


def plan_looks(n: int, alpha: float, early_stop: bool, target_radius: float | None) -> tuple[Look, ...]:
    """Looks at n/100, n/10 and n; only a target lets the early ones claim anything, so only then they spend alpha."""
    early = sorted({n // 100, n // 10} - {0, n}) if early_stop else []
    share = 0.0 if target_radius is None else _SHARE_OF_A_LOOK * alpha
    looks = (*(Look(samples, share) for samples in early), Look(n, alpha - share * len(early)))
    check_enough(n, looks[-1].alpha)
    return looks


def check_enough(n: int, alpha: float) -> None:
    """Refuse an n at which even n of n votes prove nothing."""
    check_int(n, "n")
    enough = math.floor(-math.log2(alpha)) + 1
    if float(lower_bound(torch.tensor([n]), n, alpha)) <= 0.5:
        raise refuse(f"n >= {enough} (fewer always abstain)", "n", n, f"Pass n={enough} or more, or a larger alpha")


def lower_bound(votes: Tensor, n: int, alpha: float) -> Tensor:
    """One-sided Clopper-Pearson bound, float64: P(bound > p) <= alpha for every p. alpha = 0 proves nothing."""
    k = votes.cpu().numpy().astype(np.float64)
    if alpha <= 0:
        return torch.zeros(k.shape, dtype=torch.float64)
    bound = np.where(k > 0, scipy_stats.beta.ppf(alpha, np.maximum(k, 1), n - k + 1), 0.0)
    return torch.from_numpy(bound)


def hopeless(votes: Tensor, look: Look, last: Look, alpha: float) -> Tensor:
    """Rows whose share of votes lies, at level alpha, below the least share that the last look accepts."""
    k = votes.cpu().numpy().astype(np.float64)
    upper = np.where(k < look.samples, scipy_stats.beta.ppf(1 - alpha, k + 1, np.maximum(look.samples - k, 1)), 1.0)
    return torch.from_numpy(upper < _least_votes(last) / last.samples)


def _least_votes(last: Look) -> int:
    low, high = last.samples // 2, last.samples
    while low < high:  # the bound grows with the votes: bisection
        middle = (low + high) // 2
        proven = float(lower_bound(torch.tensor([middle]), last.samples, last.alpha)) > 0.5
        low, high = (low, middle) if proven else (middle + 1, high)
    return low


def certified_radius(p_lower: Tensor, sigma: float) -> Tensor:
    """The radius sigma * inverse normal CDF of the bound, 0 where it does not exceed one half."""
    radius = sigma * torch.from_numpy(ndtri(p_lower.clamp(0.5, 1.0).numpy()))
    return torch.where(p_lower > 0.5, radius, 0.0)


def needed_probability(radius: float, sigma: float) -> float:
    """The bound from which this radius follows."""
    return float(ndtr(radius / sigma))


class Ledger:
    """What each row has proven so far: `record` reads the running votes at one look, `active` rows need more."""

    def __init__(self, rows: int, looks: Sequence[Look], alpha: float, needed: float | None) -> None:
        self.looks, self.alpha, self.needed = looks, alpha, needed
        self.p_lower = torch.zeros(rows, dtype=torch.float64)
        self.samples = torch.zeros(rows, dtype=torch.int64)
        self.active = torch.arange(rows)

    def record(self, look: Look, votes: Tensor) -> None:
        """`votes` (N,) for the selected class among the first `look.samples` draws; stopped rows are ignored."""
        rows = self.active
        self.samples[rows] = look.samples
        bound = lower_bound(votes[rows], look.samples, look.alpha)
        if look is self.looks[-1]:
            self.p_lower[rows] = bound
            self.active = rows[:0]
            return
        proven = bound >= self.needed if self.needed is not None else torch.zeros(len(rows), dtype=torch.bool)
        self.p_lower[rows[proven]] = bound[proven]
        self.active = rows[~proven & ~hopeless(votes[rows], look, self.looks[-1], self.alpha)]


@dataclasses.dataclass(frozen=True)
class SmoothingCertificate:
    """What `SmoothedModel.certify` proved, row by row.

    Args:
        prediction: (N,) int64, the smoothed classifier's class; -1 where it abstained.
        radius: (N,) float64, l2 in units of x; 0 where it abstained.
        p_lower: (N,) float64, lower bound on the class's probability under noise; 0 where a row abstained early.
        samples: (N,) int64, draws used for the estimate (the n0 of the selection come on top).
        sigma, alpha, n0, n: The call's settings; alpha is the error probability of each row, not of all rows at once.
    """

    prediction: Tensor
    radius: Tensor
    p_lower: Tensor
    samples: Tensor
    sigma: float
    alpha: float
    n0: int
    n: int

    def __len__(self) -> int:
        return len(self.prediction)

    def accuracy_at(self, radii: Sequence[float], y: Tensor, confidence: float = 0.95) -> tuple[Interval, ...]:
        """Share of rows that are right and certified beyond each radius, with Clopper-Pearson intervals over rows."""
        correct = self._correct(y)
        values = [check_number(r, "radii", 0.0) for r in check_items(radii, (int, float), "radii")]
        hits = [int((correct & (self.radius > r)).sum()) for r in values]
        return tuple(clopper_pearson(k, len(self), confidence) for k in hits)

    def average_radius(self, y: Tensor) -> float:
        """Mean over rows of the radius where the prediction is right and 0 elsewhere (ACR)."""
        return float(torch.where(self._correct(y), self.radius, 0.0).mean())

    def to_evidence(self, y: Tensor, radii: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> Evidence:
        """Findings `smoothing.certified_accuracy` (one for each radius) and `smoothing.average_certified_radius`."""
        setting = {"sigma": self.sigma, "alpha": self.alpha, "n0": self.n0, "n": self.n}
        limits = "Holds for the smoothed classifier only, and for each row with probability 1 - alpha over the noise."
        findings = [
            Finding(
                "smoothing.certified_accuracy",
                f"Certified accuracy beyond l2 radius {radius:g}",
                value=share.value,
                low=share.low,
                high=share.high,
                n=len(self),
                setting={**setting, "radius": float(radius)},
                threat=f"l2 change of at most {radius:g}, in units of x",
                limits=limits,
            )
            for radius, share in zip(radii, self.accuracy_at(radii, y), strict=True)
        ]
        average = Finding(
            "smoothing.average_certified_radius",
            "Average certified radius (l2; 0 where wrong or abstained)",
            value=self.average_radius(y),
            n=len(self),
            setting=setting,
            threat="l2, in units of x",
            limits=limits,
        )
        return Evidence([*findings, average])

    def _correct(self, y: Tensor) -> Tensor:
        check_not_empty(len(self), "certificate")
        return self.prediction == check_labels(y, len(self)).to(self.prediction.device)
