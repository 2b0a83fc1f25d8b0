"""One adaptive poison per detector, and what `screen` makes of each.

python -m benchmarks.sanitize_adaptive --data mnist.npz [--seeds 2] [--rows 5000] [--only Scan Beatrix] [--name x]
For each detector a plain attack that it sees, and the disguise that `Evading` finds against its score on the attacker's
own surrogates. Then a defender trains a model of his own (other first weights, other order) on either poison. Per
detector and seed: area under the ROC curve and true-positive rate at 1 % false positives on the plain and the adaptive
poison, the success of both undefended, and the share of the gap between no defense and a perfect filter that
`screen(detectors="auto")` closes on the adaptive one. Adap-Blend and Adap-Patch stand beside them.
Writes benchmarks/results/sanitize_adaptive_NAME.json after each row; rows that are there are not run again, unless the
code that decides has changed since.
"""

import argparse
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from aidefend import Threat, sanitize
from aidefend.attacks.poisoning import AdaptiveBlend, AdaptivePatch, Blend, Disguised, Evading, Patch, Poisoned
from aidefend.sanitize import extract_features, screen
from aidefend.sanitize.out_of_fold import out_of_fold_logits
from aidefend.sanitize.view import IndependentView
from benchmarks.record import earlier, write_result
from benchmarks.sanitize_screen import deciding_code, network, trained

FIRST_SEED = 300
TARGET = 3
SOURCES = 10
EPOCHS = 6
Rows = tuple[Tensor, Tensor]


def features_of(x: Tensor, y: Tensor, model: Any, *, view: bool = False) -> dict[str, Any]:
    """One block of all rows."""
    found = extract_features((x, y), model)
    return next(found.blocks(len(x), IndependentView(x).coordinates(x) if view else None))


def fitted(detector: Any, block: Mapping[str, Any]) -> Tensor:
    """Scores of the rows that the detector was fitted on."""
    return detector.partial_fit(block).score(block)


def of_features(kind: str) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """A detector that looks at the features of the suspect model."""
    return lambda x, y, model: fitted(getattr(sanitize, kind)(), features_of(x, y, model))


def confident(x: Tensor, y: Tensor, model: Any) -> Tensor:
    """ConfidentLearning on predictions of cross-validation."""
    block = features_of(x, y, model, view=True)
    return fitted(
        sanitize.ConfidentLearning(),
        {**block, "logits": out_of_fold_logits(block["ids"], block["view"], block["labels"])},
    )


def disagreement(x: Tensor, y: Tensor, model: Any) -> Tensor:
    """NeighbourDisagreement in the independent view."""
    return fitted(sanitize.NeighbourDisagreement(), features_of(x, y, model, view=True))


def consistency(x: Tensor, y: Tensor, model: Any) -> Tensor:
    """TriggerConsistency of the suspect model."""
    return fitted(sanitize.TriggerConsistency(model, overlays=10), features_of(x, y, model))


def duplicates(x: Tensor, y: Tensor, model: Any) -> Tensor:
    """NearDuplicates by the perceptual hash, with a wide radius, so that there are similarities to rank."""
    return fitted(sanitize.NearDuplicates("image", 0.9), features_of(x, y, model))


def sources(x: Tensor, y: Tensor, model: Any) -> Tensor:
    """SourceEvidence: row i comes from source i mod 10."""
    block = features_of(x, y, model, view=True)
    return fitted(sanitize.SourceEvidence(), {**block, "sources": [f"source {i % SOURCES}" for i in range(len(x))]})


