"""Every public call with bad input: one error of ours that names an argument, and a model that is as it was.

The list holds one good call for each public door. The sweep replaces one argument after the other with values of every
wrong kind. A call may take a value (None where it is a default, 0.5 where a number is asked for). It may not let an
error out that is no `AidefendError`, draw from a global stream or leave a trace on the model.
"""

import functools
import importlib
import inspect
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import aidefend
from aidefend import (
    AidefendError,
    Evidence,
    Finding,
    Report,
    Severity,
    Threat,
    adversarial,
    artifacts,
    attacks,
    audit,
    collaborate,
    datasets,
    explain,
    monitor,
    privacy,
    sanitize,
    validate,
)
from tests.validate.query_world import FakeRedis

ROWS, CLASSES = 24, 3
KEY = b"0123456789abcdef"
DOT = b"GIF87a\x01\0\x01\0\x80\0\0\xff\xff\xff\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"
SCORES = torch.arange(99.0)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """BatchNorm and dropout: what a careless call would leave changed."""

    def __init__(self, answer=None, *, raises=False):
        super().__init__()
        torch.manual_seed(0)  # the test's own stream: every Net has the same weights
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(32, CLASSES)
        self.answer, self.raises = answer, raises
        self.eval()

    def forward(self, x):
        hidden = self.body(x)
        if self.raises:
            raise ZeroDivisionError("the model broke")
        outputs = self.head(hidden)
        return outputs if self.answer is None else self.answer(outputs)


class Broken:
    """A data set with a row that cannot be read."""

    def __len__(self):
        return 10

    def __getitem__(self, row):
        if row == 3:
            raise OSError("row 3 is damaged")
        return torch.zeros(1, 6, 6), 0


def private_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))


def per_example(outputs, targets):
    return cross_entropy(outputs, targets, reduction="none")


def private_config():
    return privacy.PrivacyConfig(
        expected_batch_size=8, steps=2, max_grad_norm=1.0, delta=1e-5, public_size=24, noise_multiplier=1.0
    )


X, X2 = torch.rand(ROWS, 1, 6, 6, generator=stream()), torch.rand(ROWS, 1, 6, 6, generator=stream(1))
Y = torch.arange(ROWS) % CLASSES
MANY = torch.rand(300, 1, 6, 6, generator=stream(2))
HOLED = X.clone()
HOLED[2, 0, 1, 1] = float("nan")
THREAT = Threat("linf", 0.1)
ATTACK = attacks.PGD(THREAT, 1)
EVIDENCE = Evidence([Finding("a.b", "t", Severity.HIGH, 0.5, 0.4, 0.6, 10)])
LOGITS = torch.rand(ROWS, CLASSES + 1, generator=stream(3))
STREAMS = [(MANY[8 * i : 8 * i + 8], torch.rand(8, CLASSES + 1, generator=stream(4 + i))) for i in range(34)]
QUERY_OPTIONS = {
    "store": validate.MemoryStore(),
    "action": "alert",
    "delay": (1.0, 2.0),
    "clock": lambda: 1.0,
}
QUERIES = validate.QueryMonitor.calibrate(STREAMS, validate.MemoryStore(), alpha=0.1, key=KEY)
BLOCK = {"ids": tuple(map(str, range(ROWS))), "features": X.flatten(1), "labels": Y, "x": X}

WRONG = {
    "None": None,
    "text": "nonsense",
    "negative": -1,
    "half": 0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "huge": 10**30,
    "object": object(),
    "empty list": [],
    "list of None": [None],
    "dict": {"a": 1},
    "bytes": b"bytes",
    "array": np.zeros(3),
    "array of objects": np.array([object(), None]),
    "no rows": X[:0],
    "scalar": torch.tensor(1.0),
    "holes": HOLED,
    "one dimension": X[:, 0, 0, 0],
    "other shape": X[:, :, :5],
    "bytes of pixels": (X * 255).byte(),
    "complex": X.to(torch.complex64),
    "sparse": X.reshape(ROWS, 36).to_sparse(),
    "outside": X * 3 - 1,
    "few rows": X[:3],
    "labels below 0": Y - 5,
    "labels too high": Y + 100,
    "ragged rows": [(torch.zeros(2), 0), (torch.zeros(3), 1)],
    "broken rows": Broken(),
    "no labels": TensorDataset(X),
    "wrong labels": (X, Y - 5),
    "unequal pair": (X, Y[:3]),
}
MODELS = {
    "raises": lambda: Net(raises=True),
    "raises in train mode": lambda: Net(raises=True).train(),
    "train mode": lambda: Net().train(),
    "probabilities": lambda: Net(lambda outputs: outputs.softmax(dim=1)),
    "text": lambda: Net(lambda outputs: "text"),
    "one row": lambda: Net(lambda outputs: outputs[:1]),
    "classes": lambda: Net(lambda outputs: outputs.argmax(dim=1)),
    "holes": lambda: Net(lambda outputs: outputs * float("nan")),
    "half precision": lambda: Net().half(),
    "no argument": lambda: lambda: None,
}


def guard():
    return validate.Guard.calibrate(Net(), MANY, detectors=[validate.Energy()], alpha=0.05)


@functools.cache
def one_guard():
    """The same guard for every call that does not make one."""
    return guard()


def file(name, content=b"x"):
    path = Path(tempfile.mkdtemp()) / name
    path.write_bytes(content)
    return path


def saved(thing, name="saved"):
    path = Path(tempfile.mkdtemp()) / name
    thing.save(path)
    return path


def table_spec():
    return validate.TableSpec({"a": validate.Column("number")})


@functools.cache
def store():
    return sanitize.FeatureStore.write(TensorDataset(X, Y), Net(), new_path(), shard_rows=10)


def new_path():
    return Path(tempfile.mkdtemp()) / "new"


def stored_detector():
    path = new_path()
    validate.save_detector(validate.Reconstruction(nn.Identity()), path)
    return path


def croissant():
    path = new_path()
    TRUSTED.to_croissant(path, name="data")
    return path


def weights():
    return saved_tensors({"w": torch.ones(3, 3)})


def saved_tensors(tensors):
    from safetensors.torch import save

    return file("w.safetensors", save(tensors))


def npz():
    path = Path(tempfile.mkdtemp()) / "images.npz"
    parts = {f"{part}_x": np.zeros((4, 28, 28), np.uint8) for part in ("train", "test")}
    labels = {f"{part}_y": np.arange(4, dtype=np.uint8) for part in ("train", "test")}
    np.savez(path, **parts, **labels)
    return path


def with_private(use):
    def run(**arguments):
        model = private_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = privacy.make_private(model, optimizer, TensorDataset(X, Y), per_example, private_config())
        try:
            return use(run, **arguments)
        finally:
            run.release()

    return run


def made_private(**arguments):
    privacy.make_private(**arguments).release()


def private_arguments():
    model = private_net()
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "dataset": TensorDataset(X, Y),
        "per_example_loss": per_example,
        "config": private_config(),
        "ledger": None,
    }


def budget():
    return monitor.QueryBudget(new_path(), monitor.Bucket(9))


def rule():
    return monitor.Rule("reader", ("predict",), ("model",))


def policy():
    return monitor.AccessPolicy([rule()], {"alice": ["reader"]})


def log():
    return monitor.AuditLog(new_path(), KEY)


def report():
    return Report(("a", "b"), torch.tensor([True, False]))


def trained(dataset, seed):
    return Net()


def plan():
    sizes = {"samples": 8, "comparisons": 16, "shadows": 4, "inversion_steps": 2, "queries": (5,)}
    return audit.AuditPlan(parts=("membership", "storage"), **sizes)


def sample_arguments():
    return {"model": Net(), "x": X, "y": Y}


LOGIT_BLOCK = {**BLOCK, "logits": torch.zeros(ROWS, CLASSES)}
ENSEMBLE = sanitize.PartitionEnsemble(partitions=3).fit(TensorDataset(X, Y))
SCREENED = sanitize.ScreenReport(["a", "b"], torch.tensor([False, True]), {"structured_poison": torch.ones(2)})
FITTED = sanitize.SpectralSignature().partial_fit(BLOCK)
INDICATORS = collaborate.sample_indicators(X[:4], KEY)
DETECTOR = collaborate.apply_indicators(INDICATORS, KEY)
FOUR = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 4)).requires_grad_(False)
SCHEMA = sanitize.DatasetSchema.infer((X, Y))
TRUSTED = sanitize.TrustedSources([sanitize.Source.of("web", {"r": b"x"}), sanitize.Source.of("file", b"x")])
STATE = sanitize.screen(TensorDataset(X, Y)).state()
MARKED = X.clone()
MARKED[..., -2:, -2:] = 1.0


def smoothed(model):
    return adversarial.SmoothedModel(model, 0.5, CLASSES, samples=9)


