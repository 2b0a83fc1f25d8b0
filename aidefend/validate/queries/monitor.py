"""The query monitor: what an account asked, over time, and whether it still gets answers."""

import dataclasses
import functools
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor

from aidefend._core.checks import (
    check_callable,
    check_choice,
    check_int,
    check_kind,
    check_number,
    check_path,
    check_probability,
    refuse,
)
from aidefend._core.errors import AidefendError
from aidefend._core.storage import canonical_json, unique_fields, write_atomic
from aidefend.validate.conformal_law import Mode
from aidefend.validate.queries.calibrating import Promise, calibrate_rules, check_streams, mark, take_note
from aidefend.validate.queries.crowds import Session
from aidefend.validate.queries.norms import Array
from aidefend.validate.queries.rules import Rules
from aidefend.validate.queries.sqlite_store import SQLiteStore
from aidefend.validate.queries.store import QueryStore, StoreHealth
from aidefend.validate.queries.trail import Trail

_SCHEMA = "aidefend.queries/3"
_ACTIONS = ("suspend", "alert")
_PROMISES = ("marginal", "calibration-conditional")
_NO_NAME = 256
_AT_ONCE = 64  # rows of a call in one transaction: some tenths of a second, so that no large call keeps others waiting


@dataclasses.dataclass(frozen=True)
class QueryStanding:
    """What is known of an account. For the operator; of all this a client may only see that it gets no answers.

    Args:
        allowed: The account gets answers.
        remark: Set at the call at which the account was flagged, and again when its own queries come to speak against
            an account that others alone got flagged: which statistics say most.
        flagged: The account was flagged, now or before.
        score: Joint score after the latest query; above `threshold` an account is flagged.
        threshold: The calibrated one.
    """

    allowed: bool
    remark: str
    flagged: bool
    score: float
    threshold: float


