"""Intervals and p-values against closed forms, scipy, scikit-learn and simulation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from aidefend._core.stats import (
    clopper_pearson,
    combine_p_values,
    conformal_p_values,
    false_positive_interval,
    roc_auc,
    tpr_at_fpr,
    wilson,
)


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from([0.9, 0.95, 0.99]))
def test_proportion_intervals_equal_scipy(n, share, confidence):
    k = round(n * share)
    test = scipy_stats.binomtest(k, n)
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        value, low, high = ours(k, n, confidence)
        reference = test.proportion_ci(confidence, method)
        assert value == k / n and low <= value <= high
        assert math.isclose(low, min(reference.low, value), abs_tol=1e-12)
        assert math.isclose(high, max(reference.high, value), abs_tol=1e-12)


@pytest.mark.parametrize(("k", "n", "confidence"), [(-1, 5, 0.9), (6, 5, 0.9), (0, 0, 0.9), (1, 5, 1.0), (1.0, 5, 0.9)])
def test_bad_counts_are_refused(k, n, confidence):
    with pytest.raises(ValueError, match="Expected"):
        wilson(k, n, confidence)


@given(st.integers(1, 60), st.integers(0, 1000))
def test_conformal_p_values_equal_the_definition(n, seed):
    stream = torch.Generator().manual_seed(seed)
    calibration = torch.randint(0, 9, (n,), generator=stream).double()
    scores = torch.randint(-1, 10, (12,), generator=stream).float()
    expected = [(1 + int((calibration >= score).sum())) / (n + 1) for score in scores]
    assert conformal_p_values(scores, calibration).tolist() == pytest.approx(expected, abs=0)


def test_conformal_edges():
    calibration = torch.arange(9.0)
    assert conformal_p_values(torch.tensor([math.nan, math.inf, -math.inf]), calibration).tolist() == [0.1, 0.1, 1.0]
    assert conformal_p_values(torch.zeros(0), calibration).shape == (0,)
    with pytest.raises(ValueError, match="calibration"):
        conformal_p_values(torch.zeros(1), torch.zeros(0))
    with pytest.raises(ValueError, match="finite"):
        conformal_p_values(torch.zeros(1), torch.tensor([math.nan]))


def test_the_off_by_one_of_a_peer_breaks_validity():
    """P(p <= a) <= a for (1 + k) / (n + 1); k / n, the planted violation, is too small. 40,000 draws, sd 0.0011."""
    stream = torch.Generator().manual_seed(0)
    draws = torch.rand(40_000, 20, generator=stream)
    k = (draws[:, 1:] >= draws[:, :1]).sum(dim=1)
    assert float(((1 + k) / 20 <= 0.06).double().mean()) <= 0.06
    assert float((k / 19 <= 0.06).double().mean()) > 0.09


def test_combination_is_valid_under_dependence():
    stream = torch.Generator().manual_seed(0)
    shared = torch.rand(40_000, 1, generator=stream, dtype=torch.float64)
    mixed = torch.where(torch.rand(40_000, 3, generator=stream) < 0.5, shared, 1 - shared).clamp(min=1e-12)
    independent = torch.rand(40_000, 3, generator=stream, dtype=torch.float64).clamp(min=1e-12)
    for p in (mixed, independent, shared.expand(-1, 3)):
        for method in ("bonferroni", "geometric", "harmonic"):
            assert float((combine_p_values(p, method) <= 0.05).double().mean()) <= 0.054
    assert float((independent.min(dim=1).values <= 0.05).double().mean()) > 0.12
    assert float((combine_p_values(independent, "cauchy") <= 0.05).double().mean()) <= 0.055


def test_combination_edges():
    one = torch.tensor([[0.3], [1.0]], dtype=torch.float64)
    for method in ("bonferroni", "geometric", "harmonic", "cauchy"):
        assert torch.equal(combine_p_values(one, method), one[:, 0])
        assert combine_p_values(torch.ones(2, 3), method).tolist() == pytest.approx([1.0, 1.0])
        assert combine_p_values(torch.rand(0, 3), method).shape == (0,)
    for bad in (torch.zeros(1, 2), torch.full((1, 2), 1.1), torch.rand(3, 0)):
        with pytest.raises(ValueError, match="Expected"):
            combine_p_values(bad)


def test_false_positive_interval_covers():
    """Simulated split conformal: the measured share falls inside in at least the stated part of the runs."""
    stream = torch.Generator().manual_seed(1)
    inside = 0
    interval = false_positive_interval(0.05, 199, 300, 0.9)
    for _ in range(400):
        p = conformal_p_values(torch.rand(300, generator=stream), torch.rand(199, generator=stream))
        inside += interval.low <= float((p <= 0.05).double().mean()) <= interval.high
    assert inside / 400 > 0.86
    with pytest.raises(ValueError, match="99"):
        false_positive_interval(0.01, 98, 10)


@given(st.integers(0, 500))
def test_auc_equals_scikit_learn(seed):
    stream = torch.Generator().manual_seed(seed)
    positive = torch.randint(0, 8, (17,), generator=stream).float() + 1
    negative = torch.randint(0, 8, (23,), generator=stream).float()
    truth = [1] * 17 + [0] * 23
    value, low, high = roc_auc(positive, negative)
    assert value == pytest.approx(roc_auc_score(truth, torch.cat([positive, negative])))
    assert 0 <= low <= value <= high <= 1


def test_auc_interval_covers_the_truth():
    """N(1, 1) against N(0, 1): AUC = Phi(1 / sqrt 2) = 0.7602. 300 runs at 95 %: false failure below 1e-4."""
    stream = torch.Generator().manual_seed(0)
    truth = float(scipy_stats.norm.cdf(1 / math.sqrt(2)))
    covered = 0
    for _ in range(300):
        _, low, high = roc_auc(torch.randn(80, generator=stream) + 1, torch.randn(80, generator=stream))
        covered += low <= truth <= high
    assert 0.9 <= covered / 300 <= 0.99


def test_tpr_never_admits_more_than_the_stated_rate():
    negative = torch.tensor([0.0] * 95 + [1.0] * 5)
    assert tpr_at_fpr(torch.tensor([1.0, 2.0]), negative, 0.04).value == 0.5
    assert tpr_at_fpr(torch.tensor([1.0, 2.0]), negative, 0.05).value == 1.0
    with pytest.raises(ValueError, match="positive"):
        tpr_at_fpr(torch.zeros(0), negative, 0.1)
