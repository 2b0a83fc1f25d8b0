"""Clipped gradients and differentially private training as a defense against poison: a curve, no target.

python -m benchmarks.sanitize_dp --data mnist.npz [--first-seed 810] [--seeds 2] [--rows 2000]
A small network (196-64-10 on pooled digits) learns poisoned rows with plain SGD, with row gradients that are clipped
to .1 without noise (`robust_loss`), and privately (`make_private`) at noise multipliers from .5 to 2. All arms draw
Poisson batches of 200 rows for 300 steps, clipped ones at two learning rates (5, 20); two plain arms stop early, the
second about where slow clipped steps end, as a control: a lower success may come from learning less and not from
clipping. Attack success on test images of other classes, accuracy, epsilon at delta 1e-5. Rates, clip norm and the
early stops were looked at on seed 800 only. The noise comes from the operating system: those arms differ a little on
each run.
Writes benchmarks/results/sanitize_dp.json after each seed.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aidefend.attacks import poisoning
from aidefend.privacy import PrivacyConfig, make_private
from aidefend.sanitize import robust_loss
from benchmarks.record import earlier, write_result
from benchmarks.sanitize_screen import TARGET, World, judged, world

BATCH, STEPS, DELTA = 200, 300, 1e-5
ATTACKS: dict[str, Any] = {
    "clean": None,
    "patch 5 %": poisoning.Patch(TARGET, 0.05),
    "blend 5 %": poisoning.Blend(TARGET, 0.05),
    "flipped labels 20 %": poisoning.LabelFlip(0.2),
}


class Arm(NamedTuple):
    """Clip norm (None: no clipping), noise multiplier, learning rate, steps."""

    clip: float | None
    noise: float
    rate: float
    steps: int = STEPS


ARMS = {
    "plain": Arm(None, 0.0, 0.5),
    "plain, 60 steps": Arm(None, 0.0, 0.5, 60),
    "plain, 45 steps": Arm(None, 0.0, 0.5, 45),
    "clip, slow": Arm(0.1, 0.0, 5.0),
    "clip, fast": Arm(0.1, 0.0, 20.0),
    "noise 0.5, slow": Arm(0.1, 0.5, 5.0),
    "noise 1, slow": Arm(0.1, 1.0, 5.0),
    "noise 1, fast": Arm(0.1, 1.0, 20.0),
    "noise 2, slow": Arm(0.1, 2.0, 5.0),
    "noise 2, fast": Arm(0.1, 2.0, 20.0),
}


def network(seed: int) -> nn.Sequential:
    """One hidden layer on 14 x 14 pixels."""
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10))


def losses(outputs: Tensor, y: Tensor) -> Tensor:
    """(N,) cross-entropies."""
    return cross_entropy(outputs, y, reduction="none")


def trained(w: World, arm: Arm, seed: int) -> tuple[nn.Module, float | None]:
    """The network after STEPS steps, and epsilon where there is noise."""
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=arm.rate)
    if arm.noise:
        return model, _privately(model, optimizer, w, arm)
    stream = torch.Generator().manual_seed(seed)
    for _ in range(arm.steps):
        drawn = torch.rand(len(w.y), generator=stream) < BATCH / len(w.y)
        x, y = w.x[drawn], w.y[drawn]
        optimizer.zero_grad()
        if arm.clip is None:
            losses(model(x), y).mean().backward()
        else:
            robust_loss(model, x, y, method="clipped", max_grad_norm=arm.clip).backward()
        optimizer.step()
    return model.eval(), None


def _privately(model: nn.Module, optimizer: torch.optim.Optimizer, w: World, arm: Arm) -> float:
    config = PrivacyConfig(
        expected_batch_size=BATCH,
        public_size=len(w.y),
        steps=arm.steps,
        max_grad_norm=arm.clip,
        delta=DELTA,
        noise_multiplier=arm.noise,
    )
    private = make_private(model, optimizer, torch.utils.data.TensorDataset(w.x, w.y), losses, config)
    for x, y in private.loader:
        private.optimizer.zero_grad()
        private.loss(private.model(x), y).backward()
        private.optimizer.step()
    model.eval()
    return float(private.epsilon())


def rows_of(data: dict[str, Any], rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row for each attack and arm."""
    for name, attack in ATTACKS.items():
        w = world(data, attack, rows, seed)
        for arm, setting in ARMS.items():
            start = time.perf_counter()
            model, spent = trained(w, setting, seed)
            seconds = time.perf_counter() - start
            accuracy, success = judged(model, w)
            found = {"attack": name, "arm": arm, "seed": seed, "accuracy": accuracy}
            yield found | {"asr": None if success != success else success, "epsilon": spent, "seconds": seconds}


def means_of(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds."""
    means = []
    for attack, arm in dict.fromkeys((row["attack"], row["arm"]) for row in table):
        mine = [row for row in table if (row["attack"], row["arm"]) == (attack, arm)]
        row: dict[str, Any] = {"attack": attack, "arm": arm, "n": len(mine)}
        means.append(row | {name: _mean([one[name] for one in mine]) for name in ("accuracy", "asr", "epsilon")})
    return means


def _mean(values: list[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def told(row: dict[str, Any]) -> str:
    """One line."""
    return " ".join(f"{v:8.4f}" if isinstance(v, float) else f"{v!s:20}" for v in row.values())


def main() -> None:
    """Print the rows as they come, then their means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--first-seed", type=int, default=810)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2000)
    arguments = parser.parse_args()
    with np.load(arguments.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    settings = {"training_rows": arguments.rows, "steps": STEPS, "batch": BATCH}
    table = earlier("sanitize_dp", settings).get("rows", [])
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        if seed in {row["seed"] for row in table}:
            continue
        for row in rows_of(data, arguments.rows, seed):
            table.append(row)
            print(told(row), flush=True)
        seeds = sorted({row["seed"] for row in table})
        write_result("sanitize_dp", settings | {"means": means_of(table), "rows": table}, seeds=seeds)
    print("\nmeans", *map(told, means_of(table)), sep="\n")


if __name__ == "__main__":
    main()
