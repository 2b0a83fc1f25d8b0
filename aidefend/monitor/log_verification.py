"""What a log shows: integrity and completeness, told apart."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aidefend._core.checks import refuse
from aidefend._core.errors import AidefendError
from aidefend.monitor.log_entries import LONGEST_LINE, START, LogState, read_line, read_state


@dataclasses.dataclass(frozen=True)
class LogVerification:
    """What was found in a log.

    Args:
        integrity: Every entry is as it was written, in its place.
        completeness: "shown up to entry N" by an anchor, "not shown" without one, or "broken".
        problems: What is wrong, in words; empty if nothing is.
        entries: Number of entries read.
        unanchored: Entries behind the last anchor. Who holds an old copy of the state file could have cut these off.
        clock_regressions: Entries with an earlier time than the one before; a clock that was set, or a clue.
    """

    integrity: bool
    completeness: str
    problems: tuple[str, ...]
    entries: int
    unanchored: int
    clock_regressions: int

    @property
    def ok(self) -> bool:
        """No problem was found. Read `completeness` and `unanchored` for what that covers."""
        return not self.problems


class _Walk(NamedTuple):
    """One pass: the hash after each entry, the two last states, and what was wrong."""

    heads: list[str]
    last: LogState
    before_last: LogState
    regressions: int
    broken: list[str]


def verify_log(
    path: Path, state_path: Path, first: LogState | None, seen: LogState | None, anchors: list[dict[str, Any]]
) -> LogVerification:
    """Check the log at `path` with its first state (keyed), or against what its writer has `seen` (by hashes)."""
    walk = _walk(path, first)
    missing = [] if path.exists() else ["the log file is missing"]
    broken = list(walk.broken)
    if first is not None:
        missing += _check_state_file(walk, state_path)
    elif seen is None:
        broken.append("nothing can be shown without the first key: pass key=")
    else:
        _check_memory(walk, seen, broken, missing)
    for anchor in anchors:
        _check_anchor(walk, anchor, broken, missing)
    reached = max((anchor["entries"] for anchor in anchors), default=None)
    shown = "not shown" if reached is None else f"shown up to entry {reached}"
    entries = walk.last.entries
    return LogVerification(
        integrity=not broken,
        completeness="broken" if missing else shown,
        problems=tuple(broken + missing),
        entries=entries,
        unanchored=entries - min(entries, reached or 0),
        clock_regressions=walk.regressions,
    )


def read_anchors(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The anchors of a file, or the one given; an unreadable source is an error, not an absent anchor."""
    if source is None:
        return []
    try:
        if isinstance(source, Mapping):
            found = [dict(source)]
        else:
            found = [json.loads(line) for line in Path(source).read_text("utf-8").splitlines()]
        if not found or any(type(anchor["entries"]) is not int or anchor["entries"] < 0 for anchor in found):
            raise ValueError("no anchor")
        return [{"entries": anchor["entries"], "head": str(anchor["head"])} for anchor in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise refuse("anchors that AuditLog.anchor wrote", "anchor", source, "Pass its file") from error


def _walk(path: Path, first: LogState | None) -> _Walk:
    state = first or LogState(0, 0, START, b"")
    before, heads, broken, regressions, latest = state, [START], [], 0, -math.inf
    lines = _lines(path) if path.exists() else iter(())
    for line in lines:
        entry = read_line(line, state, keyed=first is not None)
        if entry is None:
            if line.endswith(b"\n"):
                broken.append(f"entry {state.entries} was changed, moved, added or follows a removed one")
            break
        regressions += entry["time"] < latest
        latest = max(latest, entry["time"])
        before, state = state, state.after(line)
        heads.append(state.head)
    return _Walk(heads, state, before, regressions, broken)


def _lines(path: Path) -> Any:
    with path.open("rb") as file:
        yield from iter(lambda: file.readline(LONGEST_LINE + 1), b"")


def _check_state_file(walk: _Walk, state_path: Path) -> list[str]:
    """The writer's state must carry the key that follows the last entry (or, after a crash, the last but one)."""
    try:
        kept = read_state(state_path)
    except AidefendError:
        if walk.last.entries == 0 and not state_path.exists():
            return []
        return [f"the log ends at entry {walk.last.entries}, its state file is missing or unreadable"]
    if kept in (walk.last, walk.before_last):
        return []
    return [f"the log ends at entry {walk.last.entries}, its state file stands at entry {kept.entries}"]


def _check_memory(walk: _Walk, seen: LogState, broken: list[str], missing: list[str]) -> None:
    if seen.entries >= len(walk.heads):
        missing.append(f"the log ends at entry {walk.last.entries}, {seen.entries} were written")
    elif walk.heads[seen.entries] != seen.head:
        broken.append(f"the first {seen.entries} entries are not those that were written")


def _check_anchor(walk: _Walk, anchor: dict[str, Any], broken: list[str], missing: list[str]) -> None:
    if anchor["entries"] >= len(walk.heads):
        missing.append(f"the log ends at entry {walk.last.entries}, an anchor saw {anchor['entries']}")
    elif walk.heads[anchor["entries"]] != anchor["head"]:
        broken.append(f"the first {anchor['entries']} entries are not those that the anchor saw")
