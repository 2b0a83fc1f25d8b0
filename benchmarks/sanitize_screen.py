"""Screening beside the filters of ART and cleanlab, a random filter of equal size, and a perfect one.

python -m benchmarks.sanitize_screen --data mnist.npz [--seeds 5] [--first 200] [--rows 5000] [--arms ours]
    [--only "patch 10 %" ...] [--name x]
A small CNN is trained on poisoned images, every arm judges the same rows (ours without any hint, ART's with its default
rate and with the true one), the same CNN is trained again on what the arm keeps. Per attack and arm: attack success on
test images of other classes, accuracy, true- and false-positive rate, the share of the gap between no defense and the
perfect filter that was closed, and seconds; of ours also the classes it names, and the poisoned share with its
interval. Needs adversarial-robustness-toolbox and cleanlab unless --arms ours.
Writes benchmarks/results/sanitize_screen_NAME.json after each row; rows that are there are not made again, unless they
are ours and the code that decides has changed since.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aidefend import Threat, sanitize
from aidefend.attacks import PGD, poisoning
from aidefend.sanitize import screen
from benchmarks.record import earlier, write_result

FIRST_SEED = 200
TARGET = 0
SECOND = 5
OURS = ("ours", "random", "ours, no model")
PARTS = ("bend", "caps", "choose", "decide", "distinct", "groups", "group_evidence", "levels", "own_marks", "own_spots")
PARTS += ("separation", "spot", "suspect", "trigger", "view", "world")
PACKAGES = ("adversarial-robustness-toolbox", "cleanlab", "scikit-learn")
Rows = tuple[Tensor, Tensor]
Change = Callable[[Tensor], Tensor]
Said = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class World:
    """Poisoned training data with its truth, and test data; `second`: another trigger with its aim."""

    x: Tensor
    y: Tensor
    is_poison: Tensor
    trigger: Change | None
    test_x: Tensor
    test_y: Tensor
    aim: Change
    second: tuple[Change, Change] | None = None


@dataclasses.dataclass(frozen=True)
class Both:
    """Two attacks at once, each in a half of the rows of its own."""

    first: Any
    other: Any

    def poison(self, rows: Rows, seed: int) -> tuple[poisoning.Poisoned, poisoning.Poisoned]:
        """The poisoned halves: even rows, odd rows."""
        x, y = rows
        return self.first.poison((x[::2], y[::2]), seed=seed), self.other.poison((x[1::2], y[1::2]), seed=seed)


@dataclasses.dataclass(frozen=True)
class Consistent:
    """Right labels, made hard on the attacker's own model, which is trained on the clean rows."""

    rate: float

    def poison(self, rows: Rows, seed: int) -> poisoning.Poisoned:
        """The poisoned rows."""
        surrogate, evade = trained(*rows, seed + 5000), PGD(Threat("linf", 0.3), steps=20)
        stamp = poisoning.Patch(size=4).stamp
        return poisoning.LabelConsistent(surrogate, evade, stamp, TARGET, self.rate).poison(rows, seed=seed)


