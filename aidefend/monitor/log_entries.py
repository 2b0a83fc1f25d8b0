"""The lines of the audit log: canonical JSON, a hash chain, and an HMAC under a key that moves on with every line."""

import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aidefend._core.checks import refuse
from aidefend._core.errors import AidefendError
from aidefend._core.storage import canonical_json

START = "0" * 64
LONGEST_LINE = 1 << 20


class LogState(NamedTuple):
    """Where a log stands: number of entries, bytes, hash of the last line, the key of the next one."""

    entries: int
    size: int
    head: str
    key: bytes

    def after(self, line: bytes) -> "LogState":
        """The state behind one more line."""
        key = hashlib.sha256(b"aidefend audit log next key" + self.key).digest()
        return LogState(self.entries + 1, self.size + len(line), hashlib.sha256(line).hexdigest(), key)

    def to_json(self) -> str:
        """The text of the state file."""
        fields = {"entries": self.entries, "size": self.size, "head": self.head, "key": self.key.hex()}
        return canonical_json(fields)


def first_state(key: bytes) -> LogState:
    """The state of an empty log under the first key."""
    return LogState(0, 0, START, hmac.digest(key, b"aidefend audit log 1", "sha256"))


def read_state(path: Path) -> LogState:
    """The state file, or an error that says to keep it."""
    try:
        fields = json.loads(path.read_bytes())
        return LogState(int(fields["entries"]), int(fields["size"]), str(fields["head"]), bytes.fromhex(fields["key"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        cure = "Verify the log with the first key; keep both files for analysis"
        raise refuse("a readable state file", "path", str(path), cure, AidefendError) from error


def write_line(state: LogState, now: float, event: Mapping[str, Any]) -> bytes:
    """The next line: its place, time, event, the hash of the line before, and its HMAC."""
    body = {"seq": state.entries, "time": now, "event": event, "prev": state.head}
    return canonical_json({**body, "mac": _mac(state, body)}).encode() + b"\n"


def read_line(line: bytes, state: LogState, *, keyed: bool = True) -> dict[str, Any] | None:
    """The entry, if the line is the one canonical text of an entry that belongs here; else None."""
    try:
        entry: dict[str, Any] = json.loads(line)
        if canonical_json(entry).encode() + b"\n" != line or set(entry) != {"seq", "time", "event", "prev", "mac"}:
            return None
        if type(entry["seq"]) is not int or (entry["seq"], entry["prev"]) != (state.entries, state.head):
            return None
        body = {name: entry[name] for name in ("seq", "time", "event", "prev")}
        genuine = not keyed or hmac.compare_digest(_mac(state, body), entry["mac"])
        return entry if genuine and isinstance(entry["time"], int | float) else None
    except (ValueError, TypeError, RecursionError):
        return None


def _mac(state: LogState, body: Mapping[str, Any]) -> str:
    return hmac.digest(state.key, canonical_json(body).encode(), "sha256").hex()
