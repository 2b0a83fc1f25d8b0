"""Too quick or too slow for query monitoring: attacks that succeed before it can know, and attacks that hide in time.

python -m benchmarks.validate_queries_time --data fashion_mnist.npz [--attacks 100] [--hidden 8] [--accounts 450]
The monitor, networks and attacks of `benchmarks.validate_queries`, on images that it does not use. "quick": so many
attacks of each kind, by how many queries they need (at most 300 are followed), with the survivors' numbers of queries
and the earliest flag. "hidden": attacks that succeed unwatched within 1,000 queries, from one account that asks so many
queries in a life of the evidence (`ttl`), or so many natural images after each query. "padded": the same from accounts
that ask so many natural images first, since near queries are held against the volume.
Writes benchmarks/results/validate_queries_time_DATA.json after each row; a run with the same settings goes on where the
last one ended.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aidefend.validate import MemoryStore, QueryMonitor
from benchmarks.query_attackers import record
from benchmarks.query_attackers_adaptive import interleaved
from benchmarks.query_traffic import population
from benchmarks.record import earlier, write_result
from benchmarks.validate_queries import ALPHA, EPS, KEY, MOST, Sequence, images, plain_attacks, show, summary, trained

SEED, FIRST_IMAGE, FIRST_ATTACK = 0, 40, 20_000
FOLLOWED = 300
LENGTHS = (10, 30, 60)
PACES = (0.9, 10, 30, 100)
BETWEEN, MOST_BETWEEN = (9, 49), 2000
FIRST = (0, 100, 300, 600, 900)
Attacks = dict[str, tuple[Any, Callable[..., object]]]


class World:
    """A network, the monitor's calibration, and images that `benchmarks.validate_queries` does not attack."""

    def __init__(self, path: str, accounts: int) -> None:
        x, y, tx, ty = images(path)
        self.model: nn.Module = trained(x, y, SEED)
        half = len(tx) // 2
        streams = [(queries, self.model(queries)) for _, queries in population(tx[:half], ty[:half], accounts, SEED)]
        self._rules = QueryMonitor.calibrate(streams, MemoryStore(), alpha=ALPHA, seed=SEED, key=KEY)._rules
        known = (self.model(tx[half:]).argmax(dim=1) == ty[half:]).nonzero().flatten()[FIRST_IMAGE:] + half
        self.x, self.y, self.natural = tx[known], ty[known], tx[half:]

    def flag_at(self, queries: Tensor, seconds: float) -> int:
        """At which query (from 1; 0 = never) one account is flagged that asks one every so many seconds."""
        now = [1e9]
        monitor = QueryMonitor(self._rules, MemoryStore(), clock=lambda: now[0])
        outputs = self.model(queries)
        for i in range(len(queries)):
            now[0] += seconds
            if monitor.watch("eve", queries[i : i + 1], outputs[i : i + 1]).remark:
                return i + 1
        return 0

    @property
    def life(self) -> float:
        """Seconds after which evidence has expired."""
        return self._rules.ttl

    def attacks(self, arms: Attacks, arm: str, most: int) -> Iterator[Sequence]:
        """One attack an image, for all images."""
        threat, run = arms[arm]
        for i in range(len(self.x)):
            yield record(run, self.model, self.x[i : i + 1], self.y[i : i + 1], threat, most, FIRST_ATTACK + i)


def quick(world: World, arms: Attacks, arm: str, count: int) -> dict[str, Any]:
    """Flagged before success, by the number of queries that the attack needs."""
    found = list(itertools.islice(world.attacks(arms, arm, FOLLOWED), count))
    at = [world.flag_at(queries, 0.0) for queries, _ in found]
    need = [len(queries) if success else FOLLOWED + 1 for queries, success in found]
    before = [0 < flag < n for flag, n in zip(at, need, strict=True)]
    lengths = {}
    for low, high in zip((0, *LENGTHS), (*LENGTHS, FOLLOWED + 1), strict=True):
        own = [seen for seen, n in zip(before, need, strict=True) if low < n <= high]
        lengths[f"{low + 1} to {high}" if high in LENGTHS else f"more than {low}"] = [sum(own), len(own)]
    survivors = sorted(n for seen, n in zip(before, need, strict=True) if not seen)
    line = summary(zip(found, at, strict=True))
    return line | {
        "by_queries_needed": lengths,
        "earliest_flag": min((flag for flag in at if flag), default=None),
        "survivors_succeed_at": [n for n in survivors if n <= FOLLOWED],
        "never_flagged_in_300": sum(flag == 0 and n > FOLLOWED for flag, n in zip(at, need, strict=True)),
    }


def hidden(world: World, found: list[Sequence]) -> dict[str, Any]:
    """The same attacks at once, slowly, and among natural queries."""
    wins = statistics.median(len(queries) for queries, _ in found)
    lines = {"at once": summary((one, world.flag_at(one[0], 0.0)) for one in found)}
    for pace in PACES:
        at = [world.flag_at(queries, world.life / pace) for queries, _ in found]
        lines[f"{pace:g} queries a life"] = summary(zip(found, at, strict=True)) | {"lives_to_success": wins / pace}
    for each in BETWEEN:
        rows = []
        for number, (queries, success) in enumerate(found):
            mixed = interleaved(queries, world.natural[37 * number :], each)[:MOST_BETWEEN]
            rows.append(((queries, success), -(-world.flag_at(mixed, 0.0) // (each + 1))))
        lines[f"{each} natural queries after each"] = summary(rows)
    return lines


def padded(world: World, found: list[Sequence]) -> dict[str, Any]:
    """The same attacks after natural queries; flagged at 0.5: while these were asked."""
    lines = {}
    for count in FIRST:
        at = []
        for number, (queries, _) in enumerate(found):
            flag = world.flag_at(torch.cat([world.natural[37 * number :][:count], queries]), 0.0)
            at.append(max(0.5, flag - count) if flag else 0)
        lines[f"{count} natural queries first"] = summary(zip(found, at, strict=True))
    return lines


def main() -> None:
    """Print a line for each row and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--attacks", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=8)
    parser.add_argument("--accounts", type=int, default=450)
    arguments = parser.parse_args()
    data = Path(arguments.data).stem
    name, eps = f"validate_queries_time_{data}", EPS[data]
    settings = {"eps": list(eps), **{key: getattr(arguments, key) for key in ("attacks", "hidden", "accounts")}}
    result = settings | earlier(name, settings)
    world, arms = World(arguments.data, arguments.accounts), plain_attacks(*eps)
    for arm, (kind, judge) in itertools.product(("square", "hopskipjump"), (("hidden", hidden), ("padded", padded))):
        if f"{arm}, {kind}" not in result:
            wins = (one for one in world.attacks(arms, arm, MOST) if one[1])
            result[f"{arm}, {kind}"] = judge(world, list(itertools.islice(wins, arguments.hidden)))
            write_result(name, result, seeds=[SEED])
            for label, line in result[f"{arm}, {kind}"].items():
                show(data, f"{arm}, {label}", line)
    for arm in arms:
        if f"{arm}, quick" not in result:
            result[f"{arm}, quick"] = quick(world, arms, arm, arguments.attacks)
            write_result(name, result, seeds=[SEED])
            line = show(data, f"{arm}, quick", result[f"{arm}, quick"])
            print(
                {key: line[key] for key in ("by_queries_needed", "earliest_flag", "survivors_succeed_at")}, flush=True
            )


if __name__ == "__main__":
    main()
