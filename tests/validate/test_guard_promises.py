"""What a guard promises at alpha: on average, by class, for this set; recalibration on record; drift; detections."""

import dataclasses
import functools
import math
import threading

import pytest
import torch

from aidefend import ConfigurationError
from aidefend._core.batches import content_ids
from aidefend.monitor import AuditLog, DriftMonitor
from aidefend.validate import Consistency, Energy, Ensemble, Guard, InputSpec, Mahalanobis, NearestNeighbours
from aidefend.validate.calibration import JointCalibration
from aidefend.validate.conformal_law import least_calibration_rows
from tests.validate.small_world import CENTRES, Recorder, model, rows, strange

DETECTORS = [Energy(), NearestNeighbours(k=5)]
FIT, CALIBRATION, TEST = rows(200, 1), rows(600, 2), rows(400, 3)[0]
SPEC = InputSpec((6,), low=-30.0, high=30.0)


def moved(n, seed):
    """Clean rows of another day: every feature that no class has is higher."""
    return rows(n, seed)[0] + torch.tensor([0.0, 0, 0, 1.5, 1.5, 1.5])


def guard_of(data=CALIBRATION, network=None, **options):
    options = {"detectors": DETECTORS, "alpha": 0.05, "fit": FIT, "spec": SPEC, **options}
    return Guard.calibrate(model() if network is None else network, data, **options)


def uneven(n, seed):
    """Rows of which class 2 scatters more than the others."""
    x, y = rows(n, seed)
    return torch.where(y[:, None] == 2, CENTRES[2] + 2 * (x - CENTRES[2]), x), y


@pytest.mark.parametrize("promise", ["marginal", "class-conditional", "calibration-conditional"])
def test_decision_p_values_and_view_agree_in_every_mode(promise, tmp_path):
    guard = guard_of(promise=promise)
    x = torch.cat([TEST, strange(5)])
    decision = guard(x)
    assert torch.equal(~decision.accepted, decision.p_values["combined"] <= 0.05 * (1 + 1e-9))
    assert torch.equal(guard.attackable()(x).argmax(dim=1) == 3, ~decision.accepted)
    assert not decision.accepted[-5:].any() and decision.accepted[:400].double().mean() > 0.85
    assert decision.report.parameters.get("promise", "marginal") == promise
    guard.save(tmp_path / "guard")
    again = Guard.load(tmp_path / "guard", model())
    assert again(x).report.to_dict() == decision.report.to_dict() and again.facts == guard.facts
    assert again.calibration.law.mode == promise and again.to_evidence().to_json() == guard.to_evidence().to_json()


def rates_by_class(promise):
    """Refusals of clean rows by predicted class, over 12 worlds."""
    refused, seen = torch.zeros(3), torch.zeros(3)
    for seed in range(12):
        guard = guard_of(uneven(500, 50 + seed), promise=promise, alpha=0.1)
        x = uneven(600, 80 + seed)[0]
        predicted = guard.model(x).argmax(dim=1)
        kept = guard(x).report.keep
        seen += torch.bincount(predicted, minlength=3)
        refused += torch.bincount(predicted[~kept], minlength=3)
        guard.close()
    return refused / seen


def test_by_class_the_rate_holds_in_each_class_and_else_it_does_not():
    by_class, marginal = rates_by_class("class-conditional"), rates_by_class("marginal")
    assert bool((by_class < 0.125).all()) and bool((by_class > 0.06).all())
    assert float(marginal[2]) > 0.16 and float(marginal[:2].max()) < 0.08  # planted violation


def test_a_class_without_calibration_rows_is_refused_and_one_with_too_few_is_named():
    x, y = CALIBRATION
    two = guard_of((x[y != 2][:300], y[y != 2][:300]), promise="class-conditional")
    predicted = two.model(TEST).argmax(dim=1)
    decision = two(TEST)
    known = set(two.model(x[y != 2][:300]).argmax(dim=1).tolist())
    if 2 not in known:
        assert (
            not decision.accepted[predicted == 2].any() and decision.p_values["combined"][predicted == 2].isnan().all()
        )
    few = torch.cat([x[y != 2][:300], x[y == 2][:8]])
    with pytest.raises(ConfigurationError, match=r"at least 19 calibration rows in each class \(too few in \[2\]\)"):
        guard_of(few, promise="class-conditional")


