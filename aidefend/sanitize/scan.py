"""SCAn: a poisoned class is a mixture of two groups that vary alike; an honest one is one group."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aidefend._core.checks import check_int
from aidefend.sanitize.block import check_kin, read_block, score_by_class
from aidefend.sanitize.moments import ClassMoments, merged, moments_of, top_directions
from aidefend.sanitize.sample import ClassSample

_ROUNDS = 3
_SMALLEST = 6
_ONE_GROUP = 2 / math.pi  # gain of cutting a normal distribution in two at its mean


class ScanEvidence(NamedTuple):
    """One class: the smaller group's share, the gain of two groups per row, and how far it stands out of all classes.

    `gain` is the log-likelihood ratio of two groups against one, times 2 / n: about .64 for one normal group. `anomaly`
    is the distance of the gain from the median over the classes, in robust standard deviations, or with fewer than four
    classes its excess over one normal group's, in units of that; below 0 means unusually clean.
    """

    relative_size: float
    gain: float
    anomaly: float


class _Split(NamedTuple):
    small: Tensor
    large: Tensor
    share: float
    gain: float


class Scan:
    """Chance that a row belongs to the smaller group of its class, weighed by how much its class is a mixture of two.

    All classes share the covariance within groups, which is estimated from all rows together, and again with what the
    cut of a class takes out beyond what it takes out of a normal one; the two groups of a class are then found in
    coordinates in which it is the identity.

    Guarantee: none. An honest class of two styles is a mixture too. A group of a few in a hundred gains less than a cut
        through the middle of an honest class does, unless it is far off (8 standard deviations at 1 %). Which of the
        two groups is the poison this view cannot tell: where poison is most of its class, the scores point at the
        honest part. `evidence()` says which classes are mixtures.
    Args:
        dimensions: Directions of largest variance that are looked at.
        limit: Rows a class that place the two groups; every row is scored. The same rows for any sharding.
        seed: Chooses them.
    A score is >= 0, and 0 in classes that are no more of a mixture than usual, or have fewer than 12 rows; an unfitted
    class, or a row with NaN or infinity, scores NaN (no opinion).
    Cost: N d^2 + d^3 operations, one pass to fit; group sums of C limit rows in each step; scoring is a second pass.
    Source: Tang, Wang, Tang, Zhang 2021 (SCAn). Differs: no trusted set, the covariance is that of the data itself,
        with the split taken out; group sums in place of loops over rows; the index is one-sided, so that an unusually
        clean class is not an anomaly.

    Example:
        >>> stream = torch.Generator().manual_seed(0)
        >>> features, labels = torch.randn(400, 6, generator=stream), torch.arange(400) % 4
        >>> features[:40:4] += 3.0
        >>> block = {"ids": tuple(map(str, range(400))), "features": features, "labels": labels}
        >>> scan = Scan().partial_fit(block)
        >>> max(scan.evidence(), key=lambda label: scan.evidence()[label].anomaly)
        0
    """

    def __init__(self, dimensions: int = 64, limit: int = 3000, seed: int = 0) -> None:
        self.dimensions = check_int(dimensions, "dimensions")
        self.limit, self.seed = check_int(limit, "limit", 2 * _SMALLEST), check_int(seed, "seed", 0)
        self.moments: ClassMoments = {}
        self.sample = ClassSample(limit, seed)
        self._fit: tuple[Tensor, dict[int, _Split], dict[int, ScanEvidence]] | None = None

    def partial_fit(self, block: Mapping[str, Any]) -> "Scan":
        """Add the rows of a block; returns self."""
        ids, features, labels = read_block(block, self._features()).finite()
        self.moments = merged(self.moments, moments_of(features, labels))
        self.sample.add(ids, features, labels)
        self._fit = None
        return self

    def merge(self, other: "Scan") -> "Scan":
        """A new detector that has seen what both have seen."""
        check_kin(self, other, ("dimensions", "limit", "seed"))
        total = Scan(self.dimensions, self.limit, self.seed)
        total.moments = merged(self.moments, other.moments)
        total.sample = self.sample.merged(other.sample)
        return total

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64 >= 0, up = suspicious."""
        rows = read_block(block, self._features())
        if not self.moments:
            return torch.full((len(rows.ids),), torch.nan, dtype=torch.float64)
        whitener, splits, evidence = self._fitted()

        def judge(label: int) -> Any:
            if label not in splits or evidence[label].anomaly <= 0:
                return lambda features: torch.zeros(len(features), dtype=torch.float64)
            mean, weight = self.moments[label].mean, math.log1p(evidence[label].anomaly)
            return lambda features: weight * torch.sigmoid(_log_odds((features - mean) @ whitener, splits[label]))

        return score_by_class(rows, {label: judge(label) for label in self.moments})

    def evidence(self) -> dict[int, ScanEvidence]:
        """For each class with at least 12 rows, how much of a mixture it is."""
        return self._fitted()[2] if self.moments else {}

    def _fitted(self) -> tuple[Tensor, dict[int, _Split], dict[int, ScanEvidence]]:
        if self._fit is None:
            self._fit = self._untangled()
        return self._fit

    def _untangled(self) -> tuple[Tensor, dict[int, _Split], dict[int, ScanEvidence]]:
        """Whitener (d, r), the split of each class, and what it says; covariance and splits settle each other."""
        count = sum(part.count for part in self.moments.values())
        whole = torch.stack([part.scatter for part in self.moments.values()]).sum(dim=0) / count
        basis = top_directions(whole, self.dimensions)[1]
        within = basis.T @ whole @ basis
        points = {label: (self.sample.of(label)[1] - part.mean) @ basis for label, part in sorted(self.moments.items())}
        points = {label: rows for label, rows in points.items() if len(rows) >= 2 * _SMALLEST}
        apart, splits, whitener = torch.zeros_like(within), {}, within
        for _ in range(_ROUNDS):
            whitener = _whitener(within - apart)
            sides = {label: _two_groups(rows @ whitener) for label, rows in points.items()}
            splits = {label: _described(points[label] @ whitener, side) for label, side in sides.items()}
            apart = torch.zeros_like(within)
            for label, side in sides.items():
                gap = points[label][side].mean(dim=0) - points[label][~side].mean(dim=0)
                share, excess = splits[label].share, max(0.0, 1 - _ONE_GROUP / max(splits[label].gain, 1e-12))
                apart += torch.outer(gap, gap) * (share * (1 - share) * excess * self.moments[label].count / count)
        return basis @ whitener, splits, _compared(splits)

    def _features(self) -> int | None:
        return next((len(moments.mean) for moments in self.moments.values()), None)


