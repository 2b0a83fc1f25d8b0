"""What query monitoring costs: processor time a query, bytes an account, and a flood of a million accounts.

python -m benchmarks.validate_queries_cost --mnist mnist.npz
Writes benchmarks/results/validate_queries_cost.json.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aidefend.validate import Capacity, MemoryStore, QueryMonitor, SQLiteStore
from aidefend.validate.queries.trail import Trail
from benchmarks.query_traffic import population
from benchmarks.record import write_result
from benchmarks.validate_queries import ALPHA, KEY, images, network

ACCOUNTS, SEED = 119, 0


def cost(folder: str, streams: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Microseconds of processor time for a call of one row, and bytes an account holds."""
    x, outputs = (torch.cat(parts)[:600] for parts in zip(*streams, strict=True))
    found: dict[str, Any] = {}
    for label, make in (("memory", MemoryStore), ("sqlite", lambda: SQLiteStore(f"{folder}/state"))):
        monitor = QueryMonitor.load(f"{folder}/rules", make())
        spent = []
        for i in range(len(x)):
            start = time.process_time_ns()
            monitor.watch(f"account-{i % 6}", x[i : i + 1], outputs[i : i + 1])
            spent.append((time.process_time_ns() - start) / 1000)
        found[f"{label}_microseconds"] = [statistics.median(spent), float(np.quantile(spent, 0.99))]
        start = time.process_time_ns()
        for i in range(0, len(x), 50):
            monitor.watch("batches", x[i : i + 50], outputs[i : i + 50])
        found[f"{label}_microseconds_in_50"] = (time.process_time_ns() - start) / 1000 / len(x)
        monitor.close()
    monitor = QueryMonitor.load(f"{folder}/rules", MemoryStore())
    monitor.watch("a", x, outputs)
    size = monitor._store.run(lambda session: session.get("principals", monitor._name("a")), 0.0, 1.0)
    found["bytes_full_account"], found["file_bytes"] = len(size or b""), Path(f"{folder}/state").stat().st_size
    return found


def flood() -> dict[str, Any]:
    """A million fresh accounts against a store of 10,000 with one suspect in it."""
    store, state = MemoryStore(Capacity()), Trail.new(10).to_bytes()
    store.run(lambda session: session.put("principals", b"suspect", state, 1), 0.0, 86_400.0)
    for i in range(1_000_000):
        name = i.to_bytes(16, "big")
        store.run(lambda session, name=name: session.put("principals", name, state), 1.0, 86_400.0)
    health = store.health()
    kept = store.run(lambda session: session.get("principals", b"suspect"), 1.0, 86_400.0) is not None
    assert kept
    assert health.principals == 10_000
    assert health.evidence_lost == 0
    return {"accounts": health.principals, "evicted": health.evicted, "suspect_kept": kept}


def main() -> None:
    """Print and write the figures; the answers of an untrained net will do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", required=True)
    _, _, x, y = images(parser.parse_args().mnist)
    model, folder = network().eval().requires_grad_(False), tempfile.mkdtemp()
    streams = [(queries, model(queries)) for _, queries in population(x, y, ACCOUNTS, SEED)]
    QueryMonitor.calibrate(streams, MemoryStore(), alpha=ALPHA, seed=SEED, key=KEY).save(f"{folder}/rules")
    result = {**cost(folder, streams), "flood": flood()}
    print(result)
    write_result("validate_queries_cost", result, seeds=[SEED])


if __name__ == "__main__":
    main()