def exceeding(mode):
    """Share of 200 calibration sets of 199 rows whose true rate is above alpha = 0.05."""
    stream, above = torch.Generator().manual_seed(7), 0
    for _ in range(200):
        scores = torch.rand(199, 1, generator=stream, dtype=torch.float64)
        calibration = JointCalibration.of(("a",), scores, scores[:0], 0.05, mode, 0.1)
        above += float(1 - calibration.law.threshold()) > 0.05
    return above / 200


def test_for_this_very_set_the_rate_exceeds_alpha_no_more_often_than_delta():
    assert exceeding("calibration-conditional") <= 0.1 + 3 * math.sqrt(0.09 / 200)
    assert exceeding("marginal") > 0.3  # planted violation: on average over sets is no promise for one


def test_too_few_rows_for_the_promise_say_how_many():
    least = least_calibration_rows(0.01, "calibration-conditional")
    with pytest.raises(ConfigurationError, match=f"{least + 20} different rows.*calibration-conditional"):
        guard_of(rows(300, 5), alpha=0.01, promise="calibration-conditional")
    with pytest.raises(ConfigurationError, match="mode to be one of"):
        guard_of(promise="always")


def test_alarms_detections_and_rates_are_reported():
    guard = guard_of()
    evidence = guard.to_evidence(10_000, {"far": strange(40), "clean": TEST})
    rate, alarms = evidence["guard.false_positive_rate"], evidence["guard.alarms_a_day"]
    assert alarms.value == pytest.approx(1e4 * rate.value) and alarms.low < alarms.value < alarms.high
    assert evidence["guard.true_positive_rate.far"].value == 1.0
    refused = 1 - float(guard(TEST).accepted.double().mean())
    assert evidence["guard.true_positive_rate.clean"].value == pytest.approx(refused)
    assert guard.detection(TEST.double()).value == 1.0  # another dtype: the specification refuses
    assert "false alarms a day at 10000" in guard.summary(10_000)
    with pytest.raises(ConfigurationError, match="at least one"):
        guard.detection(TEST[:0])


def test_caps_on_requests_bind_neither_calibration_nor_detections():
    """Planted violation: with one pass over all rows, the caps would refuse clean rows and count as detections.

    In float64: how a product of float32 is summed depends on the machine and on the rows of a pass.
    """
    wide = dataclasses.replace(SPEC, dtype=torch.float64)
    small, row = dataclasses.replace(wide, max_rows=16), dataclasses.replace(wide, max_bytes=6 * 8 * 10)
    (x, y), fit, test = CALIBRATION, (FIT[0].double(), FIT[1]), TEST.double()
    expected = guard_of((x.double(), y), model().double(), spec=wide, fit=fit)
    for spec in (small, row):
        guard = guard_of((x.double(), y), model().double(), spec=spec, fit=fit)
        torch.testing.assert_close(guard.calibration.scores, expected.calibration.scores)
        assert guard.detection(test).value == expected.detection(test).value < 0.2
        guard.recalibrate(test, reason="spring")
        assert not guard(test[:17]).accepted.any()


def test_recalibration_is_on_record_before_it_is_in_force():
    recorder = Recorder()
    guard = guard_of(log=recorder)
    before, threshold = guard.calibration, float(guard.calibration.threshold)
    guard.recalibrate(moved(300, 9), reason="new camera")
    event = recorder.events[-1]
    assert event["event"] == "guard.recalibrated" and event["reason"] == "new camera"
    assert event["before"]["thresholds"]["-1"] == threshold != event["after"]["thresholds"]["-1"]
    assert guard.calibration.n == 300 == guard.facts.calibration_n and len(guard.calibration.history) == 1
    assert float(guard.calibration.threshold) > threshold and torch.equal(before.knots, guard.calibration.knots)
    share = float((~guard(moved(2000, 10)).accepted).double().mean())
    assert share < 0.09
    assert recorder.events[-1]["setting"]["n"] == 300
    assert guard.to_evidence()["guard.false_positive_rate"].setting["follows"] == 1


