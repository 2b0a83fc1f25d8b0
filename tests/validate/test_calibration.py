"""The decision's rate of false positives is alpha: neither over nor under, and the checks would notice either."""

import math

import pytest
import torch
from scipy import stats as scipy_stats

from aidefend import ConfigurationError
from aidefend._core.stats import combine_p_values, conformal_p_values, false_positive_interval
from aidefend.validate import Energy, Guard, NearestNeighbours
from aidefend.validate.calibration import JointCalibration, share_rows
from aidefend.validate.conformal_law import least_rows, rank_for
from tests.validate.small_world import model, rows

ALPHA, CALIBRATION, TEST, REPETITIONS = 0.05, 199, 400, 200


def scores(n, stream, dependence):
    """Two detectors of one hidden strangeness, on different scales; dependence 1 = the same up to a monotone map."""
    hidden = torch.randn(n, generator=stream, dtype=torch.float64)
    own = torch.randn(n, generator=stream, dtype=torch.float64)
    other = dependence * hidden + math.sqrt(1 - dependence**2) * own
    return torch.stack([hidden.exp(), 100 * other - 7], dim=1)


def rates(decide, dependence):
    """False positives of `decide(reference, calibration, test)` in 200 independent worlds."""
    found = []
    for seed in range(REPETITIONS):
        stream = torch.Generator().manual_seed(seed)
        reference, calibration, test = (scores(n, stream, dependence) for n in (60, CALIBRATION, TEST))
        found.append(int(decide(reference, calibration, test).sum()))
    return torch.tensor(found, dtype=torch.float64)


def exact(found):
    """Whether 200 counts look like draws of the beta-binomial law: their mean and their 95 % range."""
    rank = rank_for(ALPHA, CALIBRATION)
    law = scipy_stats.betabinom(TEST, rank, CALIBRATION + 1 - rank)
    mean_fits = abs(float(found.mean()) - law.mean()) < 4 * law.std() / math.sqrt(len(found))
    low, high = (bound * TEST for bound in false_positive_interval(ALPHA, CALIBRATION, TEST)[1:])
    return mean_fits and float(((found >= low) & (found <= high)).double().mean()) > 0.9


def ours(reference, calibration, test):
    return JointCalibration.of(("a", "b"), calibration, reference, ALPHA).margin(test) > 0


@pytest.mark.parametrize("dependence", [0.0, 0.7, 1.0])
def test_the_combined_decision_has_rate_alpha_under_any_dependence(dependence):
    assert exact(rates(ours, dependence))


def separate(calibration, test):
    return torch.stack([conformal_p_values(test[:, i], calibration[:, i]) for i in (0, 1)], dim=1)


def test_the_check_notices_a_decision_that_refuses_too_many():
    """Planted violation: refuse where either detector alone would."""
    assert not exact(rates(lambda _, c, t: separate(c, t).amin(dim=1) <= ALPHA, 0.0))


def test_the_check_notices_a_decision_that_refuses_too_few():
    """Planted violation: Bonferroni over two detectors that say the same."""
    assert not exact(rates(lambda _, c, t: combine_p_values(separate(c, t)) <= ALPHA, 1.0))


def test_the_check_notices_a_scale_that_has_seen_the_calibration_rows_as_detectors_would():
    """Planted violation: scores of rows that were fitted on are too low."""
    assert not exact(rates(lambda r, c, t: JointCalibration.of(("a", "b"), 0.9 * c - 20, r, ALPHA).margin(t) > 0, 0.7))


def test_a_whole_guard_has_rate_alpha():
    """60 guards, each calibrated afresh on its own rows. The seeds are fixed; over seeds it would fail in about 1 %."""
    network, counts, n = model(), [], 0
    fit = rows(200, 1)
    for seed in range(60):
        data = rows(250 + 200, 1000 + seed)[0]
        guard = Guard.calibrate(network, data[:250], detectors=[Energy(), NearestNeighbours(k=5)], alpha=ALPHA, fit=fit)
        counts.append(200 - int(guard(data[250:]).report.keep.sum()))
        n = guard.facts.calibration_n
        assert guard.facts.refused_n == 0
        guard.close()
    rank = rank_for(ALPHA, n)
    law = scipy_stats.betabinom(200, rank, n + 1 - rank)
    found = torch.tensor(counts, dtype=torch.float64)
    assert abs(float(found.mean()) - law.mean()) < 4 * law.std() / math.sqrt(60)
    low, high = (bound * 200 for bound in false_positive_interval(ALPHA, n, 200)[1:])
    assert float(((found >= low) & (found <= high)).double().mean()) >= 0.87


