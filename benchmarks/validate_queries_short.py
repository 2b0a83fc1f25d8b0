"""Where query monitoring comes too late: attacks that succeed within some tens of queries, because the threat is large.

python -m benchmarks.validate_queries_short --mnist mnist.npz [--images 16] [--accounts 300]
Square on a small CNN at growing eps, against the monitor of `benchmarks.validate_queries` (same accounts, seed, key).
Writes benchmarks/results/validate_queries_short.json.
"""

import argparse
from typing import Any

from aidefend import Threat
from aidefend.attacks import Square
from aidefend.validate import MemoryStore, QueryMonitor
from benchmarks.query_traffic import population
from benchmarks.record import write_result
from benchmarks.validate_queries import ALPHA, KEY, flag_at, images, sequences, show, summary, trained

SEED = 0


def main() -> None:
    """Print a line for each eps and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", required=True)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--accounts", type=int, default=300)
    arguments = parser.parse_args()
    x, y, tx, ty = images(arguments.mnist)
    model, half = trained(x, y, SEED), len(tx) // 2
    streams = [(queries, model(queries)) for _, queries in population(tx[:half], ty[:half], arguments.accounts, SEED)]
    rules = QueryMonitor.calibrate(streams, MemoryStore(), alpha=ALPHA, seed=SEED, key=KEY)._rules
    known = (model(tx[half:]).argmax(dim=1) == ty[half:]).nonzero().flatten()[: arguments.images] + half
    result: dict[str, Any] = {}
    for eps in (0.1, 0.2, 0.3):
        ball = Threat("linf", eps)
        square = Square(ball, 5000)
        attack = (ball, lambda m, x, y, g, square=square: square.run(m, x, y, generator=g))
        found = []
        for one in sequences(attack, model, tx[known], ty[known], SEED):
            monitor = QueryMonitor(rules, MemoryStore(), clock=lambda: 1.0)
            found.append((one, flag_at(monitor, one[0], model, lambda i: "eve")[0]))
        result[f"eps {eps:g}"] = show("mnist", f"square, eps {eps:g}", summary(found))
    write_result("validate_queries_short", result, seeds=[SEED])


if __name__ == "__main__":
    main()
