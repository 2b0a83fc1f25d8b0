"""The centred spectral score against a naive twin, and the defect of public copies as a planted violation."""

import pytest
import torch

from aidefend.sanitize import SpectralSignature


def world(shift, n=1000, d=64, poison=100, sigma=5.0):
    """One class whose mean lies `shift` standard deviations along the direction that the poison moves in."""
    stream = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=stream, dtype=torch.float64)
    features[:poison, 0] += sigma
    features[:, 0] += shift
    block = {"ids": tuple(map(str, range(n))), "features": features, "labels": torch.zeros(n, dtype=torch.int64)}
    return block, torch.arange(n) < poison


def true_positive_rate(scores, is_poison, removed=150):
    return float(is_poison[scores.topk(removed).indices].double().mean() * removed / is_poison.sum())


def uncentred_score(block):
    """What several public copies compute: the top direction of centred features, met by features that are not."""
    features = block["features"]
    _, _, directions = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)
    return (features @ directions[0]).abs()


@pytest.mark.parametrize("shift", [0.0, -1.0, -2.5, -5.0])
def test_the_score_does_not_depend_on_where_the_class_lies(shift):
    block, is_poison = world(shift)
    scores = SpectralSignature().partial_fit(block).score(block)
    assert true_positive_rate(scores, is_poison) > 0.98


def test_the_planted_violation_is_caught():
    block, is_poison = world(-5.0)
    assert true_positive_rate(uncentred_score(block), is_poison) < 0.2


def test_equals_a_naive_singular_value_decomposition():
    block, _ = world(0.0, n=200, d=6)
    centred = block["features"] - block["features"].mean(dim=0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    naive = (centred @ directions[0]).abs() / (values[0] / 200**0.5)
    torch.testing.assert_close(SpectralSignature().partial_fit(block).score(block), naive, rtol=1e-9, atol=1e-9)


def test_classes_of_one_and_two_rows_keep_their_rows_low():
    features = torch.cat([torch.randn(30, 3), torch.randn(3, 3) * 50])
    labels = torch.tensor([0] * 30 + [1, 2, 2])
    block = {"ids": tuple(map(str, range(33))), "features": features, "labels": labels}
    scores = SpectralSignature().partial_fit(block).score(block)
    assert scores[30] == 0 and torch.allclose(scores[31:], torch.ones(2, dtype=torch.float64))


def test_a_class_of_equal_rows_scores_zero():
    block = {"ids": ("a", "b"), "features": torch.ones(2, 3), "labels": torch.zeros(2, dtype=torch.int64)}
    assert SpectralSignature().partial_fit(block).score(block).tolist() == [0.0, 0.0]
