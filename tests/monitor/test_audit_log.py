"""Every tampering is found, every acknowledged entry survives, and a later break-in cannot rewrite the past."""

import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidefend import AidefendError, ConfigurationError
from aidefend.monitor import AuditLog
from aidefend.monitor.log_entries import read_state, write_line
from tests.monitor.test_query_budget import kill_while_working

KEY = b"a key of at least sixteen bytes"
FORK = multiprocessing.get_context("fork")


def written(path, n=6, anchor=None):
    with AuditLog(path, KEY, clock=iter(range(1000, 2000)).__next__) as log:
        for i in range(n):
            assert log.append({"what": "query", "number": i, "ünïcode": "\u2028<&>", "nested": [None, 1.5, True]}) == i
            if anchor is not None and i == 3:
                log.anchor(anchor)
    return path


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def test_an_untouched_log_verifies(tmp_path):
    path = written(tmp_path / "a.jsonl", anchor=tmp_path / "anchors")
    result = AuditLog(path, KEY).verify()
    assert result.ok and result.integrity and result.entries == result.unanchored == 6
    assert result.completeness == "not shown"
    anchored = AuditLog(path, KEY).verify(tmp_path / "anchors")
    assert anchored.ok and anchored.completeness == "shown up to entry 4" and anchored.unanchored == 2
    entry = json.loads(lines_of(path)[2])
    assert entry["seq"] == 2 and entry["event"]["number"] == 2 and entry["time"] == 1002
    assert (path.parent / "a.jsonl.state").stat().st_mode & 0o077 == 0 == path.stat().st_mode & 0o077


def _edit(lines):
    return [*lines[:2], lines[2].replace(b'"number":2', b'"number":9'), *lines[3:]]


TAMPERINGS = {
    "edit": _edit,
    "edit the last": lambda lines: [*lines[:-1], lines[-1].replace(b'"number":5', b'"number":6')],
    "delete": lambda lines: lines[:2] + lines[3:],
    "delete the first": lambda lines: lines[1:],
    "insert": lambda lines: [*lines[:3], lines[2], *lines[3:]],
    "swap": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "truncate": lambda lines: lines[:4],
    "truncate within the last line": lambda lines: [*lines[:-1], lines[-1][:-9]],
    "empty": lambda lines: [],
    "forge at the end": lambda lines: [*lines, lines[-1].replace(b'"seq":5', b'"seq":6')],
    "repeated key": lambda lines: [lines[0].replace(b'"seq":0', b'"seq":0,"seq":0'), *lines[1:]],
    "other white space": lambda lines: [lines[0].replace(b'"seq":0', b'"seq": 0'), *lines[1:]],
    "seq as float": lambda lines: [lines[0].replace(b'"seq":0', b'"seq":0.0'), *lines[1:]],
    "nonsense": lambda lines: [b"[" * 100_000 + b"\n", *lines[1:]],
    "not text": lambda lines: [b"\xff\xfe\n", *lines[1:]],
}


@pytest.mark.parametrize("name", TAMPERINGS)
@pytest.mark.parametrize("by_memory", [False, True])
def test_every_tampering_is_found(tmp_path, name, by_memory):
    path = tmp_path / "a.jsonl"
    log = AuditLog(path, KEY)
    for i in range(6):
        log.append({"number": i})
    assert log.verify().ok
    path.write_bytes(b"".join(TAMPERINGS[name](lines_of(path))))
    result = log.verify() if by_memory else AuditLog(path, KEY).verify()
    assert not result.ok
    assert result.problems


def test_a_removed_or_replaced_log_is_found(tmp_path):
    path = written(tmp_path / "a.jsonl", anchor=tmp_path / "anchors")
    path.unlink()
    assert "missing" in AuditLog(path, KEY).verify().problems[0]
    path.with_name("a.jsonl.state").unlink()
    fresh = AuditLog(path, b"the key of an intruder..")
    fresh.append({"number": 0})
    assert not AuditLog(path, KEY).verify().ok
    assert not AuditLog(path, KEY).verify(tmp_path / "anchors").integrity


def test_a_replayed_state_shows_against_an_anchor_only(tmp_path):
    """The limit that the docstring states: an old copy of log and state verifies, until an anchor says otherwise."""
    path = written(tmp_path / "a.jsonl", 3)
    for suffix in ("", ".state"):
        shutil.copy(f"{path}{suffix}", f"{path}{suffix}.old")
    with AuditLog(path) as log:
        log.append({"number": 3})
        log.anchor(tmp_path / "anchors")
    for suffix in ("", ".state"):
        Path(f"{path}{suffix}.old").replace(f"{path}{suffix}")
    assert AuditLog(path, KEY).verify().ok
    result = AuditLog(path, KEY).verify(tmp_path / "anchors")
    assert not result.ok and result.integrity and result.completeness == "broken"


def test_a_later_intruder_cannot_rewrite_the_past(tmp_path):
    """Planted violation: with all that is on the machine, entries from before the break-in cannot be made anew."""
    path = written(tmp_path / "a.jsonl")
    stolen = read_state(path.with_name("a.jsonl.state"))
    lines = lines_of(path)
    entry = json.loads(lines[2])
    forged = write_line(stolen._replace(entries=2, head=entry["prev"]), entry["time"], {"number": 99})
    path.write_bytes(b"".join([*lines[:2], forged, *lines[3:]]))
    assert not AuditLog(path, KEY).verify().integrity
    path.write_bytes(b"".join(lines[:2]))
    shorter = stolen._replace(entries=2, size=path.stat().st_size, head=entry["prev"])
    path.with_name("a.jsonl.state").write_text(shorter.to_json())
    assert AuditLog(path, KEY).verify().completeness == "broken"


