"""All private runs on one data set, in one file: their epsilons compose, whatever crashes."""

import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from aidefend._core.checks import (
    check_choice,
    check_int,
    check_kind,
    check_number,
    check_path,
    check_probability,
    describe,
    expected,
    refuse,
)
from aidefend._core.errors import BudgetExceeded, PrivacyError
from aidefend._core.storage import open_database, transaction
from aidefend.privacy.accounting import NEIGHBORING, Neighboring, epsilon
from aidefend.privacy.config import PrivacyConfig

_BLOCKS = 50
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS budget "
    "(id INTEGER PRIMARY KEY CHECK (id = 1), target REAL NOT NULL, delta REAL NOT NULL, neighboring TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS run "
    "(id TEXT PRIMARY KEY, opened REAL NOT NULL, digest TEXT NOT NULL, noise REAL NOT NULL, rate REAL NOT NULL, "
    "planned INTEGER NOT NULL, reserved INTEGER NOT NULL, closed INTEGER NOT NULL DEFAULT 0)",
)


class LedgerRun(NamedTuple):
    """One run: its steps are those that were reserved, at least those that ran."""

    id: str
    opened: float
    noise_multiplier: float
    sample_rate: float
    planned: int
    steps: int
    closed: int


class PrivacyLedger:
    """The runs on one data set. Pass it as `make_private(..., ledger=ledger)`.

    Guarantee: the total never undercounts the steps of any run that used the ledger, after a crash or a kill at any
        point, with several processes at once: steps are reserved on disk, in blocks of a fiftieth of the run, before
        their batch is drawn. With `target_epsilon`, runs that would exceed it in the whole are refused when they open.
        Runs that bypass the ledger and a ledger file that is deleted or rolled back void it.
    Args:
        path: One file for each data set; made if it is missing.
        target_epsilon: > 0, a limit for all runs together; None: only counted.
        delta: In (0, 1), of the limit and of `epsilon`.
        neighboring: "add_remove" or "replace_one", of the limit and of `epsilon`.
    Raises: ConfigurationError: arguments out of range, or another limit than the one in the file. PrivacyError: the
        file is no ledger.
    Cost: About fifty writes for each run, some milliseconds each.

    Example:
        >>> import tempfile, pathlib
        >>> ledger = PrivacyLedger(pathlib.Path(tempfile.mkdtemp()) / "patients.ledger", target_epsilon=8.0)
        >>> ledger.epsilon(), ledger.runs()
        (0.0, ())
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        target_epsilon: float | None = None,
        delta: float = 1e-5,
        neighboring: Neighboring = "add_remove",
    ) -> None:
        if target_epsilon is not None:
            target_epsilon = check_number(target_epsilon, "target_epsilon", 0.0, open_low=True)
        self._delta = check_probability(delta, "delta")
        check_choice(neighboring, NEIGHBORING, "neighboring")
        self._neighboring: Neighboring = neighboring
        self.path = check_path(path)
        if not self.path.parent.is_dir():
            raise refuse("path in an existing folder", "path", str(path), "Create the folder first")
        self._target = self._opened(target_epsilon)

    def epsilon(self) -> float:
        """What all runs together have spent, reserved steps included."""
        with self._database() as connection:
            return self._total(_read_runs(connection))

    def runs(self) -> tuple[LedgerRun, ...]:
        """All runs, oldest first."""
        with self._database() as connection:
            return _read_runs(connection)

    def open_run(self, config: PrivacyConfig) -> str:
        """A new run's id; BudgetExceeded if all its planned steps do not fit under the limit."""
        check_kind(config, PrivacyConfig, "config", "Pass the PrivacyConfig of the run")
        noise = config.history(1)[0][0]
        row = (secrets.token_hex(16), time.time(), config.digest(), noise, config.rate, config.steps, 0)
        planned = LedgerRun(row[0], row[1], noise, config.rate, config.steps, 0, 0)
        with self._database() as connection, transaction(connection):
            self._check_fits((*_read_runs(connection), planned))
            fields = "(id, opened, digest, noise, rate, planned, reserved)"
            connection.execute(f"INSERT INTO run {fields} VALUES (?, ?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - constants
        return row[0]

    def reserved(self, run: str, digest: str) -> int:
        """The reserved steps of a run that is taken up again; refuses another configuration."""
        check_kind(run, str, "run", "Pass what open_run returned")
        with self._database() as connection:
            row = connection.execute("SELECT reserved, digest FROM run WHERE id = ?", (run,)).fetchone()
        if row is None or row[1] != digest:
            cure = "Use the ledger file and the configuration that the run began with"
            raise PrivacyError(expected("a run of this ledger and configuration", "run", run, cure))
        return int(row[0])

    def reserve(self, run: str, steps: int) -> int:
        """Put at least `steps` steps of a run on disk; returns how many are covered now."""
        check_kind(run, str, "run", "Pass what open_run returned")
        check_int(steps, "steps", 0)
        with self._database() as connection, transaction(connection):
            found = [entry for entry in _read_runs(connection) if entry.id == run]
            if not found:
                raise PrivacyError(expected("a run of this ledger", "run", run, "Open it with make_private"))
            if found[0].closed:
                connection.execute("UPDATE run SET closed = 0 WHERE id = ?", (run,))
                self._check_fits(_read_runs(connection))
            block = max(1, found[0].planned // _BLOCKS)
            covered = max(found[0].steps, steps, min(found[0].planned, steps + block - 1))
            connection.execute("UPDATE run SET reserved = ? WHERE id = ?", (covered, run))
        return covered

    def close_run(self, run: str, steps: int) -> None:
        """Give back what was reserved and not used; a later `reserve` opens the run again."""
        values = (check_int(steps, "steps", 0), check_kind(run, str, "run", "Pass what open_run returned"))
        with self._database() as connection, transaction(connection):
            found = connection.execute("UPDATE run SET reserved = ?, closed = 1 WHERE id = ?", values)
            if not found.rowcount:
                raise PrivacyError(expected("a run of this ledger", "run", run, "Pass what open_run returned"))

    def _check_fits(self, runs: tuple[LedgerRun, ...]) -> None:
        """Every open run counts with all its planned steps."""
        if self._target is None:
            return
        total = self._total(
            tuple(run if run.closed else run._replace(steps=max(run.steps, run.planned)) for run in runs)
        )
        if total > self._target:
            cure = "Take fewer steps or more noise; runs that ended early free their rest by private.release()"
            rule = f"all runs within epsilon {self._target:g} at delta {self._delta:g}"
            raise BudgetExceeded(expected(rule, "epsilon of all runs", round(total, 4), cure))

    def _total(self, runs: tuple[LedgerRun, ...]) -> float:
        history = [(run.noise_multiplier, run.sample_rate, run.steps) for run in runs]
        return epsilon(history, self._delta, self._neighboring)

    def _opened(self, target: float | None) -> float | None:
        """The limit in the file; written by the first who states one."""
        stated = (target, self._delta, self._neighboring)
        with self._database() as connection, transaction(connection):
            for statement in _SCHEMA:
                connection.execute(statement)
            row = connection.execute("SELECT target, delta, neighboring FROM budget").fetchone()
            if row is None and target is not None:
                connection.execute("INSERT INTO budget VALUES (1, ?, ?, ?)", stated)
            elif row is not None and target is not None and row != stated:
                cure = "A limit is set once for a data set: open the ledger without target_epsilon, or with this one"
                raise refuse(f"the limit of the file {row}", "target_epsilon", stated, cure)
        if row is None:
            return target
        self._delta, self._neighboring = float(row[1]), row[2]
        return float(row[0])

    @contextmanager
    def _database(self) -> Iterator[Any]:
        import sqlite3

        connection = None
        try:
            connection = open_database(self.path)
            yield connection
        except sqlite3.DatabaseError as error:
            cure = "Pass the file that PrivacyLedger made; restore it from a copy if it is damaged"
            raise PrivacyError(expected("a readable ledger", "path", f"{self.path}: {error}", cure)) from error
        finally:
            if connection is not None:
                connection.close()


def _read_runs(connection: Any) -> tuple[LedgerRun, ...]:
    rows = connection.execute(
        "SELECT id, opened, noise, rate, planned, reserved, closed FROM run ORDER BY opened, rowid"
    )
    runs = tuple(LedgerRun(*row) for row in rows.fetchall())
    if any(not math.isfinite(run.noise_multiplier) or run.steps < 0 for run in runs):
        raise PrivacyError(expected("runs with finite noise", "ledger", describe(runs), "Restore the file from a copy"))
    return runs
