"""Detectors of strange inputs beside pytorch-ood on the same features, the ensemble beside its best member, and speed.

python -m benchmarks.validate_detectors --mnist mnist.npz --fashion fashion_mnist.npz [--seeds 3] [--rows 20000]
A small CNN is trained on MNIST and on Fashion-MNIST; its features and logits feed both libraries. Strange rows: the
other data set, images turned by 90 degrees, inverted, noisy, mixed, pure noise. Per pair: AUROC of each detector, of
pytorch-ood's where it has one, and of three ensembles of the default members against the best single detector: with
shifts of the clean rows, with those shifts alone that do not resemble the strange rows, and without shifts. Then the
time of the score of `Mahalanobis` beside a loop over classes that reads the diagonal of an N x N product. pytorch-ood
imports torchvision at its top for models and data sets that are not used here; where torchvision does not load, an
empty stand-in takes its place. Without pytorch-ood (--alone) the column stays empty. Writes
benchmarks/results/validate_detectors.json after each network; a run with the same settings goes on where the last one
ended.
"""

import argparse
import importlib.abc
import importlib.machinery
import statistics
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aidefend import validate
from aidefend._core.stats import roc_auc
from benchmarks.interleaved import interleave
from benchmarks.record import earlier, write_result

FIRST_SEED = 730
DETECTORS = {
    "energy": validate.Energy(),
    "max-softmax": validate.MaxSoftmax(),
    "max-logit": validate.MaxLogit(),
    "entropy": validate.Entropy(),
    "gen": validate.GEN(),
    "mahalanobis": validate.Mahalanobis(),
    "relative-mahalanobis": validate.RelativeMahalanobis(),
    "nearest-neighbours": validate.NearestNeighbours(k=50),
    "local-dimension": validate.LocalDimension(),
}
MEMBERS = ("energy", "mahalanobis", "relative-mahalanobis", "nearest-neighbours", "local-dimension")  # of the ensemble
ENSEMBLES = ("ensemble", "ensemble of unlike shifts", "ensemble without shifts")
LIKE = {  # for each kind of strange rows, the shifts that the second ensemble does without
    "other": (),
    "turned": ("turned",),
    "inverted": ("inverted",),
    "noisy": ("noisy",),
    "mixed": ("mixed",),
    "noise": ("noisy", "shuffled", "columns"),
}
Outputs = tuple[Tensor, Tensor]


def cnn() -> nn.Sequential:
    """Two convolutions and two linear layers; the features are the input of the last."""
    body = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(x: Tensor, y: Tensor, seed: int, epochs: int = 3) -> nn.Sequential:
    """A CNN after a few epochs of Adam."""
    torch.manual_seed(seed)
    model, stream = cnn(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=stream).split(128):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def outputs(model: nn.Sequential, x: Tensor) -> Outputs:
    """Features and logits."""
    with torch.no_grad():
        features = torch.cat([model[:-1](part) for part in x.split(1000)])
        logits: Tensor = model[-1](features)
    return features, logits


def strange_rows(test: Tensor, other: Tensor, seed: int) -> dict[str, Tensor]:
    """Kinds of rows that should be found, 3,000 each."""
    stream, part = torch.Generator().manual_seed(seed), test[:3000]
    return {
        "other": other[:3000],
        "turned": part.rot90(1, (2, 3)),
        "inverted": 1 - part,
        "noisy": (part + 0.4 * torch.randn(part.shape, generator=stream)).clamp(0, 1),
        "mixed": (part + test[3000:6000]) / 2,
        "noise": torch.rand(part.shape, generator=stream),
    }


class Empty(ModuleType):
    """A module in which every name is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers every import below torchvision with an empty module."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """A spec for torchvision and what lies below it."""
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The empty module."""
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def peer_library() -> tuple[ModuleType, bool]:
    """pytorch-ood's detectors, and whether torchvision had to be replaced."""
    replaced = False
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        replaced = True
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, StandIn())
    from pytorch_ood import detector

    return detector, replaced


