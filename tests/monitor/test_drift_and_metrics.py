"""Drift is found at the stated false-alarm rate; metrics cannot grow with traffic."""

import builtins
import json

import pytest
import torch
from scipy import stats as scipy_stats

from aidefend import ConfigurationError, MissingExtra
from aidefend._core.stats import conformal_p_values
from aidefend.monitor import CalibrationMartingale, DriftMonitor, Metrics
from aidefend.monitor.drift_monitor import _holm


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_feature_drift_equals_scipy_and_names_the_feature():
    reference, x = torch.randn(300, 4, generator=stream(0)), torch.randn(200, 4, generator=stream(1))
    x[:, 1] *= 2
    result = DriftMonitor(reference, alpha=0.01).check(x.reshape(200, 2, 2))
    raw = [scipy_stats.ks_2samp(reference[:, j].numpy(), x[:, j].numpy()).pvalue for j in range(4)]
    assert result.features == (1,) and result.drifted and result.p_values[1] == pytest.approx(4 * raw[1])
    assert result.to_evidence()["monitor.drifted_features"].value == 1
    bad = x.clone()
    bad[:7, 0] = float("nan")
    assert DriftMonitor(reference).check(bad).dropped == 7


def test_holm_is_the_textbook_rule():
    p = torch.tensor([0.01, 0.04, 0.03, 0.005], dtype=torch.float64).numpy()
    assert _holm(p).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_feature_drift_keeps_its_level():
    """200 draws without drift at alpha 0.1: more than 34 alarms happen with probability below 1e-3."""
    noise = stream(2)
    alarms = sum(
        DriftMonitor(torch.randn(100, 5, generator=noise), alpha=0.1).check(torch.randn(80, 5, generator=noise)).drifted
        for _ in range(200)
    )
    assert alarms <= 34


