"""The ledger: runs and releases compose, a chain that was touched is found, two processes cannot overspend."""

import math
import multiprocessing
import sqlite3

import pytest

from aidefend import BudgetExceeded, ConfigurationError, PrivacyError
from aidefend.privacy import PrivacyLedger, epsilon
from tests.privacy.private_worlds import settings


def used(path):
    """A ledger with a run of three steps, one that is open, and a charge."""
    ledger = PrivacyLedger(path, delta=1e-3)
    run = ledger.open_run(settings())
    ledger.reserve(run, 3)
    ledger.close_run(run, 3)
    ledger.charge("mean of ages", noise_multiplier=4.0)
    ledger.reserve(ledger.open_run(settings(noise_multiplier=2.0)), 2)
    return ledger


def test_gaussian_releases_and_runs_compose_in_one_accountant(tmp_path):
    ledger = used(tmp_path / "ledger")
    history = [(1.0, 8 / 24, 3), (4.0, 1.0, 1), (2.0, 8 / 24, 2)]
    assert ledger.epsilon() == epsilon(history, 1e-3)
    assert ledger.epsilon() < epsilon(history[:1], 1e-3) + epsilon(history[1:2], 1e-3) + epsilon(history[2:], 1e-3)
    assert [(charge.name, charge.noise_multiplier, charge.times) for charge in ledger.charges()] == [
        ("mean of ages", 4.0, 1)
    ]


def test_epsilons_are_added(tmp_path):
    ledger = used(tmp_path / "ledger")
    before = ledger.epsilon()
    ledger.charge("quantiles", epsilon=0.25, times=3)
    assert ledger.epsilon() == pytest.approx(before + 0.75)
    replaced = PrivacyLedger(tmp_path / "other", delta=1e-3, neighboring="replace_one")
    replaced.charge("quantiles", epsilon=0.25, times=3)
    assert replaced.epsilon() == pytest.approx(1.5)  # a row that is exchanged is one removed and one added


def test_banded_runs_count_their_turns(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger", delta=1e-3)
    config = settings(noise="banded", bands=3, steps=12)
    run = ledger.open_run(config)
    ledger.reserve(run, 7)
    assert ledger.epsilon() == config.spent(7).epsilon == epsilon([(1.0, 1.0, 3)], 1e-3)
    assert ledger.epsilon() > epsilon([(1.0, 8 / 24, 3)], 1e-3)


def test_a_release_that_does_not_fit_is_refused_and_not_written(tmp_path):
    one = epsilon([(4.0, 1.0, 1)], 1e-3)
    ledger = PrivacyLedger(tmp_path / "ledger", target_epsilon=1.2 * one, delta=1e-3)
    ledger.charge("first", noise_multiplier=4.0)
    for more in ({"noise_multiplier": 4.0}, {"epsilon": one}):
        with pytest.raises(BudgetExceeded, match="all runs within epsilon"):
            ledger.charge("second", **more)
    with pytest.raises(BudgetExceeded):
        ledger.open_run(settings())
    assert len(ledger.charges()) == 1 and ledger.runs() == () and ledger.epsilon() == one
    ledger.charge("small", epsilon=0.1 * one)


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"noise_multiplier": 1.0, "epsilon": 1.0},
        {"noise_multiplier": 0.0},
        {"epsilon": math.nan},
        {"epsilon": -1.0},
        {"epsilon": 1.0, "times": 0},
        {"epsilon": 1.0, "delta": 1.0},
        {"epsilon": 1.0, "for_neighboring": "both"},
    ],
)
def test_charges_that_say_nothing_are_refused(tmp_path, bad):
    ledger = PrivacyLedger(tmp_path / "ledger")
    with pytest.raises(ConfigurationError, match="Expected"):
        ledger.charge("release", **bad)
    with pytest.raises(ConfigurationError, match="name"):
        ledger.charge(3, epsilon=1.0)
    assert ledger.epsilon() == 0.0


def test_deltas_are_added_and_leave_less_for_the_rest(tmp_path):
    ledger = used(tmp_path / "ledger")
    history = [(1.0, 8 / 24, 3), (4.0, 1.0, 1), (2.0, 8 / 24, 2)]
    ledger.charge("a tuner", epsilon=0.5, delta=2e-4, times=2)
    assert ledger.epsilon() == pytest.approx(1.0 + epsilon(history, 6e-4))
    ledger.charge("another", epsilon=0.5, delta=6e-4)
    assert ledger.epsilon() == math.inf


