"""A guard around whatever can be called: functions, objects, TorchScript, exported, traced and quantised models."""

import functools

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError, IncompatibleModel
from aidefend.validate import Energy, Guard, InputSpec, NearestNeighbours
from tests.validate.small_world import model, rows, strange

FIT, CALIBRATION = rows(200, 1)[0], rows(300, 2)[0]
TEST = torch.cat([rows(40, 3)[0], strange(3)])
SPEC = InputSpec((6,), low=-30.0, high=30.0)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Object:
    """A callable that is no module."""

    def __init__(self) -> None:
        self.network = model()

    def __call__(self, x):
        return self.network(x)


def exported():
    batch = ({0: torch.export.Dim("n")},)
    return torch.export.export(model(), (TEST,), dynamic_shapes=batch).module()


def quantised(seed=0):
    return torch.ao.quantization.quantize_dynamic(model(seed), {nn.Linear}, dtype=torch.qint8)


CALLABLES = {
    "function": lambda: lambda x: model()(x),
    "object": Object,
    "partial": lambda: functools.partial(torch.nn.functional.linear, weight=torch.eye(3, 6)),
    "scripted": lambda: torch.jit.script(model()),
    "traced": lambda: torch.jit.trace(model(), TEST),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(model())),
    "exported": exported,
    "graph": lambda: torch.fx.symbolic_trace(model()),
    "quantised": quantised,
}


def guard_of(network, detectors=None, **options):
    return Guard.calibrate(network, CALIBRATION, SPEC, detectors or [Energy()], 0.05, FIT, **options)


@pytest.mark.parametrize("name", CALLABLES)
def test_whatever_can_be_called_is_guarded_saved_and_attacked(name, tmp_path):
    network = CALLABLES[name]()
    guard = guard_of(network)
    decision = guard(TEST)
    assert torch.equal(decision.outputs[decision.accepted], network(TEST).detach()[decision.accepted])
    assert decision.accepted[:40].double().mean() > 0.7 and not decision.outputs.requires_grad
    guard.save(tmp_path / "guard")
    loaded = Guard.load(tmp_path / "guard", network)
    assert torch.equal(loaded(TEST).accepted, decision.accepted)
    x = TEST.clone().requires_grad_()
    joined = loaded.attackable()(x)
    assert torch.equal(joined.argmax(dim=1) == 3, ~decision.accepted)


@pytest.mark.parametrize("name", ["function", "object", "scripted", "traced", "frozen", "exported", "quantised"])
def test_where_no_hook_can_be_features_are_refused_with_the_reason(name):
    network = CALLABLES[name]()
    with pytest.raises(
        IncompatibleModel, match=r"an nn\.Module to read features from|whose last step is an nn\.Linear"
    ):
        guard_of(network, [NearestNeighbours(k=5)])


@pytest.mark.parametrize("name", ["scripted", "traced"])
def test_a_layer_of_torchscript_is_refused_with_the_cure(name):
    with pytest.raises(IncompatibleModel, match=r"takes a hook|the layer did not run where hooks see it"):
        guard_of(CALLABLES[name](), [NearestNeighbours(k=5)], layer="2")


def test_a_scripted_model_in_train_mode_is_refused():
    network = torch.jit.script(nn.Sequential(nn.BatchNorm1d(6), *model()).train())
    with pytest.raises(IncompatibleModel, match="train mode"):
        guard_of(network)
    guard = guard_of(network.eval())
    network.train()
    assert not guard(TEST).accepted.any()


def test_other_weights_inside_a_quantised_layer_are_refused(tmp_path):
    """Planted violation: packed weights are no tensors of the state, so that every such model looked the same."""
    guard_of(quantised()).save(tmp_path / "guard")
    Guard.load(tmp_path / "guard", quantised())
    with pytest.raises(ConfigurationError, match="weights that the guard was calibrated for"):
        Guard.load(tmp_path / "guard", quantised(seed=1))


class OfTokens(nn.Module):
    """Sequences of token ids of any length; the head is asked before or after the mean over the places."""

    def __init__(self, pooled_first):
        super().__init__()
        stream = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding.from_pretrained(torch.randn(20, 8, generator=stream))
        self.head, self.pooled_first = nn.Linear(8, 3).requires_grad_(False), pooled_first

    def forward(self, x):
        found = self.embedding(x)
        return self.head(found.mean(dim=1)) if self.pooled_first else self.head(found).mean(dim=1)


def token_batches(seed=0):
    stream = torch.Generator().manual_seed(seed)
    batches = [torch.randint(0, 20, (60, n), generator=stream) for n in (5, 6, 7, 8)]
    return [(x, torch.zeros(60, dtype=torch.int64)) for x in batches]


def test_sequences_of_several_lengths_need_features_of_one_width():
    spec, detectors = InputSpec(((5, 8),), torch.int64, 0, 19), [Energy(), NearestNeighbours(k=5)]
    guard = Guard.calibrate(OfTokens(True).eval(), token_batches(), spec, detectors, 0.05)
    for x, _ in token_batches(1):
        decision = guard(torch.cat([x, torch.full((1, x.shape[1]), 20)]))
        assert decision.accepted[:60].double().mean() > 0.7 and decision.reasons[60] == ("input: out of range",)
    with pytest.raises(IncompatibleModel, match="behind the pooling"):
        Guard.calibrate(OfTokens(False).eval(), token_batches(), spec, detectors, 0.05)
