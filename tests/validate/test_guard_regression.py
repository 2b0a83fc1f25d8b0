"""A guard around models that return numbers: the same promise, by features and inputs alone."""

import math

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError, InputRejected
from aidefend._core.stats import false_positive_interval
from aidefend.monitor import DriftMonitor
from aidefend.validate import (
    Consistency,
    Energy,
    Ensemble,
    Guard,
    InputSpec,
    KeyedNoise,
    LabelOnly,
    LocalDimension,
    Mahalanobis,
    NearestNeighbours,
    Reconstruction,
    ViM,
)
from tests.validate.small_world import Recorder, rows, strange

SPEC = InputSpec((6,), low=-30.0, high=30.0)
FIT, CALIBRATION, TEST = rows(200, 1)[0], rows(600, 2), rows(1500, 3)[0]
FEATURES = [NearestNeighbours(k=5), Mahalanobis()]


def regressor(width=0):
    """Outputs (N,) for width 0, else (N, width)."""
    stream = torch.Generator().manual_seed(8)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, max(1, width))]
    model = nn.Sequential(*layers, *([] if width else [nn.Flatten(0)])).eval()
    with torch.no_grad():
        for values in model.parameters():
            values.copy_(torch.randn(values.shape, generator=stream) / 3)
    return model


def guard_of(width=0, **options):
    options = {"detectors": FEATURES, "alpha": 0.05, "fit": FIT, "spec": SPEC, **options}
    return Guard.calibrate(regressor(width), CALIBRATION, task="regression", **options)


@pytest.mark.parametrize("width", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [3, 40])
def test_values_are_the_models_and_bad_rows_cost_nobody_else(width, size):
    guard, x = guard_of(width), torch.cat([TEST[:size], strange(2), torch.full((1, 6), math.nan)])
    decision = guard(x)
    keep = decision.accepted
    assert keep[:size].double().mean() > 0.6 and not keep[size:].any()
    assert decision.outputs.shape == ((size + 3, width) if width else (size + 3,))
    torch.testing.assert_close(decision.outputs[keep], regressor(width)(x[:-1]).detach()[keep[:-1]])
    assert decision.outputs[~keep].isnan().all() and decision.reasons[-1] == ("input: not finite",)
    assert set(decision.p_values) == {"nearest-neighbours", "mahalanobis", "combined"}
    with pytest.raises(InputRejected):
        guard.predict(x)
    one = guard(TEST[keep[:size].nonzero()[0]])  # a row alone
    assert one.accepted.all() and one.outputs.shape == ((1, width) if width else (1,))


@pytest.mark.parametrize("alpha", [0.1, 0.02])
def test_the_rate_of_false_positives_is_the_promised_one(alpha):
    guard = guard_of(alpha=alpha)
    share = float((~guard(TEST).accepted).double().mean())
    low, high = false_positive_interval(alpha, guard.calibration.n, len(TEST), 0.999)[1:]
    assert low <= share <= high


def test_defaults_read_features_and_a_saved_guard_decides_the_same(tmp_path):
    for width in (0, 2):
        guard = Guard.calibrate(regressor(width), CALIBRATION, SPEC, alpha=0.05, task="regression")
        assert guard.calibration.names == ("nearest-neighbours",) and guard.facts.task == "regression"
        guard.save(tmp_path / "guard")
        again = Guard.load(tmp_path / "guard", regressor(width))
        x = torch.cat([TEST[:20], strange(3)])
        assert again(x).report.to_dict() == guard(x).report.to_dict() and again.facts == guard.facts
        torch.testing.assert_close(again(x).outputs, guard(x).outputs, equal_nan=True)
        assert not again(x).accepted[20:].any()


def test_every_detector_of_features_and_inputs_serves():
    autoencoder = nn.Linear(6, 6).eval()
    several = Ensemble([NearestNeighbours(k=5), Reconstruction(autoencoder)])
    for detector in (LocalDimension(k=20), Mahalanobis(), Reconstruction(autoencoder), several):
        guard = guard_of(detectors=[detector])
        assert guard(TEST[:100]).accepted.double().mean() > 0.8
        guard.close()
    plain = Guard.calibrate(
        lambda x: x.sum(dim=1), CALIBRATION, SPEC, [Reconstruction(autoencoder)], 0.05, FIT, task="regression"
    )
    assert plain(TEST[:50]).accepted.any()


