"""Policy, budget, log and metrics: their order, and that each failure refuses instead of letting through."""

import functools
import json
import logging
import types

import pytest
import torch

from aidefend import BudgetExceeded, ConfigurationError
from aidefend.validate import Energy, Guard, NearestNeighbours
from tests.validate.small_world import Recorder, model, rows, strange

FIT, CALIBRATION, TEST = rows(200, 1), rows(300, 2), rows(50, 3)[0][5:10]


def guard_of(network=None, **collaborators):
    return Guard.calibrate(
        model() if network is None else network,
        CALIBRATION,
        detectors=[Energy(), NearestNeighbours(k=5)],
        alpha=0.05,
        fit=FIT,
        **collaborators,
    )


class Counting(torch.nn.Module):
    """Notes each pass in the recorder's list, and fails on demand."""

    def __init__(self, recorder):
        super().__init__()
        self.inner, self.recorder, self.error = model(), recorder, None

    def forward(self, x):
        self.recorder.calls.append("model")
        if self.error is not None:
            raise self.error
        return self.inner(x)


def counted(**options):
    recorder = Recorder(**options)
    network = Counting(recorder)
    guard = guard_of(network, resource="model:digits", **recorder.all())
    recorder.calls.clear()
    return guard, recorder, network


def test_the_order_of_a_call():
    guard, recorder, _ = counted()
    assert guard(TEST, principal="team-a").accepted.all()
    assert recorder.calls == ["authorize", "reserve", "model", "append", "commit", "observe"]
    assert recorder.request == ("team-a", "predict", "model:digits")
    assert recorder.spent == 5.0 and not recorder.reserved


def test_the_event_names_counts_and_holds_no_data():
    guard, recorder, _ = counted()
    guard(torch.cat([TEST, strange(2), torch.full((1, 6), float("nan"))]), principal="team-a")
    event = recorder.events[0]
    assert json.loads(json.dumps(event)) == event
    assert (event["principal"], event["rows"], event["accepted"], event["refused"]) == ("team-a", 8, 5, 3)
    assert event["reasons"]["input: not finite"] == 1 and sum(event["reasons"].values()) == 3
    assert not any(str(float(value)) in json.dumps(event) for value in TEST.flatten())
    observed = recorder.observed[0]
    assert (observed["verdict"], observed["reason"], observed["rows"]) == ("refused", "detector", 8)
    assert len(observed["p_values"]) == 7


@pytest.mark.parametrize("allowed", [False, None, "yes", 1])
def test_anything_but_a_true_permission_is_a_refusal(allowed):
    guard, recorder, _ = counted(allowed=allowed)
    decision = guard(TEST, principal="team-a")
    assert not decision.accepted.any() and decision.reasons[0] == ("access: because",)
    assert recorder.calls == ["authorize", "append", "observe"]
    assert recorder.observed[0]["reason"] == "access"


@pytest.mark.parametrize("name", ["policy", "budget"])
def test_without_a_principal_nothing_passes_a_policy_or_a_budget(name):
    recorder = Recorder()
    guard = guard_of(**{name: recorder})
    decision = guard(TEST)
    assert not decision.accepted.any() and decision.reasons[0] == ("access: no principal",) and recorder.calls == []
    for nobody in ("", 7, b"team-a", ["team-a"]):
        assert not guard(TEST, principal=nobody).accepted.any()
    assert guard(TEST, principal="team-a").accepted.all()


def test_log_and_metrics_do_not_need_a_principal():
    recorder = Recorder()
    assert guard_of(log=recorder, metrics=recorder)(TEST).accepted.all()
    assert recorder.events[0]["principal"] is None and recorder.observed[0]["reason"] == "none"


def test_a_budget_that_is_used_up_refuses_before_the_model_runs():
    guard, recorder, _ = counted(capacity=7)
    assert guard(TEST, principal="team-a").accepted.all()
    recorder.calls.clear()
    decision = guard(TEST, principal="team-a")
    assert decision.reasons[0] == ("budget: exceeded",) and "model" not in recorder.calls
    assert recorder.spent == 5.0 and recorder.observed[-1]["reason"] == "budget"


