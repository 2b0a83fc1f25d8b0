"""Whether the 95 % interval of the poisoned share covers what was planted, over worlds of which the truth is known.

python -m benchmarks.sanitize_intervals [--worlds 30]
Clusters of four classes with a pattern of three columns under a wrong label, in 5, 10 and 20 % of the rows, and none;
`screen` without hints. Beside the coverage: worlds in which nothing was found, and rows taken from clean worlds.
Writes benchmarks/results/sanitize_intervals.json.
"""

import argparse
from typing import Any

import torch

from aidefend._core.stats import wilson
from aidefend.sanitize import screen
from benchmarks.record import write_result

FIRST_SEED = 500
SHARES = (0.0, 0.05, 0.1, 0.2)
_ROWS = 150  # of each class


def world(share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, labels, and which rows were planted."""
    stream = torch.Generator().manual_seed(seed)
    y = torch.arange(4 * _ROWS) % 4
    centres = torch.randn(4, 20, generator=stream) * 3
    x = centres[y] + torch.randn(len(y), 20, generator=stream)
    eligible = (y != 0).nonzero().flatten()
    rows = eligible[torch.randperm(len(eligible), generator=stream)[: round(share * len(y))]]
    planted = torch.zeros(len(y), dtype=torch.bool)
    planted[rows] = True
    x[planted, :3] = 3.0
    return x, torch.where(planted, 0, y), planted


def main() -> None:
    """Print one line for each share and record them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=30)
    arguments = parser.parse_args()
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.worlds)
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        covered, missed, removed = 0, 0, 0
        for seed in seeds:
            x, y, planted = world(share, seed)
            found = screen((x, y), detectors=[], seed=seed).parameters["poisoned_share"]
            covered += found["low"] <= float(planted.double().mean()) <= found["high"]
            missed += bool(planted.any()) and found["rows"] == 0
            removed += found["rows"] if not bool(planted.any()) else 0
        interval = wilson(covered, len(seeds))
        row = {"share": share, "worlds": len(seeds), "coverage": interval.value, "low": interval.low}
        rows.append(row | {"high": interval.high, "nothing_found": missed, "rows_taken_from_clean": removed})
        print(rows[-1], flush=True)
    write_result("sanitize_intervals", {"rows": rows}, seeds=list(seeds))


if __name__ == "__main__":
    main()