def test_the_view_of_an_attacker_refuses_where_the_guard_does_and_leads_around_it():
    for width in (0, 3):
        guard, x = guard_of(width), torch.cat([TEST[:60], strange(5)])
        view = guard.attackable()
        answer = view(x.requires_grad_())
        assert answer.shape == (65, 2)
        assert torch.equal(answer.argmax(dim=1) == 1, ~guard(x.detach()).accepted)
        answer[:, 1].sum().backward()
        assert x.grad.abs().sum() > 0 and guard.detection(strange(30)).value == 1.0
        x.requires_grad_(False)
    assert guard.to_evidence(strange={"far": strange(9)})["guard.true_positive_rate.far"].value == 1.0


def test_modes_outputs_collaborators_and_recalibration():
    recorder = Recorder()
    guard = guard_of(mode="monitor", output=lambda values: values.round(), log=recorder)
    decision = guard(strange(2), principal="team-a")
    assert decision.accepted.all() and torch.equal(decision.outputs, regressor()(strange(2)).detach().round())
    assert not decision.report.keep.any() and recorder.events[-1]["accepted"] == 2
    guard.follow(DriftMonitor(calibration_n=guard.calibration.n))
    guard.recalibrate(rows(300, 9), reason="spring", drift=DriftMonitor(calibration_n=300))
    assert guard.calibration.n == 300 and guard(TEST[:20]).accepted.all()


class Watcher:
    def watch(self, *_):
        raise AssertionError("never asked")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detectors": [NearestNeighbours(k=5), Energy()]}, "need no logits, got detectors='Energy'"),
        ({"detectors": [ViM(), Consistency(0)]}, "'Consistency, ViM'"),
        ({"detectors": [Ensemble([Mahalanobis(), Energy()])]}, "'Energy'"),
        ({"promise": "class-conditional"}, "without classes"),
        ({"output": LabelOnly()}, "output for numbers, got output='LabelOnly'"),
        ({"output": KeyedNoise(bytes(16))}, "output='KeyedNoise'"),
        ({"queries": Watcher()}, "no query monitor behind a regression model"),
    ],
)
def test_what_reads_classes_is_refused_by_name(options, message):
    with pytest.raises(ConfigurationError, match=message):
        guard_of(**options)


def test_each_task_names_the_other_and_malformed_outputs_are_refused():
    for width in (0, 1):
        with pytest.raises(ConfigurationError, match="pass task='regression'"):
            Guard.calibrate(regressor(width), CALIBRATION, SPEC, FEATURES, 0.05, FIT)
    with pytest.raises(ConfigurationError, match="task to be one of"):
        Guard.calibrate(regressor(), CALIBRATION, SPEC, FEATURES, task="clustering")
    for broken in (nn.Unflatten(1, (3, 1)), nn.Flatten(0)):
        network = nn.Sequential(nn.Linear(6, 3), broken).eval()
        with pytest.raises(ConfigurationError, match="floating point"):
            Guard.calibrate(network, CALIBRATION, SPEC, FEATURES, 0.05, FIT, layer="0", task="regression")


def test_a_model_that_breaks_in_service_refuses_the_row_or_the_batch():
    network = regressor(2)

    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.broken = network, False

        def forward(self, x):
            values = self.network(x)
            return values.where(x[:, :1] < 9, math.nan)[..., 0] if self.broken else values.where(x[:, :1] < 9, math.nan)

    moody = Moody().eval()
    guard = Guard.calibrate(moody, CALIBRATION, SPEC, FEATURES, 0.05, FIT, task="regression")
    x = TEST[:4].clone()
    x[1, 0] = 9.5
    decision = guard(x)
    assert not decision.accepted[1] and decision.reasons[1] == ("model: output not finite",)
    assert decision.accepted[[0, 2, 3]].any()
    moody.broken = True  # another shape than at calibration: nothing of it is shown
    assert not guard(TEST[:4]).accepted.any() and guard(TEST[:4]).outputs.shape == (4, 2)