# name: (call, good arguments). The first part of a name is the public name that the entry stands for.
CALLS = {
    "Threat": (
        Threat,
        lambda: {
            "norm": "l2",
            "eps": 0.1,
            "bounds": (0.0, 1.0),
            "mask": torch.tensor(True),
            "integer": torch.tensor(False),
            "groups": ((0, 1),),
            "scale": torch.tensor(1.0),
        },
    ),
    "Threat.normalised": (
        Threat.normalised,
        lambda: {"norm": "linf", "eps": 0.1, "mean": [0.5], "std": [0.25], "bounds": (0.0, 1.0)},
    ),
    "Threat.to_uint8": (
        lambda **a: Threat("linf", 0.1).to_uint8(**a),
        lambda: {"x_adv": torch.full((2, 3), 0.2), "x": torch.full((2, 3), 0.2)},
    ),
    "adversarial.certify_bounds": (
        adversarial.certify_bounds,
        lambda: {
            "model": Net(),
            "x": X[:2],
            "y": Y[:2],
            "threat": Threat("linf", 0.1),
            "method": "ibp",
            "batch_size": 2,
        },
    ),
    "adversarial.BoundSchedule": (
        adversarial.BoundSchedule,
        lambda: {"warmup": adversarial.EpsWarmup(5), "kappa": (1.0, 0.5), "beta": (1.0, 0.0)},
    ),
    "adversarial.BoundSchedule.objective_at": (
        lambda **a: adversarial.BoundSchedule(adversarial.EpsWarmup(5)).objective_at(**a),
        lambda: {"objective": adversarial.IBPTraining(Threat("linf", 0.1)), "step": 2},
    ),
    **{
        f"adversarial.{name}": (getattr(adversarial, name), make)
        for name, make in {
            "IBPTraining": lambda: {"threat": Threat("linf", 0.1), "kappa": 0.5, "criterion": per_example},
            "CrownIBPTraining": lambda: {
                "threat": Threat("l2", 0.1),
                "kappa": 0.5,
                "beta": 0.5,
                "criterion": per_example,
            },
            "SABR": lambda: {
                "attack": attacks.PGD(Threat("linf", 0.1)),
                "share": 0.4,
                "kappa": 0.0,
                "criterion": per_example,
                "attack_mode": "eval",
            },
            "Gaussian": lambda: {"sigma": 0.1, "samples": 2, "criterion": per_example},
            "Consistency": lambda: {
                "sigma": 0.1,
                "samples": 2,
                "weight": 1.0,
                "entropy_weight": 0.5,
                "criterion": per_example,
            },
            "MACER": lambda: {
                "sigma": 0.1,
                "samples": 2,
                "weight": 1.0,
                "gamma": 8.0,
                "inverse_temperature": 16.0,
                "criterion": per_example,
            },
            "SmoothAdv": lambda: {
                "attack": attacks.PGD(Threat("l2", 0.1)),
                "sigma": 0.1,
                "samples": 2,
                "criterion": per_example,
                "attack_mode": "eval",
            },
        }.items()
    },
    **{
        f"adversarial.{name}.call": (lambda make=make, **a: make()(Net(), **a), lambda: {"x": X, "y": Y})
        for name, make in {
            "IBPTraining": lambda: adversarial.IBPTraining(Threat("linf", 0.1)),
            "CrownIBPTraining": lambda: adversarial.CrownIBPTraining(Threat("linf", 0.1)),
            "SABR": lambda: adversarial.SABR(attacks.PGD(Threat("linf", 0.1), 2)),
            "Gaussian": lambda: adversarial.Gaussian(0.1),
            "Consistency": lambda: adversarial.Consistency(0.1),
            "MACER": lambda: adversarial.MACER(0.1, 2),
            "SmoothAdv": lambda: adversarial.SmoothAdv(attacks.PGD(Threat("l2", 0.1), 2), 0.1),
            "PGDTraining": lambda: adversarial.PGDTraining(ATTACK),
            "TRADES": lambda: adversarial.TRADES(ATTACK),
            "FastTraining": lambda: adversarial.FastTraining(ATTACK),
            "NFGSM": lambda: adversarial.NFGSM(ATTACK),
            "FreeTraining": lambda: adversarial.FreeTraining(THREAT),
            "MART": lambda: adversarial.MART(ATTACK),
            "HAT": lambda: adversarial.HAT(ATTACK, Net()),
            "LogitPairing": lambda: adversarial.LogitPairing(ATTACK),
            "GradAlign": lambda: adversarial.GradAlign(adversarial.FastTraining(ATTACK), THREAT),
            "AWP": lambda: adversarial.AWP(adversarial.PGDTraining(ATTACK)),
        }.items()
    },
    "adversarial.SmoothedModel": (
        adversarial.SmoothedModel,
        lambda: {"model": Net(), "sigma": 0.5, "num_classes": CLASSES, "samples": 9, "batch_size": 8},
    ),
    "adversarial.SmoothedModel.certify": (
        lambda model, **a: smoothed(model).certify(**a),
        lambda: {
            "model": Net(),
            "x": X[:2],
            "n0": 5,
            "n": 20,
            "alpha": 0.05,
            "generator": stream(),
            "early_stop": True,
            "target_radius": 0.1,
        },
    ),
    "adversarial.SmoothedModel.predict": (
        lambda model, **a: smoothed(model).predict(**a),
        lambda: {"model": Net(), "x": X[:2], "n": 20, "alpha": 0.05, "generator": stream()},
    ),
    "adversarial.SmoothedModel.forward": (lambda model, x: smoothed(model)(x), lambda: {"model": Net(), "x": X[:2]}),
    "adversarial.SmoothedModel.attackable": (
        lambda x, **a: smoothed(Net()).attackable(**a)(x),
        lambda: {"x": X[:2], "samples": 2, "seed": 0},
    ),
    "adversarial.SmoothingCertificate.accuracy_at": (
        lambda **a: smoothed(Net()).certify(X[:2], n=20, alpha=0.05).accuracy_at(**a),
        lambda: {"radii": [0.0, 0.5], "y": Y[:2], "confidence": 0.9},
    ),
    "adversarial.SmoothingCertificate.average_radius": (
        lambda y: smoothed(Net()).certify(X[:2], n=20, alpha=0.05).average_radius(y),
        lambda: {"y": Y[:2]},
    ),
    "adversarial.SmoothingCertificate.to_evidence": (
        lambda **a: smoothed(Net()).certify(X[:2], n=20, alpha=0.05).to_evidence(**a),
        lambda: {"y": Y[:2], "radii": [0.0, 0.5]},
    ),
    "Report": (
        Report,
        lambda: {"ids": ("a", "b"), "keep": torch.tensor([True, False]), "scores": {}, "reasons": ((), ("r",))},
    ),
    "Report.view": (lambda dataset: report().view(dataset), lambda: {"dataset": TensorDataset(X[:2])}),
    "Report.and": (lambda other: report() & other, lambda: {"other": report()}),
    "Report.save": (lambda path: report().save(path), lambda: {"path": new_path()}),
    "Report.load": (Report.load, lambda: {"path": saved(report())}),
    "Finding": (Finding, lambda: {"id": "a", "title": "t", "severity": Severity.LOW, "value": 0.5, "n": 3}),
    "Finding.from_dict": (Finding.from_dict, lambda: {"data": Finding("a", "t").to_dict()}),
    "Evidence": (Evidence, lambda: {"findings": [Finding("a", "t")], "metadata": {}}),
    "Evidence.from_dict": (Evidence.from_dict, lambda: {"data": EVIDENCE.to_dict()}),
    "Evidence.to_json": (EVIDENCE.to_json, lambda: {"path": new_path()}),
    "attacks.Patch": (
        lambda **a: attacks.Patch(**a).poison((X, Y)),
        lambda: {"target": 0, "rate": 0.2, "size": 2, "position": "center", "value": None, "bounds": (0.0, 1.0)},
    ),
    "attacks.Patch.poison": (attacks.Patch(0, 0.2, 2).poison, lambda: {"dataset": TensorDataset(X, Y), "seed": 0}),
    "attacks.Patch.stamp": (attacks.Patch(0, 0.2, 2).stamp, lambda: {"x": X}),
    "attacks.Blend": (
        lambda **a: attacks.Blend(**a).poison((X, Y)),
        lambda: {"target": 0, "rate": 0.2, "alpha": 0.2, "pattern": None, "bounds": (0.0, 1.0)},
    ),
    "attacks.Sinusoid": (
        lambda **a: attacks.Sinusoid(**a).poison((X, Y)),
        lambda: {
            "target": 0,
            "rate": 0.2,
            "strength": 0.2,
            "frequency": 3.0,
            "clean_label": False,
            "bounds": (0.0, 1.0),
        },
    ),
    "attacks.Warp": (
        lambda **a: attacks.Warp(**a).poison((X, Y)),
        lambda: {"target": 0, "rate": 0.2, "strength": 0.5, "grid": 3, "field_seed": 0},
    ),
    "attacks.SourceTargeted": (
        lambda **a: attacks.SourceTargeted(**a).poison((X, Y)),
        lambda: {
            "stamp": attacks.Patch(size=1).stamp,
            "target": 0,
            "source_class": 1,
            "rate": 0.1,
            "cover_rate": 0.1,
        },
    ),
    "attacks.TableTrigger": (
        lambda **a: attacks.TableTrigger(**a).poison((X.flatten(1), Y)),
        lambda: {"columns": (1,), "values": (0.5,), "target": 0, "rate": 0.1, "source_class": 1},
    ),
    "attacks.TextTrigger": (
        lambda **a: attacks.TextTrigger(**a).poison((["a b", "c d", "e f", "g h"] * 10, torch.arange(40) % 4)),
        lambda: {
            "words": "cf",
            "kind": "insert",
            "target": 0,
            "rate": 0.1,
            "count": 2,
            "source_class": 1,
            "seed": 0,
        },
    ),
    "attacks.AdaptiveBlend": (
        lambda **a: attacks.AdaptiveBlend(**a).poison((X, Y)).dataset[0],
        lambda: {
            "target": 0,
            "rate": 0.1,
            "cover_rate": 0.1,
            "alpha": 0.2,
            "test_alpha": 0.3,
            "keep": 0.5,
            "pieces": 3,
            "pattern": None,
            "pattern_seed": 0,
            "bounds": (0.0, 1.0),
        },
    ),
    "attacks.AdaptiveBlend.partial": (attacks.AdaptiveBlend(pieces=3).partial, lambda: {"x": X, "row": 1, "seed": 0}),
    "attacks.AdaptivePatch": (
        lambda **a: attacks.AdaptivePatch(**a).poison((X, Y)),
        lambda: {
            "target": 0,
            "rate": 0.1,
            "cover_rate": 0.1,
            "stamps": (attacks.Patch(size=1).stamp, attacks.Patch(size=2).stamp),
            "opacity": 0.5,
            "test_stamps": 2,
            "test_opacity": 1.0,
        },
    ),
    "attacks.AdaptivePatch.stamp": (attacks.AdaptivePatch().stamp, lambda: {"x": X}),
    "attacks.AdaptivePatch.partial": (attacks.AdaptivePatch().partial, lambda: {"x": X, "row": 1, "seed": 0}),
    "attacks.LabelConsistent": (
        lambda **a: attacks.LabelConsistent(**a).poison((X, Y)),
        lambda: {
            "surrogate": Net(),
            "evade": ATTACK,
            "stamp": attacks.Patch(size=1).stamp,
            "target": 0,
            "rate": 0.1,
            "threat": None,
        },
    ),
    "attacks.Disguised": (
        lambda **a: attacks.Disguised(**a).poison((X, Y)).dataset[0],
        lambda: {
            "stamp": attacks.Patch(size=1).stamp,
            "target": 0,
            "rate": 0.1,
            "cover_rate": 0.1,
            "parts": (attacks.Patch(size=1).stamp,),
            "opacity": (0.2, 0.8),
            "mix": 0.2,
            "noise": 0.1,
            "shift": 1,
            "hosts": "near",
            "source_class": 1,
            "among": None,
            "bounds": (0.0, 1.0),
        },
    ),
    "attacks.Disguised.poison": (
        attacks.Disguised(attacks.Patch(size=1).stamp, 0, 0.1).poison,
        lambda: {"dataset": (X, Y), "seed": 0},
    ),
    "attacks.Evading": (
        lambda **a: attacks.Evading(**a).poison((X, Y)),
        lambda: {
            "attack": attacks.Disguised(attacks.Patch(size=1).stamp, 0, 0.1),
            "score": lambda x, y, model: x.flatten(1).sum(dim=1),
            "train": lambda x, y: Net(),
            "floor": 0.0,
            "tactics": ({"mix": 0.5},),
            "rounds": 1,
            "push": THREAT,
            "penalty": lambda model, poison, rows: model(poison).square().mean(),
            "steps": 1,
        },
    ),
    "attacks.FeatureCollision": (
        lambda **a: attacks.FeatureCollision(**a).poison((X, Y)),
        lambda: {
            "features": Net(),
            "victims": X2[:2],
            "target": 0,
            "rate": 0.1,
            "threat": THREAT,
            "together": False,
            "nearest": True,
            "steps": 1,
        },
    ),
    "attacks.GradientMatching": (
        lambda **a: attacks.GradientMatching(**a).poison((X, Y)),
        lambda: {
            "surrogate": Net(),
            "victims": X2[:2],
            "target": 0,
            "rate": 0.1,
            "threat": THREAT,
            "steps": 1,
            "restarts": 1,
            "largest": True,
        },
    ),
    "attacks.SanitizerAware": (
        lambda **a: attacks.SanitizerAware(**a).poison((X, Y % 2)),
        lambda: {
            "rate": 0.1,
            "filters": ("sphere",),
            "removed": 0.05,
            "accept": lambda x, y: torch.ones(len(x), dtype=torch.bool),
            "aim": (X2[:2], torch.tensor([0, 1])),
            "ridge": 1e-2,
            "spread": 0.1,
            "steps": 1,
        },
    ),
    "attacks.SanitizerAware.poison": (
        attacks.SanitizerAware(0.1, steps=1).poison,
        lambda: {"dataset": (X, Y % 2), "seed": 0},
    ),
    "attacks.GradientMatching.match": (
        attacks.GradientMatching(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), X2[:2]).match,
        lambda: {"x": X},
    ),
    "attacks.LabelFlip.pairs": (
        lambda pairs: attacks.LabelFlip(pairs=pairs).poison((X, Y)),
        lambda: {"pairs": ((0, 1),)},
    ),
    "attacks.AllToAll": (
        lambda **a: attacks.AllToAll(**a).poison((X, Y)),
        lambda: {"stamp": attacks.Patch(size=2).stamp, "classes": CLASSES, "rate": 0.2, "shift": 1},
    ),
    "attacks.LabelFlip": (lambda **a: attacks.LabelFlip(**a).poison((X, Y)), lambda: {"rate": 0.2, "target": None}),
    "attacks.ClassInversion": (attacks.ClassInversion, lambda: {"steps": 2, "step_size": 0.1, "bounds": (0.0, 1.0)}),
    "attacks.ClassInversion.run": (
        attacks.ClassInversion(2),
        lambda: {"model": Net(), "y": torch.arange(3), "shape": (1, 6, 6), "generator": None, "seed": 0},
    ),
    "attacks.Extraction": (
        lambda **a: attacks.Extraction(**a)(Net(), X),
        lambda: {"student_fn": lambda seed: Net(), "queries": 10, "query_batch": 4, "epochs": 1},
    ),
    "attacks.Extraction.run": (
        lambda model, x, seed: attacks.Extraction(lambda seed: Net(), 10, epochs=1)(model, x, seed=seed),
        lambda: {"model": Net(), "x": X, "seed": 0},
    ),
    "attacks.ExtractionResult": (
        lambda model, x: attacks.ExtractionResult(Net(), 3, "").agreement(model, x),
        lambda: {"model": Net(), "x": X},
    ),
    "attacks.LiRA": (attacks.LiRA(4), lambda: {**sample_arguments(), "train_fn": trained, "seed": 0}),
    "attacks.LossThreshold": (attacks.LossThreshold(), sample_arguments),
    "sanitize.TextEncoder": (
        lambda **a: sanitize.TextEncoder(**a)(["a b"]),
        lambda: {"dimensions": 8, "seed": 0},
    ),
    "sanitize.screen": (
        sanitize.screen,
        lambda: {
            "dataset": TensorDataset(X, Y),
            "model": Net(),
            "layer": "head",
            "detectors": "auto",
            "trusted": [0],
            "sources": ["a"] * ROWS,
            "groups": ["b"] * ROWS,
            "seed": 0,
            "max_removed": 0.5,
            "max_removed_group": {"b": 0.5},
        },
    ),
    "sanitize.screen_batch": (
        sanitize.screen_batch,
        lambda: {"batch": {"x": X.numpy(), "y": Y.numpy()}, "state": STATE, "decode": None},
    ),
    "sanitize.screen_stream": (
        sanitize.screen_stream,
        lambda: {
            "data": TensorDataset(X, Y),
            "model": Net(),
            "path": new_path(),
            "layer": "head",
            "detectors": [sanitize.Outliers()],
            "sources": ["a"] * ROWS,
            "groups": ["b"] * ROWS,
            "rows_per_class": 24,
            "shard_rows": 10,
            "batch_size": 8,
            "seed": 0,
        },
    ),
    "sanitize.FeatureStore": (
        sanitize.FeatureStore.write,
        lambda: {
            "data": TensorDataset(X, Y),
            "model": Net(),
            "path": new_path(),
            "layer": "head",
            "shard_rows": 10,
            "batch_size": 8,
            "on_batch": None,
        },
    ),
    "sanitize.FeatureStore.open": (sanitize.FeatureStore.open, lambda: {"path": store().path, "verify": True}),
    "sanitize.FeatureStore.blocks": (lambda **a: list(store().blocks(**a)), lambda: {"size": 8}),
    "sanitize.FeatureStore.scores": (
        lambda **a: store().scores(**a),
        lambda: {"detector": sanitize.Outliers(), "size": 8},
    ),
    "sanitize.Samples": (
        lambda **a: sanitize.DatasetSchema.infer(sanitize.Samples(**a)),
        lambda: {
            "data": {"a": [1.0] * 4, "b": ["u", "v"] * 2},
            "inputs": ["a"],
            "label": "b",
            "decode": None,
            "classes": ["u", "v"],
        },
    ),
    "sanitize.extract_features": (
        sanitize.extract_features,
        lambda: {"samples": TensorDataset(X, Y), "model": Net(), "layer": "head", "batch_size": 8},
    ),
    "sanitize.Features": (
        lambda **a: list(sanitize.extract_features(TensorDataset(X, Y), Net()).blocks(**a)),
        lambda: {"size": 8, "view": None},
    ),
    "sanitize.SpectralSignature": (sanitize.SpectralSignature().partial_fit, lambda: {"block": BLOCK}),
    "sanitize.SpectralSignature.score": (FITTED.score, lambda: {"block": BLOCK}),
    "sanitize.SpectralSignature.merge": (FITTED.merge, lambda: {"other": FITTED}),
    "sanitize.SpectralSignature.ids": (lambda ids: FITTED.score({**BLOCK, "ids": ids}), lambda: {"ids": BLOCK["ids"]}),
    "sanitize.ActivationClustering": (sanitize.ActivationClustering, lambda: {"dimensions": 3, "limit": 9, "seed": 0}),
    "sanitize.Beatrix": (sanitize.Beatrix, lambda: {"powers": 2, "dimensions": 3, "limit": 9, "seed": 0}),
    "sanitize.Influence": (sanitize.Influence, lambda: {"trusted": LOGIT_BLOCK}),
    "sanitize.KeptSampler": (
        sanitize.KeptSampler,
        lambda: {"kept": torch.arange(4), "shuffle": True, "seed": 0, "rank": 0, "world_size": 2},
    ),
    "sanitize.Decisions": (SCREENED.decisions().rows, lambda: {"action": "keep"}),
    "sanitize.ScreenReport.weights": (SCREENED.weights, lambda: {"down": "structured_poison", "least": 0.0}),
    "sanitize.ScreenReport.changed": (
        lambda **a: sanitize.ScreenReport(list("abcd"), torch.ones(4, dtype=torch.bool)).changed(**a),
        lambda: {"dataset": (X[:4], Y[:4]), "encoder": None},
    ),
    "sanitize.ScreenReport.release": (
        SCREENED.release,
        lambda: {"ids": ["a"], "by": "me", "why": "checked", "log": None},
    ),
    "sanitize.NearDuplicates": (
        sanitize.NearDuplicates,
        lambda: {"by": "image", "threshold": 0.9, "seed": 0, "index": "exact"},
    ),
    "sanitize.NearDuplicates.partial_fit": (sanitize.NearDuplicates().partial_fit, lambda: {"block": BLOCK}),
    "sanitize.Outliers": (sanitize.Outliers().partial_fit, lambda: {"block": BLOCK}),
    "sanitize.PartitionEnsemble": (
        sanitize.PartitionEnsemble,
        lambda: {
            "make_model": None,
            "partitions": 3,
            "method": "dpa",
            "features": None,
            "classes": CLASSES,
            "spread": 2,
            "ridge": 0.1,
            "steps": 2,
            "rate": 0.1,
            "seed": 0,
        },
    ),
    "sanitize.PartitionEnsemble.fit": (
        sanitize.PartitionEnsemble(partitions=3).fit,
        lambda: {"dataset": TensorDataset(X, Y)},
    ),
    "sanitize.PartitionEnsemble.certify": (ENSEMBLE.certify, lambda: {"x": X, "batch_size": 5}),
    "sanitize.repair": (
        sanitize.repair,
        lambda: {
            "model": Net(),
            "trusted": TensorDataset(X, Y),
            "method": "fine-tuning",
            "max_accuracy_loss": 0.1,
            "epochs": 1,
            "seed": 0,
        },
    ),
    "sanitize.repair.fine-pruning": (
        sanitize.repair,
        lambda: {
            "model": Net(),
            "trusted": TensorDataset(X, Y),
            "method": "fine-pruning",
            "layer": "head",
            "epochs": 1,
        },
    ),
    "sanitize.repair.abl": (
        lambda model, trusted, suspects: sanitize.repair(model, trusted, "abl", suspects=suspects, epochs=1),
        lambda: {"model": Net(), "trusted": TensorDataset(X, Y), "suspects": TensorDataset(X[:4], Y[:4])},
    ),
    "sanitize.retest": (
        sanitize.retest,
        lambda: {
            "model": Net(),
            "repaired": Net(),
            "trusted": TensorDataset(X, Y),
            "trigger": torch.ones_like,
            "target": 0,
            "limit": 0.1,
            "epochs": 1,
            "rate": 0.01,
            "seed": 0,
        },
    ),
    "sanitize.reverse_trigger": (
        lambda **a: sanitize.reverse_trigger(FOUR, TensorDataset(X, Y), **a),
        lambda: {"forms": ("written",), "threshold": 2.0, "steps": 2, "seed": 0},
    ),
    "sanitize.robust_loss": (
        lambda **a: sanitize.robust_loss(Net(), **a),
        lambda: {
            "x": X,
            "y": Y,
            "method": "trimmed",
            "share": 0.1,
            "max_grad_norm": 1.0,
            "per_example_loss": None,
        },
    ),
    "sanitize.Scan": (sanitize.Scan, lambda: {"dimensions": 3, "limit": 12, "seed": 0}),
    "sanitize.SourceEvidence": (sanitize.SourceEvidence, lambda: {"ridge": 0.1, "smallest": 3}),
    "sanitize.SourceEvidence.partial_fit": (
        sanitize.SourceEvidence().partial_fit,
        lambda: {"block": {**BLOCK, "sources": ["a"] * ROWS}},
    ),
    "sanitize.Spectre": (
        sanitize.Spectre,
        lambda: {"dimensions": 3, "max_share": 0.2, "limit": 12, "seed": 0},
    ),
    "sanitize.TrainingDynamics": (sanitize.TrainingDynamics, lambda: {"seeks": "both", "early": 2}),
    "sanitize.TriggerConsistency": (
        sanitize.TriggerConsistency,
        lambda: {"model": Net(), "overlays": 2, "seed": 0},
    ),
    "sanitize.TriggerConsistency.partial_fit": (
        sanitize.TriggerConsistency(Net()).partial_fit,
        lambda: {"block": {**BLOCK, "x": X}},
    ),
    "sanitize.ConfidentLearning": (sanitize.ConfidentLearning, lambda: {"limit": 9, "seed": 0}),
    "sanitize.DatasetSchema": (sanitize.DatasetSchema, lambda: {"profile": SCHEMA._profile, "alpha": 0.05}),
    "sanitize.DatasetSchema.infer": (
        sanitize.DatasetSchema.infer,
        lambda: {
            "batches": (X, Y),
            "label": "y",
            "ignore": (),
            "alpha": 0.05,
            "key": KEY,
            "sample": 200,
            "rows": 200,
        },
    ),
    "sanitize.DatasetSchema.from_pandera": (
        sanitize.DatasetSchema.from_pandera,
        lambda: {"schema": {"columns": {"y": {"dtype": "int64"}}}, "label": "y", "unsupported": "list"},
    ),
    "sanitize.DatasetSchema.from_great_expectations": (
        sanitize.DatasetSchema.from_great_expectations,
        lambda: {
            "suite": {"expectations": [{"type": "expect_column_to_exist", "kwargs": {"column": "y"}}]},
            "label": "y",
            "unsupported": "list",
        },
    ),
    "sanitize.DatasetSchema.check": (SCHEMA.check, lambda: {"batch": (X2, Y), "seen": False}),
    "sanitize.DatasetSchema.merge": (SCHEMA.merge, lambda: {"other": SCHEMA}),
    "sanitize.DatasetSchema.expect": (
        SCHEMA.expect,
        lambda: {"column": "y", "low": 0.0, "high": 9.0, "values": [0, 1, 2], "max_missing": 0.5},
    ),
    "sanitize.DatasetSchema.load": (sanitize.DatasetSchema.load, lambda: {"path": saved(SCHEMA), "key": b""}),
    "sanitize.DatasetSchema.save": (SCHEMA.save, lambda: {"path": new_path()}),
    "sanitize.Source": (
        sanitize.Source,
        lambda: {"name": "a", "licence": "MIT", "sha256": "0" * 64, "records": {"r": "1" * 64}, "url": ""},
    ),
    "sanitize.Source.of": (
        sanitize.Source.of,
        lambda: {"name": "a", "content": {"r": b"x"}, "licence": "MIT", "url": ""},
    ),
    "sanitize.TrustedSources": (
        sanitize.TrustedSources,
        lambda: {"sources": [sanitize.Source.of("a", b"x")], "signature": b"s"},
    ),
    "sanitize.TrustedSources.signed": (TRUSTED.signed, lambda: {"signer": lambda message: b"s"}),
    "sanitize.TrustedSources.check_signature": (
        sanitize.TrustedSources(TRUSTED.sources, b"s").check_signature,
        lambda: {"verifier": lambda message, signature: True},
    ),
    "sanitize.TrustedSources.read": (
        TRUSTED.read,
        lambda: {"name": "file", "path": file("data", b"x"), "verifier": None},
    ),
    "sanitize.TrustedSources.load": (sanitize.TrustedSources.load, lambda: {"path": saved(TRUSTED)}),
    "sanitize.TrustedSources.from_croissant": (
        sanitize.TrustedSources.from_croissant,
        lambda: {"path": croissant(), "unverifiable": "skip"},
    ),
    "sanitize.TrustedSources.to_croissant": (
        TRUSTED.to_croissant,
        lambda: {"path": new_path(), "name": "data", "description": ""},
    ),
    "sanitize.verify_sources": (
        sanitize.verify_sources,
        lambda: {
            "trusted": TRUSTED,
            "contents": {"web": {"r": b"x"}},
            "verifier": None,
            "licences": ["MIT", ""],
            "complete": False,
        },
    ),
    "sanitize.verify_sources.records": (
        lambda records: sanitize.verify_sources(TRUSTED, {"web": records}),
        lambda: {"records": [("r", b"x")]},
    ),
    "sanitize.NeighbourDisagreement": (
        sanitize.NeighbourDisagreement,
        lambda: {"k": 3, "limit": 9, "seed": 0, "index": "exact"},
    ),
    "privacy.PrivacyConfig": (
        privacy.PrivacyConfig,
        lambda: {
            "expected_batch_size": 8,
            "steps": 2,
            "max_grad_norm": 1.0,
            "delta": 1e-5,
            "public_size": 24,
            "noise_multiplier": 1.0,
            "neighboring": "add_remove",
            "microbatch": None,
        },
    ),
    "privacy.calibrate_noise": (
        privacy.calibrate_noise,
        lambda: {"target_epsilon": 2.0, "delta": 1e-5, "sample_rate": 0.1, "steps": 5, "neighboring": "add_remove"},
    ),
    "privacy.max_steps_within": (
        privacy.max_steps_within,
        lambda: {"target_epsilon": 2.0, "noise_multiplier": 1.0, "sample_rate": 0.1, "delta": 1e-5},
    ),
    "privacy.epsilon": (privacy.epsilon, lambda: {"history": [(1.0, 0.1, 2)], "delta": 1e-5}),
    "privacy.make_private": (made_private, private_arguments),
    "privacy.check_private_ready": (
        privacy.check_private_ready,
        lambda: {"model": private_net(), "per_example_loss": per_example, "batch": (X, Y)},
    ),
    "privacy.ScatterFeatures": (privacy.ScatterFeatures, lambda: {"scales": 2, "angles": 4}),
    "privacy.ScatterFeatures.forward": (lambda x: privacy.ScatterFeatures(1, 2)(x), lambda: {"x": X}),
    "privacy.fit_linear": (
        privacy.fit_linear,
        lambda: {
            "x": X,
            "y": Y,
            "config": private_config(),
            "num_classes": CLASSES,
            "learning_rate": 0.1,
            "momentum": 0.9,
            "average_from": 0.5,
            "versions": 1,
            "body": nn.Flatten(),
            "initial": nn.Linear(36, CLASSES),
            "ledger": None,
        },
    ),
    "privacy.add_lora": (
        privacy.add_lora,
        lambda: {"model": private_net(), "rank": 2, "layers": ["1"], "alpha": 2.0, "generator": stream()},
    ),
    "privacy.merge_lora": (privacy.merge_lora, lambda: {"model": privacy.add_lora(private_net(), 2)}),
    "privacy.fix": (privacy.fix, lambda: {"model": nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()), "x": X}),
    "privacy.PrivateTraining.loss": (
        with_private(lambda run, **a: run.loss(**a)),
        lambda: {"outputs": torch.rand(3, 3, generator=stream()), "targets": Y[:3]},
    ),
    "privacy.PrivateTraining.save": (with_private(lambda run, path: run.save(path)), lambda: {"path": new_path()}),
    "privacy.PrivateTraining.resume": (
        with_private(lambda run, path: run.resume(path)),
        lambda: {"path": with_private(saved)()},
    ),
    "privacy.PrivacyStatement": (with_private(lambda run, fpr: run.statement().tpr_bound(fpr)), lambda: {"fpr": 0.1}),
    "privacy.PrivacyLedger": (
        privacy.PrivacyLedger,
        lambda: {"path": new_path(), "target_epsilon": 3.0, "delta": 1e-5, "neighboring": "add_remove"},
    ),
    "privacy.PrivateTuner": (
        lambda **given: privacy.PrivateTuner(**given).epsilon(),
        lambda: {"candidates": [1, 2], "config": private_config(), "runs": "geometric", "mean_runs": 5.0},
    ),
    "privacy.private_mean": (
        privacy.private_mean,
        lambda: {"values": X.flatten(1), "low": 0.0, "high": 1.0, "public_size": 20, "noise_multiplier": 2.0},
    ),
    "privacy.private_histogram": (
        privacy.private_histogram,
        lambda: {"labels": Y, "num_bins": 3, "noise_multiplier": 2.0},
    ),
    "privacy.private_quantile": (
        privacy.private_quantile,
        lambda: {"values": X.flatten(), "share": 0.5, "low": 0.0, "high": 1.0, "pure_epsilon": 1.0},
    ),
    "privacy.DPStandardizer": (
        lambda x, **given: privacy.DPStandardizer(**given).fit(x),
        lambda: {"x": X.flatten(1), "low": 0.0, "high": 1.0, "public_size": 20, "noise_multiplier": 2.0},
    ),
    "privacy.PrivacyLedger.charge": (
        lambda **given: privacy.PrivacyLedger(new_path()).charge(**given),
        lambda: {"name": "mean", "noise_multiplier": 2.0, "times": 1},
    ),
    "privacy.PrivacyLedger.open_run": (
        lambda config: privacy.PrivacyLedger(new_path()).open_run(config),
        lambda: {"config": private_config()},
    ),
    "validate.InputSpec": (
        validate.InputSpec,
        lambda: {"shape": (1, 6, 6), "dtype": torch.float32, "low": 0.0, "high": 1.0, "max_rows": 9, "device": None},
    ),
    "validate.InputSpec.infer": (validate.InputSpec.infer, lambda: {"x": X, "margin": 0.25}),
    "validate.InputSpec.from_dict": (
        validate.InputSpec.from_dict,
        lambda: {"data": validate.InputSpec((1, 6, 6)).to_dict()},
    ),
    "validate.InputSpec.load": (validate.InputSpec.load, lambda: {"path": saved(validate.InputSpec((1, 6, 6)))}),
    "validate.TextSpec": (
        validate.TextSpec,
        lambda: {
            "max_bytes": 99,
            "min_bytes": 1,
            "max_tokens": 9,
            "tokenizer": len,
            "form": "NFC",
            "bidi": "clip",
            "max_rows": 8,
        },
    ),
    "validate.TextSpec.infer": (validate.TextSpec.infer, lambda: {"texts": ["a"], "margin": 0.25, "tokenizer": len}),
    "validate.TextSpec.from_dict": (validate.TextSpec.from_dict, lambda: {"data": validate.TextSpec().to_dict()}),
    "validate.TextSpec.load": (validate.TextSpec.load, lambda: {"path": saved(validate.TextSpec())}),
    "validate.ImageSpec": (
        validate.ImageSpec,
        lambda: {"formats": ("png",), "mode": "L", "height": 4, "width": (1, 9), "max_bytes": 999, "alpha": "black"},
    ),
    "validate.ImageSpec.infer": (validate.ImageSpec.infer, lambda: {"images": [DOT], "margin": 0.25, "max_rows": 8}),
    "validate.ImageSpec.to_tensor": (validate.ImageSpec().to_tensor, lambda: {"x": [torch.zeros(1, 2, 2).byte()]}),
    "validate.ImageSpec.from_dict": (validate.ImageSpec.from_dict, lambda: {"data": validate.ImageSpec().to_dict()}),
    "validate.ImageSpec.load": (validate.ImageSpec.load, lambda: {"path": saved(validate.ImageSpec())}),
    "validate.Column": (
        validate.Column,
        lambda: {"kind": "number", "low": 0.0, "high": 1.0, "missing": "accept", "out_of_range": "clip"},
    ),
    "validate.TableSpec": (
        validate.TableSpec,
        lambda: {"columns": {"a": validate.Column("number")}, "extra": "drop", "max_rows": 8},
    ),
    "validate.TableSpec.infer": (
        validate.TableSpec.infer,
        lambda: {"table": {"a": [1, 2]}, "margin": 0.25, "most_categories": 9, "extra": "drop", "max_rows": 8},
    ),
    "validate.TableSpec.to_tensor": (table_spec().to_tensor, lambda: {"x": table_spec().check({"a": [1, 2]}).x}),
    "validate.TableSpec.from_dict": (validate.TableSpec.from_dict, lambda: {"data": table_spec().to_dict()}),
    "validate.TableSpec.load": (validate.TableSpec.load, lambda: {"path": saved(table_spec())}),
    "validate.Guard": (
        lambda **a: validate.Guard.calibrate(**a).close(),
        lambda: {
            "model": Net(),
            "calibration_loader": MANY,
            "spec": None,
            "detectors": [validate.Energy()],
            "task": "classification",
            "alpha": 0.05,
            "fit": None,
            "layer": None,
            "train_ids": None,
            "seed": 0,
            "output": None,
            "policy": None,
            "budget": None,
            "log": None,
            "metrics": None,
            "drift": None,
            "resource": "model",
            "promise": "marginal",
            "delta": 0.1,
        },
    ),
    "validate.Guard.recalibrate": (
        lambda **a: one_guard().recalibrate(**a),
        lambda: {"calibration_loader": MANY, "reason": "a new camera", "used_ids": None, "drift": None},
    ),
    "validate.Guard.detection": (lambda **a: one_guard().detection(**a), lambda: {"x": X, "confidence": 0.9}),
    "validate.Guard.to_evidence": (
        lambda **a: one_guard().to_evidence(**a),
        lambda: {"rows_a_day": 1e4, "strange": {"far": X}},
    ),
    "validate.Guard.call": (lambda **a: guard()(**a), lambda: {"x": X, "principal": None}),
    "validate.Guard.load": (
        lambda **a: validate.Guard.load(**a).close(),
        lambda: {"path": saved(guard()), "model": Net(), "autoencoder": None},
    ),
    "validate.Capacity": (validate.Capacity, lambda: {"principals": 16, "shared": 128}),
    "validate.MemoryStore": (validate.MemoryStore, lambda: {"capacity": validate.Capacity()}),
    "validate.SQLiteStore": (
        lambda **a: validate.SQLiteStore(**a).close(),
        lambda: {"path": new_path(), "capacity": validate.Capacity()},
    ),
    "validate.RedisStore": (
        validate.RedisStore,
        lambda: {"client": FakeRedis(), "capacity": validate.Capacity(), "prefix": "queries:"},
    ),
    "validate.QueryMonitor": (
        validate.QueryMonitor,
        lambda: {"rules": QUERIES._rules, **QUERY_OPTIONS},
    ),
    "validate.QueryMonitor.calibrate": (
        validate.QueryMonitor.calibrate,
        lambda: {"streams": STREAMS, "alpha": 0.1, "ttl": 60.0, "ring": 16, "seed": 0, "key": KEY, **QUERY_OPTIONS},
    ),
    "validate.QueryMonitor.load": (
        validate.QueryMonitor.load,
        lambda: {"path": saved(QUERIES), **QUERY_OPTIONS},
    ),
    "validate.QueryMonitor.watch": (QUERIES.watch, lambda: {"principal": "a", "x": X, "outputs": LOGITS}),
    "validate.QueryMonitor.standing": (QUERIES.standing, lambda: {"principal": "a"}),
    "validate.QueryMonitor.release": (QUERIES.release, lambda: {"principal": "a"}),
    "validate.Energy": (
        validate.Energy().score,
        lambda: {"features": X.flatten(1), "logits": LOGITS},
    ),
    "validate.NearestNeighbours": (
        validate.NearestNeighbours(3).fit(X.flatten(1), LOGITS).score,
        lambda: {"features": X.flatten(1), "logits": LOGITS},
    ),
    "validate.Mahalanobis": (
        validate.Mahalanobis().fit(X.flatten(1), LOGITS, Y).score,
        lambda: {"features": X.flatten(1), "logits": LOGITS},
    ),
    "validate.RelativeMahalanobis": (
        validate.RelativeMahalanobis().fit,
        lambda: {"features": X.flatten(1), "logits": LOGITS, "labels": Y},
    ),
    "validate.MaxLogit": (validate.MaxLogit().score, lambda: {"features": X.flatten(1), "logits": LOGITS}),
    "validate.MaxSoftmax": (validate.MaxSoftmax().score, lambda: {"features": X.flatten(1), "logits": LOGITS}),
    "validate.Entropy": (validate.Entropy().score, lambda: {"features": X.flatten(1), "logits": LOGITS}),
    "validate.GEN": (validate.GEN, lambda: {"gamma": 0.1, "top": 5}),
    "validate.ViM": (
        lambda dimension, features, logits: validate.ViM(dimension).fit(features, logits),
        lambda: {"dimension": 3, "features": X.flatten(1), "logits": LOGITS},
    ),
    "validate.LocalDimension": (
        lambda k, features: validate.LocalDimension(k).fit(features),
        lambda: {"k": 3, "features": X.flatten(1)},
    ),
    "validate.Calibration": (
        validate.Calibration.of,
        lambda: {"scores": SCORES, "alpha": 0.1, "mode": "marginal", "delta": 0.1, "ids": None, "used_ids": None},
    ),
    "validate.Calibration.init": (
        validate.Calibration,
        lambda: {"scores": SCORES, "classes": torch.zeros(99, dtype=torch.int64), "alpha": 0.1, "history": ()},
    ),
    "validate.Calibration.p_values": (validate.Calibration.of(SCORES, 0.1).p_values, lambda: {"scores": SCORES}),
    "validate.Calibration.interval": (validate.Calibration.of(SCORES, 0.1).interval, lambda: {"confidence": 0.9}),
    "validate.Calibration.alarms_a_day": (
        validate.Calibration.of(SCORES, 0.1).alarms_a_day,
        lambda: {"rows_a_day": 9.0, "confidence": 0.9},
    ),
    "validate.Calibration.detection": (
        validate.Calibration.of(SCORES, 0.1).detection,
        lambda: {"scores": SCORES, "confidence": 0.9},
    ),
    "validate.Calibration.recalibrate": (
        validate.Calibration.of(SCORES, 0.1).recalibrate,
        lambda: {"scores": SCORES, "reason": "newer rows", "log": None},
    ),
    "validate.Calibration.to_evidence": (
        validate.Calibration.of(SCORES, 0.1).to_evidence,
        lambda: {"rows_a_day": 9.0, "strange": {"far": SCORES}, "confidence": 0.9},
    ),
    "validate.Calibration.load": (
        validate.Calibration.load,
        lambda: {"path": saved(validate.Calibration.of(SCORES, 0.1))},
    ),
    "validate.least_calibration_rows": (
        validate.least_calibration_rows,
        lambda: {"alpha": 0.1, "mode": "marginal", "delta": 0.1},
    ),
    "validate.FeatureSqueezing": (validate.FeatureSqueezing, lambda: {"squeezers": [validate.BitDepth(1)]}),
    "validate.FeatureSqueezing.score": (
        validate.FeatureSqueezing([validate.BitDepth(1)]).score,
        lambda: {"features": X.flatten(1), "logits": LOGITS[:, :CLASSES], "x": X, "model": Net()},
    ),
    "validate.Consistency": (validate.Consistency, lambda: {"shift": 1, "noise": 0.1, "draws": 2, "seed": 0}),
    "validate.Consistency.score": (
        validate.Consistency(draws=1).score,
        lambda: {"features": X.flatten(1), "logits": LOGITS[:, :CLASSES], "x": X, "model": Net()},
    ),
    "validate.Reconstruction": (
        lambda autoencoder, on, x: validate.Reconstruction(autoencoder, on).score(X.flatten(1), x=x),
        lambda: {"autoencoder": nn.Identity(), "on": "inputs", "x": X},
    ),
    "validate.Purify": (lambda steps, x: validate.Purify(steps)(x), lambda: {"steps": None, "x": X}),
    "validate.PurifiedModel": (validate.Purify().around, lambda: {"model": Net()}),
    "validate.BitDepth": (lambda x, **a: validate.BitDepth(**a)(x), lambda: {"x": X, "bits": 3, "bounds": (0.0, 1.0)}),
    "validate.MedianFilter": (lambda x, size: validate.MedianFilter(size)(x), lambda: {"x": X, "size": 3}),
    "validate.NonLocalMeans": (
        lambda x, **a: validate.NonLocalMeans(**a)(x),
        lambda: {"x": X, "search": 5, "patch": 3, "strength": 0.1},
    ),
    "validate.TotalVariation": (
        lambda x, **a: validate.TotalVariation(**a)(x),
        lambda: {"x": X, "weight": 0.1, "steps": 3},
    ),
    "validate.JPEGLike": (
        lambda x, **a: validate.JPEGLike(**a)(x),
        lambda: {"x": X, "quality": 50, "bounds": (0.0, 1.0)},
    ),
    "validate.Shifts": (lambda x, **a: validate.Shifts(**a)(x), lambda: {"x": X, "kinds": ["noisy"], "seed": 0}),
    "validate.Ensemble": (
        validate.Ensemble,
        lambda: {"detectors": [validate.Energy(), validate.ViM()], "method": "harmonic", "reference": 0.2, "seed": 0},
    ),
    "validate.save_detector": (
        validate.save_detector,
        lambda: {"detector": validate.Energy(), "path": new_path()},
    ),
    "validate.load_detector": (
        validate.load_detector,
        lambda: {"path": stored_detector(), "autoencoder": nn.Identity()},
    ),
    "validate.KeyedNoise": (
        validate.KeyedNoise,
        lambda: {"key": bytes(16), "scale": 0.5, "step": 0.1, "argmax": "free"},
    ),
    "validate.KeyedNoise.call": (validate.KeyedNoise(bytes(16)), lambda: {"logits": LOGITS, "x": X}),
    "validate.ReverseSigmoid": (validate.ReverseSigmoid, lambda: {"beta": 0.5, "gamma": 0.2}),
    "validate.ReverseSigmoid.call": (validate.ReverseSigmoid(), lambda: {"logits": LOGITS}),
    "validate.LabelOnly": (validate.LabelOnly(), lambda: {"logits": LOGITS}),
    "validate.TopK": (validate.TopK, lambda: {"k": 1}),
    "validate.Rounded": (validate.Rounded, lambda: {"digits": 1}),
    "validate.Tempered": (validate.Tempered, lambda: {"temperature": 2.0}),
    "artifacts.Limits": (artifacts.Limits, lambda: {"max_file_bytes": 9, "links": "refuse", "finite": True}),
    "artifacts.safe_load": (
        artifacts.safe_load,
        lambda: {"path": weights(), "expect": None, "manifest": None, "limits": None, "key": None},
    ),
    "artifacts.inspect_artifact": (
        artifacts.inspect_artifact,
        lambda: {"path": weights(), "limits": None, "deny": None},
    ),
    "artifacts.convert": (artifacts.convert, lambda: {"path": weights(), "output": None, "entry": None}),
    "artifacts.Manifest": (artifacts.Manifest.of, lambda: {"path": weights(), "limits": None}),
    "artifacts.Manifest.sign": (lambda key: artifacts.Manifest.of(weights()).sign(key), lambda: {"key": KEY * 2}),
    "artifacts.Manifest.load": (
        artifacts.Manifest.load,
        lambda: {"path": saved(artifacts.Manifest.of(weights())), "limits": None},
    ),
    "monitor.Rule": (
        monitor.Rule,
        lambda: {"role": "r", "actions": ("a",), "resources": ("b",), "effect": "allow"},
    ),
    "monitor.AccessPolicy": (monitor.AccessPolicy, lambda: {"rules": [rule()], "members": {"alice": ["reader"]}}),
    "monitor.AccessPolicy.load": (monitor.AccessPolicy.load, lambda: {"path": saved(policy())}),
    "monitor.AccessPolicy.from_dict": (monitor.AccessPolicy.from_dict, lambda: {"data": policy().to_dict()}),
    "monitor.Bucket": (monitor.Bucket, lambda: {"capacity": 3.0, "per_second": 1.0}),
    "monitor.QueryBudget": (
        lambda **a: monitor.QueryBudget(**a).close(),
        lambda: {
            "path": new_path(),
            "per_principal": monitor.Bucket(9),
            "total": None,
            "overrides": None,
            "clock": lambda: 1.0,
        },
    ),
    "monitor.QueryBudget.reserve": (lambda **a: budget().reserve(**a), lambda: {"principal": "a", "cost": 1}),
    "monitor.QueryBudget.commit": (
        lambda reservation: budget().commit(reservation),
        lambda: {"reservation": monitor.Reservation("a", "b", 1.0)},
    ),
    "monitor.QueryBudget.spent": (lambda principal: budget().spent(principal), lambda: {"principal": "a"}),
    "monitor.AuditLog": (
        lambda **a: monitor.AuditLog(**a).append({}),
        lambda: {"path": new_path(), "key": KEY, "clock": lambda: 1.0},
    ),
    "monitor.AuditLog.append": (lambda event: log().append(event), lambda: {"event": {"a": 1}}),
    "monitor.AuditLog.verify": (lambda **a: log().verify(**a), lambda: {"anchor": None, "key": KEY}),
    "monitor.AuditLog.anchor": (lambda path: log().anchor(path), lambda: {"path": new_path()}),
    "monitor.Metrics": (monitor.Metrics, lambda: {"namespace": "x", "registry": None}),
    "monitor.Metrics.observe": (
        monitor.Metrics().observe,
        lambda: {"verdict": "accepted", "reason": "none", "rows": 1, "seconds": 0.1, "p_values": [0.5]},
    ),
    "monitor.CalibrationMartingale": (
        monitor.CalibrationMartingale,
        lambda: {"alpha": 0.01, "calibration_n": 9, "sides": "low"},
    ),
    "monitor.CalibrationMartingale.load": (
        monitor.CalibrationMartingale().load_state_dict,
        lambda: {"state": monitor.CalibrationMartingale().state_dict()},
    ),
    "monitor.DriftMonitor": (monitor.DriftMonitor, lambda: {"reference": MANY, "alpha": 0.01}),
    "monitor.DriftMonitor.check": (monitor.DriftMonitor(MANY).check, lambda: {"x": X}),
    "monitor.DriftMonitor.observe": (monitor.DriftMonitor().observe, lambda: {"p_values": torch.ones(2)}),
    "explain.attribute": (
        explain.attribute,
        lambda: {
            "model": Net(),
            "x": X,
            "target": Y,
            "method": "integrated_gradients",
            "baseline": 0.0,
            "steps": 2,
            "batch_size": 8,
        },
    ),
    "explain.attribute.smoothgrad": (
        lambda **a: explain.attribute(method="smoothgrad", samples=2, **a),
        lambda: {"model": Net(), "x": X, "target": 0, "noise": 0.1, "generator": None},
    ),
    "explain.influence": (
        explain.influence,
        lambda: {"model": Net(), "train": TensorDataset(X, Y), "x": X2, "y": Y, "top": 3, "layer": None},
    ),
    "explain.attribution_anomaly": (
        explain.attribution_anomaly,
        lambda: {"model": Net(), "x": X, "reference": MANY, "alpha": 0.1, "method": "saliency", "batch_size": 64},
    ),
    "explain.sanity_check": (
        explain.sanity_check,
        lambda: {"model": Net(), "x": X, "target": Y, "method": "saliency", "limit": 0.5, "seed": 0},
    ),
    "collaborate.aggregate": (
        collaborate.aggregate,
        lambda: {
            "updates": [torch.ones(3) * i for i in range(7)],
            "method": "krum",
            "byzantine": 1,
            "max_norm": 9.0,
            "trusted": None,
        },
    ),
    "collaborate.Indicator": (
        collaborate.Indicator,
        lambda: {"kind": "sample", "digest": "a" * 64, "title": "t", "place": None, "shape": (1, 6, 6)},
    ),
    "collaborate.artifact_indicator": (collaborate.artifact_indicator, lambda: {"digest": "a" * 64, "title": "t"}),
    "collaborate.sample_indicators": (
        collaborate.sample_indicators,
        lambda: {"x": X, "key": KEY, "bounds": (0.0, 1.0), "title": "t"},
    ),
    "collaborate.trigger_indicator": (
        collaborate.trigger_indicator,
        lambda: {"suspects": MARKED, "reference": MANY, "key": KEY, "size": 2, "bounds": (0.0, 1.0)},
    ),
    "collaborate.apply_indicators": (
        collaborate.apply_indicators,
        lambda: {"indicators": INDICATORS, "key": KEY, "bounds": (0.0, 1.0), "reference": MANY},
    ),
    "collaborate.IndicatorDetector": (DETECTOR.score, lambda: {"block": BLOCK}),
    "collaborate.IndicatorDetector.judge": (DETECTOR.judge, lambda: {"data": TensorDataset(X, Y)}),
    "collaborate.to_stix": (
        collaborate.to_stix,
        lambda: {"evidence": EVIDENCE, "indicators": INDICATORS, "tlp": "amber", "producer": "p"},
    ),
    "collaborate.from_stix": (collaborate.from_stix, lambda: {"bundle": collaborate.to_stix(EVIDENCE, INDICATORS)}),
    "collaborate.to_avid": (collaborate.to_avid, lambda: {"evidence": EVIDENCE, "artifact": "m", "date": "2020-01-01"}),
    "audit.audit": (
        audit.audit,
        lambda: {
            "model": Net(),
            "train": (X, Y),
            "test": (X2, Y),
            "threat": None,
            "plan": plan(),
            "folder": None,
            "path": None,
            "seed": 0,
            "show_progress": False,
        },
    ),
    "audit.AuditPlan": (audit.AuditPlan, lambda: {"parts": ("guard",), "samples": 4, "queries": (5,), "shadows": 4}),
    "audit.audit_artifacts": (
        audit.audit_artifacts,
        lambda: {"path": weights(), "inspector": artifacts.inspect_artifact, "verifier": None},
    ),
    "audit.audit_extraction": (
        audit.audit_extraction,
        lambda: {"model": Net(), "test": (X2, Y), "student_fn": lambda seed: Net(), "queries": (5,), "pool": None},
    ),
    "audit.audit_guard": (
        audit.audit_guard,
        lambda: {"model": Net(), "test": (X2, Y), "guard": guard(), "threat": None, "samples": 8, "attack": None},
    ),
    "audit.audit_inversion": (
        audit.audit_inversion,
        lambda: {"model": Net(), "train": (X, Y), "test": (X2, Y), "attack": None, "steps": 2, "samples": 8},
    ),
    "audit.audit_membership": (
        audit.audit_membership,
        lambda: {"model": Net(), "train": (X, Y), "test": (X2, Y), "samples": 8, "fpr": 0.1, "seed": 0},
    ),
    "audit.audit_poisoning": (
        audit.audit_poisoning,
        lambda: {
            "model": Net(),
            "train": (X, Y),
            "test": (X2, Y),
            "trigger": lambda x: x,
            "target": 0,
            "train_fn": trained,
            "attack": attacks.Patch(0, 0.2, 2),
            "samples": 8,
        },
    ),
    "audit.audit_privacy": (
        audit.audit_privacy,
        lambda: {"train": (X, Y), "train_fn": trained, "claimed_epsilon": 1.0, "canary": None, "runs": 4},
    ),
    "audit.audit_storage": (audit.audit_storage, lambda: {"folder": file("a.txt").parent, "max_files": 9}),
    "audit.compare": (audit.compare, lambda: {"before": EVIDENCE, "after": EVIDENCE}),
    "audit.epsilon_lower_bound": (
        audit.epsilon_lower_bound,
        lambda: {"with_sample": torch.ones(9), "without_sample": torch.zeros(9), "threshold": 0.5, "delta": 0.0},
    ),
    "audit.reconstruct": (
        audit.reconstruct,
        lambda: {"model": Net(), "train": (X, Y), "attack": attacks.ClassInversion(2), "per_class": 1, "seed": 0},
    ),
    "audit.joint_margin": (audit.joint_margin, lambda: {"outputs": LOGITS, "y": Y}),
    "audit.passes_and_fools": (audit.passes_and_fools, lambda: {"outputs": LOGITS, "y": Y}),
    "audit.render_page": (
        audit.render_page,
        lambda: {"title": "t", "summary_rows": [], "sections": [], "metadata": {}, "notes": ["n"]},
    ),
    "audit.Policy": (audit.Policy, lambda: {"rules": {"a.b": audit.Rule(min=0.1)}, "max_severity": None}),
    "audit.Policy.read": (audit.Policy.read, lambda: {"source": {"findings": {"a.b": {"min": 0.1}}}}),
    "audit.Rule": (audit.Rule, lambda: {"min": 0.1, "max": 0.9, "required": True, "interval": "value"}),
    "audit.AuditReport": (audit.AuditReport, lambda: {"evidence": EVIDENCE}),
    "audit.AuditReport.passed": (
        audit.AuditReport(EVIDENCE).passed,
        lambda: {"policy": {"findings": {"a.b": {"min": 0.1}}}},
    ),
    "audit.AuditReport.to_html": (
        audit.AuditReport(EVIDENCE).to_html,
        lambda: {"path": None, "title": "t", "figures": None},
    ),
    "audit.AuditReport.from_dict": (
        audit.AuditReport.from_dict,
        lambda: {"data": audit.AuditReport(EVIDENCE).to_dict()},
    ),
    "audit.Figure": (audit.Figure, lambda: {"png": b"\x89PNG\r\n\x1a\n", "alt": "a", "caption": ""}),
    "audit.DefaultStudent": (
        lambda **a: audit.DefaultStudent(**a)(0),
        lambda: {"features": 4, "classes": 3, "hidden": 2},
    ),
    "datasets.read_idx": (
        datasets.read_idx,
        lambda: {"path": file("a", b"\0\0\x08\x01\0\0\0\x02ab"), "max_bytes": 100},
    ),
    "datasets.read_npz": (datasets.read_npz, lambda: {"path": npz(), "keys": ["train_x"], "max_bytes": 10**6}),
    "datasets.load": (datasets.load, lambda: {"path": npz(), "max_bytes": 10**6}),
    "datasets.find": (datasets.find, lambda: {"name": "mnist", "roots": [new_path()]}),
    "datasets.ImageData": (
        datasets.ImageData,
        lambda: {"train_x": X, "train_y": Y, "test_x": X2, "test_y": Y, "classes": ("a", "b", "c"), "source": "s"},
    ),
}
FAILS_WHEN_GOOD = {  # a good argument that still meets a refusal: what is asked for is not there
    "artifacts.convert",
    "datasets.find",
    "monitor.QueryBudget.commit",
}
NO_ARGUMENTS_OR_RESULTS = {  # nothing to get wrong, or made by the library and read by users
    "attacks.AttackResult",
    "attacks.InversionResult",
    "attacks.Poisoned",
    "attacks.Trial",
    "sanitize.Certificate",
    "sanitize.ClusterEvidence",
    "sanitize.ScanEvidence",
    "sanitize.ScreenReport",
    "sanitize.SourceScore",
    "sanitize.StreamReport",
    "sanitize.Trajectory",
    "privacy.LedgerCharge",
    "privacy.Tuned",
    "privacy.Change",
    "privacy.Fixed",
    "privacy.LedgerRun",
    "privacy.LinearFit",
    "privacy.PrivateTraining",
    "privacy.Problem",
    "validate.AttackableGuard",
    "validate.FittedEnsemble",
    "validate.GuardDecision",
    "validate.QueryStanding",
    "validate.SpecResult",
    "validate.StoreHealth",
    "monitor.AccessDecision",
    "monitor.BudgetVerification",
    "monitor.DriftState",
    "monitor.FeatureDrift",
    "monitor.LogVerification",
    "monitor.Reservation",
    "explain.Attribution",
    "explain.Influence",
    "explain.SanityCheck",
    "sanitize.RepairTest",
    "sanitize.ReversedTriggers",
    "collaborate.Aggregation",
    "collaborate.Shared",
    "audit.Change",
    "audit.Comparison",
    "audit.EpsilonBound",
    "audit.PolicyResult",
    "audit.Problem",
    "audit.Reconstructions",
    "audit.Section",
    "audit.SummaryRow",
    "datasets.mnist_subset",
}
# their own conformance lists
EVASION = {name for name in attacks.__all__ if getattr(attacks, name).__module__.startswith("aidefend.attacks.evasion")}
OTHERS = (
    "aidefend.audit.robustness",
    "aidefend.audit.masking",
    "aidefend.audit.evasion",
    "aidefend._core.threat",
    "aidefend.audit.drawing",
)