def peer_scores(
    peer: ModuleType, fit: Outputs, y: Tensor, head: nn.Linear
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """pytorch-ood's scores by our names, fitted on the same rows."""
    features = fit[0]
    fitted = {
        "mahalanobis": peer.Mahalanobis(None).fit_features(features, y),
        "relative-mahalanobis": peer.RMD(None).fit_features(features, y),
        "nearest-neighbours": peer.KNN(None, k=50).fit_features(features, y),
        "vim": peer.ViM(None, d=64, w=head.weight, b=head.bias).fit_features(features, y),
    }
    scores: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "energy": lambda _, out: peer.EnergyBased.score(out),
        "max-softmax": lambda _, out: peer.MaxSoftmax.score(out),
        "max-logit": lambda _, out: peer.MaxLogit.score(out),
        "entropy": lambda _, out: peer.Entropy(None).predict_logits(out),
        "gen": lambda _, out: peer.GEN.score(out, M=100),
    }
    for name, detector in fitted.items():
        scores[name] = lambda found, _, detector=detector: detector.predict_features(found)
    return scores


def compared(name: str, data: dict[str, Any], other: dict[str, Any], rows: int, seed: int, peer: Any) -> dict[str, Any]:
    """AUROC by detector and kind of strange rows, for one network."""
    x, y = data["train_x"][:rows], data["train_y"][:rows]
    model = trained(x, y, seed)
    fit, clean = outputs(model, x), outputs(model, data["test_x"])
    accuracy = float((clean[1].argmax(dim=1) == data["test_y"]).float().mean())
    strange = {kind: outputs(model, z) for kind, z in strange_rows(data["test_x"], other["test_x"], seed).items()}
    single = {**DETECTORS, "vim": validate.ViM(dimension=64, head=model[-1])}
    fitted = {key: detector.fit(*fit, y) for key, detector in single.items()}

    def ensemble(shifts: validate.Shifts | None) -> Any:
        return validate.Ensemble(shifts=shifts).fit(*fit, y, x=x, outputs=lambda z: outputs(model, z))

    kinds = list(validate.Shifts()(x[:2]))
    unlike = {kind: validate.Shifts([one for one in kinds if one not in like]) for kind, like in LIKE.items()}
    fitted |= {"ensemble": ensemble(validate.Shifts()), "ensemble without shifts": ensemble(None)}
    peers = peer_scores(peer, fit, y, model[-1]) if peer else {}
    with torch.no_grad():
        ours = {key: areas(one.score, clean, strange) for key, one in fitted.items()}
        theirs = {key: areas(score, clean, strange) for key, score in peers.items()}
        ours["ensemble of unlike shifts"] = {
            kind: areas(ensemble(shifts).score, clean, {kind: strange[kind]})[kind] for kind, shifts in unlike.items()
        }
    return {"data": name, "seed": seed, "accuracy": accuracy, "ours": ours, "pytorch_ood": theirs}


def areas(score: Callable[..., Tensor], clean: Outputs, strange: dict[str, Outputs]) -> dict[str, float]:
    """AUROC against each kind of strange rows."""
    negative = score(*clean)
    return {kind: roc_auc(score(*rows), negative).value for kind, rows in strange.items()}


