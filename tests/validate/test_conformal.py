"""The rate of false alarms is what each mode says: exact over many worlds, and the checks would notice otherwise."""

import math

import pytest
import torch
from safetensors.torch import save_file
from scipy import stats as scipy_stats

from aidefend import AidefendError, ConfigurationError
from aidefend._core.batches import content_ids
from aidefend._core.stats import conformal_p_values
from aidefend.validate import Calibration, Energy, Ensemble, Mahalanobis, NearestNeighbours, least_calibration_rows

MODES = ["marginal", "class-conditional", "calibration-conditional"]
SETTINGS = [(100, 0.1), (99, 0.05), (200, 0.01), (500, 0.05)]
every_setting = pytest.mark.parametrize(("n", "alpha"), SETTINGS)
WORLDS, TEST = 300, 300


def draws(n, seed):
    """Exchangeable scores without ties; the law does not matter."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


def counts(decide, n):
    """Refused rows of 300 in 300 worlds, each with its own calibration set."""
    found = []
    for seed in range(WORLDS):
        every = draws(n + TEST, seed)
        found.append(int(decide(every[:n], every[n:]).sum()))
    return torch.tensor(found, dtype=torch.float64)


def law(n, alpha):
    rank = math.floor(alpha * (n + 1) + 1e-9)
    return scipy_stats.betabinom(TEST, rank, n + 1 - rank)


def exact(found, n, alpha):
    """Whether the counts follow the beta-binomial law: their mean to 3.5 standard errors, and the share in its 95 %."""
    expected = law(n, alpha)
    mean_fits = abs(float(found.mean()) - expected.mean()) < 3.5 * expected.std() / math.sqrt(WORLDS)
    low, high = expected.ppf(0.025), expected.ppf(0.975)
    return bool(mean_fits) and float(((found >= low) & (found <= high)).double().mean()) > 0.9


@every_setting
def test_the_marginal_rate_is_exact(n, alpha):
    assert exact(counts(lambda c, t: Calibration.of(c, alpha).refused(t), n), n, alpha)


def above(scores, calibration):
    return (calibration[None] >= scores[:, None]).sum(dim=1)


@pytest.mark.parametrize(("n", "alpha"), [(100, 0.1), (100, 0.05), (200, 0.01)])
def test_the_check_notices_a_p_value_without_the_plus_one(n, alpha):
    """Planted violation: k / n. Where alpha n is whole, its threshold is one rank too low."""
    assert not exact(counts(lambda c, t: above(t, c) / n <= alpha, n), n, alpha)


@pytest.mark.parametrize(("n", "alpha"), [(99, 0.05), (99, 0.1)])
def test_the_check_notices_a_p_value_with_the_plus_one_above_only(n, alpha):
    """Planted violation: (1 + k) / n, as a well-known library has it: p-values above one, and a rate too low."""
    assert not exact(counts(lambda c, t: (1 + above(t, c)) / n <= alpha - 1e-12, n), n, alpha)


def test_the_check_notices_a_threshold_at_the_empirical_quantile():
    """Planted violation: the interpolated quantile that most scripts take."""
    assert not exact(counts(lambda c, t: t > c.quantile(0.99), 99), 99, 0.01)


def test_the_rate_of_an_ensemble_is_exact_after_calibration():
    """Detectors that see almost the same: p-values combined without calibration are far below alpha."""
    stream = torch.Generator().manual_seed(0)
    fitted = Ensemble([Mahalanobis(), NearestNeighbours(k=5)]).fit(torch.randn(400, 3, generator=stream))

    found, loose = [], []
    for seed in range(60):
        x = torch.randn(99 + TEST, 3, generator=torch.Generator().manual_seed(1000 + seed))
        joint = fitted.score(x)
        found.append(int(Calibration.of(joint[:99], 0.05).refused(joint[99:]).sum()))
        loose.append(int((fitted.p_values(x[99:])["combined"] <= 0.05).sum()))
    expected = law(99, 0.05)
    assert abs(sum(found) / 60 - expected.mean()) < 3.5 * expected.std() / math.sqrt(60)
    assert sum(loose) / 60 < 0.7 * expected.mean()


def given_rates(n, alpha, delta, mode):
    """True rate of false alarms of 1,500 calibrations on uniform scores: it is 1 - threshold."""
    stream = torch.Generator().manual_seed(1)
    found = []
    for _ in range(1500):
        scores = torch.rand(n, generator=stream, dtype=torch.float64)
        found.append(1 - Calibration.of(scores, alpha, mode=mode, delta=delta).threshold())
    return torch.tensor(found)


@pytest.mark.parametrize(("n", "alpha", "delta"), [(299, 0.01, 0.05), (200, 0.1, 0.1), (500, 0.05, 0.01)])
def test_the_calibration_conditional_bound_fails_in_a_share_of_delta(n, alpha, delta):
    rates = given_rates(n, alpha, delta, "calibration-conditional")
    failures = float((rates > alpha).double().mean())
    assert failures <= delta + 3 * math.sqrt(delta / 1500)
    level = Calibration.of(torch.arange(float(n)), alpha, mode="calibration-conditional", delta=delta).level()
    rank = round(level * (n + 1))
    assert scipy_stats.beta(rank + 1, n - rank).sf(alpha) > delta  # one rank more would break it: it is not loose


def test_the_marginal_mode_makes_no_promise_for_this_calibration_set():
    """Planted violation: the first mode passed off as the third. About half of all sets have a rate above alpha."""
    assert float((given_rates(299, 0.05, 0.05, "marginal") > 0.05).double().mean()) > 0.3


def two_classes(n, seed):
    """Class 1 has scores ten times as large: a common threshold refuses from class 1 alone."""
    classes = torch.arange(n) % 4 // 3
    return draws(n, seed) * (1 + 9 * classes), classes


def class_rates(mode):
    found = torch.zeros(2)
    for seed in range(150):
        scores, classes = two_classes(1200, seed)
        known = {"classes": classes[:400]} if mode == "class-conditional" else {}
        new = {"classes": classes[400:]} if mode == "class-conditional" else {}
        refused = Calibration.of(scores[:400], 0.05, mode=mode, **known).refused(scores[400:], **new)
        for label in (0, 1):
            found[label] += refused[classes[400:] == label].double().mean() / 150
    return found


def test_the_class_conditional_rate_is_alpha_in_each_class():
    expected = torch.tensor([15 / 301, 5 / 101])
    torch.testing.assert_close(class_rates("class-conditional"), expected, atol=0.006, rtol=0)


def test_one_threshold_for_all_classes_is_not():
    """Planted violation: what the mode is there for."""
    quiet, loud = class_rates("marginal").tolist()
    assert quiet < 0.02 and loud > 0.1


def of(mode, n=400, alpha=0.05):
    scores, classes = two_classes(n, 0)
    return Calibration.of(scores, alpha, mode=mode, classes=classes if mode == "class-conditional" else None), classes


@pytest.mark.parametrize("mode", MODES)
def test_p_values_and_decisions_agree_and_fall_with_the_score(mode):
    calibration, _ = of(mode)
    new = torch.linspace(-5, 60, 2000, dtype=torch.float64)
    for label in (0, 1):
        classes = torch.full((2000,), label) if mode == "class-conditional" else None
        p = calibration.p_values(new, classes)
        assert bool((p > 0).all()) and bool((p <= 1).all()) and bool((p.diff() <= 0).all())
        key = label if mode == "class-conditional" else None
        assert torch.equal(calibration.refused(new, classes), new > calibration.threshold(key))


def test_marginal_p_values_are_those_of_the_core():
    calibration, _ = of("marginal")
    new = draws(200, 7)
    assert torch.equal(calibration.p_values(new), conformal_p_values(new, calibration.scores))


def test_nan_infinity_and_unknown_classes_are_refused():
    strange = torch.tensor([float("nan"), float("inf"), -float("inf")])
    for mode in ("marginal", "calibration-conditional"):
        assert of(mode)[0].refused(strange).tolist() == [True, True, False]
    calibration, _ = of("class-conditional")
    assert calibration.refused(torch.zeros(3), torch.tensor([0, 1, 7])).tolist() == [False, False, True]
    assert calibration.p_values(torch.zeros(1), torch.tensor([7])).isnan().all()


def test_ties_never_raise_the_rate():
    calibration = Calibration.of(torch.ones(99), 0.05)
    assert calibration.refused(torch.tensor([1.0, 1.0 + 1e-9])).tolist() == [False, False]
    assert calibration.refused(torch.tensor([1.1])).tolist() == [True]


@pytest.mark.parametrize(("alpha", "least"), [(0.1, 9), (0.05, 19), (0.01, 99), (0.001, 999)])
def test_too_few_rows_are_refused_with_their_number(alpha, least):
    assert least_calibration_rows(alpha) == least
    Calibration.of(draws(least, 0), alpha)
    with pytest.raises(ConfigurationError, match=f"at least {least} calibration rows .*got scores='{least - 1} rows'"):
        Calibration.of(draws(least - 1, 0), alpha)
    own = least_calibration_rows(alpha, "calibration-conditional")
    assert (1 - alpha) ** own <= 0.05 < (1 - alpha) ** (own - 1)
    Calibration.of(draws(own, 0), alpha, mode="calibration-conditional")
    with pytest.raises(ConfigurationError, match=f"at least {own} calibration rows"):
        Calibration.of(draws(own - 1, 0), alpha, mode="calibration-conditional")


def test_a_small_class_is_named():
    classes = torch.tensor([0] * 50 + [3] * 5)
    with pytest.raises(ConfigurationError, match=r"in each class \(too few in \[3\]\)"):
        Calibration.of(draws(55, 0), 0.05, mode="class-conditional", classes=classes)


def test_rows_that_were_used_before_are_refused():
    x = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(60, dtype=torch.int64)
    ids, scores = content_ids(x), draws(60, 0)
    Calibration.of(scores, 0.05, ids=ids, used_ids=content_ids(x + 1))
    for used in (content_ids(x[:3]), content_ids(x[:3], labels[:3]), content_ids(x[[5, 5]])[1:]):
        with pytest.raises(ConfigurationError, match=r"neither trained.*shared inputs"):
            Calibration.of(scores, 0.05, ids=ids, used_ids=used)
    with pytest.raises(ConfigurationError, match="ids of the calibration rows"):
        Calibration.of(scores, 0.05, used_ids=ids)
    with pytest.raises(ConfigurationError, match="same number of rows"):
        Calibration.of(scores, 0.05, ids=ids[1:], used_ids=ids)


def test_the_interval_covers_the_true_rate_and_the_alarms_follow_it():
    stream, inside = torch.Generator().manual_seed(2), 0
    for _ in range(1000):
        calibration = Calibration.of(torch.rand(150, generator=stream, dtype=torch.float64), 0.05)
        _, low, high = calibration.interval(0.9)
        inside += low <= 1 - calibration.threshold() <= high
    assert abs(inside - 900) < 3.5 * math.sqrt(90)
    assert calibration.alarms_a_day(1000, 0.9) == pytest.approx([1000 * v for v in calibration.interval(0.9)])
    assert calibration.alarms_a_day(0).high == 0


def test_the_interval_over_classes_holds_for_every_mix():
    calibration, _ = of("class-conditional")
    whole, parts = calibration.interval(), [calibration.interval(label=label) for label in (0, 1)]
    assert whole.low < min(p.low for p in parts) and whole.high > max(p.high for p in parts)
    assert calibration.threshold(1) > 3 * calibration.threshold(0)
    with pytest.raises(ConfigurationError, match="calibrated class"):
        calibration.threshold(9)


def test_the_expected_share_is_the_beta_binomial_range():
    value, low, high = Calibration.of(draws(99, 0), 0.05).expected_share(TEST)
    assert value == 0.05
    assert (low, high) == (law(99, 0.05).ppf(0.025) / TEST, law(99, 0.05).ppf(0.975) / TEST)


def test_detection_is_the_share_at_the_operating_point():
    calibration = Calibration.of(torch.arange(99.0), 0.05)
    found = calibration.detection(torch.tensor([500.0, 400.0, 0.0, 1.0]))
    assert found.value == 0.5 and found.low < 0.5 < found.high
    evidence = calibration.to_evidence(10_000, {"noise": torch.tensor([500.0])})
    assert [finding.id for finding in evidence.findings] == [
        "calibration.false_positive_rate",
        "calibration.alarms_a_day",
        "calibration.true_positive_rate.noise",
    ]
    assert evidence.findings[1].value == pytest.approx(500)


class Log:
    def __init__(self, fails=False):
        self.events, self.fails = [], fails

    def append(self, event):
        if self.fails:
            raise OSError("disk full")
        self.events.append(event)
        return len(self.events)


def test_recalibration_is_explicit_logged_and_kept():
    old, log = Calibration.of(draws(99, 0), 0.05), Log()
    before = old.threshold()
    new = old.recalibrate(3 * draws(120, 1), reason="new camera", log=log)
    assert old.threshold() == before and new.n == 120 and new.alpha == 0.05
    (event,) = log.events
    assert event["event"] == "calibration.replaced" and event["reason"] == "new camera"
    assert event["before"]["thresholds"] == {"-1": before} and event["after"]["n"] == 120
    assert event["before"]["digest"] != event["after"]["digest"]
    third = new.recalibrate(draws(99, 2), reason="lens cleaned", log=None)
    assert [entry["reason"] for entry in third.history] == ["new camera", "lens cleaned"]
    for reason in ("", "  ", None):
        with pytest.raises(ConfigurationError, match="reason"):
            old.recalibrate(draws(99, 1), reason=reason, log=None)
    with pytest.raises(OSError, match="disk full"):  # nothing is handed out that is not on record
        old.recalibrate(draws(99, 1), reason="x", log=Log(fails=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_file_brings_it_back(mode, tmp_path):
    calibration, classes = of(mode)
    known = {"classes": classes} if mode == "class-conditional" else {}
    calibration = calibration.recalibrate(draws(400, 5), reason="later", log=None, **known)
    calibration.save(tmp_path / "calibration")
    back = Calibration.load(tmp_path / "calibration")
    new = two_classes(50, 9)
    arguments = new if mode == "class-conditional" else new[:1]
    assert torch.equal(back.p_values(*arguments), calibration.p_values(*arguments))
    assert (back.mode, back.alpha, back.delta, back.history) == (
        calibration.mode,
        calibration.alpha,
        calibration.delta,
        calibration.history,
    )


@pytest.mark.parametrize(
    "header",
    [
        '{"schema": "aidefend.calibration/1"}',
        '{"schema": "aidefend.calibration/1", "alpha": 1e-9, "mode": "marginal", "delta": 0.1, "history": []}',
        '{"schema": "aidefend.calibration/1", "alpha": 0.1, "mode": "none", "delta": 0.1, "history": []}',
        '{"schema": "aidefend.detector/1", "alpha": 0.1, "mode": "marginal", "delta": 0.1, "history": []}',
        "not json",
    ],
)
def test_a_damaged_file_is_refused(header, tmp_path):
    arrays = {"scores": draws(50, 0), "classes": torch.full((50,), -1)}
    save_file(arrays, tmp_path / "calibration", {"header": header})
    with pytest.raises(AidefendError):
        Calibration.load(tmp_path / "calibration")


def test_classes_go_with_their_mode_and_no_other():
    with pytest.raises(ConfigurationError, match="classes in the mode"):
        Calibration.of(draws(99, 0), 0.05, classes=torch.zeros(99, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match="classes in the mode"):
        Calibration.of(draws(99, 0), 0.05, mode="class-conditional")
    with pytest.raises(ConfigurationError, match="classes in the mode"):
        of("marginal")[0].p_values(draws(2, 0), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match="one law for all rows"):
        of("class-conditional")[0].expected_share(100)


def test_a_detector_end_to_end_on_a_table():
    stream = torch.Generator().manual_seed(3)
    logits = torch.randn(900, 4, generator=stream)
    fitted = Energy().fit(torch.zeros(300, 0), logits[:300])
    calibration = Calibration.of(fitted.score(torch.zeros(300, 0), logits[300:600]), 0.05)
    share = calibration.refused(fitted.score(torch.zeros(300, 0), logits[600:])).double().mean()
    low, high = calibration.expected_share(300)[1:]
    assert low <= float(share) <= high


@pytest.mark.parametrize("alpha", [1 - 0.9, 0.1 + 0.2, 3 * 0.1, 0.7 - 0.4, 1 / 3, 0.07, 0.29])
@pytest.mark.parametrize("n", [9, 29, 99, 299, 999])
def test_an_alpha_with_a_wrong_last_digit_is_the_one_that_was_meant(alpha, n):
    """Decision, p-value, threshold and level agree where alpha (n + 1) is whole but for rounding."""
    if n < least_calibration_rows(alpha):
        return
    calibration = Calibration.of(torch.arange(float(n)), alpha=alpha)
    rank = round(alpha * (n + 1)) if abs(alpha * (n + 1) - round(alpha * (n + 1))) < 1e-9 else int(alpha * (n + 1))
    scores = torch.arange(n + 1) - 0.5
    assert int(calibration.refused(scores).sum()) == rank
    assert torch.equal(calibration.refused(scores), scores > calibration.threshold())
    assert calibration.level() == rank / (n + 1)