def test_decision_and_p_values_agree_exactly():
    stream = torch.Generator().manual_seed(0)
    calibration = JointCalibration.of(("a", "b"), scores(199, stream, 0.5), scores(60, stream, 0.5), ALPHA)
    test = scores(2000, stream, 0.5)
    p_values = calibration.p_values(test)
    assert torch.equal(calibration.margin(test) > 0, p_values["combined"] <= ALPHA + 1e-12)
    assert set(p_values) == {"a", "b", "combined"}
    lowered = test - calibration.slack
    torch.testing.assert_close(p_values["a"], conformal_p_values(lowered[:, 0], calibration.scores[:, 0]))
    assert bool((p_values["a"] >= conformal_p_values(test[:, 0], calibration.scores[:, 0])).all())


@pytest.mark.parametrize("mode", ["marginal", "calibration-conditional"])
@pytest.mark.parametrize("width", [1, 3])
def test_plain_numbers_say_the_same_as_tensors(mode, width):
    """The quick way for a few rows, on ordinary scores, far ones, ties with calibration rows, infinity and NaN."""
    stream = torch.Generator().manual_seed(5)
    known, held = (torch.randn(n, width, generator=stream, dtype=torch.float64) for n in (299, 120))
    calibration = JointCalibration.of(tuple("abc"[:width]), known, held, 0.05, mode, 0.1)
    asked = torch.cat([3 * torch.randn(60, width, generator=stream, dtype=torch.float64), known[:20], 1e9 * known[:5]])
    asked = torch.cat([asked, torch.tensor([math.inf, -math.inf, math.nan]).double()[:, None].expand(3, width)])
    asked[0, 0], asked[1, 0] = math.nan, math.inf
    few, many = calibration.judge_few(asked.tolist()), calibration.judge(asked)
    assert torch.equal(few.refused, many.refused) and few.some and many.some and 5 < int(few.refused.sum()) < 60
    torch.testing.assert_close(few.ranks, many.ranks, rtol=0, atol=1e-12)
    for one, other in zip(few.numbers, many.numbers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0, equal_nan=True)
    quiet = known.sort(dim=0).values[:1]
    assert not calibration.judge_few(quiet.tolist()).some and not calibration.judge(quiet).some


def test_a_score_that_is_nan_is_the_strangest_in_every_number():
    stream = torch.Generator().manual_seed(3)
    calibration = JointCalibration.of(("a", "b"), scores(199, stream, 0.5), scores(60, stream, 0.5), ALPHA)
    judged = calibration.judge(torch.tensor([[math.nan, 0.0], [0.0, math.nan], [math.inf, 0.0]], dtype=torch.float64))
    assert judged.refused.tolist() == [True] * 3
    assert judged.ranks.tolist() == [1 / 200] * 3 and judged.numbers[3][0] == judged.numbers[4][1] == 1 / 200


def test_one_detector_alone_needs_no_reference_and_uses_the_score_itself():
    scores_ = torch.arange(19.0)[:, None]
    calibration = JointCalibration.of(("a",), scores_, scores_[:0], ALPHA)
    assert calibration.margin(torch.tensor([[18.0], [18.5], [float("nan")], [float("inf")]])).gt(0).tolist() == [
        False,
        True,
        True,
        True,
    ]


def test_the_joint_statistic_rises_with_every_score():
    stream = torch.Generator().manual_seed(1)
    calibration = JointCalibration.of(("a", "b"), scores(199, stream, 0.5), scores(300, stream, 0.5), ALPHA)
    base = scores(500, stream, 0.5)
    for i, step in ((0, 0.05), (1, 5.0)):
        higher = base.clone()
        higher[:, i] += step
        assert bool((calibration.join(higher) >= calibration.join(base)).all())
        # log-sum-exp hides a term that is far below the other: only where it leads must the sum move
        assert float((calibration.join(higher) > calibration.join(base)).double().mean()) > 0.9


