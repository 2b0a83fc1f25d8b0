"""How much each principal, and all together, may ask of a model: token buckets that processes share."""

import dataclasses
import math
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from aidefend._core.checks import check_callable, check_kind, check_number, check_path, refuse
from aidefend._core.errors import AidefendError, BudgetExceeded
from aidefend._core.storage import ProcessDatabase, transaction

_UNIT = 1_000_000
_TOTAL = ""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (
    principal TEXT PRIMARY KEY, level INTEGER NOT NULL, updated REAL NOT NULL,
    capacity INTEGER NOT NULL, reserved INTEGER NOT NULL, committed INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS reservations (id TEXT PRIMARY KEY, principal TEXT NOT NULL, cost INTEGER NOT NULL);
"""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A token bucket: `capacity` cost units at most, refilled at `per_second`; 0 means a lifetime budget.

    Example:
        >>> Bucket(1000, per_second=2.0).capacity
        1000
    """

    capacity: float
    per_second: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.capacity, "capacity", 0.0, 1e12, open_low=True)
        check_number(self.per_second, "per_second", 0.0, 1e12)


@dataclasses.dataclass(frozen=True)
class Reservation:
    """Cost units set aside for one request; hand it to `commit` or `refund`, once."""

    id: str
    principal: str
    cost: float


@dataclasses.dataclass(frozen=True)
class BudgetVerification:
    """Whether the books balance, and what does not."""

    ok: bool
    problems: tuple[str, ...]
    accounts: int


