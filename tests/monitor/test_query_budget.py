"""Nobody spends more than the budget: in one thread, in several processes, and through kill -9 at any moment."""

import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidefend import AidefendError, BudgetExceeded, ConfigurationError
from aidefend.monitor import Bucket, QueryBudget

FORK = multiprocessing.get_context("fork")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_reserve_commit_refund(tmp_path):
    with QueryBudget(tmp_path / "b", Bucket(10), total=Bucket(12), overrides={"vip": Bucket(100)}) as budget:
        first = budget.reserve("a", 4)
        assert budget.remaining("a") == 6
        budget.commit(first)
        second = budget.reserve("a", 6)
        with pytest.raises(BudgetExceeded, match=r"<= 0 left for principal 'a', got cost=0\.5"):
            budget.reserve("a", 0.5)
        budget.refund(second)
        assert (budget.remaining("a"), budget.spent("a"), budget.remaining("b")) == (6, 4, 8)
        with pytest.raises(BudgetExceeded, match="all principals together"):
            budget.reserve("vip", 9)
        assert budget.remaining("vip") == 8 and budget.spent("never seen") == 0
        assert budget.verify().ok
        for settled in (first, second):
            with pytest.raises(ConfigurationError, match="open reservation"):
                budget.refund(settled)
        assert budget.remaining("a") == 6


def test_a_refused_reservation_spends_nothing(tmp_path):
    with QueryBudget(tmp_path / "b", Bucket(10), total=Bucket(3)) as budget:
        with pytest.raises(BudgetExceeded):
            budget.reserve("a", 5)
        assert budget.remaining("a") == 3 and budget.verify().ok


def test_refill_is_bounded_and_survives_a_clock_that_goes_back(tmp_path):
    clock = Clock()
    with QueryBudget(tmp_path / "b", Bucket(10, per_second=2), clock=clock) as budget:
        budget.commit(budget.reserve("a", 10))
        with pytest.raises(BudgetExceeded, match=r"Wait 0\.5 s"):
            budget.reserve("a", 1)
        clock.now += 1.5
        assert budget.remaining("a") == 3
        clock.now -= 100
        assert budget.remaining("a") == 0
        budget.reserve("a", 0)
        clock.now += 1000
        assert budget.remaining("a") == 10
        with pytest.raises(BudgetExceeded, match="Ask for less"):
            budget.reserve("a", 11)


def test_many_small_steps_of_the_clock_refill_as_one_large_one(tmp_path):
    clock = Clock()
    with QueryBudget(tmp_path / "b", Bucket(10, per_second=1), clock=clock) as budget:
        budget.commit(budget.reserve("a", 10))
        for _ in range(100):
            clock.now += 0.01
            budget.commit(budget.reserve("a", 0))
        assert budget.remaining("a") == pytest.approx(1, abs=1e-3)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 4), st.booleans()), max_size=25))
def test_any_sequence_balances(tmp_path_factory, steps):
    with QueryBudget(tmp_path_factory.mktemp("b") / "b", Bucket(10), total=Bucket(15)) as budget:
        spent = {"a": 0.0, "b": 0.0}
        for principal, cost, commit in steps:
            try:
                reservation = budget.reserve(principal, cost)
            except BudgetExceeded:
                continue
            (budget.commit if commit else budget.refund)(reservation)
            spent[principal] += reservation.cost if commit else 0
        assert all(budget.spent(p) == pytest.approx(spent[p]) and spent[p] <= 10 for p in "ab")
        assert sum(spent.values()) <= 15 and budget.verify().ok


def test_a_changed_capacity_moves_the_level(tmp_path):
    with QueryBudget(tmp_path / "b", Bucket(10)) as budget:
        budget.commit(budget.reserve("a", 8))
    with QueryBudget(tmp_path / "b", Bucket(20)) as budget:
        assert budget.remaining("a") == 12
        budget.commit(budget.reserve("a", 12))
    with QueryBudget(tmp_path / "b", Bucket(5)) as budget:
        assert budget.remaining("a") == 0 and budget.verify().ok


def test_edited_books_are_found(tmp_path):
    with QueryBudget(tmp_path / "b", Bucket(10), total=Bucket(100)) as budget:
        budget.commit(budget.reserve("a", 4))
        budget.reserve("a", 1)
        for edit in (
            "UPDATE accounts SET level = 9000000 WHERE principal = 'a'",
            "UPDATE accounts SET committed = 0 WHERE principal = 'a'",
            "UPDATE accounts SET level = 99000000 WHERE principal = 'a'",
            "DELETE FROM reservations",
        ):
            connection = sqlite3.connect(tmp_path / "b")
            before = list(connection.iterdump())
            connection.execute(edit)
            connection.commit()
            assert not budget.verify().ok, edit
            connection.executescript("DROP TABLE accounts; DROP TABLE reservations;" + "\n".join(before[0:0]))
            frame = ("BEGIN TRANSACTION;", "COMMIT;")
            connection.executescript("\n".join(line for line in before if line not in frame))
            connection.close()
            assert budget.verify().ok