@pytest.mark.parametrize(
    "x", [None, TEST.double(), torch.full((3, 6), float("nan")), torch.zeros(1, 6).expand(20_000, 6), TEST[:0]]
)
def test_units_return_where_nothing_was_computed(x):
    guard, recorder, _ = counted()
    assert not guard(x, principal="team-a").accepted.any()
    assert recorder.calls == ["authorize", "reserve", "append", "refund", "observe"]
    assert recorder.spent == 0 and not recorder.reserved


def test_units_are_spent_once_the_model_has_run_also_if_it_fails():
    guard, recorder, network = counted()
    network.error = ValueError("secret detail")
    decision = guard(TEST, principal="team-a")
    assert not decision.accepted.any() and recorder.spent == 5.0
    assert recorder.observed[-1] == {"verdict": "failed", "reason": "error", "rows": 5, "p_values": []}


@pytest.mark.parametrize("step", ["authorize", "reserve", "append", "commit", "observe"])
def test_a_collaborator_that_fails_refuses_every_row(step):
    guard, recorder, _ = counted(fails=step)
    decision = guard(TEST, principal="team-a")
    assert not decision.accepted.any() and not decision.report.keep.any() and bool(decision.outputs.isnan().all())
    assert decision.reasons[0][0].startswith("error: ") and "RuntimeError" in decision.reasons[0][0]
    assert "secret" not in str(decision.reasons)
    if step in ("commit", "observe"):
        assert [event["accepted"] for event in recorder.events] == [5, 0]


def test_a_log_that_fails_does_not_stop_the_settlement():
    guard, recorder, _ = counted(fails="append")
    guard(TEST, principal="team-a")
    assert recorder.spent == 5.0 and recorder.calls[-2:] == ["commit", "observe"]


def test_an_interrupt_returns_the_units_and_passes_through():
    guard, recorder, network = counted()
    network.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        guard(TEST, principal="team-a")
    assert recorder.spent == 0 and not recorder.reserved and recorder.events == []


def test_access_and_budget_hold_in_every_mode():
    for mode in ("monitor", "shadow"):
        recorder = Recorder(allowed=False)
        assert not guard_of(policy=recorder, mode=mode)(TEST, principal="team-a").accepted.any()
        recorder = Recorder(capacity=1)
        assert not guard_of(budget=recorder, mode=mode)(TEST, principal="team-a").accepted.any()


def test_details_of_a_failure_go_to_the_operators_logger(caplog):
    guard, _, _ = counted(fails="reserve")
    with caplog.at_level(logging.ERROR, logger="aidefend.validate"):
        guard(TEST, principal="team-a")
    assert "secret detail" in caplog.text


def test_predict_hands_on_the_principal():
    guard, recorder, _ = counted()
    guard.predict(TEST, principal="team-a")
    assert recorder.request[0] == "team-a"


METHODS = {
    "policy": ("authorize",),
    "budget": ("reserve", "commit", "refund"),
    "log": ("append",),
    "metrics": ("observe",),
    "queries": ("watch",),
    "drift": ("observe",),
}


@pytest.mark.parametrize(("name", "method"), [(name, method) for name, own in METHODS.items() for method in own])
def test_a_collaborator_that_must_be_awaited_is_refused(name, method):
    """Planted violation: nobody awaited it, so that no unit was ever counted and no event written, without an error."""

    async def later(*_, **__):
        raise BudgetExceeded("never raised")

    for waits in (later, functools.partial(later), type("Later", (), {"__call__": staticmethod(later)})()):
        methods = {other: (lambda *_, **__: None) for other in METHODS[name]} | {method: waits}
        with pytest.raises(ConfigurationError, match=rf"{name}\.{method}\(\) that is no coroutine function"):
            guard_of(**{name: types.SimpleNamespace(**methods)})


@pytest.mark.parametrize("name", ["policy", "budget", "log", "metrics"])
@pytest.mark.parametrize("stranger", ["nonsense", 0, object()])
def test_a_collaborator_without_the_methods_is_refused_when_the_guard_is_made(name, stranger):
    with pytest.raises(ConfigurationError, match=rf"{name} with \.\w+\(\)"):
        Guard.calibrate(model(), rows(200, 0), detectors=[Energy()], alpha=0.05, **{name: stranger})
