"""Certified images per second and average certified radius of `SmoothedModel` beside the reference loop, interleaved.

python -m benchmarks.smoothing [--data PATH] [--rows 100] [--reference-rows 10] [--n 10000] [--quick]
The reference is the loop of Cohen et al. 2019, written from the paper: one image a call, batches of 400 copies, a
bound at n alone, votes counted one by one. One net, trained with the library's `Gaussian` objective; both see the same
images, in turns. Ours without a target radius gives the full radius of each row; with one it stops as soon as that is
proven.
Writes benchmarks/results/smoothing.json.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from aidefend import datasets
from aidefend.adversarial import Gaussian, SmoothedModel
from benchmarks.adversarial_evaluation import mnist_net
from benchmarks.record import write_result

SIGMA, ALPHA, N0, RADII = 0.5, 0.001, 100, (0.0, 0.25, 0.5, 0.75, 1.0)


def reference(model: nn.Module, x: Tensor, n: int, stream: torch.Generator) -> tuple[int, float]:
    """(class or -1, radius) of one image."""

    def votes(count: int) -> list[int]:
        counts = [0] * 10
        while count > 0:
            size = min(400, count)
            count -= size
            copies = x.repeat(size, 1, 1, 1) + SIGMA * torch.randn((size, *x.shape), generator=stream)
            for answer in model(copies).argmax(1).tolist():
                counts[answer] += 1
        return counts

    with torch.no_grad():
        first, second = votes(N0), votes(n)
    top = max(range(10), key=first.__getitem__)
    lower = float(beta.ppf(ALPHA, second[top], n - second[top] + 1)) if second[top] else 0.0
    return (top, SIGMA * float(norm.ppf(lower))) if lower > 0.5 else (-1, 0.0)


def train(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """The net at Gaussian copies of the training digits."""
    model, objective, stream = mnist_net(0), Gaussian(SIGMA), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=stream).split(128):
            optimizer.zero_grad()
            objective(model, x[rows], y[rows], generator=stream).backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    """Train, certify in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder or .npz with the full MNIST; default: the embedded subset")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--reference-rows", type=int, default=10, help="images of the reference in each turn")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="20 rows, n = 1,000")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.n = 20, 1000
    images = datasets.load(options.data) if options.data else datasets.mnist_subset()
    model = train(images.train_x, images.train_y, 10)
    x, y = images.test_x[: options.rows], images.test_y[: options.rows]
    smoothed, found = SmoothedModel(model, SIGMA, 10), dict[str, Any]()
    ratios: dict[str, list[float]] = {"full radius": [], "target 0.25": [], "target 0.75": []}
    radii, stream = list[float](), torch.Generator().manual_seed(1)
    for turn, first in enumerate(range(0, options.rows, options.reference_rows)):
        few = slice(first, first + options.reference_rows)
        start = time.perf_counter()
        answers = [reference(model, image, options.n, stream) for image in x[few]]
        slow = (time.perf_counter() - start) / len(answers)
        pairs = zip(answers, y[few].tolist(), strict=True)
        radii += [radius if answer == label else 0.0 for (answer, radius), label in pairs]
        for name in ratios:
            target = None if name == "full radius" else float(name.split()[1])
            start = time.perf_counter()
            own = smoothed.certify(
                x[few], N0, options.n, ALPHA, target_radius=target, generator=torch.Generator().manual_seed(turn)
            )
            ratios[name].append(slow / ((time.perf_counter() - start) / len(answers)))
            found.setdefault(name, []).append(own)
    ours = statistics.mean(own.average_radius(y[i * options.reference_rows : (i + 1) * options.reference_rows])
                           for i, own in enumerate(found["full radius"]))  # fmt: skip
    whole = smoothed.certify(x, N0, 10 * options.n, ALPHA, generator=torch.Generator().manual_seed(99))
    longest = whole.average_radius(y)
    result = {
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "average_radius": ours, "average_radius_reference": statistics.mean(radii), "average_radius_10n": longest,
        "certified_10n": [share.value for share in whole.accuracy_at(RADII, y)],
        "rows": options.rows, "n": options.n, "sigma": SIGMA, "data": images.source,
    }  # fmt: skip
    speed, target = result["ratios"]["full radius"], result["ratios"]["target 0.25"]
    summary = [
        f"{'met   ' if speed >= 10 else 'MISSED'} images per second {speed:.2f} x the reference loop (>= 10), "
        f"{target:.2f} x with target_radius=0.25, {result['ratios']['target 0.75']:.2f} x with 0.75",
        f"{'met   ' if ours >= 0.99 * longest else 'MISSED'} average radius at n = {options.n}: {ours:.4f}, reference "
        f"{result['average_radius_reference']:.4f}, at 10 n {longest:.4f} (within 1 %)",
    ]
    write_result("smoothing", result | {"summary": summary}, seeds=range(1), packages=())
    print(*summary, sep="\n")


if __name__ == "__main__":
    main()
