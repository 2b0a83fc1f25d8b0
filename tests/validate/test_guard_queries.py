"""The place of the query monitor in a guard: after the model, before the outputs, closed where it fails."""

import dataclasses

import pytest
import torch

from aidefend import ConfigurationError
from aidefend.validate import Energy, Guard, LabelOnly, NearestNeighbours
from tests.validate.small_world import Recorder, model, rows, strange

FIT, CALIBRATION, TEST = rows(200, 1), rows(300, 2), rows(50, 3)[0][5:10]


@dataclasses.dataclass
class Standing:
    allowed: object = True
    remark: str = ""


class Watcher:
    """Keeps what it is shown; answers with `standing`, or raises it."""

    def __init__(self, standing=None, recorder=None):
        self.standing, self.recorder, self.seen = standing or Standing(), recorder, []

    def watch(self, principal, x, outputs):
        self.seen.append((principal, x, outputs))
        if self.recorder is not None:
            self.recorder.calls.append("watch")
        if isinstance(self.standing, Exception):
            raise self.standing
        return self.standing


def guard_of(watcher, network=None, **options):
    options = {"detectors": [Energy(), NearestNeighbours(k=5)], "alpha": 0.05, "fit": FIT, **options}
    return Guard.calibrate(network or model(), CALIBRATION, queries=watcher, **options)


def test_it_comes_after_the_model_and_before_the_outputs_and_the_log():
    recorder = Recorder()
    watcher = Watcher(recorder=recorder)

    def output(logits):
        recorder.calls.append("output")
        return logits

    guard = guard_of(watcher, output=output, **recorder.all())
    recorder.calls.clear()
    assert guard(TEST, principal="team-a").accepted.all()
    assert recorder.calls == ["authorize", "reserve", "watch", "output", "append", "commit", "observe"]


def test_it_sees_the_rows_and_logits_of_every_row_that_the_model_saw():
    watcher = Watcher()
    guard = guard_of(watcher, output=LabelOnly())
    x = torch.cat([TEST, strange(2), torch.full((1, 6), float("nan"))])
    decision = guard(x, principal="team-a")
    assert decision.accepted.tolist() == [True] * 5 + [False] * 3
    principal, seen, outputs = watcher.seen[0]
    assert principal == "team-a" and torch.equal(seen, x[:7])  # also the rows that detectors refuse
    assert torch.allclose(outputs, model()(x[:7]))


@pytest.mark.parametrize("allowed", [False, None, "yes", 1])
def test_anything_but_a_true_standing_refuses_every_row_in_enforce_alone(allowed):
    decision = guard_of(Watcher(Standing(allowed)))(TEST, principal="a")
    assert not decision.accepted.any() and bool(decision.outputs.isnan().all())
    assert set(decision.reasons) == {("queries: suspended",)} and not decision.report.keep.any()
    for mode in ("monitor", "shadow"):
        decision = guard_of(Watcher(Standing(allowed)), mode=mode)(TEST, principal="a")
        assert decision.accepted.all() and decision.reasons[0] == ("queries: suspended",)


def test_it_fails_closed_and_keeps_the_details_for_the_operator():
    recorder = Recorder()
    guard = guard_of(Watcher(RuntimeError("secret detail")), **recorder.all())
    decision = guard(TEST, principal="a")
    assert not decision.accepted.any() and decision.reasons[0] == ("error: queries failed (RuntimeError)",)
    assert recorder.spent == 5.0 and recorder.observed[0]["verdict"] == "failed"


def test_a_remark_reaches_the_log_and_nothing_that_the_client_sees():
    recorder = Recorder()
    quiet, flagged = Watcher(), Watcher(Standing(True, "flagged: near duplicates"))
    before = guard_of(quiet, **recorder.all())(TEST, principal="a")
    after = guard_of(flagged, **recorder.all())(TEST, principal="a")
    assert "queries" not in recorder.events[0] and recorder.events[1]["queries"] == "flagged: near duplicates"
    assert torch.equal(before.outputs, after.outputs) and torch.equal(before.accepted, after.accepted)
    assert before.reasons == after.reasons and before.report.to_dict() == after.report.to_dict()


def test_a_suspension_counts_as_a_refusal_of_access_and_costs_its_units():
    recorder = Recorder()
    guard_of(Watcher(Standing(False)), **recorder.all())(TEST, principal="a")
    assert recorder.observed[0]["reason"] == "access" and recorder.spent == 5.0


def test_without_a_principal_nothing_passes():
    watcher = Watcher()
    guard = guard_of(watcher)
    for nobody in (None, "", 7):
        decision = guard(TEST, principal=nobody)
        assert not decision.accepted.any() and decision.reasons[0] == ("access: no principal",)
    assert not watcher.seen


def test_rows_that_never_reach_the_model_are_not_shown():
    watcher = Watcher()
    guard_of(watcher)(torch.full((3, 6), float("nan")), principal="a")
    assert not watcher.seen


def test_attacks_on_the_attackable_view_leave_no_state():
    watcher = Watcher()
    guard_of(watcher).attackable()(TEST)
    assert not watcher.seen


def test_a_saved_guard_asks_for_its_monitor_again(tmp_path):
    network = model()
    guard_of(Watcher(), network).save(tmp_path / "g")
    with pytest.raises(ConfigurationError, match="queries="):
        Guard.load(tmp_path / "g", network)
    watcher = Watcher()
    Guard.load(tmp_path / "g", network, queries=watcher)(TEST, principal="a")
    assert len(watcher.seen) == 1


@pytest.mark.parametrize("stranger", ["nonsense", 0, object()])
def test_a_monitor_without_the_method_is_refused_when_the_guard_is_made(stranger):
    with pytest.raises(ConfigurationError, match=r"queries with \.watch\(\)"):
        guard_of(stranger)


class Silent(torch.nn.Module):
    """No numbers for rows with a negative first feature."""

    def __init__(self):
        super().__init__()
        self.inner = model()

    def forward(self, x):
        return torch.where(x[:, :1] < 0, torch.nan, self.inner(x))


def test_it_sees_rows_for_which_the_model_gives_no_numbers():
    """An attacker learns from a refusal, too."""
    watcher = Watcher()
    clean = CALIBRATION[0].abs(), CALIBRATION[1]
    options = {"detectors": [Energy()], "alpha": 0.05, "queries": watcher, "layer": "inner.2"}
    with Guard.calibrate(Silent().eval(), clean, **options) as guard:
        x = TEST.abs()
        x[1, 0] = -1e-3
        assert guard(x, principal="team-a").reasons[1] == ("model: output not finite",)
    assert torch.equal(watcher.seen[0][1], x) and watcher.seen[0][2][1].isnan().all()
