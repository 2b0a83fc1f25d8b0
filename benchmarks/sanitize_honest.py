"""What screening costs data without any poison: clean rows, classes of 50 : 1, and a legitimate style of 2 %.

python -m benchmarks.sanitize_honest --data mnist.npz [--seeds 3] [--rows 5000] [--arms ours]
The rows are honest throughout, so whatever a filter removes is lost. Settings: images as they are; class sizes that
fall geometrically to a fiftieth; 2 % of all rows inverted, in every class, or all of them in one class. Arms: `screen`
without hints, ART's activation clustering and spectral signatures as they come, a random filter that removes as many
rows as `screen`. Per setting and arm: share removed, drop rate of the minority (the three rarest classes, or the
inverted rows) and of the others, and how the accuracy of the worst class and on the minority of the test data change
when the same small CNN is trained on what is left. Needs adversarial-robustness-toolbox unless --arms ours. Writes
benchmarks/results/sanitize_honest_NAME.json.
"""

import argparse
import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.record import write_result
from benchmarks.sanitize_screen import World, art_filter, ours, trained, world

FIRST_SEED = 600
RATIO = 50
STYLE = 0.02
STYLED_CLASS = 3
RAREST = 3
Judge = Callable[[World, nn.Module, int], tuple[Tensor, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Honest:
    """Rows without poison, with a minority (N,) bool; test images, and which of them belong to the minority."""

    w: World
    minority: Tensor
    test_minority: Tensor


def honest(data: dict[str, Any], setting: str, rows: int, seed: int) -> Honest:
    """The data of one setting."""
    w = world(data, None, rows, seed)
    none = torch.zeros(rows, dtype=torch.bool)
    if setting == "clean":
        return Honest(w, none, torch.zeros(len(w.test_y), dtype=torch.bool))
    if setting == "classes of 50 : 1":
        sizes = RATIO ** (-np.arange(10) / 9)
        wanted = np.round(rows * sizes / sizes.sum()).astype(int)
        pool = world(data, None, len(data["train_x"]), seed)
        chosen = torch.cat([(pool.y == label).nonzero().flatten()[:count] for label, count in enumerate(wanted)])
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
        w = dataclasses.replace(w, x=pool.x[chosen], y=pool.y[chosen], is_poison=torch.zeros(len(chosen)).bool())
        return Honest(w, w.y >= 10 - RAREST, w.test_y >= 10 - RAREST)
    stream = torch.Generator().manual_seed(seed)
    of_one = setting == "inverted, one class"
    places = (w.y == STYLED_CLASS).nonzero().flatten() if of_one else torch.arange(rows)
    styled = none.clone()
    styled[places[torch.randperm(len(places), generator=stream)[: round(STYLE * rows)]]] = True
    x = torch.where(styled[:, None, None, None], 1 - w.x, w.x)
    also = w.test_y == STYLED_CLASS if of_one else torch.ones(len(w.test_y), dtype=torch.bool)
    test_x, test_y = torch.cat([w.test_x, 1 - w.test_x[also]]), torch.cat([w.test_y, w.test_y[also]])
    test_styled = torch.arange(len(test_y)) >= len(w.test_y)
    return Honest(dataclasses.replace(w, x=x, test_x=test_x, test_y=test_y), styled, test_styled)


SETTINGS = ("clean", "classes of 50 : 1", "inverted, every class", "inverted, one class")


@torch.no_grad()
def accuracies(model: nn.Module, h: Honest) -> tuple[float, float]:
    """Of the worst class, and on the minority of the test data (NaN without one)."""
    right = model(h.w.test_x).argmax(dim=1) == h.w.test_y
    worst = min(float(right[h.w.test_y == label].double().mean()) for label in range(10))
    return worst, float(right[h.test_minority].double().mean())


def rows_of(data: dict[str, Any], setting: str, arms: dict[str, Judge], rows: int, seed: int) -> Iterator[dict]:
    """One row for each arm."""
    h = honest(data, setting, rows, seed)
    model = trained(h.w.x, h.w.y, seed)
    before = accuracies(model, h)
    removed_by_us = 0
    for arm, judge in arms.items():
        with contextlib.redirect_stdout(io.StringIO()):
            keep, _ = judge(h.w, model, seed)
        if arm == "ours":
            removed_by_us = int((~keep).sum())
        yield {"setting": setting, "arm": arm, "seed": seed} | _cost(h, keep, before, model, seed)
    stream = torch.Generator().manual_seed(seed)
    keep = torch.ones(len(h.w.y), dtype=torch.bool)
    keep[torch.randperm(len(keep), generator=stream)[:removed_by_us]] = False
    yield {"setting": setting, "arm": "random", "seed": seed} | _cost(h, keep, before, model, seed)


def _cost(h: Honest, keep: Tensor, before: tuple[float, float], model: nn.Module, seed: int) -> dict[str, float]:
    after = before if bool(keep.all()) else accuracies(trained(h.w.x[keep], h.w.y[keep], seed), h)
    gone = (~keep).double()
    return {
        "removed": float(gone.mean()),
        "minority_dropped": float(gone[h.minority].mean()),
        "majority_dropped": float(gone[~h.minority].mean()),
        "worst_class_change": after[0] - before[0],
        "minority_accuracy_change": after[1] - before[1],
    }


def means(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of each setting and arm, and whether the targets hold in them."""
    found = []
    for setting, arm in dict.fromkeys((row["setting"], row["arm"]) for row in table):
        mine = [row for row in table if (row["setting"], row["arm"]) == (setting, arm)]
        names = [name for name in mine[0] if name not in ("setting", "arm", "seed")]
        row = {name: float(np.mean([one[name] for one in mine])) for name in names}
        fair = np.isnan(row["minority_dropped"]) or row["minority_dropped"] <= 2 * row["majority_dropped"]
        kept = {"removed_at_most_half_a_percent": row["removed"] <= 0.005, "minority_at_most_twice": bool(fair)}
        found.append({"setting": setting, "arm": arm, "n": len(mine)} | row | kept)
    return found


def main() -> None:
    """Print the rows as they come, then their means."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--arms", choices=("all", "ours"), default="all")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    arguments = parser.parse_args()
    with np.load(arguments.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    arms: dict[str, Judge] = {"ours": ours}
    if arguments.arms == "all":
        arms |= {"ART activations": art_filter("activations", False), "ART spectral": art_filter("spectral", False)}
    seeds, table = range(FIRST_SEED, FIRST_SEED + arguments.seeds), []
    for seed in seeds:
        for setting in arguments.settings:
            for row in rows_of(data, setting, arms, arguments.rows, seed):
                table.append(row)
                print(" ".join(f"{v:.4f}" if isinstance(v, float) else f"{v!s:22}" for v in row.values()), flush=True)
    summary = means(table)
    print("\nmeans")
    for row in summary:
        print(" ".join(f"{v:.4f}" if isinstance(v, float) else f"{v!s:22}" for v in row.values()))
    result = {"means": summary, "rows": table, "training_rows": arguments.rows}
    name = f"sanitize_honest_{Path(arguments.data).stem}"
    write_result(name, result, seeds=list(seeds), packages=["adversarial-robustness-toolbox", "scikit-learn"])


if __name__ == "__main__":
    main()
