"""Predictions for every row by a model that has not seen it: normal classes in an independent view, fitted by folds."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aidefend._core.batches import input_id
from aidefend.sanitize.moments import ClassMoments, Moments, merged, moments_of
from aidefend.sanitize.outliers import shrunk

FOLDS = 5


def out_of_fold_logits(ids: Sequence[str], coordinates: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
    """(N, K) log-probabilities of the classes for each row, from the rows of the four other folds.

    Equal inputs lie in one fold, whatever their labels: a copy would tell the answer. A class that the other folds do
    not hold has log-probability -100.
    Args:
        ids: Content ids, which decide the fold.
        coordinates: (N, v) finite, of a view that no model was trained on the labels for.
        labels: (N,) int64 >= 0.
        seed: Of the folds.
    Cost: N v^2 operations for fit and prediction each.
    Source: quadratic discriminant analysis, with the covariances of `outliers.shrunk`.
    """
    fold = torch.tensor([fold_of(row_id, seed) for row_id in ids], dtype=torch.int64)
    points, classes = coordinates.double(), int(labels.max()) + 1 if len(labels) else 0
    parts = [moments_of(points[fold == number], labels[fold == number]) for number in range(FOLDS)]
    return FoldedHeads(parts, max(classes, 2)).logits(points, fold)


class FoldedHeads:
    """For each fold the normal classes that were fitted on the four others.

    Args:
        parts: Moments of the classes in each fold.
        classes: Number of columns K of the predictions.
    Cost: factors of v x v numbers for each fold and class.
    """

    def __init__(self, parts: Sequence[ClassMoments], classes: int) -> None:
        self.classes = classes
        self._heads: list[dict[int, _Head]] = []
        for number in range(len(parts)):
            known: ClassMoments = {}
            for other, part in enumerate(parts):
                known = known if other == number else merged(known, part)
            total = sum(moments.count for moments in known.values())
            self._heads.append({label: _head(moments, moments.count / total) for label, moments in known.items()})

    def logits(self, points: Tensor, fold: Tensor) -> Tensor:
        """(N, K) log-probabilities of rows (N, v) float64, each by the heads that have not seen its fold (N,)."""
        found = torch.full((len(points), self.classes), -100.0, dtype=torch.float64)
        for number, heads in enumerate(self._heads):
            rows = fold == number
            for label, head in heads.items():
                found[rows, label] = head.log_density(points[rows])
        return torch.log_softmax(found, dim=1).clamp(min=-100.0)


class _Head(NamedTuple):
    """One normal class: mean (v,), Cholesky factor (v, v) of its covariance, and what does not depend on the row."""

    mean: Tensor
    root: Tensor
    constant: float

    def log_density(self, points: Tensor) -> Tensor:
        """(n,) with the share of the class, up to a constant that all classes share."""
        white = torch.linalg.solve_triangular(self.root, (points - self.mean).T, upper=False)
        density: Tensor = self.constant - white.square().sum(dim=0) / 2
        return density


def _head(moments: Moments, share: float) -> _Head:
    covariance = shrunk(moments)
    width = len(covariance)
    floor = 1e-9 + 1e-3 * float(covariance.trace()) / width
    root = torch.linalg.cholesky(covariance + floor * torch.eye(width, dtype=covariance.dtype))
    return _Head(moments.mean, root, math.log(share) - float(root.diagonal().log().sum()))


def fold_of(row_id: str, seed: int) -> int:
    """The fold of a row: that of its input."""
    digest = hashlib.blake2b(input_id(row_id).encode(), digest_size=8, salt=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big") % FOLDS