def test_calls_that_run_while_a_guard_is_recalibrated_say_what_judged_them():
    """The event names the calibration that judged the rows; no monitor sees ranks of a calibration before its own."""
    recorder, seen, drawn = Recorder(), {}, [rows(n, n)[0] for n in (200, 300, 400)]

    class Watching:
        def __init__(self, n):
            self.n, self.alarm = n, False

        def observe(self, ranks):
            seen.setdefault(self.n, []).append(ranks)
            return self

    class Slow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.hook = model(), None

        def forward(self, x):
            outputs, hook = self.inner(x), self.hook
            self.hook = None
            if hook is not None:
                hook()
            return outputs

    guard = guard_of(network=Slow(), log=recorder)
    guard.follow(Watching(guard.calibration.n))
    judged = [guard.calibration.n]
    for data in drawn:
        renew = functools.partial(guard.recalibrate, data, reason="test", drift=Watching(len(data)))
        guard.model.hook = renew  # the new calibration is in force before this very call ends
        decision = guard(TEST[:20])
        event = next(one for one in reversed(recorder.events) if one["event"] == "guard.decision")
        assert event["setting"]["n"] == judged[-1] == decision.report.parameters["n"]
        assert guard.calibration.n == len(data)
        judged.append(len(data))
    for n, ranks in seen.items():
        steps = torch.cat(ranks) * (n + 1)  # whole numbers among these calibration rows
        torch.testing.assert_close(steps, steps.round())


def test_a_recalibration_that_fails_changes_nothing():
    recorder = Recorder()
    guard = guard_of(log=recorder)
    before = guard.calibration
    with pytest.raises(ConfigurationError, match="a reason"):
        guard.recalibrate(TEST, reason=" ")
    with pytest.raises(ConfigurationError, match="at least 19"):
        guard.recalibrate(TEST[:10], reason="few")
    with pytest.raises(ConfigurationError, match="5 shared inputs"):
        guard.recalibrate(TEST, reason="reused", used_ids=content_ids(TEST[:5]))
    with pytest.raises(ConfigurationError, match="drift monitor"):
        guard.recalibrate(TEST, reason="drift", drift=DriftMonitor())
    recorder.fails = "append"
    with pytest.raises(RuntimeError):
        guard.recalibrate(TEST, reason="the log is full")
    assert guard.calibration is before and guard.facts.calibration_n == before.n


def test_history_survives_the_disk(tmp_path):
    guard = guard_of()
    guard.recalibrate(TEST, reason="spring")
    guard.save(tmp_path / "guard")
    assert Guard.load(tmp_path / "guard", model()).calibration.history[0]["reason"] == "spring"


@pytest.mark.parametrize("promise", ["marginal", "calibration-conditional"])
def test_drift_is_seen_said_and_on_record(promise, tmp_path):
    guard = guard_of(promise=promise, log=AuditLog(tmp_path / "log", b"0123456789abcdef"))
    guard.follow(DriftMonitor(calibration_n=guard.calibration.n))
    for seed in range(5):
        assert not guard(rows(200, 20 + seed)[0]).drifted
    seen = 0
    while seen < 3000 and not guard(moved(100, 100 + seen)).drifted:
        seen += 100
    assert seen < 3000
    decision = guard(TEST[:1])
    assert decision.drifted and decision.report.parameters["drift_alarm"] is True
    events = (tmp_path / "log").read_text().splitlines()
    assert "drift_alarm" in events[-1] and "drift_alarm" not in events[0]
    with pytest.raises(ConfigurationError, match="a new drift monitor"):
        guard.recalibrate(TEST, reason="drift")
    guard.recalibrate(moved(400, 77), reason="drift", drift=DriftMonitor(calibration_n=400))
    assert not guard(moved(300, 78)).drifted


class Watch:
    """A drift monitor that keeps what it saw, and fails on demand."""

    def __init__(self, fails=False):
        self.fails, self.seen = fails, []

    def observe(self, p_values):
        if self.fails:
            raise RuntimeError
        self.seen.append(p_values)
        return dataclasses.make_dataclass("State", [("alarm", bool)])(False)


def test_the_monitor_sees_scored_rows_alone_and_its_failure_refuses():
    watch = Watch()
    guard = guard_of(drift=watch)
    x = torch.cat([TEST[:3], torch.full((1, 6), math.nan), strange(1)])
    decision = guard(x)
    expected = decision.p_values["combined"][[0, 1, 2, 4]]
    assert len(watch.seen) == 1 and torch.equal(watch.seen[0], expected)
    guard("no tensor")
    assert len(watch.seen) == 1
    watch.fails = True
    refused = guard(TEST)
    assert not refused.accepted.any() and refused.reasons[0] == ("error: drift failed (RuntimeError)",)
    with pytest.raises(ConfigurationError, match="observe"):
        guard.follow("a monitor")


