"""Where query state lives: what a store must do, and one in this process."""

import collections
import dataclasses
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

from aidefend._core.checks import check_int, check_kind
from aidefend.validate.queries.crowds import Session

T = TypeVar("T")
TABLES = ("principals", "shared")
WEIGHTS = 3  # 0: nothing known, 1: evidence, 2: flagged by its own queries
FLAG = WEIGHTS - 1  # does not end by time: who waits is still suspended


@dataclasses.dataclass(frozen=True)
class StoreHealth:
    """What a store holds, and what it had to give up.

    Args:
        principals: Accounts with state.
        shared: Fingerprints and crowds of all accounts.
        evicted: Values that went before their time, for want of room.
        evidence_lost: How many of these held evidence or a flag: more than 0 means that a flood has blinded the monitor
            for somebody. Give the store more room, and look at who asked.
    """

    principals: int
    shared: int
    evicted: int = 0
    evidence_lost: int = 0


class QueryStore(Protocol):
    """State that calls share."""

    def run(self, work: Callable[[Session], T], now: float, ttl: float) -> T:
        """Run `work` so that what it reads does not change before what it writes is there. It may run several times.

        Values that were last written more than `ttl` seconds before `now` are gone, but for flags.
        """

    def delete(self, table: str, name: bytes) -> None:
        """Forget a value."""

    def health(self) -> StoreHealth:
        """What is held and what was lost."""

    def close(self) -> None:
        """Release files and connections."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The most values that a store keeps.

    Args:
        principals: Accounts, 16 or more; each takes at most about 11 kB at the default ring.
        shared: Fingerprints and crowds, 128 or more; nine for a query that is like no other, some 1.2 kB.
    Example:
        >>> Capacity(principals=1_000).shared
        450000
    """

    principals: int = 10_000
    shared: int = 450_000

    def __post_init__(self) -> None:
        check_int(self.principals, "principals", 16)
        check_int(self.shared, "shared", 128)

    def of(self, table: str) -> int:
        """The limit of a table."""
        return self.principals if table == "principals" else self.shared


class MemoryStore:
    """Query state in this process; threads may share it, processes do not.

    Guarantee: never more values than `capacity`, and none beyond `ttl` after its last use, but flags. Where room is
        short, values without evidence go first, the longest unused before others; what goes early is counted in
        `health()`. Several workers each see only their part of an attack: use `SQLiteStore` for them.
    Args:
        capacity: See `Capacity`.
    Example:
        >>> store = MemoryStore()
        >>> store.run(lambda session: session.put("shared", b"name", b"value"), now=0.0, ttl=60.0)
        >>> store.run(lambda session: session.get("shared", b"name"), now=1.0, ttl=60.0)
        b'value'
        >>> store.health().shared
        1
    """

    def __init__(self, capacity: Capacity | None = None) -> None:
        self._capacity = Capacity() if capacity is None else check_kind(capacity, Capacity, "capacity")
        self._lock = threading.Lock()
        self._levels: dict[str, list[collections.OrderedDict[bytes, tuple[bytes, float]]]] = {
            table: [collections.OrderedDict() for _ in range(WEIGHTS)] for table in TABLES
        }
        self._evicted = self._lost = 0

    def run(self, work: Callable[[Session], T], now: float, ttl: float) -> T:
        """See `QueryStore`."""
        with self._lock:
            self._end(now - ttl)
            session = Buffered(self._read)
            result = work(session)
            for (table, name), (value, weight) in session.written.items():
                self._write(table, name, value, weight, now, ttl)
            return result

    def delete(self, table: str, name: bytes) -> None:
        """Forget a value."""
        with self._lock:
            for level in self._levels[table]:
                level.pop(name, None)

    def health(self) -> StoreHealth:
        """What is held and what was lost."""
        with self._lock:
            principals, shared = (sum(map(len, self._levels[table])) for table in TABLES)
            return StoreHealth(principals, shared, self._evicted, self._lost)

    def close(self) -> None:
        """Nothing to release."""

    def _read(self, table: str, name: bytes) -> bytes | None:
        return next((level[name][0] for level in self._levels[table] if name in level), None)

    def _end(self, since: float) -> None:
        """Forget what was last used before; each level is in the order of use."""
        for levels in self._levels.values():
            for level in levels[:FLAG]:
                while level and next(iter(level.values()))[1] < since:
                    level.popitem(last=False)

    def _write(self, table: str, name: bytes, value: bytes, weight: int, now: float, ttl: float) -> None:
        levels = self._levels[table]
        for level in levels:
            level.pop(name, None)
        levels[weight][name] = (value, now)
        while sum(map(len, levels)) > self._capacity.of(table):
            place = next(i for i, level in enumerate(levels) if level)
            _, (_, used) = levels[place].popitem(last=False)
            if used > now - ttl:
                self._evicted += 1
                self._lost += place > 0


class Buffered:
    """A session that keeps what it wrote until the store takes it."""

    def __init__(self, read: Callable[[str, bytes], bytes | None]) -> None:
        self._read = read
        self.written: dict[tuple[str, bytes], tuple[bytes, int]] = {}

    def get(self, table: str, name: bytes) -> bytes | None:
        """The value, own writes first."""
        own = self.written.get((table, name))
        return self._read(table, name) if own is None else own[0]

    def put(self, table: str, name: bytes, value: bytes, weight: int = 0) -> None:
        """Keep a value."""
        self.written[table, name] = (value, weight)
