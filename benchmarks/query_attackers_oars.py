"""OARS (Feng et al. 2023) against a monitor of accounts: widths of proposals are adapted with an oracle of flags.

Two oracles. Accounts: the attacker owns throw-away accounts, runs the attack against an image of its own, waits whether
the account is suspended, and bisects for the narrowest width that is not; the target is attacked at that width. Flag
bit, the best case of an attacker, which no client of a monitor has: before each query it learns whether the query would
flag the account, draws it again, wider each time, and never sends one that would; where eight draws fail, it stalls.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aidefend import Threat
from aidefend.validate import MemoryStore, QueryMonitor
from benchmarks.query_attackers import Enough, Make, Recorder, Stalled

Attack = Callable[[Any, Tensor, Tensor, torch.Generator], object]
TRIES, GROWTH, WIDEST, ACCOUNTS = 8, 1.4, 32.0, 6


class Undo(Exception):
    """Ends a transaction, so that nothing of it is kept."""


class Trying(MemoryStore):
    """A store that can be asked what would happen."""

    dry = False

    def run(self, work: Callable[..., Any], now: float, ttl: float) -> Any:
        """As in `MemoryStore`; nothing is kept while `dry`."""
        if not self.dry:
            return super().run(work, now, ttl)

        def undone(session: Any) -> None:
            raise Undo(work(session))

        try:
            super().run(undone, now, ttl)
        except Undo as end:
            return end.args[0]
        raise AssertionError("nothing was undone")


@dataclasses.dataclass
class Account:
    """An attacker's account in front of a model that a monitor watches: `draw` is what `drawn` looks for."""

    monitor: QueryMonitor
    store: Trying
    recorder: Recorder
    name: str
    oracle: bool
    stretch: float = 1.0
    flagged: bool = False

    def draw(self, make: Make) -> tuple[Tensor, Tensor]:
        """A proposal that does not flag the account, and its answer; without an oracle the first one."""
        for _ in range(TRIES if self.oracle else 1):
            x = make(self.stretch)
            if not (self.oracle and self._would_flag(x)):
                self.stretch = max(1.0, 0.95 * self.stretch) if self.oracle else self.stretch
                return x, self(x)
            self.stretch = min(WIDEST, GROWTH * self.stretch)
        raise Stalled

    def __call__(self, x: Tensor) -> Tensor:
        """The answer; the monitor takes note."""
        self.flagged = self.monitor.watch(self.name, x, self.recorder.model(x)).flagged
        outputs = self.recorder(x)  # ends the attack if this is a success: a flag at this very query comes too late
        if self.flagged:
            raise Stalled
        return outputs

    def _would_flag(self, x: Tensor) -> bool:
        self.store.dry = True
        try:
            return self.monitor.watch(self.name, x, self.recorder.model(x)).flagged
        finally:
            self.store.dry = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an attack ended: with a success, flagged, stalled (no query was left to send), or at its budget."""

    queries: int
    success: bool
    flagged: bool
    stalled: bool
    stretch: float
    accounts: int


@dataclasses.dataclass(frozen=True)
class OARS:
    """An adaptive attack on one row: `attack` draws its proposals through `drawn`."""

    attack: Attack
    threat: Threat
    most: int

    def by_flag_bit(
        self, start: Callable[[Trying], QueryMonitor], model: Any, x: Tensor, y: Tensor, seed: int
    ) -> Outcome:
        """With the flag bit as the oracle."""
        store = Trying()
        return self._run(start(store), store, model, x, y, seed, "eve", oracle=True, stretch=1.0, accounts=1)

    def by_accounts(
        self,
        start: Callable[[Trying], QueryMonitor],
        model: Any,
        x: Tensor,
        y: Tensor,
        own: tuple[Tensor, Tensor],
        seed: int,
    ) -> Outcome:
        """Widths from throw-away accounts that attack a row of the attacker's own, one after the other."""
        store = Trying()
        monitor = start(store)

        def at(stretch: float, name: str, row: tuple[Tensor, Tensor], accounts: int) -> Outcome:
            return self._run(monitor, store, model, *row, seed, name, oracle=False, stretch=stretch, accounts=accounts)

        narrow, wide, survived = 0.25, WIDEST, WIDEST
        for number in range(ACCOUNTS):
            middle = (narrow * wide) ** 0.5
            if at(middle, f"throw-away {number}", own, 1).flagged:
                narrow = middle
            else:
                wide = survived = middle
        return at(survived, "eve", (x, y), 1 + ACCOUNTS)

    def _run(
        self,
        monitor: QueryMonitor,
        store: Trying,
        model: Any,
        x: Tensor,
        y: Tensor,
        seed: int,
        name: str,
        *,
        oracle: bool,
        stretch: float,
        accounts: int,
    ) -> Outcome:
        account = Account(monitor, store, Recorder(model, x, int(y), self.threat, self.most), name, oracle, stretch)
        stalled = False
        try:
            with contextlib.suppress(Enough):
                self.attack(account, x, y, torch.Generator().manual_seed(seed))
        except Stalled:
            stalled = not account.flagged
        recorder = account.recorder
        return Outcome(recorder.count, recorder.success, account.flagged, stalled, account.stretch, accounts)
