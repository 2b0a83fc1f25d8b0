"""Repairs of backdoored models from a few trusted rows, and what reversing says of models with and without a backdoor.

python -m benchmarks.sanitize_repair --data mnist.npz [--seeds 1] [--rows 10000] [--trusted 500] [--methods ...]
[--attacks ...]
A small CNN is trained on poisoned images; every method repairs the same model with the same trusted rows, which are
drawn from the rest of the training data and carry no trigger. Per attack and method: accuracy and attack success on
test images, the verdict of `retest` with the true trigger, and seconds; then, for backdoored and for clean models, how
many times smaller than usual the smallest reversed trigger is. Writes benchmarks/results/sanitize_repair_NAME.json.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from aidefend.attacks import poisoning
from aidefend.sanitize import repair, retest, reverse_trigger
from aidefend.sanitize.repair.repair import RepairMethod
from benchmarks.record import write_result
from benchmarks.sanitize_screen import TARGET, World, judged, trained, world

FIRST_SEED = 410  # 300 and 400 were looked at while the methods were made
SUSPECTS = 50


def attacks() -> dict[str, Any]:
    """The six attacks."""
    return {
        "patch 10 %": poisoning.Patch(TARGET, 0.1),
        "blend 10 %": poisoning.Blend(TARGET, 0.1),
        "sinusoid 5 %": poisoning.Sinusoid(TARGET, 0.05),
        "sinusoid 8 %, right labels": poisoning.Sinusoid(TARGET, 0.08, 0.5, clean_label=True),
        "warp 10 %": poisoning.Warp(TARGET, 0.1, 1.5),
        "all to all 10 %": poisoning.AllToAll(poisoning.Patch(size=4).stamp, 10, 0.1),
    }


def trusted_part(data: dict[str, Any], rows: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Training images that are not among the rows of `world`."""
    chosen = np.random.default_rng(seed).permutation(len(data["train_x"]))[rows : rows + count]
    images = torch.from_numpy(data["train_x"][chosen]).float().div(255).unsqueeze(1)
    return images, torch.from_numpy(data["train_y"][chosen]).long()


def rows_of(w: World, model: nn.Module, trusted: Any, methods: list[Any], seed: int) -> Iterator[dict[str, Any]]:
    """One row for the model as it is, and one for each method."""
    accuracy, success = judged(model, w)
    yield {"method": "none", "accuracy": accuracy, "asr": success, "verdict": "", "seconds": 0.0}
    poison = w.is_poison.nonzero().flatten()[:SUSPECTS]
    for method in methods:
        start = time.perf_counter()
        more = {"suspects": (w.x[poison], w.y[poison])} if method == "abl" else {}
        repaired = repair(model, trusted, method, seed=seed, **more)
        seconds = time.perf_counter() - start
        accuracy, success = judged(repaired, w)
        verdict = ""
        if w.trigger is not None and bool((w.aim(w.test_y) == TARGET).all()):
            verdict = retest(model, repaired, trusted, w.trigger, TARGET, seed=seed).verdict
        yield {"method": method, "accuracy": accuracy, "asr": success, "verdict": verdict, "seconds": seconds}


def reversed_row(model: nn.Module, trusted: Any, seed: int) -> dict[str, Any]:
    """What reversing says of a model."""
    found = reverse_trigger(model, trusted, seed=seed)
    return {"smallness": float(found.smallness.max()), "suspects": list(found.suspects)}


def main() -> None:
    """Print the rows as they come, then the counts of the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--trusted", type=int, default=500)
    parser.add_argument("--methods", nargs="*", default=list(get_args(RepairMethod)))
    parser.add_argument("--attacks", nargs="*", default=["none", *attacks()])
    parser.add_argument("--name", default="", help="added to the name of the result")
    arguments = parser.parse_args()
    with np.load(arguments.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    seeds, table, reversals = range(FIRST_SEED, FIRST_SEED + arguments.seeds), [], []
    for seed in seeds:
        trusted = trusted_part(data, arguments.rows, arguments.trusted, seed)
        for name in arguments.attacks:
            attack = attacks().get(name)
            w = world(data, attack, arguments.rows, seed)
            model = trained(w.x, w.y, seed)
            reversals.append({"attack": name, "seed": seed} | reversed_row(model, trusted, seed))
            print(reversals[-1], flush=True)
            for row in rows_of(w, model, trusted, arguments.methods, seed) if attack is not None else ():
                table.append({"attack": name, "seed": seed} | row)
                print(
                    " ".join(f"{v:.4f}" if isinstance(v, float) else f"{v!s:27}" for v in table[-1].values()),
                    flush=True,
                )
            write(arguments, table, reversals, list(seeds))  # after each attack: a run takes long
    counts = met(table, arguments.methods)
    print("\nattacks repaired (mean attack success < 2 %, mean accuracy loss < 2 points):", counts)


def write(arguments: argparse.Namespace, table: list[Any], reversals: list[Any], seeds: list[int]) -> None:
    """The result so far."""
    result = {"rows": table, "reversed": reversals, "met": met(table, arguments.methods)}
    result |= {"training_rows": arguments.rows, "trusted_rows": arguments.trusted}
    write_result(f"sanitize_repair_{Path(arguments.data).stem}{arguments.name}", result, seeds=seeds, packages=[])


def met(table: list[dict[str, Any]], methods: list[Any]) -> dict[str, int]:
    """For each method the number of attacks, of six, for which the target holds in the mean over the seeds."""

    def mean(attack: str, method: str, what: str) -> float:
        return float(np.mean([row[what] for row in table if (row["attack"], row["method"]) == (attack, method)]))

    return {
        method: sum(
            mean(attack, method, "asr") < 0.02
            and mean(attack, "none", "accuracy") - mean(attack, method, "accuracy") < 0.02
            for attack in dict.fromkeys(row["attack"] for row in table)
        )
        for method in methods
    }


if __name__ == "__main__":
    main()