def public_calls():
    """Every public class and function of every room, but errors and Protocols."""
    names = set()
    for room in ("", *(name for name in aidefend.__all__ if inspect.ismodule(getattr(aidefend, name)))):
        module = importlib.import_module(f"aidefend.{room}".rstrip("."))
        for name in module.__all__:
            value = getattr(module, name)
            skipped = inspect.isclass(value) and (
                issubclass(value, BaseException | int) or getattr(value, "_is_protocol", False)
            )
            if callable(value) and not skipped and not value.__module__.startswith(OTHERS):
                names.add(f"{room}.{name}".lstrip("."))
    return names


def test_every_public_call_is_in_the_list():
    listed = {".".join(name.split(".")[: 1 if name[0].isupper() else 2]) for name in CALLS}
    evasion = {f"attacks.{name}" for name in EVASION}
    objectives = {name for name in public_calls() if name.startswith("adversarial.")}
    missing = public_calls() - listed - evasion - objectives - NO_ARGUMENTS_OR_RESULTS
    assert sorted(missing) == []


def trace(model):
    """Everything about a module that a call may not change."""
    if not isinstance(model, nn.Module):
        return None
    return (
        {name: value.tolist() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


def leaks(call, make, name, value):
    """What is wrong with this call: the text of a strange error, a trace, or nothing."""
    arguments = {**make(), name: value}
    models = [given for given in arguments.values() if isinstance(given, nn.Module)]
    before = [trace(model) for model in models]
    random_state = torch.get_rng_state()
    try:
        call(**arguments)
    except AidefendError as error:
        if len(str(error)) < 15:
            return f"no message: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if str([trace(model) for model in models]) != str(before):
        return "a trace on the model"
    return "" if torch.equal(random_state, torch.get_rng_state()) else "a draw from the global stream"


@pytest.mark.parametrize("name", CALLS)
def test_bad_arguments_raise_an_error_of_ours_and_leave_no_trace(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "nonsense" is a good name for a file
    call, make = CALLS[name]
    if name in FAILS_WHEN_GOOD:
        with pytest.raises(AidefendError):
            call(**make())
    else:
        call(**make())
    found = {}
    for argument in make():
        values = {**WRONG, **({key: make_model() for key, make_model in MODELS.items()} if argument == "model" else {})}
        for kind, value in values.items():
            if text := leaks(call, make, argument, value):
                found[argument, kind] = text
    assert found == {}


def test_the_sweep_sees_foreign_errors_and_traces():
    def careless(model, x):
        model.train()
        return torch.relu(x)

    assert leaks(careless, lambda: {"model": Net(), "x": X}, "x", "text").startswith("TypeError")
    assert leaks(careless, lambda: {"model": Net(), "x": X}, "x", X) == "a trace on the model"