def test_the_writer_keeps_no_first_key(tmp_path):
    log = AuditLog(tmp_path / "a.jsonl", KEY)
    assert log.verify().entries == 0
    log.append({})
    assert log._first is None and log.verify().ok and log.verify(key=KEY).ok
    assert not log.verify(key=b"another key of sixteen").ok
    assert not AuditLog(tmp_path / "a.jsonl").verify().ok
    with AuditLog(tmp_path / "a.jsonl") as again:
        assert again.append({}) == 1
    assert AuditLog(tmp_path / "a.jsonl", KEY).verify().entries == 2


def test_a_torn_line_is_cut_off_and_a_complete_one_taken_over(tmp_path):
    path = written(tmp_path / "a.jsonl", 3)
    state = read_state(path.with_name("a.jsonl.state"))
    following = write_line(state, 5.0, {"number": "written, state not yet"})
    path.write_bytes(path.read_bytes() + following)
    assert AuditLog(path, KEY).verify().ok
    assert AuditLog(path).append({"number": 4}) == 4
    path.write_bytes(path.read_bytes() + b'{"event":{"half')
    assert AuditLog(path, KEY).verify().ok
    assert AuditLog(path).append({"number": 5}) == 5
    assert AuditLog(path, KEY).verify().entries == 6 == len(lines_of(path))


def test_the_writer_refuses_a_log_that_was_touched(tmp_path):
    path = written(tmp_path / "a.jsonl")
    content = path.read_bytes()
    for bad in (content[:-200], content + b'{"forged":1}\n'):
        path.write_bytes(bad)
        with pytest.raises(AidefendError, match=r"only grows|carry its key"):
            AuditLog(path).append({})
        assert path.read_bytes() == bad
    path.write_bytes(content)
    path.with_name("a.jsonl.state").write_text("{}")
    with pytest.raises(AidefendError, match="state file"):
        AuditLog(path).append({})
    path.with_name("a.jsonl.state").unlink()
    with pytest.raises(AidefendError, match="state file"):
        AuditLog(path, KEY).append({})
    with pytest.raises(ConfigurationError, match="first key"):
        AuditLog(path)


@given(st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.floats() | st.text(max_size=9), st.lists)))
def test_any_event_is_one_line(tmp_path_factory, event):
    path = tmp_path_factory.mktemp("log") / "a.jsonl"
    log = AuditLog(path, KEY)
    log.append(event)
    assert len(lines_of(path)) == 1 and log.verify(key=KEY).ok


@pytest.mark.parametrize("event", [None, "text", [1], {"x": "y" * (1 << 20)}])
def test_bad_events_are_refused_and_nothing_is_written(tmp_path, event):
    log = AuditLog(tmp_path / "a.jsonl", KEY)
    with pytest.raises(ConfigurationError, match="event"):
        log.append(event)
    assert not (tmp_path / "a.jsonl").exists()


def test_bad_keys_paths_and_anchors_are_refused(tmp_path):
    for bad in (b"short", "text of sixteen characters", 5):
        with pytest.raises(ConfigurationError, match="key"):
            AuditLog(tmp_path / "a", bad)
    with pytest.raises(ConfigurationError, match="folder"):
        AuditLog(tmp_path / "no" / "a", KEY)
    log = AuditLog(tmp_path / "a", KEY)
    (tmp_path / "bad").write_text("{}")
    for anchor in (tmp_path / "bad", tmp_path / "missing", {"entries": -1, "head": ""}, {"head": ""}):
        with pytest.raises(ConfigurationError, match="anchor"):
            log.verify(anchor)


def test_a_clock_that_goes_back_is_counted(tmp_path):
    log = AuditLog(tmp_path / "a", KEY, clock=iter([5.0, 4.0, 6.0]).__next__)
    for _ in range(3):
        log.append({})
    result = log.verify()
    assert result.ok and result.clock_regressions == 1


def test_a_link_in_place_of_the_log_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        AuditLog(tmp_path / "a", KEY).append({})
    assert (tmp_path / "victim").read_text() == ""


def _append(path, n):
    with AuditLog(path) as log:
        for i in range(n):
            log.append({"process": os.getpid(), "i": i})


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_and_threads_share_a_log(tmp_path):
    path = written(tmp_path / "a.jsonl", 1)
    workers = [FORK.Process(target=_append, args=(path, 8)) for _ in range(2)]
    log = AuditLog(path)
    threads = [threading.Thread(target=lambda: [log.append({"i": i}) for i in range(5)]) for _ in range(3)]
    for worker in [*workers, *threads]:
        worker.start()
    for worker in [*workers, *threads]:
        worker.join()
    result = AuditLog(path, KEY).verify()
    assert result.ok and result.entries == 1 + 16 + 15
    assert log.verify().ok


def _append_and_say(path, pipe):
    with AuditLog(path) as log:
        os.write(pipe, b"r")
        while True:
            log.append({"what": "query"})
            os.write(pipe, b".")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_at_any_moment_loses_no_acknowledged_entry(tmp_path):
    path = written(tmp_path / "a.jsonl", 1)
    acknowledged = kill_while_working(_append_and_say, path, 50, seed=1)
    result = AuditLog(path, KEY).verify()
    assert result.ok
    assert acknowledged > 0 and acknowledged + 1 <= result.entries <= acknowledged + 51
    assert AuditLog(path).append({}) == result.entries
    assert AuditLog(path, KEY).verify().ok