class WithSpare(torch.nn.Module):
    """Three classes as ever, and a fourth for rows that begin with a large number."""

    def __init__(self):
        super().__init__()
        self.inner = model()

    def forward(self, x):
        return torch.cat([self.inner(x), 50 * (x[:, :1] - 20)], dim=1)


def test_a_predicted_class_without_calibration_rows_is_refused_and_named():
    guard = guard_of(network=WithSpare().eval(), promise="class-conditional", layer="inner.2")
    spare = torch.cat([torch.full((2, 1), 29.0), TEST[:2, 1:]], dim=1)
    decision = guard(torch.cat([TEST[:5], spare]))
    assert decision.accepted.tolist() == [True] * 5 + [False] * 2
    assert decision.reasons[-1] == ("detector: a predicted class without calibration rows",)
    assert decision.p_values["combined"].isnan().tolist() == [False] * 5 + [True] * 2
    assert "every row is refused, of 1 predicted classes: 3." in guard.summary()
    assert guard.to_evidence().findings[0].setting["classes_without_calibration_rows"] == [3]
    whole = guard_of(promise="class-conditional")
    assert "no calibration rows" not in whole.summary()
    assert "classes_without_calibration_rows" not in whole.to_evidence().findings[0].setting


@pytest.mark.parametrize("mode", ["monitor", "shadow"])
def test_a_drift_monitor_that_fails_changes_no_answer_where_nothing_is_enforced(mode):
    """Planted violation: it refused every row in the mode that promises the answers of the bare model."""
    watch = Watch()
    guard = guard_of(drift=watch, mode=mode)
    before = guard(TEST)
    watch.fails = True
    after = guard(TEST)
    assert after.accepted.all() and torch.equal(before.outputs, after.outputs) and not after.report.keep.any()
    assert {row[0] for row in after.reasons} == {"error: drift failed (RuntimeError)"}


@pytest.mark.parametrize("n", [None, 10_000])
def test_a_drift_monitor_whose_alarms_mean_nothing_is_refused(n, tmp_path):
    """Planted violation: without the band for so few rows, exchangeable rows raise the alarm sooner or later."""
    guard, wrong = guard_of(), DriftMonitor(calibration_n=n)
    calls = {
        "follow": lambda: guard.follow(wrong),
        "calibrate": lambda: guard_of(drift=wrong),
        "recalibrate": lambda: guard.recalibrate(moved(300, 9), reason="test", drift=wrong),
        "load": lambda: Guard.load(tmp_path / "guard", model(), drift=wrong),
    }
    guard.follow(DriftMonitor(calibration_n=guard.calibration.n - 1))  # more cautious than need be
    guard.save(tmp_path / "guard")
    before = guard.calibration
    for call in calls.values():
        with pytest.raises(ConfigurationError, match=f"calibration_n={n}"):
            call()
    assert guard.calibration is before


def test_threads_share_a_drift_monitor_without_losing_a_row():
    monitor = DriftMonitor(calibration_n=480)
    guard = guard_of(drift=monitor)

    def work():
        for i in range(10):
            guard(TEST[8 * i : 8 * i + 8])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.observe(torch.zeros(0)).count == 4 * 80


def test_detectors_that_ask_the_model_again_work_in_a_guard(tmp_path):
    again = Consistency(shift=0, noise=0.5, draws=2)
    guard = guard_of(detectors=[again, Ensemble([Mahalanobis(), Consistency(shift=0, noise=0.3, draws=1)])])
    x = torch.cat([TEST[:50], torch.full((1, 6), math.nan), strange(3)])
    decision = guard(x)
    assert set(decision.p_values) == {"consistency", "ensemble", "combined"}
    assert decision.accepted[:50].double().mean() > 0.8 and not decision.accepted[50:].any()
    assert decision.p_values["consistency"][:50].isfinite().all()
    assert torch.equal(guard.attackable()(x).argmax(dim=1) == 3, ~decision.accepted)
    guard.save(tmp_path / "guard")
    assert Guard.load(tmp_path / "guard", model())(x).report.to_dict() == decision.report.to_dict()
