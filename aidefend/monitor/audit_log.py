"""An append-only log that shows when it was edited: hash chain, HMAC under a key that moves on, anchors elsewhere."""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aidefend._core.checks import check_callable, check_path, refuse
from aidefend._core.errors import AidefendError
from aidefend._core.storage import canonical_json, write_atomic
from aidefend.monitor.log_entries import LONGEST_LINE, LogState, first_state, read_line, read_state, write_line
from aidefend.monitor.log_verification import LogVerification, read_anchors, verify_log


class AuditLog:
    """A log of JSON lines that one key protects.

    Guarantee: an entry whose `append` returned is on disk, also after a crash. With the first key, `verify` finds every
        changed, removed, added or moved entry, and a shortened or replaced log, if the intruder had neither the first
        key nor a copy of an older state file. The writer keeps only the current key, which cannot be turned back: who
        breaks in later cannot rewrite earlier entries. Cutting off the newest entries together with an old copy of the
        state file shows against an anchor kept elsewhere only. Any number of threads and processes of one machine may
        append. Needs POSIX file locks; not on a network file system.
    Args:
        path: The log. Beside it live `<path>.state` (the current key, mode 0600) and `<path>.lock`.
        key: The first key, >= 16 random bytes. Keep it away from this machine for verification. None opens an existing
            log for writing by its state file.
        clock: Seconds since the epoch, written into each entry.
    Cost: append: two disk-synchronous writes. verify: one HMAC and one hash a line.
    Source: Bellare, Yee 1997 (forward-secure logs); Schneier, Kelsey 1999. One key a line; no encryption.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = AuditLog(f"{folder}/a.jsonl", key=b"0123456789abcdef")
        ...     (log.append({"what": "query"}), log.append({"what": "query"}), log.verify().ok)
        (0, 1, True)
    """

    def __init__(
        self, path: str | os.PathLike[str], key: bytes | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = check_path(path)
        self._state_path = self._path.with_name(self._path.name + ".state")
        self._lock_path = self._path.with_name(self._path.name + ".lock")
        self._clock = check_callable(clock, "clock", "Pass time.time")
        self._thread = threading.Lock()
        self._seen: LogState | None = None
        self._first = None if key is None else first_state(_checked_key(key))
        if self._first is None and not self._state_path.exists():
            raise refuse("the first key for a new log", "key", None, "Pass key=secrets.token_bytes(32) and keep it")
        if not self._path.parent.is_dir():
            raise refuse("path in an existing folder", "path", str(path), "Create the folder first")

    def append(self, event: Mapping[str, Any]) -> int:
        """Write one event and return its number, once it is on disk.

        Args:
            event: JSON values. Put digests of inputs into it, never the inputs.
        Raises: AidefendError: the log was shortened or its state replaced since the last entry; nothing is written.
        """
        if not isinstance(event, Mapping):
            raise refuse("event to be a mapping of JSON values", "event", event, 'Pass {"what": ...}')
        with self._thread, self._locked():
            state = self._recover(self._load_state())
            line = write_line(state, self._clock(), json.loads(canonical_json(event)))
            if len(line) > LONGEST_LINE:
                raise refuse(f"event of at most {LONGEST_LINE} bytes", "event", f"{len(line)} bytes", "Log a digest")
            self._write(line)
            self._seen = self._save_state(state.after(line))
            self._first = None
            return state.entries

    def anchor(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Write where the log stands to a second file (one line more each time), to keep elsewhere, and return it."""
        target = check_path(path)
        with self._thread, self._locked():
            state = self._recover(self._load_state())
        anchor = {"entries": state.entries, "head": state.head, "time": self._clock()}
        try:
            earlier = target.read_text("utf-8") if target.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise refuse("an anchor file, or a new one", "path", str(path), f"{error}", AidefendError) from error
        write_atomic(target, earlier + canonical_json(anchor) + "\n")
        return anchor

    def verify(
        self, anchor: str | os.PathLike[str] | Mapping[str, Any] | None = None, *, key: bytes | None = None
    ) -> LogVerification:
        """Read the whole log and say what holds.

        Args:
            anchor: The anchor file, or one anchor, to check completeness against.
            key: The first key, where this object has written already and so keeps only the current one. Without it,
                such a writer checks the log against its own memory of the last entry.
        """
        first = self._first if key is None else first_state(_checked_key(key))
        anchors = read_anchors(anchor)
        with self._thread, self._locked():
            return verify_log(self._path, self._state_path, first, self._seen, anchors)

    def close(self) -> None:
        """Forget every key in memory. The log can be opened again with or without the first key."""
        self._first = self._seen = None

    def __enter__(self) -> "AuditLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time; the lock goes with the process if it dies."""
        handle = os.open(self._lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _load_state(self) -> LogState:
        if self._state_path.exists():
            return read_state(self._state_path)
        if self._first is None or self._seen is not None or (self._path.exists() and self._path.stat().st_size):
            cure = "Verify the log; keep it aside and start a new one if the state file is lost"
            raise refuse("the state file beside the log", "path", str(self._path), cure, AidefendError)
        return self._save_state(self._first)

    def _save_state(self, state: LogState) -> LogState:
        write_atomic(self._state_path, state.to_json(), mode=0o600)
        _sync_folder(self._path.parent)
        return state

    def _recover(self, state: LogState) -> LogState:
        """After a crash: take over a complete line that the state does not know yet, cut off a torn one."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < state.size:
            found = f"{size} bytes where {state.size} were written"
            raise refuse(
                "a log that only grows", "path", found, "It was shortened: keep it for analysis", AidefendError
            )
        if size == state.size:
            return state
        with self._path.open("rb+") as file:
            file.seek(state.size)
            tail = file.read()
            for line in tail.splitlines(keepends=True):
                if not line.endswith(b"\n") or read_line(line, state) is None:
                    break
                state = state.after(line)
            if tail[len(tail) - (size - state.size) :].count(b"\n"):
                rule = "lines behind the last known entry that carry its key"
                raise refuse(rule, "path", str(self._path), "Somebody wrote into the log: verify it", AidefendError)
            file.truncate(state.size)
            os.fsync(file.fileno())
        return self._save_state(state)

    def _write(self, line: bytes) -> None:
        handle = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _checked_key(key: bytes) -> bytes:
    if not isinstance(key, bytes) or len(key) < 16:
        raise refuse("key of at least 16 bytes", "key", type(key).__name__, "Use secrets.token_bytes(32)")
    return key


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
