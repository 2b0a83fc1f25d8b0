"""The figures of the demo as means over seeds, beside what the project asks of them.

python -m benchmarks.demo_figures [--quick] [--seeds 3]: prints a table and writes benchmarks/results/demo_figures.json.
"""

import argparse
import platform
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from aidefend import Evidence, __version__
from aidefend._core.storage import pretty_json, write_atomic
from aidefend.demo.evasion import evasion
from aidefend.demo.inputs import inputs
from aidefend.demo.poisoning import poisoning
from aidefend.demo.private import membership
from aidefend.demo.world import open_world

Check = Callable[[Mapping[str, float]], bool]
TARGETS: dict[str, tuple[tuple[str, ...], Check]] = {
    "attack success after screening within 1 point of the perfect filter": (
        ("poisoning.attack_success_rate.screened", "poisoning.attack_success_rate.perfect_filter"),
        lambda m: (
            m["poisoning.attack_success_rate.screened"] <= m["poisoning.attack_success_rate.perfect_filter"] + 0.01
        ),
    ),
    "accuracy after screening at most 1 point below the perfect filter": (
        ("poisoning.clean_accuracy.screened", "poisoning.clean_accuracy.perfect_filter"),
        lambda m: m["poisoning.clean_accuracy.screened"] >= m["poisoning.clean_accuracy.perfect_filter"] - 0.01,
    ),
    "TRADES worst case >= 80 % where undefended < 20 %": (
        ("evasion.robust_accuracy.trades", "evasion.robust_accuracy.undefended"),
        lambda m: m["evasion.robust_accuracy.trades"] >= 0.8 and m["evasion.robust_accuracy.undefended"] < 0.2,
    ),
    "membership AUC: private upper end <= .56, overfitted lower end > .6": (
        ("membership.auc.private.high", "membership.auc.overfitted.low"),
        lambda m: m["membership.auc.private.high"] <= 0.56 and m["membership.auc.overfitted.low"] > 0.6,
    ),
    "guard's false positives inside the 99 % interval of exact guards": (
        ("validate.false_positive_rate",),
        lambda m: m["expected_low"] <= m["validate.false_positive_rate"] <= m["expected_high"],
    ),
}


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    seeds = range(1 if options.quick else options.seeds)
    runs = [_numbers(seed) for seed in seeds]
    means = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
    rows = [(name, [round(means[key], 4) for key in keys], check(means)) for name, (keys, check) in TARGETS.items()]
    for name, values, met in rows:
        print(f"{'met   ' if met else 'MISSED'} {name}: {values}")
    versions = {"aidefend": __version__, "torch": torch.__version__, "python": platform.python_version()}
    result = {"versions": versions, "seeds": list(seeds), "runs": runs, "means": means, "targets": rows}
    folder = Path(__file__).with_name("results")
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "demo_figures.json", pretty_json(result))


def _numbers(seed: int) -> dict[str, float]:
    world = open_world(None, seed)
    evidence = Evidence()
    for chapter in (poisoning, evasion, membership, inputs):
        print(f"seed {seed}: {chapter.__name__}", flush=True)
        evidence += chapter(world, lambda text: print(f"  {text}", flush=True)).evidence
    found = {finding.id: float(finding.value) for finding in evidence.findings if isinstance(finding.value, float)}
    found |= {f"{finding.id}.low": finding.low for finding in evidence.findings if finding.low is not None}
    found |= {f"{finding.id}.high": finding.high for finding in evidence.findings if finding.high is not None}
    setting = evidence["validate.false_positive_rate"].setting
    return found | {"expected_low": setting["expected_low"], "expected_high": setting["expected_high"]}


if __name__ == "__main__":
    main()
