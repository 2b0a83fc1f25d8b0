"""From the queries of benign principals to rules whose rate of flagged principals is a promise."""

import dataclasses
import itertools
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from aidefend._core.checks import check_tensor, refuse
from aidefend.validate.conformal_law import Mode, least_calibration_rows, rank_of
from aidefend.validate.queries.crowds import Session, join_crowd
from aidefend.validate.queries.norms import Answered, Array, Norms
from aidefend.validate.queries.rules import Rules, answer, join, paced, read_rows
from aidefend.validate.queries.sketch import Floats, Sketcher
from aidefend.validate.queries.store import Capacity, MemoryStore
from aidefend.validate.queries.trail import STATISTICS, Shared, Trail

_LEAST_REFERENCE = 20
_PAIRS = 20_000
_MOST_CLASSES = 2**15 - 1  # every account keeps a count of each
_UNITS = dict.fromkeys(STATISTICS, 1.0) | {"near": 4.0, "haze": 2.0, "lateral": 4.0, "volume": 16.0, "shared": 2.0}


class Stream(NamedTuple):
    """The queries of one benign principal in the order in which it asked."""

    x: Tensor
    outputs: Tensor
    seconds: Array


class Marked(NamedTuple):
    """A stream as the monitor sees it, with what a crowd and a trail need of each row."""

    rows: Answered
    marks: list[list[bytes]]
    surprises: tuple[Array, Array]
    seconds: Array


def check_streams(streams: object) -> list[Stream]:
    """Streams as (x, outputs) or (x, outputs, seconds), at least two, of one shape and number of classes."""
    if not isinstance(streams, Iterable) or isinstance(streams, str | bytes | Tensor):
        raise refuse("a list of (x, outputs) for each principal", "streams", streams, "Pass one pair a principal")
    found = [_check_stream(number, stream) for number, stream in enumerate(streams)]
    shapes = {(tuple(stream.x.shape[1:]), stream.outputs.shape[1]) for stream in found}
    if len(shapes) > 1:
        raise refuse("streams of one shape and number of classes", "streams", sorted(shapes), "Calibrate each alone")
    return found


def _check_stream(number: int, stream: Any) -> Stream:
    name = f"streams[{number}]"
    if not isinstance(stream, Sequence) or isinstance(stream, str) or len(stream) not in (2, 3):
        raise refuse(f"{name} to be (x, outputs) or (x, outputs, seconds)", name, stream, "Pass tensors")
    x, outputs = stream[0], stream[1]
    check_tensor(x, f"{name}[0]")
    check_tensor(outputs, f"{name}[1]", ndim=2, floating=True, rows=len(x))
    if len(x) == 0 or outputs.shape[1] < 2 or x[0].numel() == 0:
        raise refuse(
            f"{name} with queries and logits (n, K >= 2)", name, stream, "Leave out principals without queries"
        )
    seconds = stream[2] if len(stream) == 3 else range(len(x))
    if outputs.shape[1] > _MOST_CLASSES:
        cure = "Pass the logits of groups of classes, to calibrate and to watch"
        raise refuse(f"at most {_MOST_CLASSES} classes", name, outputs, cure)
    times = np.asarray(seconds, dtype=np.float64)
    if times.shape != (len(x),) or not np.isfinite(times).all() or bool((np.diff(times) < 0).any()):
        raise refuse(f"{name}[2] to be rising seconds, one a query", name, times.shape, "Sort the queries by time")
    return Stream(x, outputs, times - times[0])


class Promise(NamedTuple):
    """What the rate of flagged benign principals keeps to."""

    alpha: float
    mode: Mode
    delta: float


