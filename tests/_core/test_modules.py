"""`preserve` restores everything, on every path out; the feature hook finds the layer that runs last."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aidefend import IncompatibleModel
from aidefend._core.modules import (
    InputCapture,
    device_of,
    evaluate,
    find_module,
    freeze,
    last_linear,
    looks_like_probabilities,
    preserve,
    training_layers,
)


class Nested(nn.Module):
    """Shared modules, frozen BatchNorm, dropout, a lazily used buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        shared = nn.Linear(6, 6)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), shared, nn.Dropout(0.5), shared)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("empty", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(self.body(x))


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "training": [module.training for module in model.modules()],
        "requires": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [(id(p.grad), None if p.grad is None else p.grad.clone().tolist()) for p in model.parameters()],
        "buffers": [(id(b), b.clone().tolist()) for b in model.buffers()],
        "keys": [list(module._buffers) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "streams": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
    }


def disturb(model: Nested, x: torch.Tensor) -> None:
    model.train()
    model(x).sum().backward()
    model.eval()
    freeze(model)
    model.register_forward_hook(lambda *_: None)
    model.body[1].running_mean = torch.ones(6)
    model.register_buffer("new", torch.ones(2))
    torch.rand(3)
    np.random.rand(2)
    random.random()


@pytest.mark.global_random("the disturbance that is undone draws from the global streams")
@given(st.lists(st.booleans(), min_size=8, max_size=8), st.booleans(), st.booleans())
def test_preserve_restores_everything(flags, with_grad, fails):
    model, x = Nested(), torch.rand(5, 4)
    model(x).sum().backward()
    for flag, module in zip(flags, model.modules(), strict=False):
        module.training = flag
    for flag, parameter in zip(flags, model.parameters(), strict=False):
        parameter.requires_grad_(flag)
        parameter.grad = parameter.grad if with_grad else None
    before = snapshot(model)
    if fails:
        with pytest.raises(ZeroDivisionError), preserve(model):
            disturb(model, x) if any(flags[:7]) else None
            raise ZeroDivisionError
    else:
        with preserve(model):
            evaluate(model)
            model(x)
    assert snapshot(model) == before


def test_planted_traces_are_seen_by_the_snapshot():
    """Without `preserve` the same disturbance changes every part of the snapshot: the test above can fail."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    model, x = Nested(), torch.rand(5, 4)
    before = snapshot(model)
    disturb(model, x)
    after = snapshot(model)
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
    assert [key for key in before if before[key] == after[key]] == []


def test_gradients_inside_do_not_reach_the_users_gradients():
    model, x = nn.Linear(3, 2), torch.rand(4, 3)
    model(x).sum().backward()
    mine, content = model.weight.grad, model.weight.grad.clone()
    with preserve(model):
        model(x).sum().backward()
    assert model.weight.grad is mine
    assert torch.equal(mine, content)


def test_plain_callables_keep_their_random_streams():
    before = torch.get_rng_state()
    with preserve(lambda x: x):
        torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())


class HeadDefinedFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 3)
        self.backbone = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.backbone(x).relu())


def test_last_linear_is_found_by_execution():
    """Peers take the module defined last, which is the backbone here."""
    model = HeadDefinedFirst().train()
    assert last_linear(model, torch.rand(2, 5)) is model.fc
    assert model.training
    assert not model.fc._forward_pre_hooks
    with InputCapture(model.fc) as capture:
        model(torch.rand(4, 5))
        assert capture.take().shape == (4, 7)
        with pytest.raises(IncompatibleModel, match="did not run"):
            capture.take()
    assert not model.fc._forward_pre_hooks


def test_a_model_without_linear_names_the_cure():
    with pytest.raises(IncompatibleModel, match="layer="):
        last_linear(nn.Conv2d(1, 2, 3), torch.rand(1, 1, 5, 5))


def test_find_module_by_name_and_by_object():
    model = HeadDefinedFirst()
    assert find_module(model, "fc") is model.fc is find_module(model, model.fc)
    with pytest.raises(ValueError, match="backbone"):
        find_module(model, "fcc")
    with pytest.raises(ValueError, match="layer"):
        find_module(model, nn.Linear(1, 1))


def _layers():
    return nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2), nn.ReLU())


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("mode", [True, False])
def test_torchscript_is_left_as_it_was_and_its_mode_is_known(mode):
    model = torch.jit.script(_layers().train(mode))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with preserve(model):
        model.train(not mode)
        model.train()(torch.ones(4, 2))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [mode] * 5
    assert [offender.path for offender in training_layers(model)] == (["0", "1"] if mode else [])
    frozen = torch.jit.freeze(torch.jit.script(_layers().eval()))
    with preserve(frozen):
        frozen(torch.ones(4, 2))
    assert training_layers(frozen) == []


def test_training_layers_and_probabilities():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.0), nn.Dropout(0.2), nn.InstanceNorm1d(3))
    assert [offender.path for offender in training_layers(model)] == ["0", "2"]
    assert training_layers(model.eval()) == training_layers(lambda x: x) == []
    logits = torch.randn(9, 3)
    assert looks_like_probabilities(logits.softmax(1))
    assert not looks_like_probabilities(logits)
    assert not looks_like_probabilities(torch.zeros(0, 3))
    assert device_of(model).type == device_of(len).type == "cpu"


def test_a_graph_that_waits_for_its_backward_pass_stays_valid():
    """Planted trace: writing the buffers back in place would void the user's own pending backward pass."""
    model, x = nn.BatchNorm1d(3).eval(), torch.arange(12.0).reshape(4, 3)
    pending = model(x.requires_grad_()).square().sum()
    with preserve(model):
        model.train()
        model(x)
    pending.backward()
    assert model.weight.grad is not None