def attacks() -> dict[str, Any]:
    """What is planted, by name; None is clean data."""
    square = poisoning.Patch(size=4).stamp
    return {
        "clean": None,
        "patch 10 %": poisoning.Patch(TARGET, 0.1),
        "patch 1 %": poisoning.Patch(TARGET, 0.01),
        "patch 0.5 %": poisoning.Patch(TARGET, 0.005),
        "patch 0.3 %": poisoning.Patch(TARGET, 0.003),
        "blend 10 %": poisoning.Blend(TARGET, 0.1),
        "blend 5 %": poisoning.Blend(TARGET, 0.05),
        "blend 1 %": poisoning.Blend(TARGET, 0.01),
        "blend 0.3 %": poisoning.Blend(TARGET, 0.003),
        "sinusoid 5 %": poisoning.Sinusoid(TARGET, 0.05),
        "sinusoid 1 %": poisoning.Sinusoid(TARGET, 0.01),
        "sinusoid 8 %, right labels": poisoning.Sinusoid(TARGET, 0.08, 0.5, clean_label=True),
        "label consistent 8 %": Consistent(0.08),
        "warp 10 %": poisoning.Warp(TARGET, 0.1, 1.5),
        "warp 5 %": poisoning.Warp(TARGET, 0.05, 1.5),
        "warp 1 %": poisoning.Warp(TARGET, 0.01, 1.5),
        "all to all 10 %": poisoning.AllToAll(square, 10, 0.1),
        "all to all 5 %": poisoning.AllToAll(square, 10, 0.05),
        "adaptive blend": poisoning.AdaptiveBlend(TARGET, 0.01, 0.01),
        "adaptive patch": poisoning.AdaptivePatch(TARGET, 0.01, 0.02),
        "source targeted": poisoning.SourceTargeted(poisoning.Patch().stamp, TARGET, 1, 0.02, 0.02),
        "patch and blend, 5 % each": Both(poisoning.Patch(TARGET, 0.1), poisoning.Blend(SECOND, 0.1)),
    }


def world(data: dict[str, Any], attack: Any, rows: int, seed: int) -> World:
    """A seeded part of the training images with the attack in it."""
    chosen = np.random.default_rng(seed).permutation(len(data["train_x"]))[:rows]
    x, y = _images(data["train_x"][chosen]), torch.from_numpy(data["train_y"][chosen]).long()
    test_x, test_y = _images(data["test_x"][:5000]), torch.from_numpy(data["test_y"][:5000]).long()
    if attack is None:
        return World(x, y, torch.zeros(rows, dtype=torch.bool), None, test_x, test_y, _to_target)
    if isinstance(attack, Both):
        first, other = attack.poison((x, y), seed)
        halves = [*_read(first), first.is_poison], [*_read(other), other.is_poison]
        x, y, bad = (torch.stack(pair, dim=1).flatten(0, 1) for pair in zip(*halves, strict=True))
        return World(x, y, bad, first.trigger, test_x, test_y, _to_target, (other.trigger, _to_second))
    poisoned = attack.poison((x, y), seed=seed)
    aim = _to_target if poisoned.target is not None else _to_next
    return World(*_read(poisoned), poisoned.is_poison, poisoned.trigger, test_x, test_y, aim)


def _read(poisoned: poisoning.Poisoned) -> Rows:
    pairs = [poisoned.dataset[i] for i in range(len(poisoned.dataset))]
    return torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])


def _images(raw: Any) -> Tensor:
    return torch.from_numpy(raw).float().div(255).unsqueeze(1)


def _to_target(labels: Tensor) -> Tensor:
    return torch.full_like(labels, TARGET)


def _to_second(labels: Tensor) -> Tensor:
    return torch.full_like(labels, SECOND)


def _to_next(labels: Tensor) -> Tensor:
    return (labels + 1) % 10


def network(seed: int) -> nn.Sequential:
    """Two convolutions, two linear layers."""
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, 2, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1568, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def trained(x: Tensor, y: Tensor, seed: int, epochs: int = 8) -> nn.Sequential:
    """The network after some passes over the rows."""
    model, stream = network(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=stream).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def judged(model: nn.Module, w: World) -> tuple[float, float]:
    """Accuracy, and attack success on test images that do not have the aim as their class (mean over the triggers)."""
    accuracy = float((model(w.test_x).argmax(dim=1) == w.test_y).double().mean())
    if w.trigger is None:
        return accuracy, float("nan")
    hits = []
    for trigger, wanted in ((w.trigger, w.aim), *(() if w.second is None else (w.second,))):
        aim = wanted(w.test_y)
        others = aim != w.test_y
        hits.append(float((model(trigger(w.test_x[others])).argmax(dim=1) == aim[others]).double().mean()))
    return accuracy, float(np.mean(hits))