class QueryMonitor:
    """Finds accounts whose queries, taken together, look like an attack; suspends accounts, never single answers.

    Watches for near duplicates (keyed fingerprints, by account and over all accounts), the direction of steps from one
    to the next, answers that change among them, distances, classes, margins and inputs unlike the benign ones, and the
    volume. Their joint score is compared with a threshold that was read off benign accounts alone.

    Guarantee: (1) A benign account is flagged within the time span of the calibrated streams with probability at most
        alpha, if its stream is exchangeable with them. It says nothing of a longer time: who asks on has more chances,
        and in the steady state more evidence (see `ttl` of `calibrate`). Drift, other traffic, and someone who asks
        near an account's own inputs void it. (2) No answer tells which query was flagged: at that call the client sees
        what it would have seen otherwise. An account is suspended a random time (`delay`) later. (3) Memory is bounded
        by the store; what it gives up early is counted in `health()`. (4) About attackers: none. One who needs only
        some tens of queries, asks few in a `ttl`, asks from many accounts, or moves every query far enough passes;
        docs/query-monitoring.md has the measured shares.
    An account that is flagged because others asked near the same inputs, and never sent three such queries itself,
    is remarked and not suspended: otherwise anyone could have a competitor suspended. Once it sends them, it is.
    Args:
        rules: From `calibrate` or `load`; use these two.
        store: Holds the state: `SQLiteStore` (one machine), `RedisStore` (several), `MemoryStore` (one process), or a
            path for the first.
        action: "suspend", or "alert" for remarks alone: an account that was flagged meanwhile, and not released, is
            suspended once the action is "suspend".
        delay: Shortest and longest time in seconds from flag to suspension, drawn from the operating system's
            randomness. Within it, the attack goes on.
        clock: Seconds since the epoch, the same in every process.
    Threads may share one monitor; each process makes its own, with a store that they share. Rows of a large call are
    taken note of 64 at a time, between which others have their turn.
    Cost: One matrix product of F x 32 for each row, eight hashes, some 20 look-ups and writes in the store;
        `python -m benchmarks.validate_queries` prints microseconds and bytes.
    Source: Chen, Carlini, Wagner 2019 (stateful detection); Li et al. 2022 (Blacklight: fingerprints); Juuti et al.
        2019 (PRADA: distances); QPA (arXiv 2405.20641: provenance and direction); Feng et al. 2023 (OARS: what breaks
        these).
        Ours: the joint score, its calibration over accounts, the answers that change, the delayed action.
    Example:
        >>> import tempfile, torch
        >>> stream = torch.Generator().manual_seed(0)
        >>> model = torch.nn.Linear(4, 3).requires_grad_(False)
        >>> days = [torch.rand(20, 4, generator=stream) for _ in range(60)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pairs = [(x, model(x)) for x in days]
        ...     monitor = QueryMonitor.calibrate(pairs, f"{folder}/queries.sqlite", alpha=0.05)
        ...     first = monitor.watch("team-a", days[0], model(days[0]))
        ...     near = days[0][0] + 0.001 * torch.randn(400, 4, generator=stream)
        ...     second = monitor.watch("team-a", near, model(near))
        ...     monitor.close()
        >>> first.flagged, second.flagged, second.allowed
        (False, True, True)
    """

    def __init__(
        self,
        rules: Rules,
        store: QueryStore | str | os.PathLike[str],
        *,
        action: str = "suspend",
        delay: tuple[float, float] = (10.0, 120.0),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rules = check_kind(rules, Rules, "rules", "Use QueryMonitor.calibrate or QueryMonitor.load")
        self._action = check_choice(action, _ACTIONS, "action")
        self._delay = _check_delay(delay)
        self._clock = check_callable(clock, "clock", "Pass time.time")
        self._store: QueryStore = SQLiteStore(store) if isinstance(store, str | os.PathLike) else _check_store(store)

    @classmethod
    def calibrate(
        cls,
        streams: Iterable[Any],
        store: QueryStore | str | os.PathLike[str],
        *,
        alpha: float = 0.01,
        promise: Mode = "marginal",
        delta: float = 0.05,
        ttl: float = 86_400.0,
        ring: int = 64,
        seed: int = 0,
        key: bytes | None = None,
        action: str = "suspend",
        delay: tuple[float, float] = (10.0, 120.0),
        clock: Callable[[], float] = time.time,
    ) -> "QueryMonitor":
        """Read what is usual, and the threshold, off benign accounts; attacks play no part.

        Args:
            streams: For each benign account (account-day) `(x, outputs)` or `(x, outputs, seconds)`: its queries
                (n, ...) in the order of asking, their logits (n, K), and when, rising (else one a second, all accounts
                side by side). At least 1 / alpha - 1 + 20 accounts; all of one shape. Put the hard ones in (video,
                retries, augmentation, few classes), in the proportion in which you serve them.
            store: As in the class.
            alpha: Share of benign accounts that may be flagged, in (0, 1).
            promise: "marginal": at most alpha on average over calibrations; this very one may flag more. Or
                "calibration-conditional": at most alpha for this very one with confidence 1 - delta; needs
                log(delta) / log(1 - alpha) + 20 accounts (319 at .01 and .05).
            delta: See `promise`, in (0, 1).
            ttl: Life of the evidence in seconds, 1 or more: in this time it fades to 1 / e. Calibrate on accounts
                observed for as long as the promise is to hold, about five `ttl` or more: one that asks steadily holds
                in the end up to 1.6 times the evidence that its first `ttl` leaves.
            ring: Queries of an account that are kept, 8 to 4,096.
            seed: Splits the accounts: a third says what is usual, the others set the threshold.
            key: >= 16 secret bytes for the fingerprints; None takes 32 from the operating system.
            action: As in the class.
            delay: As in the class.
            clock: As in the class.
        Raises: ConfigurationError: too few accounts for alpha (says how many), or malformed streams.
        """
        check_probability(alpha, "alpha")
        check_probability(delta, "delta")
        check_choice(promise, _PROMISES, "promise")
        check_number(ttl, "ttl", 1.0, 1e9)
        check_int(ring, "ring", 8, 4096)
        check_int(seed, "seed", 0)
        if key is not None and (not isinstance(key, bytes) or len(key) < 16):
            raise refuse("key of at least 16 secret bytes", "key", type(key).__name__, "Take secrets.token_bytes(32)")
        rules = calibrate_rules(check_streams(streams), Promise(alpha, promise, delta), ttl, ring, seed, key)
        return cls(rules, store, action=action, delay=delay, clock=clock)

    def watch(self, principal: str, x: Tensor, outputs: Tensor) -> QueryStanding:
        """Take note of answered queries; what a `Guard(queries=)` calls.

        Args:
            principal: A non-empty name of up to 256 characters that your front end has verified.
            x: (n, ...) as the model saw them, of the calibrated shape.
            outputs: (n, K) logits before any hardening.
        Returns: The standing of the account; `allowed` concerns the whole call.
        Raises: ConfigurationError: another shape or number of classes. AidefendError and errors of the store: it is
            damaged or away. A guard refuses the call in all these cases.
        """
        name, now = self._name(principal), float(self._clock())
        rows = self._rules.read(x, outputs)
        marked = mark(self._rules, rows, np.full(len(x), now))

        def work(session: Session, places: range) -> QueryStanding:
            trail = self._trail(session, name)
            remark, score = "", 0.0
            for i in places:
                statistics = take_note(self._rules, session, trail, marked, i, now, name)
                score = float(self._rules.scores(statistics))
                if np.isinf(trail.acts) and score > self._rules.threshold:
                    remark = self._flag(trail, statistics, now) or remark
            weight = 2 if np.isfinite(trail.acts) else int(trail.flagged > 0 or score > self._rules.threshold / 2)
            session.put("principals", name, trail.to_bytes(), weight)
            return self._standing(trail, remark, score, now)

        parts = [range(start, min(start + _AT_ONCE, len(x))) for start in range(0, max(1, len(x)), _AT_ONCE)]
        found = [self._store.run(functools.partial(work, places=part), now, self._rules.ttl) for part in parts]
        remark = "; ".join(standing.remark for standing in found if standing.remark)
        return dataclasses.replace(found[-1], remark=remark)

    def standing(self, principal: str) -> QueryStanding:
        """What is known of an account now, without a query."""
        name, now = self._name(principal), float(self._clock())

        def work(session: Session) -> QueryStanding:
            trail = self._trail(session, name)
            trail.fade(now, self._rules.ttl)
            return self._standing(trail, "", float(self._rules.scores(trail.statistics(self._rules.norms))), now)

        return self._store.run(work, now, self._rules.ttl)

    def release(self, principal: str) -> None:
        """Forget an account, its flag and its suspension: the operator has looked at it."""
        self._store.delete("principals", self._name(principal))

    def health(self) -> StoreHealth:
        """What the store holds, and whether it had to give up evidence for want of room."""
        return self._store.health()

    @property
    def threshold(self) -> float:
        """Of the joint score."""
        return self._rules.threshold

    @property
    def level(self) -> float:
        """The share of benign accounts that is flagged on average over calibrations: at most alpha."""
        return self._rules.rank / (self._rules.principals + 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration, not the state, as JSON that its owner alone may read: the secret key is in it."""
        write_atomic(path, canonical_json({"schema": _SCHEMA, "rules": self._rules.to_dict()}), mode=0o600)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        store: QueryStore | str | os.PathLike[str],
        *,
        action: str = "suspend",
        delay: tuple[float, float] = (10.0, 120.0),
        clock: Callable[[], float] = time.time,
    ) -> "QueryMonitor":
        """The calibration back from `save`; nothing in the file is executed. All workers load the same file.

        Args:
            path: A file written by `save`.
            store: As in the class; of this calibration alone.
            action: As in the class.
            delay: As in the class.
            clock: As in the class.
        Raises: ConfigurationError: a file of another kind or a damaged one.
        """
        place = check_path(path)
        try:
            data = json.loads(place.read_bytes(), object_pairs_hook=unique_fields)
            if data["schema"] != _SCHEMA:
                raise ValueError(f"schema {data['schema']!r}")
            rules = Rules.from_dict(data["rules"])
        except AidefendError:
            raise
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            cure = f"Could not read it ({error!r})"
            raise refuse("a file written by QueryMonitor.save", "path", str(path), cure) from error
        return cls(rules, store, action=action, delay=delay, clock=clock)

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def __enter__(self) -> "QueryMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _name(self, principal: str) -> bytes:
        if not isinstance(principal, str) or not 0 < len(principal) <= _NO_NAME:
            raise refuse("principal to be a name of 1 to 256 characters", "principal", principal, "Name who asks")
        return self._rules.sketcher.name(principal)

    def _trail(self, session: Session, name: bytes) -> Trail:
        data = session.get("principals", name)
        classes = self._rules.norms.num_classes
        try:
            return Trail.new(classes) if data is None else Trail.from_bytes(data, classes)
        except (ValueError, TypeError) as error:
            cure = "Give each calibration a store of its own, and mend or remove a damaged one"
            raise refuse("state of this calibration in the store", "store", str(error), cure, AidefendError) from error

    def _flag(self, trail: Trail, statistics: Array, now: float) -> str:
        """Note the flag and, if the account's own queries speak against it, when it takes effect; returns the remark.

        An account that others alone got flagged is asked again at each query: nobody is safe for having been framed.
        """
        framed = self._rules.scores(statistics, own=True) <= self._rules.threshold and trail.peaks[1] < 2
        if framed and trail.flagged:
            return ""
        trail.flagged = trail.flagged or now or 1e-9
        remark = f"flagged: {self._rules.leading(statistics)}"
        if framed:
            return f"{remark}; by others near its inputs, not suspended"
        low, high = self._delay
        trail.acts = now + low + (high - low) * secrets.randbits(53) / 2**53
        return remark

    def _standing(self, trail: Trail, remark: str, score: float, now: float) -> QueryStanding:
        allowed = self._action == "alert" or now < trail.acts
        return QueryStanding(allowed, remark, trail.flagged > 0, score, self._rules.threshold)


def _check_delay(delay: Any) -> tuple[float, float]:
    if not isinstance(delay, tuple | list) or len(delay) != 2:
        raise refuse("delay to be (shortest, longest) seconds", "delay", delay, "Pass (10.0, 120.0)")
    low, high = (check_number(end, "delay", 0.0, 1e9, open_low=True) for end in delay)
    if low >= high:
        raise refuse("delay to be a range that hides the moment of the flag", "delay", delay, "Pass (10.0, 120.0)")
    return low, high


def _check_store(store: Any) -> QueryStore:
    if not all(callable(getattr(store, name, None)) for name in ("run", "delete", "health", "close")):
        cure = "Pass a path, SQLiteStore, RedisStore or MemoryStore"
        raise refuse("store with .run(), .delete(), .health(), .close()", "store", store, cure)
    found: QueryStore = store
    return found
