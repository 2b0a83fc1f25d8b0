"""Every detector on disk, alone and in a guard: identical scores after loading; an autoencoder by its weights."""

import copy
import json

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from aidefend import ConfigurationError, validate
from aidefend.validate import (
    GEN,
    BitDepth,
    Consistency,
    Energy,
    Ensemble,
    Entropy,
    FeatureSqueezing,
    Guard,
    InputSpec,
    LocalDimension,
    Mahalanobis,
    MaxLogit,
    MaxSoftmax,
    NearestNeighbours,
    Reconstruction,
    RelativeMahalanobis,
    Shifts,
    ViM,
    load_detector,
    save_detector,
)
from tests.validate.small_world import model, rows, strange

FIT, CALIBRATION = rows(200, 1), rows(300, 2)
TEST = torch.cat([rows(40, 3)[0], strange(3)])
SPEC = InputSpec((6,), low=-30.0, high=30.0)


def autoencoder(width=6, seed=4):
    """Any fixed function of rows will do: its error is the score."""
    stream = torch.Generator().manual_seed(seed)
    layers = nn.Sequential(nn.Linear(width, 3), nn.BatchNorm1d(3), nn.Linear(3, width)).eval()
    with torch.no_grad():
        for values in layers.parameters():
            values.copy_(0.5 * torch.randn(values.shape, generator=stream))
    return layers


DETECTORS = {
    "Energy": Energy(),
    "MaxLogit": MaxLogit(),
    "MaxSoftmax": MaxSoftmax(),
    "Entropy": Entropy(),
    "GEN": GEN(0.2, 2),
    "Mahalanobis": Mahalanobis(),
    "RelativeMahalanobis": RelativeMahalanobis(),
    "NearestNeighbours": NearestNeighbours(k=4),
    "LocalDimension": LocalDimension(k=20),
    "ViM": ViM(dimension=3),
    "Consistency": Consistency(0, 0.3, 2, 7),
    "FeatureSqueezing": FeatureSqueezing([BitDepth(6, (-30.0, 30.0))]),
    "Reconstruction": Reconstruction(autoencoder()),
    "Reconstruction of features": Reconstruction(autoencoder(8), on="features"),
    "Ensemble": Ensemble([Energy(), Reconstruction(autoencoder()), LocalDimension(k=20), Consistency(0, 0.3, 2)]),
    "Ensemble with shifts": Ensemble([Energy(), Reconstruction(autoencoder()), LocalDimension(k=20)], shifts=Shifts()),
    "Ensemble in an ensemble": Ensemble(
        [
            Energy(),
            Ensemble(
                [
                    Reconstruction(autoencoder()),
                    Ensemble([LocalDimension(k=20), Consistency(0, 0.3, 2)], shifts=Shifts()),
                ]
            ),
        ]
    ),
}


def given(name):
    """The autoencoder again, as another process would have it."""
    width = 8 if "features" in name else 6
    return {"autoencoder": autoencoder(width)} if name.startswith(("Reconstruction", "Ensemble")) else {}


def guard_of(*detectors):
    return Guard.calibrate(model(), CALIBRATION, SPEC, list(detectors), 0.05, FIT, layer="2")


def test_no_detector_is_missing_here():
    fits = {name for name in validate.__all__ if hasattr(getattr(validate, name), "fit")}
    assert fits - {"Detector"} == {name.partition(" ")[0] for name in DETECTORS}


@pytest.mark.parametrize("name", DETECTORS)
def test_scores_are_identical_after_loading(name, tmp_path):
    guard = guard_of(DETECTORS[name])
    features = torch.relu(model()[0](TEST)).detach()
    inputs = {"x": TEST, "model": model()} if getattr(guard.detectors[0], "uses_inputs", False) else {}
    save_detector(guard.detectors[0], tmp_path / "detector")
    again = load_detector(tmp_path / "detector", **given(name))
    logits = model()(TEST).detach()
    expected = guard.detectors[0].score(features, logits, **inputs)
    assert torch.equal(again.score(features, logits, **inputs), expected) and expected.unique().numel() > 20
    guard.save(tmp_path / "guard")
    loaded = Guard.load(tmp_path / "guard", model(), **given(name))
    a, b = guard(TEST), loaded(TEST)
    assert a.report.to_dict() == b.report.to_dict() and torch.equal(a.accepted, b.accepted)
    loaded.save(tmp_path / "twice")  # what was loaded can be saved again, byte by byte the same
    assert (tmp_path / "twice").read_bytes() == (tmp_path / "guard").read_bytes()