def test_a_surprise_is_minus_the_log_of_the_tail():
    """Scores from a unit exponential: -log P(score >= s) = s, between the knots and far beyond them."""
    stream = torch.Generator().manual_seed(2)
    draws = -torch.rand(2, 20_000, generator=stream, dtype=torch.float64).log().T
    calibration = JointCalibration.of(("a", "b"), draws[:100], draws, ALPHA)
    for value in (1.0, 2.0, 4.0, 8.0):
        pair = torch.tensor([[value, -50.0]], dtype=torch.float64)
        assert calibration.join(pair).item() == pytest.approx(value, rel=0.05)


def test_constant_and_tied_scores_calibrate_and_stay_below_alpha():
    constant = torch.ones(199, 2)
    calibration = JointCalibration.of(("a", "b"), constant, constant[:40], ALPHA)
    assert not bool((calibration.margin(constant) > 0).any())
    assert bool((calibration.margin(constant + 1) > 0).all())


def test_the_level_is_what_n_rows_can_express():
    calibration = JointCalibration.of(("a",), torch.arange(150.0)[:, None], torch.zeros(0, 1), 0.01)
    assert calibration.level == pytest.approx(1 / 151)
    low, high = calibration.interval()[1:]
    assert scipy_stats.beta(1, 150).cdf(high) - scipy_stats.beta(1, 150).cdf(low) == pytest.approx(0.95)


@pytest.mark.parametrize(("alpha", "least"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.001, 999), (0.3, 3), (0.9, 1)])
def test_the_least_n(alpha, least):
    assert least_rows(alpha) == least
    assert rank_for(alpha, least) >= 1
    if least > 1:
        with pytest.raises(ConfigurationError, match=f"at least {least} calibration rows"):
            rank_for(alpha, least - 1)


@pytest.mark.parametrize("alpha", [0.29, 0.07, 0.57, 0.01])
def test_rounding_of_alpha_does_not_lose_a_rank(alpha):
    assert rank_for(alpha, 99) == round(alpha * 100)


def test_shares_add_up_and_keep_enough_to_calibrate():
    for n in range(70, 3000, 17):
        for own_fit in (True, False):
            for detectors in (1, 3):
                shares = share_rows(n, own_fit, detectors, 0.05)
                assert sum(shares) == n and shares.calibration >= 19
                assert (shares.fit == 0) == own_fit
                assert (shares.reference == 0) == (detectors == 1)


def test_too_few_rows_name_how_many_are_needed():
    with pytest.raises(ConfigurationError, match=r"at least 119 different rows .* alpha=0\.01") as caught:
        share_rows(118, True, 2, 0.01)
    assert "99" in str(caught.value)
    assert share_rows(119, True, 2, 0.01).calibration == 99
    needed = 200
    with pytest.raises(ConfigurationError, match=f"at least {needed}"):
        share_rows(150, False, 2, 0.01)
    assert share_rows(needed, False, 2, 0.01).calibration >= 99


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan"), "0.01"])
def test_alpha_is_a_probability(alpha):
    with pytest.raises(ConfigurationError, match="alpha"):
        JointCalibration.of(("a",), torch.arange(99.0)[:, None], torch.zeros(0, 1), alpha)


@pytest.mark.parametrize("name", ["scores", "knots", "heights", "slopes"])
def test_damaged_arrays_are_refused(name):
    good = {
        "scores": torch.rand(50, 2, generator=torch.Generator().manual_seed(0)),
        "knots": torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
        "heights": torch.tensor([0.7, 2.3]),
        "slopes": torch.ones(2, 2),
    }
    JointCalibration(("a", "b"), **good, alpha=0.05)
    for broken in (good[name] * float("nan"), good[name][:1], good[name].flip(-1)[..., :1], torch.zeros(3)):
        with pytest.raises(ConfigurationError):
            JointCalibration(("a", "b"), **{**good, name: broken}, alpha=0.05)