def diagonal_loop(rows: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """The usual form: per class an N x N product of which the diagonal is read."""
    gaps = (rows - mean for mean in means)
    return torch.stack([(gap @ precision @ gap.T).diagonal() for gap in gaps], dim=1).amin(dim=1)


def speed(classes: int, rounds: int, n: int = 256, d: int = 512) -> dict[str, Any]:
    """Time of ours beside the loop with the same means and covariance, and the largest relative difference."""
    stream = torch.Generator().manual_seed(FIRST_SEED)
    centres = 3 * torch.randn(classes, d, generator=stream)
    mixing = torch.eye(d) + 0.3 * torch.randn(d, d, generator=stream) / d**0.5
    labels = torch.arange(8 * max(classes, d)) % classes
    fit = centres[labels] + torch.randn(len(labels), d, generator=stream) @ mixing
    rows = centres[torch.randint(0, classes, (n,), generator=stream)] + torch.randn(n, d, generator=stream) @ mixing
    fitted = validate.Mahalanobis().fit(fit, None, labels)
    whitening = fitted.whitening.double()
    precision = (whitening.T @ whitening).float()
    means = torch.linalg.solve(whitening, fitted.means.double().T).T.float() + fitted.centre
    exact = diagonal_loop(rows.double(), means.double(), precision.double())
    error = float(((fitted.score(rows).double() - exact) / exact).abs().max())
    result = interleave(
        {"loop": lambda: diagonal_loop(rows, means, precision), "ours": lambda: fitted.score(rows)},
        reference="ours",
        rounds=rounds,
        warmup=1,
        seed=FIRST_SEED,
    )
    print(f"C={classes}, relative difference {error:.1e}\n{result.table()}", flush=True)
    return {"classes": classes, "rows": n, "width": d, "relative_difference": error, "timing": result.rows()}


def load(path: str) -> dict[str, Any]:
    """Images (N, 1, 28, 28) in (0, 1) and labels."""
    with np.load(path) as arrays:
        raw = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    images = {name: raw[name].float().div(255).unsqueeze(1) for name in ("train_x", "test_x")}
    return images | {name: raw[name].long() for name in ("train_y", "test_y")}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds: each pair's AUROC of ours and theirs, and the ensemble beside the best single detector."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(run["data"] for run in runs):
        mine = [run for run in runs if run["data"] == name]
        for kind in mine[0]["ours"]["energy"]:
            ours = {key: statistics.fmean(run["ours"][key][kind] for run in mine) for key in mine[0]["ours"]}
            theirs = {
                key: statistics.fmean(run["pytorch_ood"][key][kind] for run in mine) for key in mine[0]["pytorch_ood"]
            }
            joint = {key: ours.pop(key) for key in ENSEMBLES}
            best = max(ours, key=lambda key: ours[key])
            members = max(ours[key] for key in MEMBERS)
            found[f"{name} / {kind}"] = {
                "ours": ours,
                "pytorch_ood": theirs,
                "ensembles": joint,
                "best_single": best,
                "ensemble_minus_best": {key: area - ours[best] for key, area in joint.items()},
                "ensemble_minus_best_member": {key: area - members for key, area in joint.items()},
            }
    return found


def show(pairs: dict[str, Any]) -> None:
    """A table: AUROC in points, ours / pytorch-ood."""
    for pair, row in pairs.items():
        print(f"{pair}: best single {row['best_single']}")
        for key, area in row["ensembles"].items():
            print(f"  {key:26} {100 * area:6.2f} ({100 * row['ensemble_minus_best'][key]:+.2f})")
        for key, area in row["ours"].items():
            peer = row["pytorch_ood"].get(key)
            print(f"  {key:26} {100 * area:6.2f}" + ("" if peer is None else f"  pytorch-ood {100 * peer:6.2f}"))


def main() -> None:
    """Print each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", required=True)
    parser.add_argument("--fashion", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--alone", action="store_true")
    arguments = parser.parse_args()
    peer, replaced = (None, False) if arguments.alone else peer_library()
    data = {"mnist": load(arguments.mnist), "fashion_mnist": load(arguments.fashion)}
    seeds = [FIRST_SEED + i for i in range(arguments.seeds)]
    settings = {"rows": arguments.rows, "torchvision_stand_in": replaced, "first_seed": FIRST_SEED}
    result: dict[str, Any] = {**settings, "runs": [], "mahalanobis": []} | earlier("validate_detectors", settings)
    runs, timing = result["runs"], result["mahalanobis"]

    def keep() -> None:
        result["pairs"] = summary(runs)
        write_result(
            "validate_detectors", result, seeds=sorted({one["seed"] for one in runs}), packages=["pytorch-ood"]
        )

    for seed in seeds:
        for name, other in (("mnist", "fashion_mnist"), ("fashion_mnist", "mnist")):
            if not any(one["seed"] == seed and one["data"] == name for one in runs):
                runs.append(compared(name, data[name], data[other], arguments.rows, seed, peer))
                print(f"{name}, seed {seed}: accuracy {runs[-1]['accuracy']:.4f}", flush=True)
                keep()
    show(result["pairs"])
    for classes, rounds in ((10, 20), (100, 10), (1000, 3)):
        if not any(one["classes"] == classes for one in timing):
            timing.append(speed(classes, rounds))
            keep()


if __name__ == "__main__":
    main()