def test_bad_calls_are_refused(tmp_path):
    with QueryBudget(tmp_path / "b", Bucket(10)) as budget:
        for bad in (
            lambda: budget.reserve("a", -1),
            lambda: budget.reserve("a", float("nan")),
            lambda: budget.reserve("", 1),
            lambda: budget.reserve(None, 1),
            lambda: Bucket(0),
            lambda: Bucket(1, -1),
        ):
            with pytest.raises(ConfigurationError, match="Expected"):
                bad()
    (tmp_path / "text").write_text("not a database" * 100)
    with pytest.raises(AidefendError, match="SQLite"):
        QueryBudget(tmp_path / "text", Bucket(1))


def test_threads_share_one_object(tmp_path):
    granted = []
    with QueryBudget(tmp_path / "b", Bucket(20)) as budget:

        def ask() -> None:
            for _ in range(10):
                try:
                    budget.commit(budget.reserve("a", 1))
                    granted.append(1)
                except BudgetExceeded:
                    return

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(granted) == 20 and budget.verify().ok


def _spend(path, asks, granted):
    with QueryBudget(path, Bucket(30), total=Bucket(100)) as budget:
        for _ in range(asks):
            try:
                budget.commit(budget.reserve("a", 1))
                with granted.get_lock():
                    granted.value += 1
            except BudgetExceeded:
                pass


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_four_processes_grant_exactly_the_budget(tmp_path):
    granted = FORK.Value("i", 0)
    workers = [FORK.Process(target=_spend, args=(tmp_path / "b", 12, granted)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert granted.value == 30
    with QueryBudget(tmp_path / "b", Bucket(30), total=Bucket(100)) as budget:
        assert budget.spent("a") == 30 and budget.verify().ok


def _spend_and_say(path, pipe):
    with QueryBudget(path, Bucket(1e9)) as budget:
        os.write(pipe, b"r")
        while True:
            budget.commit(budget.reserve("a", 1))
            os.write(pipe, b".")


def kill_while_working(target, path, rounds, seed, longest=0.02):
    """Fork a writer that acknowledges each step on a pipe, kill -9 it at a random moment; the acknowledgements."""
    moments, acknowledged = random.Random(seed), 0
    for _ in range(rounds):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                target(path, writer)
            finally:
                os._exit(1)
        os.close(writer)
        assert os.read(reader, 1) == b"r"
        time.sleep(moments.random() * longest)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while chunk := os.read(reader, 4096):
            acknowledged += chunk.count(b".")
        os.close(reader)
    return acknowledged


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_at_any_moment_loses_no_acknowledged_unit(tmp_path):
    path = tmp_path / "b"
    with QueryBudget(tmp_path / "other", Bucket(1e9)) as budget:
        started = time.perf_counter()
        for _ in range(10):
            budget.commit(budget.reserve("a", 1))
        step = (
            time.perf_counter() - started
        ) / 10  # on a slow disk, a child must live for some steps to prove anything
    QueryBudget(path, Bucket(1e9)).close()
    acknowledged = kill_while_working(_spend_and_say, path, 50, seed=0, longest=max(0.02, 5 * step))
    with QueryBudget(path, Bucket(1e9)) as budget:
        spent = budget.spent("a")
        assert acknowledged > 0 and acknowledged <= spent <= acknowledged + 50
        assert 1e9 - budget.remaining("a") - spent <= 50
        assert budget.verify().ok


@pytest.mark.parametrize("nothing", [0, "", [], {}, False, 5])
def test_a_total_that_is_no_bucket_is_refused_and_never_read_as_no_limit(tmp_path, nothing):
    for place in ({"total": nothing}, {"overrides": {"a": nothing}}, {"per_principal": nothing}):
        with pytest.raises(ConfigurationError, match="Bucket"):
            QueryBudget(tmp_path / "b", **{"per_principal": Bucket(1), **place})


@pytest.mark.parametrize("path", ["", None, 3, b"bytes", "a\0b"])
def test_a_path_that_names_no_file_is_refused(path):
    """SQLite takes an empty name as a data base that nobody else sees: each process would have a budget of its own."""
    with pytest.raises(ConfigurationError, match="path"):
        QueryBudget(path, Bucket(1))


def test_memory_is_a_file_name_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for left in (1.0, 0.0):
        with QueryBudget(":memory:", Bucket(2)) as budget:
            budget.commit(budget.reserve("a", 1))
            assert budget.remaining("a") == left
