"""SPECTRE: natural variance is whitened away by a covariance that the poison cannot shape."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from aidefend.sanitize import SpectralSignature, Spectre
from aidefend.sanitize.spectre import _most_variable_form, robust_moments


def drawn(n=1000, d=10, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block_of(features):
    n = len(features)
    return {"ids": tuple(map(str, range(n))), "features": features, "labels": torch.zeros(n, dtype=torch.int64)}


def test_poison_hides_in_a_wide_class_from_the_top_direction_but_not_after_whitening():
    features = drawn()
    features[:, 0] *= 10.0
    features[:50, 1] += 6.0  # far in a narrow direction, nothing beside the wide one
    block, truth = block_of(features), torch.arange(1000) < 50
    found = roc_auc_score(truth, Spectre().partial_fit(block).score(block))
    by_top_direction = roc_auc_score(truth, SpectralSignature().partial_fit(block).score(block))
    assert found > 0.99 and by_top_direction < 0.7


@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize("offset", [0.0, -2.5, -5.0])
def test_where_the_class_mean_lies_and_on_which_side_the_poison_is_does_not_matter(side, offset):
    features = drawn() + offset
    features[:60, 3] += 6.0 * side
    block = block_of(features)
    score = Spectre().partial_fit(block).score(block)
    assert roc_auc_score(torch.arange(1000) < 60, score) > 0.99


def test_the_robust_covariance_is_that_of_the_honest_rows():
    honest, mixed = drawn(2000, 6), drawn(2000, 6)
    mixed[:160, 0] += 8.0
    stream = torch.Generator().manual_seed(0)
    mean, covariance = robust_moments(mixed, 0.3, stream)
    plain = torch.cov(mixed.T)
    truth = torch.cov(honest[160:].T)
    assert float((covariance - truth).norm()) < 0.25 < float((plain - truth).norm())
    assert float(mean.norm()) < 0.1 < float(mixed.mean(dim=0).norm())


def test_nothing_is_laid_aside_from_normal_rows():
    rows = drawn(1500, 8, seed=3)
    mean, covariance = robust_moments(rows, 0.3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(covariance, torch.cov(rows.T, correction=0))
    torch.testing.assert_close(mean, rows.mean(dim=0))


def test_the_most_variable_form_is_the_top_eigenvector_of_the_full_moment_matrix():
    rows = drawn(400, 4, seed=1)
    rows[:20, :2] += 4.0
    rows = rows - rows.mean(dim=0)
    _, variance = _most_variable_form(rows, torch.Generator().manual_seed(0), steps=200)
    pairs = torch.stack([torch.outer(row, row).flatten() for row in rows])  # what power iteration never forms
    top = torch.linalg.eigvalsh(torch.cov(pairs.T, correction=0))[-1]
    assert variance == pytest.approx(float(top), rel=1e-6)


def test_a_fifth_of_a_class_is_its_stated_limit():
    features = drawn()
    features[:300, 1] += 6.0
    block = block_of(features)
    assert roc_auc_score(torch.arange(1000) < 300, Spectre().partial_fit(block).score(block)) < 0.95