def test_relations_that_say_nothing_are_refused(tmp_path):
    removed = PrivacyLedger(tmp_path / "removed")
    with pytest.raises(ConfigurationError, match="for_neighboring"):
        removed.charge("release", epsilon=1.0, for_neighboring="replace_one")
    exchanged = PrivacyLedger(tmp_path / "exchanged", neighboring="replace_one")
    with pytest.raises(ConfigurationError, match="for_neighboring"):
        exchanged.charge("release", noise_multiplier=1.0, for_neighboring="replace_one")
    exchanged.charge("release", epsilon=0.5, for_neighboring="replace_one")
    assert exchanged.epsilon() == 0.5
    exchanged.charge("release", epsilon=0.5, delta=1e-6)
    assert exchanged.epsilon() == pytest.approx(1.5)
    assert exchanged.charges()[1].cost("replace_one")[1] == pytest.approx(1e-6 * (1 + math.exp(0.5)))


TAMPERING = {
    "less noise": "UPDATE entry SET body = replace(body, '4.0', '9.0') WHERE number = 4",
    "fewer steps": "UPDATE entry SET body = replace(body, '\"steps\":3', '\"steps\":1') WHERE number = 3",
    "a removed entry": "DELETE FROM entry WHERE number = 4",
    "the last entry removed": "DELETE FROM entry WHERE number = (SELECT max(number) FROM entry)",
    "all removed": "DELETE FROM entry",
    "two entries exchanged": "UPDATE entry SET number = CASE number WHEN 2 THEN -3 WHEN 3 THEN -2 ELSE number END",
    "a link": "UPDATE entry SET chain = 'f' WHERE number = 2",
    "the head": "UPDATE head SET number = number - 1",
    "no head": "DELETE FROM head",
}


@pytest.mark.parametrize("how", TAMPERING)
def test_a_chain_that_was_touched_is_refused_at_every_call(tmp_path, how):
    ledger = used(tmp_path / "ledger")
    run = ledger.runs()[1].id
    with sqlite3.connect(tmp_path / "ledger") as connection:
        assert connection.execute(TAMPERING[how]).rowcount > 0
    connection.close()
    calls = (
        ledger.epsilon,
        ledger.runs,
        lambda: ledger.charge("more", epsilon=0.1),
        lambda: ledger.open_run(settings()),
        lambda: ledger.reserve(run, 3),
        lambda: PrivacyLedger(tmp_path / "ledger"),
    )
    for call in calls:
        with pytest.raises(PrivacyError, match="unbroken chain"):
            call()


def test_files_of_another_format_are_not_taken_for_empty(tmp_path):
    with sqlite3.connect(tmp_path / "old") as connection:
        connection.execute("CREATE TABLE run (id TEXT)")
    connection.close()
    with pytest.raises(PrivacyError, match="readable ledger"):
        PrivacyLedger(tmp_path / "old")


def test_the_limit_of_the_file_binds_whoever_opens_it(tmp_path):
    PrivacyLedger(tmp_path / "ledger", target_epsilon=1.0, delta=1e-6, neighboring="replace_one")
    again = PrivacyLedger(tmp_path / "ledger", delta=1e-2)
    with pytest.raises(BudgetExceeded, match="1e-06"):
        again.charge("too much", epsilon=0.51)  # 1.02 for an exchanged row
    again.charge("fits", epsilon=0.49)


def spend(path, start, outcome):
    start.wait()
    ledger, made = PrivacyLedger(path), 0
    for _ in range(20):
        try:
            ledger.charge("share", epsilon=0.1)
            made += 1
        except BudgetExceeded:
            pass
    outcome.put(made)


def test_two_processes_cannot_overspend_together(tmp_path):
    context = multiprocessing.get_context("fork")
    start, outcome = context.Event(), context.Queue()
    ledger = PrivacyLedger(tmp_path / "ledger", target_epsilon=1.55)
    workers = [context.Process(target=spend, args=(tmp_path / "ledger", start, outcome)) for _ in range(2)]
    for worker in workers:
        worker.start()
    start.set()
    made = [outcome.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sum(made) == len(ledger.charges()) == 15
    assert ledger.epsilon() == pytest.approx(1.5)


def test_a_ledger_of_users_takes_no_releases_of_rows(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger", delta=1e-2)
    ledger.charge("histogram by user", noise_multiplier=3.0, unit="user")
    with pytest.raises(PrivacyError, match="unit"):
        ledger.charge("histogram", noise_multiplier=3.0)
    with pytest.raises(PrivacyError, match="unit"):
        ledger.open_run(settings())
    with pytest.raises(ConfigurationError, match="unit"):
        ledger.charge("histogram", noise_multiplier=3.0, unit="household")
    assert len(ledger.charges()) == 1
