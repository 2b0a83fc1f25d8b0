"""Files that are never half-written: canonical JSON, write-then-rename, and SQLite that several processes may share."""

import json
import math
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_path, refuse
from aidefend._core.errors import AidefendError


def plain(value: Any) -> Any:
    """The value as JSON types: tensors and arrays as lists, non-finite numbers as the texts 'nan', 'inf', '-inf'."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise refuse("tensors with dense values", "value", value, "Convert them with .to_dense() first")
        value = value.detach().cpu().tolist()
    elif isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [plain(item) for item in items]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, ASCII, shortest float repr. What digests are taken over."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=)`: a name that stands twice would hide what a reader before us saw."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field occurs twice")
    return found


def pretty_json(value: Any) -> str:
    """The same value for readers: sorted keys, two spaces, one newline at the end."""
    return json.dumps(plain(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def atomic_path(path: str | os.PathLike[str], mode: int = 0o644) -> Iterator[Path]:
    """A temporary path beside the target; renamed onto it on success, removed on any exception.

    The data is flushed to disk before the rename, so a crash leaves the old file or the new one, never a mixture. A new
    file gets `mode`, an existing one keeps its own.
    """
    target = check_path(path)
    if not target.parent.is_dir():
        raise refuse("path to be in an existing folder", "path", str(target), "Create the folder first", AidefendError)
    if target.is_dir():
        raise refuse("path to be a file", "path", str(target), "Add the name of a file in this folder", AidefendError)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise refuse("path in a folder that can be written", "path", str(target), str(error), AidefendError) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], data: bytes | str, mode: int = 0o644) -> None:
    """Write the whole file or nothing."""
    with atomic_path(path, mode) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def open_database(path: str | os.PathLike[str], timeout: float = 30.0) -> sqlite3.Connection:
    """A SQLite connection that survives crashes (full sync) and waits for other processes instead of failing.

    Transactions are explicit: use `with transaction(connection):`.
    """
    target = check_path(path)  # "" and ":memory:" would be data bases of this connection alone
    connection = sqlite3.connect(target.resolve(), timeout=timeout, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA trusted_schema=OFF")
    return connection


class ProcessDatabase:
    """A SQLite file with a connection and a lock for each process: after a fork, the child opens its own.

    What the parent had open is kept and never touched: SQLite forbids to use or close it in the child, and a lock that
    a thread of the parent held would never be released there.
    """

    def __init__(self, path: str | os.PathLike[str], prepare: Callable[[sqlite3.Connection], object]) -> None:
        self._path, self._prepare = path, prepare
        self._of_process = {os.getpid(): self._opened()}

    @property
    def lock(self) -> threading.Lock:
        """Of this process."""
        return self._own()[0]

    @property
    def connection(self) -> sqlite3.Connection:
        """Of this process."""
        return self._own()[1]

    def _own(self) -> tuple[threading.Lock, sqlite3.Connection]:
        own = self._of_process.get(os.getpid())
        # of two threads that come first, one opens a connection that nobody uses
        return self._of_process.setdefault(os.getpid(), self._opened()) if own is None else own

    def _opened(self) -> tuple[threading.Lock, sqlite3.Connection]:
        connection = open_database(self._path)
        self._prepare(connection)
        return threading.Lock(), connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """BEGIN IMMEDIATE .. COMMIT, rolled back on any exception: read-then-write is atomic across processes."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
