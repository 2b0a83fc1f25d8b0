"""Screening a stream of any length: memory, time and what is found, for 1e4, 1e5 and 1e6 rows.

python -m benchmarks.sanitize_stream [--rows 10000 100000 1000000] [--quick]
The rows are an iterator that is read once: ten Gaussian classes in 128 dimensions, made block by block; 5 % of all rows
belong to other classes, carry a pattern of four numbers and the label 0. The model is a small network trained on the
first 20,000 of such rows. Each length runs in a process of its own; memory is the peak beyond what the process held
before the stream began (torch, the model). Writes benchmarks/results/sanitize_stream.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aidefend.sanitize import Outliers, SpectralSignature, screen_stream
from benchmarks.record import write_result

SEED = 300
BLOCK = 1000
CLASSES = 10
WIDTH = 128
RATE = 0.05
SAMPLED = 500  # rows a class, so that the shortest stream fills the sample, too


def block(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels, and which rows are poison: the same for every length and every run."""
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(SEED))
    stream = torch.Generator().manual_seed(SEED + 1 + number)
    labels = torch.randint(0, CLASSES, (BLOCK,), generator=stream)
    x = centres[labels] + torch.randn(BLOCK, WIDTH, generator=stream)
    poison = (torch.rand(BLOCK, generator=stream) < RATE * CLASSES / (CLASSES - 1)) & (labels != 0)
    x[poison, :4] = 4.0
    return x, torch.where(poison, 0, labels), poison


def batches(rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The stream."""
    for number in range(rows // BLOCK):
        x, y, _ = block(number)
        yield x, y


def trained() -> nn.Module:
    """The suspect model, which has learnt the pattern."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(5):
        for number in range(20):
            x, y, _ = block(number)
            for part in torch.arange(BLOCK).split(100):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()
    return model


def peak() -> float:
    """MiB, the most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(rows: int) -> dict[str, Any]:
    """One length, in this process."""
    model = trained()
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        found = screen_stream(batches(rows), model, folder, rows_per_class=SAMPLED, seed=0)
        middle = time.perf_counter()
        scores = [found.store.scores(kind(), 8192) for kind in (SpectralSignature, Outliers)]
        end = time.perf_counter()
        disk = sum(file.stat().st_size for file in Path(folder).iterdir())
    poison = torch.cat([block(number)[2] for number in range(rows // BLOCK)])
    return {
        "rows": rows,
        "before_mib": before,
        "beyond_mib": peak() - before,
        "seconds": middle - start,
        "detector_seconds": end - middle,
        "disk_bytes_a_row": disk / rows,
        "tpr": float((~found.keep)[poison].double().mean()),
        "fpr": float((~found.keep)[~poison].double().mean()),
        "scored": [int(score.isfinite().sum()) for score in scores],
        "extended": dict(found.parameters["extended"]),
    }


def main() -> None:
    """Print one line a length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--quick", action="store_true", help="10,000 and 40,000 rows; nothing is written")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measured(arguments.one)))
        return
    runs = []
    for rows in [10_000, 40_000] if arguments.quick else arguments.rows:
        call = [sys.executable, "-m", "benchmarks.sanitize_stream", "--one", str(rows)]
        runs.append(json.loads(subprocess.check_output(call, text=True).splitlines()[-1]))  # noqa: S603
        print(runs[-1], flush=True)
    if not arguments.quick:
        write_result("sanitize_stream", {"runs": runs}, seeds=[SEED, 0])


if __name__ == "__main__":
    main()
