"""The entries of a privacy ledger: what each of them says, what they add up to, and the chain that holds them."""

import hashlib
import json
import math
from typing import Any, NamedTuple

from aidefend._core.checks import check_kind, expected
from aidefend._core.errors import PrivacyError
from aidefend._core.storage import canonical_json
from aidefend.privacy.accounting import Neighboring, epsilon

_BEGINNING = "aidefend.privacy-ledger/1"
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS entry (number INTEGER PRIMARY KEY, body TEXT NOT NULL, chain TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS head (id INTEGER PRIMARY KEY CHECK (id = 1), number INTEGER NOT NULL, chain TEXT)",
)


class LedgerRun(NamedTuple):
    """One run: its steps are those that were reserved, at least those that ran."""

    id: str
    opened: float
    digest: str
    noise_multiplier: float
    sample_rate: float
    planned: int
    bands: int = 1
    sampler: str = "poisson"
    unit: str = "example"
    owner: str = ""
    steps: int = 0
    closed: bool = False

    def history(self, steps: int) -> tuple[float, float, int, str]:
        """So many of its steps as `epsilon` takes them."""
        rate = min(1.0, self.sample_rate * self.bands)
        return self.noise_multiplier, rate, -(-steps // self.bands), self.sampler


class LedgerCharge(NamedTuple):
    """One release outside of training: of a Gaussian mechanism, or of one that is (epsilon, delta)-DP."""

    id: str
    charged: float
    name: str
    noise_multiplier: float | None
    epsilon: float | None
    delta: float
    times: int
    neighboring: str
    unit: str

    def cost(self, neighboring: str) -> tuple[float, float]:
        """(epsilon, delta) of all its times; a row that is exchanged is one removed and one added."""
        one, delta = self.epsilon or 0.0, self.delta
        if neighboring == self.neighboring:
            return self.times * one, self.times * delta
        return self.times * 2 * one, self.times * delta * (1 + math.exp(min(one, 700.0)))


class Account:
    """What the entries add up to, and the number and link of the last one."""

    def __init__(self) -> None:
        self.limit: tuple[float, float, str] | None = None
        self.runs: dict[str, LedgerRun] = {}
        self.charges: list[LedgerCharge] = []
        self.head = (0, _BEGINNING)

    def following(self, body: str) -> tuple[int, str]:
        """The number and link of this text as the next entry."""
        number, chain = self.head
        return number + 1, hashlib.sha256(f"{chain}\n{body}".encode()).hexdigest()

    def take(self, body: str) -> None:
        """One entry more."""
        self.head = self.following(body)
        entry: dict[str, Any] = json.loads(body)
        kind = entry.pop("kind")
        if kind == "limit":
            self.limit = (entry["target"], entry["delta"], entry["neighboring"])
        elif kind == "open":
            self.runs[entry["id"]] = LedgerRun(**entry)
        elif kind == "resume":
            self.runs[entry["id"]] = self.runs[entry["id"]]._replace(owner=entry["owner"])
        elif kind in ("reserve", "close"):
            run = self.runs[entry["id"]]
            self.runs[run.id] = run._replace(steps=entry["steps"], closed=kind == "close")
        else:
            self.charges.append(LedgerCharge(**entry))

    def run(self, name: Any) -> LedgerRun:
        """The run of this id."""
        found = self.runs.get(check_kind(name, str, "run", "Pass what open_run returned"))
        if found is None:
            raise PrivacyError(expected("a run of this ledger", "run", name, "Pass what open_run returned"))
        return found

    def check_unit(self, unit: str) -> None:
        """Epsilons of rows and of users do not add up to one of either."""
        others = {run.unit for run in self.runs.values()} | {charge.unit for charge in self.charges}
        others -= {unit}
        if others:
            cure = "Keep one ledger for each unit of privacy"
            raise PrivacyError(expected(f"entries of unit {others.pop()!r} in this ledger", "unit", unit, cure))

    def epsilon(self, delta: float, neighboring: Neighboring, planned: bool = False) -> float:
        """Of everything; with `planned`, open runs count with all their planned steps."""
        runs = self.runs.values()
        history = [
            run.history(max(run.steps, run.planned) if planned and not run.closed else run.steps) for run in runs
        ]
        history += [
            (c.noise_multiplier or 0.0, 1.0, c.times, "poisson") for c in self.charges if c.noise_multiplier is not None
        ]
        others = [charge.cost(neighboring) for charge in self.charges if charge.epsilon is not None]
        left = delta - sum(its_delta for _, its_delta in others)
        if left <= 0:
            return math.inf
        return epsilon(history, left, neighboring) + sum(its_epsilon for its_epsilon, _ in others)


def create_tables(connection: Any, path: Any) -> None:
    """The tables of a ledger, if they are missing; refuses a file of another format."""
    names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if names - {"entry", "head"}:
        cure = "Pass a new path: entries of another format would not be counted"
        raise PrivacyError(expected("a readable ledger", "path", f"{path} with tables {sorted(names)}", cure))
    for statement in _SCHEMA:
        connection.execute(statement)


def read_account(connection: Any) -> Account:
    """All entries, each checked against the chain."""
    account = Account()
    for stored, body, link in connection.execute("SELECT * FROM entry ORDER BY number"):
        if (stored, link) != account.following(body):
            raise _broken(account.head[0] + 1)
        account.take(body)
    last = connection.execute("SELECT number, chain FROM head").fetchone()
    if (last or (0, _BEGINNING)) != account.head:
        raise _broken(account.head[0] + 1)
    return account


def append(connection: Any, account: Account, entry: dict[str, Any]) -> None:
    """One entry behind those of an account that was read in the same transaction."""
    body = canonical_json(entry)
    account.take(body)
    number, chain = account.head
    connection.execute("INSERT INTO entry VALUES (?, ?, ?)", (number, body, chain))
    connection.execute("INSERT OR REPLACE INTO head VALUES (1, ?, ?)", account.head)


def _broken(number: int) -> PrivacyError:
    cure = "The file was changed from outside: restore it from a copy, or count everything that was ever run as spent"
    return PrivacyError(expected("an unbroken chain of entries", "ledger", f"a break at entry {number}", cure))
