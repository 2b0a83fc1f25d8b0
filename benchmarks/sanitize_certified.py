"""Certified accuracy under poisoning: partition ensembles on all of MNIST.

python -m benchmarks.sanitize_certified --data mnist.npz [--partitions 1200 3000] [--test 10000]
Base models are ridge regressions on scattering coefficients, which are fixed before any data is seen; their strength
is chosen on 1,000 training images that are taken out for it. Clean accuracy and the share of test images that are right
and certified at some numbers of inserted rows, for majority, spread parts and run-off. Published beside it: DPA
certifies half of the test images against more than 500 insertions, with 3,000 parts (Levine,
Feizi 2021). Writes benchmarks/results/sanitize_certified_PARTS.json.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aidefend.privacy import ScatterFeatures
from aidefend.sanitize import PartitionEnsemble
from benchmarks.record import write_result

SEED = 400
RADII = (0, 50, 100, 250, 400, 500, 501, 550, 600, 700)
RIDGES = (0.003, 0.01, 0.03, 0.1)


def loaded(path: str) -> dict[str, Tensor]:
    """Images (N, 1, 28, 28) in [0, 1] and labels."""
    with np.load(path) as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {
        name: values.float().div(255).unsqueeze(1) if name.endswith("x") else values.long()
        for name, values in found.items()
    }


def coefficients(images: Tensor) -> Tensor:
    """Scattering coefficients, row by row: a fixed function."""
    scatter = ScatterFeatures()
    return torch.cat([scatter(part) for part in images.split(500)]).flatten(1)


def certified(ensemble: PartitionEnsemble, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Shares of images that are right and certified, and the seconds that certifying took."""
    start = time.perf_counter()
    found = ensemble.certify(x)
    seconds = time.perf_counter() - start
    right = found.prediction == y
    shares = {str(radius): float((right & (found.radius >= radius)).double().mean()) for radius in RADII}
    median = int(torch.where(right, found.radius, -1).median())
    return {"certified": shares, "median_radius": median, "seconds_per_1000": 1000 * seconds / len(x)}


def chosen(x: Tensor, y: Tensor, partitions: int) -> float:
    """The ridge with the largest median radius on images that are held out of the training data."""
    ridges = {}
    for ridge in RIDGES:
        ensemble = PartitionEnsemble(partitions=partitions, ridge=ridge, classes=10, seed=SEED).fit(
            (x[1000:], y[1000:])
        )
        ridges[ridge] = certified(ensemble, x[:1000], y[:1000])["median_radius"]
        print("held out: ridge", ridge, "median radius", ridges[ridge], flush=True)
    return max(ridges, key=lambda ridge: ridges[ridge])


def main() -> None:
    """Print a row for each number of parts and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--partitions", type=int, nargs="+", default=[1200, 3000])
    parser.add_argument("--test", type=int, default=10_000)
    arguments = parser.parse_args()
    data = loaded(arguments.data)
    order = torch.randperm(len(data["train_y"]), generator=torch.Generator().manual_seed(SEED))
    x, y = coefficients(data["train_x"])[order], data["train_y"][order]
    test_x, test_y = coefficients(data["test_x"][: arguments.test]), data["test_y"][: arguments.test]
    for partitions in arguments.partitions:
        table = []
        ridge = chosen(x, y, partitions)
        for method, spread in (("dpa", 1), ("run-off", 1), ("finite-aggregation", 4)):
            if method == "finite-aggregation" and partitions > 1500:
                continue  # four times the models, each as large as those of "dpa": left out for time
            settings = {"partitions": partitions, "method": method, "ridge": ridge, "spread": spread, "seed": SEED}
            start = time.perf_counter()
            ensemble = PartitionEnsemble(classes=10, **settings).fit((x, y))
            row = settings | {"fit_seconds": time.perf_counter() - start} | certified(ensemble, test_x, test_y)
            table.append(row)
            print(row, flush=True)
            name = f"sanitize_certified_{partitions}"
            write_result(name, {"rows": table, "test_images": arguments.test}, seeds=[SEED])


if __name__ == "__main__":
    main()
