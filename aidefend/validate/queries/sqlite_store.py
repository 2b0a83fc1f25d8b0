"""Query state in one SQLite file, which the workers of one machine share."""

import os
import sqlite3
import threading
from collections.abc import Callable
from typing import TypeVar

from aidefend._core.checks import check_kind, check_path, refuse
from aidefend._core.errors import AidefendError
from aidefend._core.storage import ProcessDatabase, transaction
from aidefend.validate.queries.crowds import Session
from aidefend.validate.queries.store import FLAG, TABLES, Buffered, Capacity, StoreHealth

T = TypeVar("T")
_AT_ONCE = 900  # values in one statement
_SCHEMA = """
CREATE TABLE IF NOT EXISTS principals (
    name BLOB PRIMARY KEY, value BLOB NOT NULL, weight INTEGER NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS principals_order ON principals (weight, used);
CREATE TABLE IF NOT EXISTS shared (
    name BLOB PRIMARY KEY, value BLOB NOT NULL, weight INTEGER NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS shared_order ON shared (weight, used);
CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, number INTEGER NOT NULL);
INSERT OR IGNORE INTO counts VALUES ('principals', 0), ('shared', 0), ('evicted', 0), ('lost', 0);
"""


class SQLiteStore:
    """Query state that the threads and processes of one machine share: what one worker saw, all know.

    Guarantee: calls take turns, so that no query is counted against a state that misses an earlier one. Never more
        values than `capacity`, and none beyond `ttl` after its last use, but flags. Where room is short, values without
        evidence go first, the longest unused before others; what goes early is counted in `health()`. A process that
        dies leaves whole transactions behind; after a power cut the last moments may be missing. The file holds keyed
        sketches, no input and no name; keep it away from strangers all the same. Not on a network file system. Each
        process opens its own connection, after a fork by itself.
    Args:
        path: The file, made if missing, readable by its owner alone.
        capacity: See `Capacity`.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = SQLiteStore(f"{folder}/queries.sqlite")
        ...     store.run(lambda session: session.put("shared", b"name", b"value"), now=0.0, ttl=60.0)
        ...     found = store.run(lambda session: session.get("shared", b"name"), now=1.0, ttl=60.0)
        ...     store.close()
        >>> found
        b'value'
    """

    def __init__(self, path: str | os.PathLike[str], capacity: Capacity | None = None) -> None:
        self._capacity = Capacity() if capacity is None else check_kind(capacity, Capacity, "capacity")
        place = check_path(path)
        try:
            os.close(os.open(place, os.O_RDWR | os.O_CREAT, 0o600))
            self._file = ProcessDatabase(place.resolve(), _prepare)
        except (OSError, sqlite3.Error) as error:
            raise refuse("a SQLite file that can be written", "path", str(path), f"{error}", AidefendError) from error

    @property
    def _lock(self) -> threading.Lock:
        return self._file.lock

    @property
    def _database(self) -> sqlite3.Connection:
        return self._file.connection

    def run(self, work: Callable[[Session], T], now: float, ttl: float) -> T:
        """See `QueryStore`."""
        with self._lock, transaction(self._database):
            self._end(now - ttl)
            session = Buffered(self._read)
            result = work(session)
            for table in TABLES:
                rows = [
                    (name, value, weight, now)
                    for (place, name), (value, weight) in session.written.items()
                    if place == table
                ]
                self._write(table, rows, now - ttl)
            return result

    def delete(self, table: str, name: bytes) -> None:
        """Forget a value."""
        with self._lock, transaction(self._database):
            gone = self._database.execute(f"DELETE FROM {_checked(table)} WHERE name = ?", (name,)).rowcount  # noqa: S608
            self._add(table, -gone)

    def health(self) -> StoreHealth:
        """What is held and what was lost, over all processes."""
        with self._lock:
            found = dict(self._database.execute("SELECT name, number FROM counts").fetchall())
        return StoreHealth(found["principals"], found["shared"], found["evicted"], found["lost"])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def _end(self, since: float) -> None:
        """Forget what was last used before."""
        for table in TABLES:
            ended = f"DELETE FROM {table} WHERE weight = ? AND used < ?"  # noqa: S608 - one of our two tables
            gone = sum(self._database.execute(ended, (weight, since)).rowcount for weight in range(FLAG))
            if gone:
                self._add(table, -gone)

    def _read(self, table: str, name: bytes) -> bytes | None:
        query = f"SELECT value FROM {_checked(table)} WHERE name = ?"  # noqa: S608 - one of our two tables
        row = self._database.execute(query, (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def _write(self, table: str, rows: list[tuple[bytes, bytes, int, float]], since: float) -> None:
        if not rows:
            return
        old = sum(self._known(table, [row[0] for row in rows[i : i + _AT_ONCE]]) for i in range(0, len(rows), _AT_ONCE))
        self._database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)", rows)  # noqa: S608
        held = self._add(table, len(rows) - old)
        if held > self._capacity.of(table):
            self._evict(table, held - self._capacity.of(table), since)

    def _known(self, table: str, names: list[bytes]) -> int:
        query = f"SELECT COUNT(*) FROM {_checked(table)} WHERE name IN ({','.join('?' * len(names))})"  # noqa: S608
        (count,) = self._database.execute(query, names).fetchone()
        return int(count)

    def _evict(self, table: str, count: int, since: float) -> None:
        """Lowest weight first, then the longest unused."""
        worst = f"SELECT name, weight, used FROM {table} ORDER BY weight, used LIMIT ?"  # noqa: S608
        gone = self._database.execute(worst, (count,)).fetchall()
        self._database.executemany(f"DELETE FROM {table} WHERE name = ?", [(name,) for name, _, _ in gone])  # noqa: S608
        self._add(table, -len(gone))
        early = [weight for _, weight, used in gone if used > since]
        self._add("evicted", len(early))
        self._add("lost", sum(weight > 0 for weight in early))

    def _add(self, name: str, number: int) -> int:
        query = "UPDATE counts SET number = number + ? WHERE name = ? RETURNING number"
        (total,) = self._database.execute(query, (number, name)).fetchone()
        return int(total)


def _prepare(database: sqlite3.Connection) -> None:
    database.execute("PRAGMA synchronous=NORMAL")  # evidence of the last moments may go with the power
    database.executescript(_SCHEMA)


def _checked(table: str) -> str:
    if table not in TABLES:
        raise refuse(f"one of the tables {TABLES}", "table", table, "Use one of these")
    return table