class QueryBudget:
    """Per-principal and global budgets in one SQLite file.

    Guarantee: over any interval a principal spends at most its capacity plus what was refilled in the interval, and all
        principals together at most the total bucket, for any number of threads and processes on one machine, through
        crashes at any moment. What was reserved and not settled when a process died stays spent (it fails closed).
        Voided by: write access to the file; a clock set forward (refills early, up to the capacity); one person with
        many principals (give `total` a limit).
    Args:
        path: The SQLite file, made if missing. Not on a network file system.
        per_principal: The bucket of every principal.
        total: One bucket for all together, or None.
        overrides: Principal to its own bucket.
        clock: Seconds since the epoch; the same clock in every process.
    Cost: One disk-synchronous transaction for each of reserve, commit, refund.
    Example:
        >>> import tempfile
        >>> with (
        ...     tempfile.TemporaryDirectory() as folder,
        ...     QueryBudget(f"{folder}/b.sqlite", Bucket(10)) as budget,
        ... ):
        ...     budget.commit(budget.reserve("team-a", 4))
        ...     budget.remaining("team-a")
        6.0
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        per_principal: Bucket,
        *,
        total: Bucket | None = None,
        overrides: Mapping[str, Bucket] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if overrides is not None:
            check_kind(overrides, Mapping, "overrides", "Pass {principal: Bucket(...)} or None")
        self._buckets = {} if overrides is None else dict(overrides)
        if total is not None:
            self._buckets[_TOTAL] = total
        for bucket in (per_principal, *self._buckets.values()):
            check_kind(bucket, Bucket, "per_principal, total and overrides", "Pass Bucket(capacity, per_second)")
        self._default = per_principal
        self._clock = check_callable(clock, "clock", "Pass time.time")
        try:
            self._file = ProcessDatabase(check_path(path).resolve(), lambda database: database.executescript(_SCHEMA))
        except sqlite3.Error as error:
            raise refuse("a SQLite file that can be written", "path", str(path), f"{error}", AidefendError) from error

    @property
    def _lock(self) -> threading.Lock:
        return self._file.lock

    @property
    def _database(self) -> sqlite3.Connection:
        return self._file.connection

    def reserve(self, principal: str, cost: float) -> Reservation:
        """Set `cost` units aside, or raise `BudgetExceeded` and spend nothing.

        Args:
            principal: A non-empty name that your front end has verified.
            cost: Units >= 0, rounded up to a millionth.
        """
        units = math.ceil(check_number(cost, "cost", 0.0, 1e12) * _UNIT)
        _check_principal(principal)
        reservation = Reservation(secrets.token_hex(16), principal, units / _UNIT)
        with self._lock, transaction(self._database):
            for account in self._accounts_of(principal):
                self._take(account, units, principal)
            self._database.execute("INSERT INTO reservations VALUES (?, ?, ?)", (reservation.id, principal, units))
        return reservation

    def commit(self, reservation: Reservation) -> None:
        """The request was served: the reserved units are spent for good."""
        self._settle(reservation, refund=False)

    def refund(self, reservation: Reservation) -> None:
        """The request was not served: the reserved units return (never above the capacity)."""
        self._settle(reservation, refund=True)

    def remaining(self, principal: str) -> float:
        """Units the principal could reserve now, by its own bucket and by the total one."""
        _check_principal(principal)
        with self._lock, transaction(self._database):
            return min(self._refill(account)[0] for account in self._accounts_of(principal)) / _UNIT

    def spent(self, principal: str) -> float:
        """Units committed by the principal so far, refills included."""
        _check_principal(principal)
        with self._lock:
            row = self._database.execute("SELECT committed FROM accounts WHERE principal = ?", (principal,)).fetchone()
        return 0.0 if row is None else row[0] / _UNIT

    def verify(self) -> BudgetVerification:
        """Check that the file is intact and that the books balance: levels, open reservations and the total."""
        with self._lock, transaction(self._database):
            (state,) = self._database.execute("PRAGMA quick_check").fetchone()
            problems = [] if state == "ok" else [f"the file is damaged: {state}"]
            rows = self._database.execute(
                "SELECT principal, level, capacity, reserved, committed FROM accounts"
            ).fetchall()
            query = "SELECT principal, SUM(cost) FROM reservations GROUP BY principal"
            open_costs = dict(self._database.execute(query).fetchall())
        open_costs[_TOTAL] = sum(open_costs.values())
        for principal, level, capacity, reserved, committed in rows:
            lifetime = self._bucket(principal).per_second == 0
            name = repr(principal) if principal != _TOTAL else "the total"
            balance = _Balance(level, capacity, reserved, committed, open_costs.get(principal, 0), lifetime)
            problems += [f"{name}: {problem}" for problem in _imbalances(balance)]
        single = sum(row[4] for row in rows if row[0] != _TOTAL)
        if any(row[0] == _TOTAL and row[4] > single for row in rows):
            problems.append("the total: more spent than by the principals together")
        return BudgetVerification(not problems, tuple(problems), sum(row[0] != _TOTAL for row in rows))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> "QueryBudget":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accounts_of(self, principal: str) -> tuple[str, ...]:
        return (principal, _TOTAL) if _TOTAL in self._buckets else (principal,)

    def _bucket(self, account: str) -> Bucket:
        return self._buckets.get(account, self._default)

    def _refill(self, account: str) -> tuple[int, float, int]:
        """Level, time and capacity of the account now. A clock that went back refills nothing; a capacity that the
        operator changed since moves the level by the difference.
        """
        bucket, now = self._bucket(account), self._clock()
        capacity = int(bucket.capacity * _UNIT)
        query = "SELECT level, updated, capacity FROM accounts WHERE principal = ?"
        row = self._database.execute(query, (account,)).fetchone()
        if row is None:
            return capacity, now, capacity
        level, updated = max(0, row[0] + capacity - row[2]), row[1]
        gained = int(max(0.0, now - updated) * bucket.per_second * _UNIT)
        return min(capacity, level + gained), now if gained or bucket.per_second == 0 else updated, capacity

    def _take(self, account: str, units: int, principal: str) -> None:
        level, updated, capacity = self._refill(account)
        if units > level:
            whose = f"principal {principal!r}" if account != _TOTAL else "all principals together"
            wait = _waiting_time(units, level, self._bucket(account))
            raise BudgetExceeded(
                f"Expected cost <= {level / _UNIT:g} left for {whose}, got cost={units / _UNIT:g}. {wait}."
            )
        self._database.execute(
            "INSERT INTO accounts VALUES (?, ?, ?, ?, ?, 0) ON CONFLICT (principal) DO UPDATE SET "
            "level = excluded.level, updated = excluded.updated, "
            "capacity = excluded.capacity, reserved = reserved + excluded.reserved",
            (account, level - units, updated, capacity, units),
        )

    def _settle(self, reservation: Reservation, *, refund: bool) -> None:
        check_kind(reservation, Reservation, "reservation", "Pass what reserve returned")
        with self._lock, transaction(self._database):
            query = "DELETE FROM reservations WHERE id = ? RETURNING principal, cost"
            row = self._database.execute(query, (reservation.id,)).fetchone()
            if row is None:
                cure = "Settle each reservation once, with the budget that made it"
                raise refuse("an open reservation", "reservation", reservation.id, cure)
            principal, units = row
            for account in self._accounts_of(principal):
                level, updated, capacity = self._refill(account)
                back = min(capacity, level + units) if refund else level
                self._database.execute(
                    "UPDATE accounts SET level = ?, updated = ?, capacity = ?, reserved = reserved - ?, "
                    "committed = committed + ? WHERE principal = ?",
                    (back, updated, capacity, units, 0 if refund else units, account),
                )


class _Balance(NamedTuple):
    """The books of one account, in millionths of a unit."""

    level: int
    capacity: int
    reserved: int
    committed: int
    open_cost: int
    lifetime: bool


def _imbalances(account: _Balance) -> list[str]:
    found = []
    if not 0 <= account.level <= account.capacity:
        found.append("the level is outside 0 to the capacity")
    if account.reserved != account.open_cost:
        found.append("the open reservations do not add up")
    if account.committed < 0:
        found.append("less than nothing was spent")
    used = account.level + account.reserved + account.committed
    if account.lifetime and used != account.capacity and not (account.level == 0 and used > account.capacity):
        found.append("level, reserved and spent units do not add up to the capacity")
    return found


def _waiting_time(units: int, level: int, bucket: Bucket) -> str:
    if units > bucket.capacity * _UNIT or bucket.per_second == 0:
        return "Ask for less, or raise the budget"
    return f"Wait {(units - level) / _UNIT / bucket.per_second:.3g} s, or ask for less"


def _check_principal(principal: object) -> None:
    if not isinstance(principal, str) or not 0 < len(principal) <= 256:
        raise refuse("principal to be a name of 1 to 256 characters", "principal", principal, "Name who asks")
