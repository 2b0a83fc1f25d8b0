"""Outliers: distance in the class's own units, also where the class is smaller than the number of features."""

import torch
from sklearn.metrics import roc_auc_score

from aidefend.sanitize import Outliers
from aidefend.sanitize.moments import moments_of
from aidefend.sanitize.outliers import shrunk


def drawn(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block_of(features, labels=None):
    n = len(features)
    labels = torch.zeros(n, dtype=torch.int64) if labels is None else labels
    return {"ids": tuple(map(str, range(n))), "features": features, "labels": labels}


def test_far_in_a_narrow_direction_counts_more_than_far_in_a_wide_one():
    features = drawn(500, 4)
    features[:, 0] *= 10
    features[0], features[1] = torch.tensor([20.0, 0, 0, 0]), torch.tensor([0.0, 8.0, 0, 0])
    scores = Outliers().partial_fit(block_of(features)).score(block_of(features))
    assert int(scores.argmax()) == 1 and float(scores[0]) < 1.5


def test_ordinary_rows_score_about_one():
    block = block_of(drawn(4000, 20))
    scores = Outliers().partial_fit(block).score(block)
    assert abs(float(scores.square().mean()) - 1) < 0.02


def test_the_covariance_is_positive_definite_below_and_right_above_the_number_of_features():
    truth = torch.diag(torch.linspace(0.5, 2.0, 30, dtype=torch.float64))
    few, many = (drawn(n, 30) @ truth.sqrt() for n in (8, 50_000))
    for rows in (few, many):
        labels = torch.zeros(len(rows), dtype=torch.int64)
        assert float(torch.linalg.eigvalsh(shrunk(moments_of(rows, labels)[0])).min()) > 0.05
    large = shrunk(moments_of(many, torch.zeros(50_000, dtype=torch.int64))[0])
    assert float((large - truth).abs().max()) < 0.05


def test_new_rows_of_a_rare_class_are_no_more_outlying_than_those_of_a_common_one():
    """By the plain covariance of 12 rows in 10 dimensions a new row would be many times further out."""
    features, labels = drawn(612, 10), torch.cat([torch.zeros(600), torch.ones(12)]).long()
    detector = Outliers().partial_fit(block_of(features, labels))
    fresh = drawn(200, 10, seed=5)
    common = detector.score(block_of(fresh))
    rare = detector.score(block_of(fresh, torch.ones(200, dtype=torch.int64)))
    assert float(rare.median()) < 1.5 * float(common.median())


def test_planted_outliers_are_on_top():
    features = drawn(1000, 16)
    features[:10] *= 3
    scores = Outliers().partial_fit(block_of(features)).score(block_of(features))
    assert roc_auc_score(torch.arange(1000) < 10, scores) > 0.999


def test_equal_rows_score_nothing():
    block = block_of(torch.full((9, 3), 0.1))
    assert torch.equal(Outliers().partial_fit(block).score(block), torch.zeros(9, dtype=torch.float64))
