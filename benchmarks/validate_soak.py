"""A guard with every collaborator under steady traffic: flat memory, no lost event, no state that crosses principals.

python -m benchmarks.validate_soak [--minutes 30] [--threads 4] [--quick]
Threads ask one guard (policy, budget, audit log, metrics) for several principals at once: rows that are good, strange,
not finite or of the wrong shape, by principals that may ask, may not, or run out of budget. Every row carries a tag of
its call, which the model's answer shows again. Checked at the end: each answer carried the tag of its own question;
each call has one event in the log, under its principal, with its counts; the log verifies under the first key; the
budget of each principal is what it was served; the resident memory of the last quarter is that of the second. Prints
the calls a second and p50/p99 of a call. Writes benchmarks/results/validate_soak.json.
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
from torch import Tensor, nn

from aidefend.monitor import AccessPolicy, AuditLog, Bucket, Metrics, QueryBudget, Rule
from aidefend.validate import Energy, Guard, InputSpec, NearestNeighbours
from benchmarks.record import write_result

SEED = 1300
WIDTH, CLASSES = 16, 6
ALLOWED = tuple(f"team-{i}" for i in range(8))
POOR, STRANGER = "team-poor", "stranger"
POOR_BUDGET = 50.0
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


def client(guard: Guard, number: int, threads: int, until: float, tally: Tally) -> None:
    """Ask as several principals in turn until the time is over."""
    stream = torch.Generator().manual_seed(SEED + number)
    count = 0
    while time.monotonic() < until:
        names = (*ALLOWED, POOR, STRANGER)
        principal = names[int(torch.randint(len(names), (1,), generator=stream))]
        kind = KINDS[int(torch.randint(len(KINDS), (1,), generator=stream))]
        tag = ((count * threads + number) % 2**20) / 2**20  # exact in float32
        x = question(kind, tag, stream)
        start = time.perf_counter()
        decision = guard(x, principal=principal)
        tally.add(principal, decision, tag, time.perf_counter() - start)
        count += 1


def resident() -> float:
    """MiB of resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def run(minutes: float, threads: int, folder: Path) -> dict[str, Any]:
    """Traffic for some minutes, then the books."""
    key = secrets.token_bytes(32)
    rows = torch.rand(3000, WIDTH, generator=torch.Generator().manual_seed(SEED))
    buckets = {POOR: Bucket(POOR_BUDGET)}
    policy = AccessPolicy([Rule("team", ("predict",), ("model",))], dict.fromkeys((*ALLOWED, POOR), ("team",)))
    budget = QueryBudget(folder / "budget.sqlite", Bucket(1e9), overrides=buckets)
    log = AuditLog(folder / "log.jsonl", key)
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
    return books(folder, key, budget, log, tally, memory, seconds)


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
    spent = {name: budget.spent(name) for name in (*ALLOWED, POOR)}
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