def run_stream(seed: int, calibration_n: int, covered: bool, n: int = 4000, shift: float = 0.0) -> bool:
    noise = stream(seed)
    calibration = torch.randn(calibration_n, generator=noise)
    watch = CalibrationMartingale(0.1, calibration_n if covered else None)
    for _ in range(n // 500):
        watch.observe(conformal_p_values(torch.randn(500, generator=noise) + shift, calibration))
    return watch.state.alarm


def test_false_alarms_stay_below_the_stated_rate_with_one_fixed_calibration_set():
    """Planted violation: leaving the calibration set's own sampling out of account raises false alarms."""
    assert sum(run_stream(seed, 100, True) for seed in range(60)) <= 6
    assert sum(run_stream(seed, 100, False) for seed in range(60)) > 12


def test_uniform_streams_stay_quiet_and_drift_is_found_early_and_late():
    """40 uniform streams at alpha 0.05: more than 7 alarms happen with probability below 1e-2; the seeds are fixed."""
    alarms = 0
    for seed in range(40):
        watch = CalibrationMartingale(0.05, sides="both")
        alarms += watch.observe(1 - torch.rand(5000, generator=stream(seed), dtype=torch.float64)).alarm
    assert alarms <= 4
    assert run_stream(0, 1000, True, shift=1.0)
    late = CalibrationMartingale(0.01, 2000)
    assert not late.observe(1 - torch.rand(20_000, generator=stream(1))).alarm
    state = late.observe(torch.rand(3000, generator=stream(2)) ** 0.3)
    low = late.observe((1 - torch.rand(3000, generator=stream(3))) ** 3)
    assert not state.alarm and low.alarm and low.alarm_at > 23_000
    high = CalibrationMartingale(0.01, sides="both")
    assert high.observe(1 - torch.rand(2000, generator=stream(4)) ** 3).alarm


def test_capital_is_a_supermartingale():
    """Mean capital after 20 uniform p-values stays at or below 1, up to the error of 1,000 runs."""
    total = 0.0
    for seed in range(1000):
        total += CalibrationMartingale(0.1, sides="both").observe(1 - torch.rand(20, generator=stream(seed))).capital
    assert total / 1000 < 1.15


def test_ties_do_not_alarm_a_low_sided_bet():
    watch = CalibrationMartingale(0.01)
    assert not watch.observe(torch.ones(5000)).alarm


def test_a_restart_continues_the_bet_and_batching_does_not_matter():
    p = 1 - torch.rand(700, generator=stream(5), dtype=torch.float64)
    whole, parts = CalibrationMartingale(0.01, 500), CalibrationMartingale(0.01, 500)
    whole.observe(p)
    parts.observe(p[:333])
    resumed = CalibrationMartingale(0.01, 500)
    resumed.load_state_dict(parts.state_dict())
    resumed.observe(p[333:])
    assert resumed.state.capital == pytest.approx(whole.state.capital, rel=1e-9)
    assert resumed.observe(torch.zeros(0)) == resumed.state
    with pytest.raises(ConfigurationError, match="same alpha"):
        CalibrationMartingale(0.02, 500).load_state_dict(parts.state_dict())


def test_a_monitor_goes_on_after_a_restart_and_stays_alarmed():
    drifted = 0.2 * torch.rand(400, generator=stream(0), dtype=torch.float64) + 1e-3
    whole, before, after = (DriftMonitor(calibration_n=5_000) for _ in range(3))
    found = whole.observe(drifted)
    assert found.alarm and not before.observe(drifted[: found.alarm_at // 2]).alarm
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    resumed = after.observe(drifted[found.alarm_at // 2 :])
    assert (resumed.count, resumed.capital) == (400, pytest.approx(found.capital, rel=1e-9))
    assert resumed.alarm and found.alarm_at // 2 < resumed.alarm_at
    again = DriftMonitor(calibration_n=5_000)
    again.load_state_dict(after.state_dict())
    assert again.observe(torch.ones(50, dtype=torch.float64)).alarm
    for wrong in (DriftMonitor(calibration_n=400), DriftMonitor(alpha=0.05, calibration_n=5_000)):
        with pytest.raises(ConfigurationError, match="same alpha and calibration_n"):
            wrong.load_state_dict(before.state_dict())


@pytest.mark.parametrize(
    "call",
    [
        lambda: DriftMonitor(torch.rand(19, 2)),
        lambda: DriftMonitor(torch.full((30, 2), float("nan"))),
        lambda: DriftMonitor().check(torch.rand(5, 2)),
        lambda: DriftMonitor(torch.rand(30, 2)).check(torch.rand(5, 3)),
        lambda: DriftMonitor(torch.rand(30, 2)).check(torch.full((5, 2), float("nan"))),
        lambda: DriftMonitor(alpha=0.0),
        lambda: CalibrationMartingale().observe(torch.tensor([0.0])),
        lambda: CalibrationMartingale().observe(torch.tensor([1.5])),
        lambda: CalibrationMartingale().observe(torch.tensor([float("nan")])),
        lambda: CalibrationMartingale(0.1, 0),
    ],
)
def test_bad_calls_are_refused(call):
    with pytest.raises(ConfigurationError, match="Expected"):
        call()


def test_metrics_have_closed_labels():
    metrics = Metrics()
    for i in range(500):
        metrics.observe(verdict=f"v{i}", reason=f"user-{i}", rows=2, seconds=0.1, p_values=[0.5, float("nan")])
    metrics.observe(verdict="refused", reason="budget", rows=1, seconds=0.0)
    text = metrics.text()
    assert 'aidefend_requests_total{reason="other",verdict="failed"} 500.0' in text
    assert 'aidefend_rows_total{reason="other",verdict="failed"} 1000.0' in text
    assert "aidefend_budget_exhausted_total 1.0" in text
    assert "aidefend_p_value_count 500.0" in text
    assert "user-" not in text and text.count("aidefend_requests_total{") == 2
    Metrics()
    with pytest.raises(ConfigurationError, match="rows"):
        metrics.observe(verdict="accepted", reason="none", rows=-1, seconds=0.0)


def test_a_missing_library_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "prometheus_client":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"aidefend\[metrics\]"):
        Metrics()


@pytest.mark.parametrize(
    "change",
    [
        {"log_capital": [[[float("nan")] * 3] * 24]},
        {"log_capital": "nothing"},
        {"log_capital": [[0.0]]},
        {"capital": float("nan")},
        {"capital": "much"},
        {"count": -1},
        {"alarm_at": "never"},
        {"more": 1},
    ],
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(change):
    """A capital of NaN would never reach the alarm."""
    watch = CalibrationMartingale()
    watch.observe(torch.full((3,), 0.5))
    before = watch.state_dict()
    with pytest.raises(ConfigurationError, match="Expected"):
        watch.load_state_dict({**before, **change})
    assert watch.state_dict() == before


def test_a_bet_that_began_under_inference_mode_goes_on_outside():
    watch, plain = CalibrationMartingale(), CalibrationMartingale()
    p = torch.linspace(0.01, 1, 100)
    with torch.inference_mode():
        watch.observe(p.clone())
    assert watch.observe(p) == [plain.observe(p), plain.observe(p)][1]
