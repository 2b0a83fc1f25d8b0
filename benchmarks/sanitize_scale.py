"""Scores of a million rows in constant memory: the covariance-based detectors beside the matrix products they need.

python -m benchmarks.sanitize_scale [--rows 1000000] [--width 128] [--neighbours 100000]
Features come in seeded blocks that are made anew for each pass, so that nothing of size N is held but ids and scores.
Per block the five detectors are timed next to the bare products of the same sizes (float64, as they use them): scatter
for the fit, projections and triangular solution for the score. Then exact k-nearest neighbours beside one matrix
product of the same size, and the same detectors merged from four shards. Writes benchmarks/results/sanitize_scale.json.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aidefend._core.neighbours import k_nearest
from aidefend.sanitize import ActivationClustering, Outliers, Scan, SpectralSignature, Spectre
from benchmarks.record import write_result

SEED = 300
BLOCK = 16_384
CLASSES = 10
DETECTORS = {
    "spectral_signature": (SpectralSignature, 1),
    "activation_clustering": (ActivationClustering, 10),
    "scan": (Scan, 64),
    "spectre": (Spectre, 64),  # 32 to whiten, 32 for the quadratic form
    "outliers": (Outliers, 0),
}


def blocks(rows: int, width: int) -> Iterator[dict[str, Any]]:
    """Seeded blocks of a mixture of classes, the same in every pass."""
    centres = 3 * torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(SEED))
    for start in range(0, rows, BLOCK):
        stream = torch.Generator().manual_seed(SEED + 1 + start)
        n = min(BLOCK, rows - start)
        labels = torch.randint(0, CLASSES, (n,), generator=stream)
        features = torch.randn(n, width, generator=stream) + centres[labels]
        yield {"ids": tuple(f"{i:032x}" for i in range(start, start + n)), "features": features, "labels": labels}


def products(features: Tensor, labels: Tensor, projected: int, *, score: bool) -> None:
    """The matrix products of one detector on one block."""
    rows, width = features.double(), features.shape[1]
    for label in range(CLASSES):
        part = rows[labels == label]
        if not score:
            part.T @ part
        elif projected:
            part @ rows[:1].T.expand(width, projected)
        else:
            torch.linalg.solve_triangular(torch.eye(width, dtype=torch.float64), part.T, upper=False)


def measured(rows: int, width: int) -> dict[str, Any]:
    """Seconds of each detector and of its products, and peak memory."""
    detectors = {name: kind() for name, (kind, _) in DETECTORS.items()}
    seconds, floor = dict.fromkeys(DETECTORS, 0.0), dict.fromkeys(DETECTORS, 0.0)
    for score in (False, True):
        for block in blocks(rows, width):
            for name, (_, projected) in DETECTORS.items():
                start = time.perf_counter()
                products(block["features"], block["labels"], projected, score=score)
                middle = time.perf_counter()
                if score:
                    detectors[name].score(block)
                else:
                    detectors[name].partial_fit(block)
                floor[name] += middle - start
                seconds[name] += time.perf_counter() - middle
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    total = {"seconds": sum(seconds.values()), "floor": sum(floor.values())}
    each = {name: {"seconds": seconds[name], "ratio": seconds[name] / floor[name]} for name in DETECTORS}
    return {"rows": rows, **total, "ratio": total["seconds"] / total["floor"], "peak_mib": peak, "each": each}


def merged_equals_whole(rows: int, width: int) -> float:
    """Largest relative difference of any score between one pass and four merged shards."""
    worst = 0.0
    for kind, _ in DETECTORS.values():
        whole, shards = kind(), [kind() for _ in range(4)]
        for place, block in enumerate(blocks(rows, width)):
            whole.partial_fit(block)
            shards[place % 4].partial_fit(block)
        total = shards[0].merge(shards[1]).merge(shards[2].merge(shards[3]))
        block = next(blocks(rows, width))
        one, other = whole.score(block), total.score(block)
        worst = max(worst, float(((one - other).abs() / one.abs().clamp(min=1e-6)).max()))
    return worst


def neighbours(rows: int, width: int, k: int = 10) -> dict[str, float]:
    """Exact neighbours of every row beside one product of the same size, block by block."""
    points = torch.randn(rows, width, generator=torch.Generator().manual_seed(SEED))
    start = time.perf_counter()
    for part in points.split(4096):
        for other in points.split(4096):
            part @ other.T
    middle = time.perf_counter()
    k_nearest(points, points, k, exclude_self=True)
    end = time.perf_counter()
    return {"rows": rows, "seconds": end - middle, "floor": middle - start, "ratio": (end - middle) / (middle - start)}


def main() -> None:
    """Print each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--neighbours", type=int, default=100_000)
    arguments = parser.parse_args()
    small = measured(arguments.rows // 10, arguments.width)
    print(small, flush=True)
    large = measured(arguments.rows, arguments.width)
    print(large, flush=True)
    difference = merged_equals_whole(min(arguments.rows, 100_000), arguments.width)
    print("largest relative difference, four shards merged:", difference, flush=True)
    nearest = neighbours(arguments.neighbours, arguments.width)
    print(nearest)
    growth = large["seconds"] / small["seconds"]
    result = {"small": small, "large": large, "growth": growth, "merged_difference": difference, "neighbours": nearest}
    write_result("sanitize_scale", result, seeds=[SEED])


if __name__ == "__main__":
    main()