def dynamics(x: Tensor, y: Tensor, model: Any) -> Tensor:
    """TrainingDynamics: losses of three epochs of a training of its own; shortcuts are learnt early."""
    block = {"ids": tuple(map(str, range(len(x)))), "features": torch.zeros(len(x), 1), "labels": y}
    suspect, detector = network(77), sanitize.TrainingDynamics("shortcuts")
    optimizer, stream = torch.optim.Adam(suspect.parameters(), lr=2e-3), torch.Generator().manual_seed(77)
    for _ in range(3):
        for rows in torch.randperm(len(x), generator=stream).split(64):
            optimizer.zero_grad()
            cross_entropy(suspect(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            detector.partial_fit({**block, "losses": cross_entropy(suspect(x), y, reduction="none")})
    return detector.score(block)


class OfTrusted(NamedTuple):
    """Influence against trusted rows, at an early checkpoint, before the poison is known by heart."""

    x: Tensor
    y: Tensor

    def __call__(self, x: Tensor, y: Tensor, model: Any) -> Tensor:
        """Scores of all rows."""
        early = trained(x, y, 78, 2)
        return fitted(sanitize.Influence(features_of(self.x, self.y, early)), features_of(x, y, early))


def screened(x: Tensor, y: Tensor, model: Any) -> Tensor:
    """1 for rows in quarantine, plus the shared score as the smaller part."""
    report = screen((x, y), model=model, seed=0)
    return (~report.keep).double()


@dataclasses.dataclass(frozen=True)
class Case:
    """A plain attack that a detector sees, and what the attacker may change against it."""

    attack: Disguised
    tactics: tuple[Mapping[str, Any], ...]
    score: Callable[[Tensor, Tensor, Any], Tensor]
    push: Threat | None = None


def corners(x: Tensor) -> Tensor:
    """Patches in all four corners: the trigger of a test whose training rows carry one each."""
    for position in CORNERS:
        x = Patch(position=position).stamp(x)
    return x


def frame(x: Tensor) -> Tensor:
    """A white frame of three cells, which leaves the digit as it is."""
    x = x.clone()
    x[..., :3, :] = x[..., -3:, :] = x[..., :, :3] = x[..., :, -3:] = 1.0
    return x


CORNERS: tuple[Any, ...] = ("top-left", "bottom-right", "top-right", "bottom-left")
PARTS = tuple(Patch(position=position).stamp for position in CORNERS)
MIXED = ({"mix": 0.3}, {"mix": 0.45}, {"mix": 0.3, "opacity": (0.5, 0.8), "parts": PARTS})
FAINT = (
    {"opacity": (0.1, 0.3)},
    {"opacity": (0.1, 0.3), "cover_rate": 0.05},
    {"opacity": (0.1, 0.5), "cover_rate": 0.03},
)
SPLIT = ({"parts": PARTS, "opacity": (0.5, 0.5), "cover_rate": 0.05}, {"opacity": (0.3, 0.7)})
SCATTERED = {"parts": PARTS, "opacity": (0.3, 0.6), "cover_rate": 0.1, "rate": 0.03}
VARIED = ({"noise": 0.3}, {"shift": 4}, {"shift": 4, "noise": 0.3})
LEARNT = ({"stamp": corners}, {"mix": 0.3})


def cases(rows: int, trusted: tuple[Tensor, Tensor]) -> dict[str, Case]:
    """By detector."""
    loud = Disguised(frame, TARGET, 0.03)
    upload = Disguised(corners, TARGET, 0.03, hosts="one")
    spot = Disguised(corners, TARGET, 0.03)
    many = Disguised(corners, TARGET, 0.05)
    soft = Disguised(Blend(alpha=0.2).stamp, TARGET, 0.02)
    small = Disguised(Patch().stamp, TARGET, 0.015)
    one = Disguised(Blend(alpha=0.2).stamp, TARGET, 0.05, among=torch.arange(rows) % SOURCES == 4)
    near = Threat("linf", 0.2)
    return {
        "SpectralSignature": Case(loud, FAINT, of_features("SpectralSignature")),
        "ActivationClustering": Case(loud, FAINT, of_features("ActivationClustering")),
        "TrainingDynamics": Case(loud, FAINT, dynamics),
        "NearDuplicates": Case(upload, VARIED, duplicates),
        "Scan": Case(many, (*SPLIT, SCATTERED), of_features("Scan")),
        "TriggerConsistency": Case(many, SPLIT, consistency),
        "Spectre": Case(spot, MIXED[:2], of_features("Spectre"), near),
        "Beatrix": Case(spot, MIXED[:2], of_features("Beatrix"), near),
        "Outliers": Case(spot, MIXED[:2], of_features("Outliers"), near),
        "NeighbourDisagreement": Case(soft, MIXED[:2], disagreement),
        "ConfidentLearning": Case(soft, LEARNT, confident),
        "Influence": Case(small, LEARNT, OfTrusted(*trusted)),
        "SourceEvidence": Case(one, ({"among": None}, {"rate": 0.02}), sources),
        "screen": Case(many, (*MIXED, SPLIT[0]), screened),
    }


def area(scores: Tensor, is_poison: Tensor) -> float:
    """Area under the ROC curve; no opinion counts as the lowest score, ties count half."""
    scores = scores.double().nan_to_num(nan=-torch.inf)
    poison, clean = scores[is_poison], scores[~is_poison].sort().values
    both = [torch.searchsorted(clean, poison, right=right).double() for right in (False, True)]
    return float((both[0] + both[1]).mean() / 2 / len(clean))


def found_at(scores: Tensor, is_poison: Tensor, false_alarms: float = 0.01) -> float:
    """Share of the poison above the threshold that this share of clean rows exceeds."""
    scores = scores.double().nan_to_num(nan=-torch.inf)
    clean = scores[~is_poison].sort().values
    threshold = clean[min(len(clean) - 1, int((1 - false_alarms) * len(clean)))]
    return float((scores[is_poison] > threshold).double().mean())


class HeldOut(NamedTuple):
    """Held-out rows."""

    x: Tensor
    y: Tensor

    def judge(self, model: Any, poisoned: Poisoned) -> tuple[float, float]:
        """Accuracy, and attack success on rows of other classes."""
        others = self.x[self.y != TARGET]
        with torch.no_grad():
            hit = model(poisoned.trigger(others)).argmax(dim=1) == TARGET
            return float((model(self.x).argmax(dim=1) == self.y).double().mean()), float(hit.double().mean())


def read(poisoned: Poisoned) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a poisoned data set."""
    pairs = [poisoned.dataset[i] for i in range(len(poisoned.dataset))]
    return torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])


def adapted(case: Case, data: tuple[Tensor, Tensor], seed: int, floor: float = 0.6) -> tuple[Poisoned, Poisoned, dict]:
    """The plain poison, the poison that was searched, and what was changed."""
    attack = Evading(
        case.attack, case.score, _Trainer(seed), floor=floor, tactics=case.tactics, rounds=1, push=case.push
    )
    trials = attack.search(data, seed)
    changes = {name: _told(value) for name, value in trials[-1].changes.items()}
    return trials[0].poisoned, trials[-1].poisoned, changes


def _told(value: Any) -> str:
    """A changed field, without addresses of functions."""
    if callable(value) or (isinstance(value, tuple) and callable(value[0])):
        return getattr(value, "__name__", f"{len(value) if isinstance(value, tuple) else 1} patches")
    return str(value)


class _Trainer(NamedTuple):
    """The attacker's training."""

    seed: int

    def __call__(self, x: Tensor, y: Tensor) -> Any:
        return trained(x, y, self.seed, EPOCHS)


def measured(score: Any, poisoned: Poisoned, test: HeldOut, seed: int) -> tuple[dict[str, float], Any]:
    """What a defender with a model of his own sees of a poison, and what the poison does to the model."""
    x, y = read(poisoned)
    model = trained(x, y, seed + 1000, EPOCHS)
    accuracy, success = test.judge(model, poisoned)
    found = {"accuracy": accuracy, "asr": success}
    if score is not None:
        scores = score(x, y, model)
        found |= {"auc": area(scores, poisoned.is_poison), "tpr": found_at(scores, poisoned.is_poison)}
    return found, model


def cleaned(poisoned: Poisoned, model: Any, before: float, test: HeldOut, seed: int) -> dict[str, float]:
    """What `screen` makes of it: rates, success after training on what is kept, share of the gap closed."""
    x, y = read(poisoned)
    keep, bad = screen((x, y), model=model, seed=seed).keep, poisoned.is_poison
    after = test.judge(trained(x[keep], y[keep], seed + 2000, EPOCHS), poisoned)
    perfect = test.judge(trained(x[~bad], y[~bad], seed + 2000, EPOCHS), poisoned)[1]
    gap = before - perfect
    return {
        "screen_tpr": float((~keep)[bad].double().mean()),
        "screen_fpr": float((~keep)[~bad].double().mean()),
        "screen_asr": after[1],
        "screen_accuracy": after[0],
        "perfect_asr": perfect,
        "gap_closed": (before - after[1]) / gap if gap > 0.05 else float("nan"),
    }


def row_of(name: str, case: Any, data: tuple[Tensor, Tensor], test: HeldOut, seed: int) -> dict[str, Any]:
    """One detector, or one attack without a search, with one seed."""
    row: dict[str, Any] = {"name": name, "seed": seed}
    if isinstance(case, Case):
        plain, poisoned, row["changes"] = adapted(case, data, seed)
        row["plain"] = measured(case.score, plain, test, seed)[0]
        row["adaptive"], model = measured(case.score, poisoned, test, seed)
    else:
        poisoned = case.poison(data, seed=seed)
        row["adaptive"], model = measured(None, poisoned, test, seed)
    row["screen"] = cleaned(poisoned, model, row["adaptive"]["asr"], test, seed)
    return row


def summary(table: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of each row, and the mean share of the gap that was closed."""
    means = {}
    for name in dict.fromkeys(row["name"] for row in table):
        mine = [row for row in table if row["name"] == name]
        parts = [part for part in ("plain", "adaptive", "screen") if part in mine[0]]
        means[name] = {
            part: {key: float(np.nanmean([row[part][key] for row in mine])) for key in mine[0][part]} for part in parts
        } | {"n": len(mine)}
    closed = [row["screen"]["gap_closed"] for row in table]
    evaded = [n for n, m in means.items() if "plain" in m and m["adaptive"]["auc"] < m["plain"]["auc"] - 0.05]
    unmoved = [n for n, m in means.items() if "plain" in m and n not in evaded]
    failures = [f"{row['name']}, seed {row['seed']}" for row in table if row["screen"]["gap_closed"] < 0.6]
    return {
        "means": means,
        "mean_gap_closed": float(np.nanmean(closed)),
        "detectors_evaded": evaded,
        "detectors_not_evaded": unmoved,
        "screen_failures": failures,
    }


def parts_of(
    data: Mapping[str, Any], rows: int, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], HeldOut]:
    """Training rows, 200 trusted ones beside them, and test rows."""
    order = np.random.default_rng(seed).permutation(len(data["train_x"]))
    parts = [order[:rows], order[rows : rows + 200]]
    train, trusted = ((_images(data["train_x"][p]), torch.from_numpy(data["train_y"][p]).long()) for p in parts)
    return train, trusted, HeldOut(_images(data["test_x"][:3000]), torch.from_numpy(data["test_y"][:3000]).long())


def _images(raw: Any) -> Tensor:
    return torch.from_numpy(raw).float().div(255).unsqueeze(1)


def everything(data: Mapping[str, Any], rows: int, seed: int) -> Iterator[tuple[str, Any, Any, HeldOut]]:
    """Name, case or attack, training rows, test rows."""
    train, trusted, test = parts_of(data, rows, seed)
    listed: dict[str, Any] = {
        "Adap-Blend": AdaptiveBlend(TARGET, 0.03, 0.03),
        "Adap-Patch": AdaptivePatch(TARGET, 0.03, 0.03, test_stamps=4),
        **cases(rows, trusted),
    }
    for name, case in listed.items():
        yield name, case, train, test


def main() -> None:
    """Print each row as it comes, and write the result after each."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--only", nargs="*", default=None, help="run these again")
    parser.add_argument("--name", default="", help="added to the name of the result")
    arguments = parser.parse_args()
    with np.load(arguments.data) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    name = f"sanitize_adaptive_{Path(arguments.data).stem}{arguments.name}"
    seeds = list(range(FIRST_SEED, FIRST_SEED + arguments.seeds))
    again = set(arguments.only or ())
    code, known = deciding_code(), earlier(name, {"training_rows": arguments.rows}).get("rows", [])
    table = [row for row in known if row["name"] not in again and row.get("code") == code]
    for seed in seeds:
        for label, case, train, test in everything(data, arguments.rows, seed):
            if (again and label not in again) or any((r["name"], r["seed"]) == (label, seed) for r in table):
                continue
            table.append(row_of(label, case, train, test, seed) | {"code": code})
            print(table[-1], flush=True)
            result = summary(table) | {"rows": table, "training_rows": arguments.rows}
            write_result(name, result, seeds=sorted({row["seed"] for row in table}))
    print(summary(table))


if __name__ == "__main__":
    main()
