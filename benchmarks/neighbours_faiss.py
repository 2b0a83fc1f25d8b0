"""Approximate neighbours beside exact ones: time, and the recall that is promised, measured on rows of their own.

python -m benchmarks.neighbours_faiss [--rows 100000] [--width 128]
Rows lie near 50 planes of 10 dimensions, as features of a trained network do, and for comparison all over the space.
The recall on 1,000 rows outside the 256 that the index measured itself on is printed beside its own figure. Writes
benchmarks/results/neighbours_faiss.json.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from aidefend._core.approximate import ApproximateIndex
from aidefend._core.neighbours import k_nearest
from benchmarks.record import write_result

SEED = 300
K = 10
ASKED = 1000


def planes(rows: int, width: int) -> Tensor:
    """Rows near 50 planes of 10 dimensions."""
    stream = torch.Generator().manual_seed(SEED)
    which = torch.randint(0, 50, (rows,), generator=stream)
    bases, centres = torch.randn(50, 10, width, generator=stream), 5 * torch.randn(50, width, generator=stream)
    points = centres[which] + 0.1 * torch.randn(rows, width, generator=stream)
    weights = torch.randn(rows, 10, generator=stream)
    for plane in range(50):
        points[which == plane] += weights[which == plane] @ bases[plane]
    return points


def everywhere(rows: int, width: int) -> Tensor:
    """A Gaussian in all directions: the case in which no index helps."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(SEED))


def measured(bank: Tensor) -> dict[str, Any]:
    """Seconds to ask for ASKED rows each way, for the index itself, and both recalls."""
    asked = bank[torch.randperm(len(bank), generator=torch.Generator().manual_seed(SEED + 1))[:ASKED]]
    start = time.perf_counter()
    index = ApproximateIndex(bank, K)
    made = time.perf_counter()
    found = index.nearest(asked)[1]
    asked_index = time.perf_counter()
    true = k_nearest(asked, bank, K)[1]
    end = time.perf_counter()
    hits = (true.unsqueeze(2) == found.unsqueeze(1)).any(dim=2)
    return {
        "rows": len(bank),
        "width": bank.shape[1],
        "make_seconds": made - start,
        "index_seconds": asked_index - made,
        "exact_seconds": end - asked_index,
        "speedup": (end - asked_index) / (asked_index - made),
        "recall_measured_by_index": index.measured._asdict(),
        "recall": float(hits.double().mean()),
    }


def main() -> None:
    """Print one line a world."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    result = {}
    for name, make in (("planes", planes), ("everywhere", everywhere)):
        result[name] = measured(make(arguments.rows, arguments.width))
        print(name, result[name], flush=True)
    write_result("neighbours_faiss", result, seeds=[SEED, SEED + 1], packages=["faiss-cpu"])


if __name__ == "__main__":
    main()