def calibrate_rules(
    streams: list[Stream], promise: Promise, ttl: float, ring: int, seed: int, key: bytes | None
) -> Rules:
    """A third of the principals (at least 20) says what is usual, the others how far benign principals go beyond it."""
    needed = least_calibration_rows(*promise)
    if len(streams) < needed + _LEAST_REFERENCE:
        rule = (
            f"at least {needed + _LEAST_REFERENCE} benign principals for alpha={promise.alpha:g}"
            f" ({needed} for the threshold, and {_LEAST_REFERENCE} more)"
        )
        raise refuse(rule, "streams", f"{len(streams)} principals", "Collect more principal-days, or raise alpha")
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(streams))
    share = min(max(_LEAST_REFERENCE, len(streams) // 3), len(streams) - needed)
    reference, rest = ([streams[i] for i in part] for part in (order[:share], order[share:]))
    rank = rank_of(len(rest), *promise)
    rules = _learn(reference, promise.alpha, ttl, ring, key or secrets.token_bytes(32), (len(rest), rank))
    every, bounds = _replay(rules, reference), _bounds(reference)
    usual = np.stack([_usual(kind, bounds) for kind in (every, paced(every))])
    rules = dataclasses.replace(rules, usual=usual)
    highest = np.array([join(rules.units(every[i:j])).max(axis=0) for i, j in bounds])  # (n, 2)
    plain, held = np.quantile(highest, 1 - promise.alpha, axis=0)
    rules = dataclasses.replace(rules, weight=float(plain / held) if plain > 0 and held > 0 else 1.0)
    scores = np.sort(replay_scores(rules, rest))[::-1]
    return dataclasses.replace(rules, threshold=float(scores[rank - 1]))


def _usual(statistics: Array, bounds: list[tuple[int, int]]) -> Array:
    """(S, 2) median of the peaks of principals, and what counts as one unit beyond it."""
    peaks = np.array([statistics[i:j].max(axis=0) for i, j in bounds])
    median = np.median(peaks, axis=0)
    beyond = np.maximum(peaks - median, 0.0).mean(axis=0)
    return np.stack([median, beyond + np.array([_UNITS[name] for name in STATISTICS])], axis=1)


def replay_scores(rules: Rules, streams: list[Stream]) -> Array:
    """The highest joint score that each principal reaches while all of them ask side by side: (n,)."""
    scores = rules.scores(_replay(rules, streams))
    return np.array([scores[i:j].max() for i, j in _bounds(streams)])


def _bounds(streams: list[Stream]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(np.cumsum([0, *(len(stream.x) for stream in streams)]).tolist()))


def _replay(rules: Rules, streams: list[Stream]) -> Array:
    """All statistics after each query, stream after stream; the queries of all are asked in order of time."""
    marked = [mark(rules, rules.read(stream.x, stream.outputs), stream.seconds) for stream in streams]
    turns = np.concatenate([one.seconds for one in marked])
    owner = np.concatenate([np.full(len(one.seconds), i) for i, one in enumerate(marked)])
    place = np.concatenate([np.arange(len(one.seconds)) for one in marked])
    trails = [Trail.new(rules.norms.num_classes) for _ in streams]
    store, starts = MemoryStore(Capacity(shared=max(128, 9 * len(turns)))), [i for i, _ in _bounds(streams)]
    found = np.zeros((len(turns), len(STATISTICS)))
    for turn in np.lexsort((place, turns)):
        who, i = int(owner[turn]), int(place[turn])

        def work(session: Session, who: int = who, i: int = i, now: float = float(turns[turn])) -> Array:
            return take_note(rules, session, trails[who], marked[who], i, now + 1.0, b"%08d" % who)

        found[starts[who] + i] = store.run(work, float(turns[turn]) + 1.0, rules.ttl)
    return found


def mark(rules: Rules, rows: Answered, seconds: Array) -> Marked:
    """Fingerprints and surprises of the rows of a call, all at once."""
    return Marked(rows, rules.sketcher.marks(rows.sketches), rules.norms.surprises(rows), seconds)


def take_note(
    rules: Rules, session: Session, trail: Trail, marked: Marked, i: int, now: float, principal: bytes
) -> Array:
    """Put query i into the shared crowds and the principal's trail; returns the statistics that it leaves behind."""
    rows, norms = marked.rows, rules.norms
    trail.fade(now, rules.ttl)
    shared = Shared()
    if not trail.knows(rows.contents[i]):
        row = (marked.marks[i], rows.sketches[i], rows.contents[i], int(rows.labels[i]))
        shared = join_crowd(session, *row, now, float(norms.radii[0]), rules.ttl, principal)
    surprise = (float(marked.surprises[0][i]), float(marked.surprises[1][i]))
    trail.add(rows, i, norms, surprise, shared, rules.ring)
    return trail.statistics(norms)


def _learn(streams: list[Stream], alpha: float, ttl: float, ring: int, key: bytes, counts: tuple[int, int]) -> Rules:
    """Scales, radii and what is usual, from the reference principals."""
    flats, logits = zip(*(read_rows(stream.x, stream.outputs) for stream in streams), strict=True)
    centre, scale = _scales(np.concatenate(flats), streams[0].x.ndim)
    rough = Sketcher(key, centre, scale)
    unrelated = _unrelated(rough, flats)
    unit = float(np.median(unrelated)) or 1.0
    unrelated = unrelated / unit
    sketcher = Sketcher(key, centre, scale, unit)
    classes = logits[0].shape[1]
    rows = [answer(sketcher, flat, one) for flat, one in zip(flats, logits, strict=True)]
    everything = Answered(
        np.concatenate([one.sketches for one in rows]),
        [],
        np.concatenate([one.labels for one in rows]),
        np.concatenate([one.margins for one in rows]),
    )
    norms = Norms.of(everything, unrelated, np.concatenate([_nearest(one.sketches, ring) for one in rows]), classes)
    step = 4.0 * float(norms.radii[0]) / np.sqrt(sketcher.sketch(flats[0][:1]).shape[1])
    sketcher = Sketcher(key, centre, scale, unit, step)
    blank = np.ones((2, len(STATISTICS), 2))
    shape = tuple(streams[0].x.shape[1:])
    return Rules(sketcher, norms, blank, 1.0, 0.0, alpha, *counts, shape, ttl, ring)


def _scales(flat: Floats, ndim: int) -> tuple[Floats, Floats]:
    """Centre and scale: one scale for images and signals; one a column for tables, not below half the usual one."""
    centre, spread = flat.mean(axis=0), flat.std(axis=0)
    usual = float(np.median(spread[spread > 0])) if bool((spread > 0).any()) else 1.0
    scale = np.maximum(spread, 0.5 * usual) if ndim == 2 else np.full_like(spread, usual)
    return centre.astype(np.float32), scale.astype(np.float32)


def _unrelated(sketcher: Sketcher, flats: Sequence[Floats]) -> Array:
    """Distances of rows of different principals."""
    stream = np.random.Generator(np.random.Philox(key=0))
    sketches = [sketcher.sketch(flat) for flat in flats]
    first, second = stream.integers(0, len(flats), (2, _PAIRS))
    apart = first != second
    one, other = (_drawn(sketches, part[apart], stream) for part in (first, second))
    distances: Array = np.linalg.norm(one - other, axis=1).astype(np.float64)
    return distances


def _drawn(sketches: list[Floats], owners: Array, stream: np.random.Generator) -> Floats:
    return np.stack([sketches[i][stream.integers(len(sketches[i]))] for i in owners.astype(int)])


def _nearest(sketches: Floats, ring: int) -> Array:
    """Distance of each row to the nearest of the `ring` rows before it, leaving out rows that are the same."""
    found = []
    for i in range(1, len(sketches)):
        distances = np.linalg.norm(sketches[max(0, i - ring) : i] - sketches[i], axis=1)
        if distances.min() > 0:
            found.append(float(distances.min()))
    return np.array(found)
