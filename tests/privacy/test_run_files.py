"""Saving, resuming and the ledger: no step is lost, no noise comes back, nothing of another run is taken up."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from aidefend import BudgetExceeded, ConfigurationError, PrivacyError
from aidefend.privacy import PrivacyLedger, epsilon
from tests.privacy.private_worlds import one_step, private_run, released, settings, small_mlp


def adam_run(config=None, model=None, ledger=None):
    model = model or small_mlp()
    return private_run(model, config=config, optimizer=torch.optim.Adam(model.parameters(), 0.01), ledger=ledger)


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    first = adam_run()
    one_step(first), one_step(first)
    first.save(tmp_path / "run")
    second = adam_run(model=small_mlp(9))
    second.resume(tmp_path / "run")
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert second.steps_taken == 2 and second.epsilon() == first.epsilon() > 0
    ours, theirs = (run.optimizer.state_dict() for run in (second, first))
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    for index, entries in theirs["state"].items():
        assert entries.keys() == ours["state"][index].keys()
        assert all(torch.equal(value, ours["state"][index][name]) for name, value in entries.items())
    one_step(second), one_step(second)
    with pytest.raises(BudgetExceeded):
        iter(second.loader)


def test_resuming_twice_draws_fresh_noise(tmp_path):
    first = adam_run()
    one_step(first)
    first.save(tmp_path / "run")
    gradients = []
    for _ in range(2):
        run = adam_run()
        run.resume(tmp_path / "run")
        one_step(run)
        gradients.append(released(run)["0.weight"])
    assert not torch.equal(*gradients)


def test_the_file_holds_no_random_state_and_no_pickle(tmp_path):
    run = adam_run()
    one_step(run)
    run.save(tmp_path / "run")
    with safe_open(tmp_path / "run", "pt") as file:
        assert not [name for name in file.keys() if "rng" in name or "seed" in name]  # noqa: SIM118
    assert (tmp_path / "run").read_bytes()[:2] != b"PK"


@pytest.mark.parametrize("changes", [{"noise_multiplier": 1.1}, {"steps": 5}, {"max_grad_norm": 1.0}, {"delta": 1e-4}])
def test_another_configuration_is_refused(tmp_path, changes):
    run = adam_run()
    one_step(run)
    run.save(tmp_path / "run")
    with pytest.raises(PrivacyError, match="configuration of the saved run"):
        adam_run(settings(**changes)).resume(tmp_path / "run")
    faster = adam_run(settings(microbatch=2, steps_per_pass=1))
    faster.resume(tmp_path / "run")
    assert faster.steps_taken == 1


def test_another_model_or_optimizer_is_refused_and_nothing_changes(tmp_path):
    run = adam_run()
    one_step(run)
    run.save(tmp_path / "run")
    other = adam_run(model=nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)))
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(PrivacyError, match="another model"):
        other.resume(tmp_path / "run")
    model = small_mlp()
    groups = [{"params": [p]} for p in model.parameters()]
    split = private_run(model, optimizer=torch.optim.SGD(groups, 0.1))
    with pytest.raises(PrivacyError, match="another optimizer"):
        split.resume(tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    assert other.steps_taken == split.steps_taken == 0


def test_a_run_that_has_begun_cannot_resume(tmp_path):
    run = adam_run()
    one_step(run)
    run.save(tmp_path / "run")
    with pytest.raises(PrivacyError, match="without steps"):
        run.resume(tmp_path / "run")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    run = adam_run()
    run.save(tmp_path / "run")
    (tmp_path / "cut").write_bytes((tmp_path / "run").read_bytes()[:-8])
    (tmp_path / "text").write_text("hello")
    torch.save({"model": torch.zeros(2)}, tmp_path / "pickle")
    for name in ("cut", "text", "pickle"):
        with pytest.raises(PrivacyError, match=r"private\.save"):
            adam_run().resume(tmp_path / name)
    with pytest.raises(ConfigurationError, match=r"private\.save"):
        adam_run().resume(tmp_path / "missing")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    run = adam_run()
    run.save(tmp_path / "run")
    old = (tmp_path / "run").read_bytes()
    one_step(run)

    def fails(*arguments, **named):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        run.save(tmp_path / "run")
    assert (tmp_path / "run").read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_runs_compose_in_the_ledger(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger", delta=1e-3)
    for sigma in (1.0, 2.0):
        run = adam_run(settings(noise_multiplier=sigma), ledger=ledger)
        for _ in range(3):
            one_step(run)
        run.release()
    history = [(1.0, 8 / 24, 3), (2.0, 8 / 24, 3)]
    assert ledger.epsilon() == epsilon(history, 1e-3) > epsilon(history[:1], 1e-3)
    assert PrivacyLedger(tmp_path / "ledger", delta=1e-3).epsilon() == ledger.epsilon()
    assert [(run.steps, run.planned, bool(run.closed)) for run in ledger.runs()] == [(3, 4, True)] * 2


def test_an_insecure_run_spoils_the_ledger_for_good(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger")
    one_step(adam_run(settings(insecure_no_noise=True), ledger=ledger))
    assert ledger.epsilon() == math.inf


def test_steps_are_reserved_before_they_are_drawn(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger", delta=1e-3)
    run = adam_run(settings(steps=500), ledger=ledger)
    for _ in range(12):
        one_step(run)
        assert ledger.runs()[0].steps >= run.steps_taken
    assert ledger.runs()[0].steps <= 12 + 10
    run.release()
    assert ledger.runs()[0].steps == 12


def test_a_limit_refuses_a_run_that_would_exceed_it(tmp_path):
    config = settings(steps=4, noise_multiplier=2.0)
    one = epsilon(config.history(4), 1e-3)
    ledger = PrivacyLedger(tmp_path / "ledger", target_epsilon=1.2 * one, delta=1e-3)
    run = adam_run(config, ledger=ledger)
    with pytest.raises(BudgetExceeded, match="all runs within epsilon"):
        adam_run(config, ledger=ledger)
    one_step(run)
    run.release()
    adam_run(settings(steps=1, noise_multiplier=2.0), ledger=ledger)
    assert ledger.epsilon() <= 1.2 * one
    with pytest.raises(ConfigurationError, match="limit"):
        PrivacyLedger(tmp_path / "ledger", target_epsilon=100.0, delta=1e-3)
    assert PrivacyLedger(tmp_path / "ledger").epsilon() == ledger.epsilon()


def test_a_closed_run_cannot_come_back_into_a_full_ledger(tmp_path):
    config = settings(steps=4, noise_multiplier=2.0)
    one = epsilon(config.history(4), 1e-3)
    ledger = PrivacyLedger(tmp_path / "ledger", target_epsilon=1.2 * one, delta=1e-3)
    run = adam_run(config, ledger=ledger)
    one_step(run)
    run.save(tmp_path / "run")
    run.release()
    late = adam_run(settings(steps=1, noise_multiplier=2.0), ledger=ledger)
    late.release()
    adam_run(settings(steps=2, noise_multiplier=2.0), ledger=ledger)
    with pytest.raises(BudgetExceeded, match="all runs within epsilon"):
        adam_run(config, ledger=ledger)


def test_resume_charges_what_ran_after_the_save(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger", delta=1e-3)
    run = adam_run(ledger=ledger)
    one_step(run)
    run.save(tmp_path / "run")
    one_step(run), one_step(run)
    again = adam_run(ledger=ledger)
    again.resume(tmp_path / "run")
    assert again.steps_taken == 3
    one_step(again)
    assert [entry.steps for entry in ledger.runs()] == [4, 0]


def test_a_run_that_was_taken_up_is_nobody_elses(tmp_path):
    """Planted before: the old object went on, or gave back, what the new one had spent."""
    ledger = PrivacyLedger(tmp_path / "ledger", delta=1e-3)
    config = settings(steps=200)
    first = adam_run(config, ledger=ledger)
    one_step(first), one_step(first)
    first.save(tmp_path / "run")
    second = adam_run(config, ledger=ledger)
    second.resume(tmp_path / "run")
    assert second.steps_taken >= first.steps_taken
    for _ in range(6):
        one_step(second)
    told = ledger.runs()[0].steps
    covered = first._covered
    with pytest.raises(PrivacyError, match="nobody else"):
        for _ in range(covered + 1):
            one_step(first)
    assert first.steps_taken <= covered <= second.steps_taken  # what it had reserved was charged to the second
    first.release()
    assert ledger.runs()[0].steps == told and second.epsilon() <= ledger.epsilon()
    second.release()
    assert ledger.runs()[0].steps == second.steps_taken


def test_steps_that_the_old_owner_takes_while_the_run_is_taken_up_are_counted(tmp_path, monkeypatch):
    """Count and hand-over are one transaction: what is reserved between the look and it belongs to the new one."""
    from aidefend.privacy import training

    ledger = PrivacyLedger(tmp_path / "ledger", delta=1e-3)
    config = settings(steps=200)
    first = adam_run(config, ledger=ledger)
    one_step(first)
    first.save(tmp_path / "run")
    honest = training.load_run

    def slow(*arguments):
        for _ in range(30):
            one_step(first)
        return honest(*arguments)

    second = adam_run(config, ledger=ledger)
    monkeypatch.setattr(training, "load_run", slow)
    second.resume(tmp_path / "run")
    assert second.steps_taken >= first.steps_taken == 31


def test_a_run_of_another_ledger_is_refused(tmp_path):
    run = adam_run(ledger=PrivacyLedger(tmp_path / "one"))
    run.save(tmp_path / "run")
    with pytest.raises(PrivacyError, match="this ledger"):
        adam_run(ledger=PrivacyLedger(tmp_path / "two")).resume(tmp_path / "run")


def test_ledgers_that_are_none(tmp_path):
    (tmp_path / "text").write_text("not a database, but long enough to be looked at" * 30)
    with pytest.raises(PrivacyError, match="readable ledger"):
        PrivacyLedger(tmp_path / "text")
    with pytest.raises(ConfigurationError, match="folder"):
        PrivacyLedger(tmp_path / "no" / "ledger")
    for changes in ({"delta": 0.0}, {"target_epsilon": -1.0}, {"neighboring": "x"}):
        with pytest.raises(ConfigurationError, match="Expected"):
            PrivacyLedger(tmp_path / "ledger", **changes)


def reserve_many(path, start):
    start.wait()
    ledger = PrivacyLedger(path)
    run = ledger.open_run(settings(steps=60))
    for step in range(1, 61):
        ledger.reserve(run, step)


def test_two_processes_share_a_ledger(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=reserve_many, args=(tmp_path / "ledger", start)) for _ in range(2)]
    PrivacyLedger(tmp_path / "ledger")
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert [run.steps for run in PrivacyLedger(tmp_path / "ledger").runs()] == [60, 60]


KILLED = """
import sys
from tests.privacy.private_worlds import private_run, settings, one_step
from aidefend.privacy import PrivacyLedger
run = private_run(config=settings(steps=100_000), ledger=PrivacyLedger(sys.argv[1]))
print("ready", flush=True)
for _ in range(100_000):
    one_step(run)
    print(run.steps_taken, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.5])
def test_a_killed_run_is_never_undercounted(tmp_path, delay):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "ledger")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "ready"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        told = [int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    assert PrivacyLedger(tmp_path / "ledger").runs()[0].steps >= max(told, default=0)
