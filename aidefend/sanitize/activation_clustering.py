"""Activation clustering: poison of one class forms a cluster of its own in the features."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aidefend._core.checks import check_int
from aidefend.sanitize.block import check_kin, read_block
from aidefend.sanitize.moments import ClassMoments, merged, moments_of, top_directions
from aidefend.sanitize.sample import ClassSample

_ROUNDING = 1e-9  # of the size of the numbers


class ClusterEvidence(NamedTuple):
    """Two clusters of one class: the smaller one's share, mean silhouette, distance in within-cluster spreads."""

    relative_size: float
    silhouette: float
    separation: float


class _Clusters(NamedTuple):
    mean: Tensor
    directions: Tensor
    small: Tensor
    large: Tensor
    evidence: ClusterEvidence


class ActivationClustering:
    """Two clusters per class in the projected features; rows of the smaller one score above zero.

    Guarantee: none. Every class can be cut in two: `evidence()` says how well, and a score alone condemns nothing.
        Where poison is most of its class the larger cluster is the poison, so read the sign together with other
        evidence.
    Args:
        dimensions: Directions of largest variance in which a class is clustered.
        limit: Rows a class that place the cluster centres; every row is scored. The same rows for any sharding.
        seed: Chooses those rows.
    A score is silhouette-like, in [-1, 1]: the nearness to the smaller cluster, scaled by the class's silhouette. A
    class with fewer than 3 rows scores 0; an unfitted class, or a row with NaN or infinity, NaN (no opinion).
    Cost: N d^2 + C d^3 operations, plus C limit^2 for the silhouette; one pass to fit.
    Source: Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy, Srivastava 2018. Differs: principal instead of
        independent components; no cluster is removed for being the smaller one.

    Example:
        >>> features = torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.0, 0.0], [0.1, 0.1], [9.0, 9.0], [9.1, 9.0]])
        >>> block = {"ids": tuple("abcdef"), "features": features, "labels": torch.zeros(6, dtype=torch.int64)}
        >>> (ActivationClustering().partial_fit(block).score(block) > 0).tolist()
        [False, False, False, False, True, True]
    """

    def __init__(self, dimensions: int = 10, limit: int = 1000, seed: int = 0) -> None:
        self.dimensions = check_int(dimensions, "dimensions")
        self.limit, self.seed = check_int(limit, "limit", 3), check_int(seed, "seed", 0)
        self.moments: ClassMoments = {}
        self.sample = ClassSample(limit, seed)
        self._clusters: dict[int, _Clusters] | None = None

    def partial_fit(self, block: Mapping[str, Any]) -> "ActivationClustering":
        """Add the rows of a block; returns self."""
        rows = read_block(block, self._features())
        ids, features, labels = rows.finite()
        self.moments = merged(self.moments, moments_of(features, labels))
        self.sample.add(ids, features, labels)
        self._clusters = None
        return self

    def merge(self, other: "ActivationClustering") -> "ActivationClustering":
        """A new detector that has seen what both have seen."""
        mine = (self.dimensions, self.limit, self.seed)
        check_kin(self, other, ("dimensions", "limit", "seed"))
        total = ActivationClustering(*mine)
        total.moments = merged(self.moments, other.moments)
        total.sample = self.sample.merged(other.sample)
        return total

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64, up = suspicious."""
        rows = read_block(block, self._features())
        scores = torch.full((len(rows.ids),), torch.nan, dtype=torch.float64)
        fitted = self._fitted()
        for label in self.moments:
            mine = (rows.labels == label) & rows.usable
            if bool(mine.any()):
                scores[mine] = _nearness(rows.features[mine], fitted[label]) if label in fitted else 0.0
        return scores

    def evidence(self) -> dict[int, ClusterEvidence]:
        """For each class with at least 3 rows, how its two clusters stand to each other."""
        return {label: clusters.evidence for label, clusters in sorted(self._fitted().items())}

    def _fitted(self) -> dict[int, _Clusters]:
        if self._clusters is None:
            self._clusters = {
                label: self._cluster(label) for label, moments in self.moments.items() if moments.count > 2
            }
        return self._clusters

    def _cluster(self, label: int) -> _Clusters:
        moments = self.moments[label]
        directions = top_directions(moments.covariance(), self.dimensions)[1]
        points = (self.sample.of(label)[1] - moments.mean) @ directions
        side = two_means(points)
        small = _smaller(side)
        at_small, at_large = _centre(points[small]), _centre(points[~small])
        return _Clusters(moments.mean, directions, at_small, at_large, _evidence(points, small))

    def _features(self) -> int | None:
        return next((len(moments.mean) for moments in self.moments.values()), None)


def two_means(points: Tensor, steps: int = 50) -> Tensor:
    """(n,) bool: one of two k-means clusters of points (n, r), started from the sign of the first coordinate.

    A point that lies in the middle but for rounding is in the other one.
    """
    rounding = _ROUNDING * float(points.abs().amax()) if len(points) else 0.0
    side = points[:, 0] > points[:, 0].mean() + rounding
    for _ in range(steps):
        if bool(side.all()) or not bool(side.any()):
            return side
        gaps = [(points - points[part].mean(dim=0)).square().sum(dim=1) for part in (side, ~side)]
        new = gaps[0] < gaps[1] - _ROUNDING * (gaps[0] + gaps[1])
        if torch.equal(new, side):
            break
        side = new
    return side


def _smaller(side: Tensor) -> Tensor:
    """(n,) bool: the smaller one of two clusters; of equal ones, that without the first row."""
    count = 2 * int(side.sum())
    return side if count < len(side) or (count == len(side) and not bool(side[0])) else ~side


def _centre(points: Tensor) -> Tensor:
    return points.mean(dim=0) if len(points) else points.new_full(points.shape[1:], torch.inf)


def _nearness(features: Tensor, clusters: _Clusters) -> Tensor:
    points = (features - clusters.mean) @ clusters.directions
    if not bool(torch.isfinite(clusters.small).all()):  # all rows alike: nothing to tell apart
        return torch.zeros(len(points), dtype=torch.float64)
    to_small, to_large = ((points - centre).norm(dim=1) for centre in (clusters.small, clusters.large))
    share = (to_large - to_small) / (to_large + to_small).clamp(min=torch.finfo(torch.float64).tiny)
    nearness: Tensor = share * max(clusters.evidence.silhouette, 0.0)
    return nearness


def _evidence(points: Tensor, small: Tensor) -> ClusterEvidence:
    if not bool(small.any()):
        return ClusterEvidence(0.0, 0.0, 0.0)
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")  # 0 between equal rows
    to_small, to_large = distance[:, small].sum(dim=1), distance[:, ~small].sum(dim=1)
    n_small, n_large = int(small.sum()), int((~small).sum())
    own = torch.where(small, to_small / max(n_small - 1, 1), to_large / max(n_large - 1, 1))
    other = torch.where(small, to_large / n_large, to_small / n_small)
    width = ((other - own) / torch.maximum(own, other).clamp(min=torch.finfo(torch.float64).tiny)).mean()
    gap = points[small].mean(dim=0) - points[~small].mean(dim=0)
    parts = (points[part] - points[part].mean(dim=0) for part in (small, ~small))
    spread = torch.cat(list(parts)).square().sum(dim=1).mean().sqrt()
    separation = float(gap.norm() / spread) if spread > 0 else 0.0
    return ClusterEvidence(n_small / len(points), float(width), separation)