def _whitener(covariance: Tensor) -> Tensor:
    """(r, r), so that rows times it have about unit variance; small variances are damped."""
    values, vectors = top_directions(covariance, len(covariance))
    top = float(values[0])
    whitener: Tensor = vectors * (values + (0.01 * top if top > 0 else 1.0)).rsqrt()
    return whitener


def _two_groups(points: Tensor, steps: int = 30) -> Tensor:
    """(n,) bool: one of two groups, each row with the nearer mean, from the main direction.

    The groups' sizes have no say: where they do, every normal class loses its tail to a group of a few rows.
    """
    along = points @ top_directions(points.T @ points, 1)[1][:, 0]
    side = along > along.mean()
    if not _large_enough(side):
        side = torch.zeros(len(side), dtype=torch.bool)
        side[along.argsort(stable=True)[len(side) // 2 :]] = True
    for _ in range(steps):
        split = _described(points, side)
        moved = _log_odds(points, split._replace(share=0.5)) > 0
        if not _large_enough(moved) or torch.equal(moved, side) or torch.equal(moved, ~side):
            break
        side = moved
    return side


def _large_enough(side: Tensor) -> bool:
    return _SMALLEST <= int(side.sum()) <= len(side) - _SMALLEST


def _described(points: Tensor, side: Tensor) -> _Split:
    small = side if int(side.sum()) * 2 <= len(side) else ~side
    share = float(small.double().mean())
    ours, rest = points[small].mean(dim=0), points[~small].mean(dim=0)
    return _Split(ours, rest, share, share * (1 - share) * float((ours - rest).square().sum()))


def _log_odds(points: Tensor, split: _Split) -> Tensor:
    """(n,) log-odds of the smaller group."""
    gap = split.small - split.large
    return points @ gap - gap @ (split.small + split.large) / 2 + math.log(split.share / (1 - split.share))


def _compared(splits: Mapping[int, _Split]) -> dict[int, ScanEvidence]:
    if not splits:
        return {}
    gains = torch.tensor([split.gain for split in splits.values()], dtype=torch.float64)
    middle, spread = _ONE_GROUP, _ONE_GROUP
    if len(gains) >= 4:
        middle = float(gains.median())
        spread = max(1.4826 * float((gains - middle).abs().median()), 0.05 * _ONE_GROUP)
    return {
        label: ScanEvidence(split.share, split.gain, (split.gain - middle) / spread) for label, split in splits.items()
    }