def test_the_file_holds_no_weight_and_no_code_of_the_autoencoder(tmp_path):
    guard_of(DETECTORS["Reconstruction"]).save(tmp_path / "guard")
    data = (tmp_path / "guard").read_bytes()
    assert b"pickle" not in data and all(
        values.detach().numpy().tobytes() not in data for values in autoencoder().parameters() if values.numel() > 3
    )


def changed():
    other = autoencoder()
    with torch.no_grad():
        other[2].weight[0, 0] += 1e-3
    return other


def other_statistics():
    other = autoencoder()
    other[1].running_mean += 1e-3
    return other


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (changed, "weights .the structure is the same"),
        (other_statistics, "weights .the structure is the same"),
        (lambda: autoencoder(7), "autoencoder .its modules or shapes differ"),
        (lambda: [changed(), autoencoder(8)], "weights .the structure is the same"),
        (lambda: None, "Pass autoencoder="),
        (lambda: [autoencoder(), autoencoder(8)], "only autoencoders that a detector"),
        (lambda: lambda x: x, "autoencoder to be a Module"),
    ],
)
def test_another_autoencoder_is_refused(other, message, tmp_path):
    """Planted violation: one weight, or one statistic of a BatchNorm, that differs by a thousandth."""
    guard = guard_of(DETECTORS["Reconstruction"])
    guard.save(tmp_path / "guard")
    save_detector(guard.detectors[0], tmp_path / "detector")
    with pytest.raises(ConfigurationError, match=message):
        Guard.load(tmp_path / "guard", model(), autoencoder=other())
    with pytest.raises(ConfigurationError, match=message):
        load_detector(tmp_path / "detector", autoencoder=other())


def test_weights_that_changed_after_the_fit_are_not_saved(tmp_path):
    own = autoencoder()
    guard = guard_of(Reconstruction(own))
    with torch.no_grad():
        own[0].weight += 1
    with pytest.raises(ConfigurationError, match="weights at the fit"):
        guard.save(tmp_path / "guard")
    assert not (tmp_path / "guard").exists()


def test_a_plain_function_cannot_be_told_from_another(tmp_path):
    guard = guard_of(Reconstruction(lambda x: 0.5 * x))
    with pytest.raises(ConfigurationError, match=r"an nn\.Module as autoencoder"):
        guard.save(tmp_path / "guard")


def test_several_autoencoders_are_found_by_their_weights_in_any_order(tmp_path):
    first, second = autoencoder(seed=5), autoencoder(8, seed=6)
    guard = guard_of(Reconstruction(first), Ensemble([Energy(), Reconstruction(second, on="features")]))
    guard.save(tmp_path / "guard")
    for order in ([first, second], [second, first]):
        again = Guard.load(tmp_path / "guard", model(), autoencoder=copy.deepcopy(order))
        assert again(TEST).report.to_dict() == guard(TEST).report.to_dict()


def test_a_file_that_asks_for_other_keys_is_refused(tmp_path):
    save_detector(DETECTORS["Reconstruction"], tmp_path / "detector")
    with safetensors.safe_open(tmp_path / "detector", framework="pt") as file:
        header = json.loads(file.metadata()["header"])
    for change in ({"identity": {"weights": 3}}, {"identity": None}, {"on": "labels"}, {"autoencoder": "os.system"}):
        detector = [header["detector"][0], {**header["detector"][1], **change}]
        text = json.dumps({**header, "detector": detector})
        safetensors.torch.save_file({}, tmp_path / "hostile", {"header": text})
        with pytest.raises(ConfigurationError):
            load_detector(tmp_path / "hostile", autoencoder=autoencoder())
