"""A guard with every collaborator under steady traffic: flat memory, no lost event, no state that crosses principals.

python -m benchmarks.validate_soak [--minutes 30] [--threads 4] [--quick]
Threads ask one guard (policy, budget, audit log, metrics, query monitor in its SQLite store) for several principals at
once: rows that are good, strange, not finite or of the wrong shape, by principals that may ask, may not, run out of
budget, or search around one input as an attack does. Every row carries a tag of its call, which the model's answer
shows again. Checked at the end: each answer carried the tag of its own question; each call has one event in the log,
under its principal, with its counts; the log verifies under the first key; the budget of each principal is what it was
served; the attacker is suspended and, of the benign accounts, no more than the calibrated rate allows, though they
share the monitor with the attacker; the store stays within its capacity; the resident memory of the last quarter is
that of the second. Prints the calls a second and p50/p99 of a call. Writes benchmarks/results/validate_soak.json.
"""

import argparse
import collections
import json
import math
import secrets
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor, nn

from aidefend.monitor import AccessPolicy, AuditLog, Bucket, Metrics, QueryBudget, Rule
from aidefend.validate import Energy, Guard, InputSpec, NearestNeighbours, QueryMonitor
from benchmarks.record import write_result

SEED = 1300
WIDTH, CLASSES = 16, 6
ALLOWED = tuple(f"team-{i}" for i in range(8))
POOR, STRANGER, ATTACKER = "team-poor", "stranger", "team-attacker"
POOR_BUDGET = 50.0
QUERY_ALPHA, LIFE, SPAN, ACCOUNTS, DELAY = 0.01, 20.0, 100.0, 160, (2.0, 10.0)
SECONDS_A_CALL = 0.2  # of each thread: an account asks some 180 times in a span
_SCATTER = 0x9E3779B1  # odd: no tag comes twice; tags that crept up from 0 would be unlike the calibrated ones
KINDS = ("good", "good", "good", "good", "strange", "nan", "shape")


class Tagged(nn.Module):
    """Logits whose last entry repeats the last feature: an answer shows which question it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(SEED)
        self.body = nn.Sequential(nn.Linear(WIDTH - 1, 32), nn.ReLU())
        self.head = nn.Linear(32, CLASSES - 1)
        with torch.no_grad():
            for weights in self.parameters():
                weights.copy_(torch.randn(weights.shape, generator=stream) / math.sqrt(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 16) to (N, 6)."""
        return torch.cat([self.head(self.body(x[:, :-1])), x[:, -1:]], dim=1)


