"""Predictions for every row by a model that has not seen it: normal classes in an independent view, fitted by folds."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aidefend._core.batches import input_id
from aidefend.sanitize.moments import ClassMoments, Moments, merged, moments_of
from aidefend.sanitize.outliers import shrunk

_FOLDS = 5


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
    fold = torch.tensor([_fold(row_id, seed) for row_id in ids], dtype=torch.int64)
    points, classes = coordinates.double(), int(labels.max()) + 1 if len(labels) else 0
    parts = [moments_of(points[fold == number], labels[fold == number]) for number in range(_FOLDS)]
    logits = torch.full((len(labels), max(classes, 2)), -100.0, dtype=torch.float64)
    for number in range(_FOLDS):
        known: ClassMoments = {}
        for other in range(_FOLDS):
            known = known if other == number else merged(known, parts[other])
        rows = fold == number
        total = sum(moments.count for moments in known.values())
        for label, moments in known.items():
            logits[rows, label] = _log_density(points[rows], moments) + math.log(moments.count / total)
    return torch.log_softmax(logits, dim=1).clamp(min=-100.0)


def _log_density(points: Tensor, moments: Moments) -> Tensor:
    """(n,) up to a constant that all classes share."""
    covariance = shrunk(moments)
    width = len(covariance)
    floor = 1e-9 + 1e-3 * float(covariance.trace()) / width
    root = torch.linalg.cholesky(covariance + floor * torch.eye(width, dtype=covariance.dtype))
    white = torch.linalg.solve_triangular(root, (points - moments.mean).T, upper=False)
    density: Tensor = -white.square().sum(dim=0) / 2 - root.diagonal().log().sum()
    return density


def _fold(row_id: str, seed: int) -> int:
    digest = hashlib.blake2b(input_id(row_id).encode(), digest_size=8, salt=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big") % _FOLDS