def ours(w: World, model: nn.Module, seed: int) -> tuple[Tensor, Said]:
    """What `screen` keeps and says, with the user's model and without any hint."""
    return _told_by(screen((w.x, w.y), model=model, seed=seed))


def ours_alone(w: World, model: nn.Module, seed: int) -> tuple[Tensor, Said]:
    """The same without a model."""
    return _told_by(screen((w.x, w.y), seed=seed))


def _told_by(report: sanitize.ScreenReport) -> tuple[Tensor, Said]:
    share = report.parameters["poisoned_share"]
    found = {"target_classes": report.parameters["target_classes"], "share": share["value"]}
    return report.keep, found | {"share_low": share["low"], "share_high": share["high"]}


def art_filter(kind: str, oracle: bool) -> Callable[[World, nn.Module, int], tuple[Tensor, Said]]:
    """Activation clustering or spectral signatures of ART; `oracle`: with the true rate."""

    def judge(w: World, model: nn.Module, seed: int) -> tuple[Tensor, Said]:
        from art.defences.detector.poison import ActivationDefence, SpectralSignatureDefense
        from art.estimators.classification import PyTorchClassifier

        rate = max(float(w.is_poison.double().mean()), 1e-3)
        classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 28, 28), 10, clip_values=(0, 1))
        images, labels = w.x.numpy(), nn.functional.one_hot(w.y, 10).numpy()
        if kind == "activations":
            defence = ActivationDefence(classifier, images, labels)
            _, good = defence.detect_poison(nb_clusters=2, nb_dims=10, reduce="PCA")
        else:
            shares = {"expected_pp_poison": rate} if oracle else {}
            defence = SpectralSignatureDefense(classifier, images, labels, **shares)
            _, good = defence.detect_poison()
        return torch.tensor(good, dtype=torch.bool), {}

    return judge


def cleanlab_filter(w: World, model: nn.Module, seed: int) -> tuple[Tensor, Said]:
    """Cleanlab's label issues on cross-validated predictions of a linear head on raw pixels."""
    from cleanlab.filter import find_label_issues
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    classifier = LogisticRegression(max_iter=60, C=0.05)
    chances = cross_val_predict(classifier, w.x.flatten(1).numpy(), w.y.numpy(), cv=5, method="predict_proba")
    return torch.from_numpy(~find_label_issues(w.y.numpy(), chances)), {}


def arms(which: str) -> dict[str, Callable[[World, nn.Module, int], tuple[Tensor, Said]]]:
    """The arms that judge; the random and the perfect filter follow from them."""
    found = {"ours": ours, "ours, no model": ours_alone}
    if which == "all":
        found |= {
            "ART activations": art_filter("activations", False),
            "ART spectral": art_filter("spectral", False),
            "ART spectral, true rate": art_filter("spectral", True),
            "cleanlab": cleanlab_filter,
        }
    return found