class Tally:
    """What the clients saw, by principal."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.rows: collections.Counter[str] = collections.Counter()
        self.answered: collections.Counter[str] = collections.Counter()
        self.charged: collections.Counter[str] = collections.Counter()
        self.suspended: collections.Counter[str] = collections.Counter()
        self.wrong = 0
        self.seconds: list[float] = []
        self._lock = threading.Lock()

    def add(self, principal: str, decision: Any, tag: float, seconds: float) -> None:
        """Count one call, and look whether every answer carries the tag of its question."""
        answered = decision.accepted
        crossed = int((decision.outputs[answered][:, -1] != tag).sum())
        refused_whole = any(
            word in reason for row in decision.reasons[:1] for reason in row for word in ("access", "budget")
        )
        ran = not refused_whole and bool(decision.p_values["combined"].isfinite().any())
        with self._lock:
            self.calls[principal] += 1
            self.rows[principal] += len(answered)
            self.answered[principal] += int(answered.sum())
            self.charged[principal] += len(answered) if ran else 0
            self.suspended[principal] += any("queries: suspended" in row for row in decision.reasons[:1])
            self.wrong += crossed
            if len(self.seconds) < 200_000:
                self.seconds.append(seconds)


def question(kind: str, tag: float, stream: torch.Generator) -> Tensor:
    """One to four rows of a kind; all rows of a good question carry the tag."""
    rows = torch.rand(1 + int(torch.randint(4, (1,), generator=stream)), WIDTH, generator=stream)
    rows[:, -1] = tag
    if kind == "nan":
        rows[0, 3] = math.nan
    if kind == "strange":
        rows[:, :-1] = 1 - rows[:, :-1].round()
    return rows[:, 1:] if kind == "shape" else rows


def attack(tag: float, stream: torch.Generator) -> Tensor:
    """Four steps of a search around one input: what a decision-based attack sends."""
    rows = (torch.full((4, WIDTH), 0.5) + 0.01 * torch.randn(4, WIDTH, generator=stream)).clamp(0, 1)
    rows[:, -1] = tag
    return rows


def benign_accounts() -> list[tuple[Tensor, Tensor, list[float]]]:
    """Traffic of accounts like the ones that will ask, slow and fast ones, over five lives of the evidence.

    Evidence fades and is never reset: in its first life an account that asks steadily has gathered but 63 % of what it
    will have from then on, so a shorter look would set the threshold too low for it.
    """
    stream, model, accounts = torch.Generator().manual_seed(SEED + 1), Tagged().eval(), []
    for _ in range(ACCOUNTS):
        parts: list[Tensor] = []
        for _ in range(100 + int(torch.randint(160, (1,), generator=stream))):
            tag = int(torch.randint(2**20, (1,), generator=stream)) / 2**20
            parts.append(question(KINDS[int(torch.randint(5, (1,), generator=stream))], tag, stream))
        x = torch.cat(parts)
        seconds = (SPAN * torch.rand(len(x), generator=stream)).sort().values.tolist()
        with torch.no_grad():
            accounts.append((x, model(x), seconds))
    return accounts


def client(guard: Guard, number: int, threads: int, until: float, tally: Tally) -> None:
    """Ask as several principals in turn until the time is over."""
    stream = torch.Generator().manual_seed(SEED + number)
    count = 0
    while time.monotonic() < until:
        names = (*ALLOWED, POOR, STRANGER, ATTACKER)
        principal = names[int(torch.randint(len(names), (1,), generator=stream))]
        kind = KINDS[int(torch.randint(len(KINDS), (1,), generator=stream))]
        tag = ((count * threads + number) * _SCATTER % 2**20) / 2**20  # exact in float32, and all over (0, 1)
        x = attack(tag, stream) if principal == ATTACKER else question(kind, tag, stream)
        start = time.perf_counter()
        decision = guard(x, principal=principal)
        tally.add(principal, decision, tag, time.perf_counter() - start)
        count += 1
        time.sleep(max(0.0, start + SECONDS_A_CALL - time.perf_counter()))  # as fast as the calibrated accounts asked


def resident() -> float:
    """MiB of resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def run(minutes: float, threads: int, folder: Path) -> dict[str, Any]:
    """Traffic for some minutes, then the books."""
    key = secrets.token_bytes(32)
    rows = torch.rand(3000, WIDTH, generator=torch.Generator().manual_seed(SEED))
    buckets = {POOR: Bucket(POOR_BUDGET)}
    policy = AccessPolicy(
        [Rule("team", ("predict",), ("model",))], dict.fromkeys((*ALLOWED, POOR, ATTACKER), ("team",))
    )
    budget = QueryBudget(folder / "budget.sqlite", Bucket(1e9), overrides=buckets)
    log = AuditLog(folder / "log.jsonl", key)
    monitor = QueryMonitor.calibrate(
        benign_accounts(), folder / "queries.sqlite", alpha=QUERY_ALPHA, ttl=LIFE, seed=SEED, delay=DELAY
    )
    guard = Guard.calibrate(
        Tagged().eval(),
        rows,
        InputSpec((WIDTH,), torch.float32, 0.0, 1.0),
        [Energy(), NearestNeighbours(k=10)],
        layer="head",
        policy=policy,
        budget=budget,
        log=log,
        metrics=Metrics(),
        queries=monitor,
    )
    tally, memory, start = Tally(), [], time.monotonic()
    until = start + 60 * minutes
    workers = [threading.Thread(target=client, args=(guard, i, threads, until, tally)) for i in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        time.sleep(min(5.0, max(0.2, 60 * minutes / 60)))
        memory.append(resident())
    seconds = time.monotonic() - start
    found = books(folder, key, budget, log, tally, memory, seconds) | standings(monitor, tally, seconds)
    monitor.close()
    return found


def standings(monitor: QueryMonitor, tally: Tally, seconds: float) -> dict[str, Any]:
    """What the query monitor holds against whom."""
    lives = len(ALLOWED) * math.ceil(seconds / SPAN)
    flagged = [name for name in ALLOWED if monitor.standing(name).flagged]
    health = monitor.health()
    found = {
        "query_alpha": QUERY_ALPHA,
        "benign_account_spans": lives,
        "benign_flagged": len(flagged),
        "benign_flagged_at_most": int(binom.ppf(0.999, lives, QUERY_ALPHA)),
        "attacker_calls_answered": tally.calls[ATTACKER] - tally.suspended[ATTACKER],
        "attacker_calls_suspended": tally.suspended[ATTACKER],
        "query_store": {name: getattr(health, name) for name in ("principals", "shared", "evicted", "evidence_lost")},
    }
    print(found, flush=True)
    assert tally.suspended[ATTACKER], "the attacker was never suspended"
    assert not any(tally.suspended[name] for name in {*ALLOWED, POOR} - {*flagged, POOR}), "suspended without a flag"
    assert len(flagged) <= found["benign_flagged_at_most"], "benign accounts pay for what others asked"
    return found


def books(
    folder: Path, key: bytes, budget: QueryBudget, log: AuditLog, tally: Tally, memory: list[float], seconds: float
) -> dict[str, Any]:
    """What must hold, as numbers; asserts that it does."""
    events = [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]
    logged: dict[str, collections.Counter[str]] = {
        name: collections.Counter() for name in ("calls", "rows", "accepted")
    }
    for event in events:
        logged["calls"][event["principal"]] += 1
        logged["rows"][event["principal"]] += event["rows"]
        logged["accepted"][event["principal"]] += event["accepted"]
    spent = {name: budget.spent(name) for name in (*ALLOWED, POOR, ATTACKER)}
    quarters = [memory[len(memory) * i // 4 : len(memory) * (i + 1) // 4] for i in range(4)]
    second, last = statistics.median(quarters[1]), statistics.median(quarters[3])
    total = sum(tally.calls.values())
    cuts = statistics.quantiles(tally.seconds, n=100)
    found = {
        "minutes": seconds / 60,
        "calls": total,
        "rows": sum(tally.rows.values()),
        "answered": sum(tally.answered.values()),
        "calls_a_second": total / seconds,
        "p50_milliseconds": 1e3 * cuts[49],
        "p99_milliseconds": 1e3 * cuts[98],
        "crossed_answers": tally.wrong,
        "lost_events": total - len(events),
        "log_verifies": log.verify(key=key).ok,
        "budget_balances": budget.verify().ok,
        "memory_second_quarter_mib": second,
        "memory_last_quarter_mib": last,
    }
    assert tally.wrong == 0, "an answer carried the tag of another question"
    assert logged["calls"] == tally.calls
    assert logged["rows"] == tally.rows
    assert +logged["accepted"] == +tally.answered
    assert not tally.answered[STRANGER]
    assert found["log_verifies"]
    assert found["budget_balances"]
    assert all(spent[name] == tally.charged[name] for name in spent), "a budget is not what was served"
    assert spent[POOR] <= POOR_BUDGET
    assert last - second < max(8.0, 0.03 * second), "resident memory grows"
    return found


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="half a minute")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(0.5 if arguments.quick else arguments.minutes, arguments.threads, Path(folder))
    for name, value in found.items():
        print(f"{name:28} {value}")
    write_result("validate_soak", {"threads": arguments.threads, **found}, seeds=[SEED], packages=["prometheus-client"])


if __name__ == "__main__":
    main()
