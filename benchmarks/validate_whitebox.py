"""Model and guard under an attacker who knows both, beside one who knows the model alone.

python -m benchmarks.validate_whitebox --data mnist.npz [--seeds 2] [--rows 200] [--steps 100]
A small CNN is trained on one part of the training images; a guard with each detector alone, with the default ones and
with all of them is calibrated at alpha on a second part. Both attackers have the same linf threats and passes and
start from the same points. The naive one climbs the loss of the model and is then put to the guard. The white-box one
attacks `guard.attackable()`: APGD climbs the best wrong class less the larger of the true class and the refusal; and,
from the naive points, PGD on the model's margin less a multiple of the refusal's (three multiples); a row counts if
any of these succeed. Success, of rows that are classified rightly and accepted without an attack: the guard accepts
the row and the answer is wrong. Printed per detector and eps: success against the bare model, of the naive attacker,
of the white-box one. Writes benchmarks/results/validate_whitebox_DATA.json after each set of detectors; a run with the
same settings goes on where the last one ended.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aidefend import Threat, validate
from aidefend._core.stats import wilson
from aidefend.attacks import APGD, PGD
from benchmarks.record import earlier, write_result
from benchmarks.sanitize_screen import trained
from benchmarks.validate_detectors import DETECTORS as COMPARED

FIRST_SEED = 1200
ALPHA = 0.05
RADII = (0.05, 0.1, 0.2)
WEIGHTS = (0.3, 1.0, 3.0)
DETECTORS = {**COMPARED, "vim": validate.ViM()}
PANELS = {
    **{name: [one] for name, one in DETECTORS.items()},
    "energy + nearest-neighbours (default)": [DETECTORS["energy"], DETECTORS["nearest-neighbours"]],
    "all ten": list(DETECTORS.values()),
}


def joint_margin(outputs: Tensor, y: Tensor) -> Tensor:
    """Best wrong class less the larger of the true class and the refusal, the last column: > 0 = a joint success."""
    wrong = outputs[:, :-1].scatter(1, y[:, None], -torch.inf).amax(dim=1)
    return wrong - torch.maximum(outputs.gather(1, y[:, None])[:, 0], outputs[:, -1])


def weighted(weight: float) -> Any:
    """The model's own margin, capped once it is won, less the refusal's lead where the guard refuses."""

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        classes = outputs[:, :-1]
        others = classes.scatter(1, y[:, None], -torch.inf).amax(dim=1)
        won = others - classes.gather(1, y[:, None])[:, 0]
        refusal = outputs[:, -1] - classes.amax(dim=1)
        return won.clamp(max=1.0) - weight * refusal.clamp(min=-1.0)

    return loss


def succeeds(outputs: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: accepted and wrong."""
    return joint_margin(outputs, y) > 0


def joint_attack(view: nn.Module, x: Tensor, y: Tensor, naive: Tensor, threat: Threat, steps: int, seed: int) -> Tensor:
    """(N,) bool: some of the white-box attacks succeeds."""
    stream = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"is_success": succeeds, "loss": joint_margin}
    direct = APGD(threat, steps=steps, **options).run(view, x, y, goal="first_success", generator=stream)
    found = direct.success.clone()
    for weight in WEIGHTS:
        rest = (~found).nonzero().flatten()
        if not len(rest):
            break
        attack = PGD(threat, steps=steps, loss=weighted(weight), is_success=succeeds)
        again = attack.run(view, x[rest], y[rest], goal="first_success", generator=stream, begin_at=naive[rest])
        found[rest] = again.success
    return found


def measured(
    guard: validate.Guard, x: Tensor, y: Tensor, naive: dict[float, Tensor], steps: int, seed: int
) -> list[dict[str, Any]]:
    """One row for each radius."""
    view = guard.attackable()
    with torch.no_grad():
        usable = view(x).argmax(dim=1) == y
    rows = []
    for eps, points in naive.items():
        with torch.no_grad():
            alone = guard.model(points[usable]).argmax(dim=1) != y[usable]
            unaware = succeeds(view(points[usable]), y[usable])
        threat = Threat("linf", eps)
        joint = unaware | joint_attack(view, x[usable], y[usable], points[usable], threat, steps, seed)
        counts = {"model": int(alone.sum()), "naive": int(unaware.sum()), "joint": int(joint.sum())}
        rows.append({"eps": eps, "n": int(usable.sum()), **counts})
    return rows