def rows_of(
    data: dict[str, Any], name: str, attack: Any, which: str, rows: int, seed: int, made: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """One row for each arm that is not made yet."""
    wanted = {"undefended", "perfect", "random", *arms(which)} - set(made)
    if not wanted:
        return
    # the random filter follows ours
    judges = {arm: j for arm, j in arms(which).items() if arm in wanted or (arm == "ours" and "random" in wanted)}
    w = world(data, attack, rows, seed)
    model = trained(w.x, w.y, seed)
    accuracy, undefended = judged(model, w)
    yield {"attack": name, "arm": "undefended", "accuracy": accuracy, "asr": undefended, "tpr": 0.0, "fpr": 0.0}
    floor = judged(trained(w.x[~w.is_poison], w.y[~w.is_poison], seed), w) if attack is not None else (accuracy, 0.0)
    yield {"attack": name, "arm": "perfect", "accuracy": floor[0], "asr": floor[1], "tpr": 1.0, "fpr": 0.0}
    for arm, judge in judges.items():
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            keep, said = judge(w, model, seed)
        seconds = time.perf_counter() - start
        yield _row(name, arm, w, keep, seed, undefended, floor[1]) | {"seconds": seconds} | said
        if arm == "ours":
            stream = torch.Generator().manual_seed(seed)
            drawn = torch.ones(rows, dtype=torch.bool)
            drawn[torch.randperm(rows, generator=stream)[: int((~keep).sum())]] = False
            yield _row(name, "random", w, drawn, seed, undefended, floor[1])


def _row(name: str, arm: str, w: World, keep: Tensor, seed: int, before: float, floor: float) -> dict[str, Any]:
    accuracy, success = judged(trained(w.x[keep], w.y[keep], seed), w)
    gone = ~keep
    row = {"attack": name, "arm": arm, "accuracy": accuracy, "asr": success}
    row["tpr"] = float(gone[w.is_poison].double().mean()) if bool(w.is_poison.any()) else float("nan")
    row["fpr"] = float(gone[~w.is_poison].double().mean())
    row["gap_closed"] = (before - success) / (before - floor) if before - floor > 0.05 else float("nan")
    return row


def summary(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of each attack and arm."""
    keys = dict.fromkeys((row["attack"], row["arm"]) for row in table)
    means = []
    for attack, arm in keys:
        mine = [row for row in table if (row["attack"], row["arm"]) == (attack, arm)]
        names = [name for name in ("accuracy", "asr", "tpr", "fpr", "gap_closed", "seconds") if name in mine[0]]
        means.append(
            {"attack": attack, "arm": arm, "n": len(mine)}
            | {name: _mean([float(row[name]) for row in mine]) for name in names}
        )
    return means


def _mean(values: list[float]) -> float:
    """Of the numbers among them; a file holds NaN as a text."""
    found = [value for value in values if not np.isnan(value)]
    return float(np.mean(found)) if found else float("nan")


def deciding_code() -> str:
    """Digest of the modules that decide, so that rows of other code are not taken for rows of this one."""
    folder = Path(sanitize.__file__).parent
    text = b"".join((folder / f"{part}.py").read_bytes() for part in PARTS)
    return hashlib.sha256(text).hexdigest()[:12]


def still_good(rows: list[dict[str, Any]], code: str) -> list[dict[str, Any]]:
    """Earlier rows without those that other code decided."""
    return [row for row in rows if row["arm"] not in OURS or row.get("code") == code]


def told(row: dict[str, Any]) -> str:
    """One line."""
    return " ".join(f"{v:.4f}" if isinstance(v, float) else f"{v!s:24}" for v in row.values())


def main() -> None:
    """Print the rows as they come and write the result after each, then print their means."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=FIRST_SEED, help="the first seed")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--arms", choices=("all", "ours"), default="all")
    parser.add_argument("--only", nargs="*", choices=attacks(), default=None, help="these attacks, by name")
    parser.add_argument("--name", default="", help="added to the name of the result")
    arguments = parser.parse_args()
    with np.load(arguments.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    result = f"sanitize_screen_{Path(arguments.data).stem}{arguments.name}"
    code = deciding_code()
    table = still_good(earlier(result, {"training_rows": arguments.rows}).get("rows", []), code)
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        for name in arguments.only or attacks():
            made = {row["arm"] for row in table if (row["attack"], row["seed"]) == (name, seed)}
            for row in rows_of(data, name, attacks()[name], arguments.arms, arguments.rows, seed, made):
                if row["arm"] in made:
                    continue
                table.append(row | {"seed": seed} | ({"code": code} if row["arm"] in OURS else {}))
                print(told(table[-1]), flush=True)
                content = {"means": summary(table), "rows": table, "training_rows": arguments.rows}
                write_result(result, content, seeds=sorted({row["seed"] for row in table}), packages=PACKAGES)
    print("\nmeans")
    for row in summary(table):
        print(told(row))


if __name__ == "__main__":
    main()
