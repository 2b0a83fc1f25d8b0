"""Outliers: rows far from their own class, in the units in which the class varies."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aidefend.sanitize.block import check_kin, read_block, score_by_class
from aidefend.sanitize.moments import ClassMoments, Moments, merged, moments_of


class Outliers:
    """Mahalanobis distance of a row from its class mean, divided by the square root of the number of features.

    About 1 for an ordinary row. The covariance of a class is shrunk towards a multiple of the identity, more so the
    fewer rows the class has, so that rare classes are not judged by noise.

    Guarantee: none. A rare style is far out and honest; poison that is a large part of its class widens the class and
        hides. What is found here is worth a look, it is no evidence of an attack.
    A class with one row, or without variation, scores 0; an unfitted class, or a row with NaN or infinity, scores NaN
    (no opinion).
    Cost: N d^2 + C d^3 operations, C d^2 numbers of memory, one pass to fit and one to score; shards agree within 1e-9
        relative.
    Source: Mahalanobis 1936; shrinkage by oracle approximation, Chen, Wiesel, Eldar, Hero 2010, equation 23.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0], [0.1, 0.1], [9.0, 9.0]])
        >>> block = {"ids": tuple("abcdef"), "features": features, "labels": torch.zeros(6, dtype=torch.int64)}
        >>> Outliers().partial_fit(block).score(block).argmax().item()
        5
    """

    def __init__(self) -> None:
        self.moments: ClassMoments = {}

    def partial_fit(self, block: Mapping[str, Any]) -> "Outliers":
        """Add the rows of a block; returns self."""
        _, features, labels = read_block(block, self._dimensions()).finite()
        self.moments = merged(self.moments, moments_of(features, labels))
        return self

    def merge(self, other: "Outliers") -> "Outliers":
        """A new detector that has seen what both have seen."""
        check_kin(self, other, ())
        total = Outliers()
        total.moments = merged(self.moments, other.moments)
        return total

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64 >= 0, up = suspicious."""
        rows = read_block(block, self._dimensions())
        return score_by_class(rows, {label: partial(_distance, part) for label, part in self.moments.items()})

    def _dimensions(self) -> int | None:
        return next((len(moments.mean) for moments in self.moments.values()), None)


def _distance(moments: Moments, features: Tensor) -> Tensor:
    covariance = shrunk(moments)
    if not float(covariance.trace()) > 0:
        return torch.zeros(len(features), dtype=torch.float64)
    root = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(root, (features - moments.mean).T, upper=False)
    distance: Tensor = (whitened.square().sum(dim=0) / len(covariance)).sqrt()
    return distance


def shrunk(moments: Moments) -> Tensor:
    """(d, d) covariance, shrunk towards the identity times its mean variance; zero if all rows are equal."""
    covariance, d, n = moments.covariance(), len(moments.mean), moments.count
    trace, squares = covariance.trace(), covariance.square().sum()
    spread = (n + 1 - 2 / d) * (squares - trace.square() / d)
    weight = ((1 - 2 / d) * squares + trace.square()) / spread if float(spread) > 0 else torch.ones_like(trace)
    weight = weight.clamp(1e-6, 1.0)
    shrunken: Tensor = (1 - weight) * covariance + weight * trace / d * torch.eye(d, dtype=covariance.dtype)
    return shrunken