def world(data: dict[str, Any], seed: int, count: int) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A trained net, rows to calibrate on, their labels, test rows, and theirs."""
    order = np.random.default_rng(seed).permutation(len(data["train_x"]))
    x = torch.from_numpy(data["train_x"][order[:13000]]).float().div(255).unsqueeze(1)
    y = torch.from_numpy(data["train_y"][order[:13000]]).long()
    test_x = torch.from_numpy(data["test_x"][:count]).float().div(255).unsqueeze(1)
    test_y = torch.from_numpy(data["test_y"][:count]).long()
    return trained(x[:10000], y[:10000], seed, epochs=4), x[10000:], y[10000:], test_x, test_y


def run(data: dict[str, Any], seed: int, count: int, steps: int, names: list[str]) -> Iterator[list[dict[str, Any]]]:
    """All radii of one seed, panel by panel."""
    model, held_x, held_y, x, y = world(data, seed, count)
    stream = torch.Generator().manual_seed(seed)
    naive = {eps: APGD(Threat("linf", eps), steps=steps)(model, x, y, generator=stream) for eps in RADII}
    for name in names:
        detectors = PANELS[name]
        with validate.Guard.calibrate(model, (held_x, held_y), detectors=detectors, alpha=ALPHA, seed=seed) as guard:
            rows = measured(guard, x, y, naive, steps, seed)
        for row in rows:
            shown = " ".join(f"{kind} {row[kind] / row['n']:.3f}" for kind in ("model", "naive", "joint"))
            print(f"seed {seed} {name:40} eps {row['eps']:.2f} n {row['n']} {shown}", flush=True)
        yield [{"detectors": name, "seed": seed, **row} for row in rows]


def summary(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shares over all seeds, with the Wilson interval of the joint one."""
    keys = dict.fromkeys((row["detectors"], row["eps"]) for row in table)
    found = []
    for name, eps in keys:
        mine = [row for row in table if (row["detectors"], row["eps"]) == (name, eps)]
        n = sum(row["n"] for row in mine)
        shares = {kind: sum(row[kind] for row in mine) / n for kind in ("model", "naive", "joint")}
        joint = wilson(sum(row["joint"] for row in mine), n)
        found.append(
            {"detectors": name, "eps": eps, "n": n, **shares, "joint_low": joint.low, "joint_high": joint.high}
        )
    return found


def main() -> None:
    """Print a line for each detector and radius, then the totals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="one seed, 40 rows, 20 steps")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.rows, arguments.steps = 1, 40, 20
    with np.load(arguments.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    name = f"validate_whitebox_{Path(arguments.data).stem}"
    settings = {"alpha": ALPHA, "steps": arguments.steps, "count": arguments.rows}
    table: list[dict[str, Any]] = earlier(name, settings).get("rows", [])
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        missing = [panel for panel in PANELS if not any((r["detectors"], r["seed"]) == (panel, seed) for r in table)]
        for rows in run(data, seed, arguments.rows, arguments.steps, missing) if missing else ():
            table += rows
            result = settings | {"means": summary(table), "rows": table}
            write_result(name, result, seeds=sorted({row["seed"] for row in table}))
    means = summary(table)
    print(
        f"\nof rows that are right and accepted without an attack (alpha {ALPHA}): answers that are wrong and accepted"
    )
    print(f"{'detectors':40} {'eps':>5} {'bare model':>11} {'naive':>7} {'white box':>10}")
    for row in means:
        print(f"{row['detectors']:40} {row['eps']:5.2f} {row['model']:11.3f} {row['naive']:7.3f} {row['joint']:10.3f}")


if __name__ == "__main__":
    main()
