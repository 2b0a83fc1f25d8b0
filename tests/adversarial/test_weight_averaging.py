"""EMA and SWA: closed forms, no shared memory, buffers copied, 16-bit weights, states, wrappers."""

import copy

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError
from aidefend.adversarial import EMA, SWA


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def walk(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g).to(parameter))
    model(torch.randn(5, 3, generator=g).to(model[0].weight))


def test_ema_is_the_closed_form():
    model, decay, steps = net().double(), 0.8, 6
    seen, ema = [copy.deepcopy(model)], EMA(model, decay)
    for step in range(steps):
        walk(model, step)
        ema.update(model)
        seen.append(copy.deepcopy(model))
    weights = [decay**steps, *((1 - decay) * decay ** (steps - k) for k in range(1, steps + 1))]
    assert sum(weights) == pytest.approx(1)
    for name, average in ema.model.named_parameters():
        expected = sum(w * dict(m.named_parameters())[name] for w, m in zip(weights, seen, strict=True))
        torch.testing.assert_close(average, expected)


def test_swa_is_the_mean_and_follow_starts_late():
    model = net().double()
    swa, ema, seen = SWA(model), EMA(model, 0.9, follow=4), []
    for step in range(4):
        walk(model, step)
        swa.update(model)
        ema.update(model)
        seen.append(model[0].weight.detach().clone())
    torch.testing.assert_close(swa.model[0].weight, torch.stack(seen).mean(dim=0))
    assert torch.equal(ema.model[0].weight, seen[-1])


@pytest.mark.parametrize("make", [EMA, SWA])
def test_buffers_are_copied_and_nothing_is_shared(make):
    model = net()
    average = make(model)
    walk(model, 0)
    average.update(model)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    assert average.model[1].num_batches_tracked == 1 and not average.model.training and model.training
    kept = {name: value.clone() for name, value in average.model.state_dict().items()}
    walk(model, 1)
    average.model(torch.randn(5, 3))
    assert all(torch.equal(value, kept[name]) for name, value in average.model.state_dict().items())
    live = {value.data_ptr() for value in model.state_dict().values()}
    assert not live & {value.data_ptr() for value in average.model.state_dict().values()}
    average.copy_to(model)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert live == {value.data_ptr() for value in model.state_dict().values()}
    assert not live & {value.data_ptr() for value in average.state_dict()["model"].values()}


def test_sixteen_bits_do_not_stall():
    """A step of 0.001 of the way rounds to nothing in bfloat16; the average still arrives."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = EMA(model, 0.999)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(3000):
        ema.update(model)
    assert ema.model.weight.item() == pytest.approx(2 - 0.999**3000, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_as_before(dtype):
    model = net().to(dtype)
    ema = EMA(model, 0.9)
    walk(model, 0)
    ema.update(model)
    again = EMA(copy.deepcopy(model), 0.9)
    again.load_state_dict(ema.state_dict())
    walk(model, 1)
    ema.update(model)
    again.update(model)
    assert again.updates == 2
    for a, b in zip(ema.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_wrappers_are_seen_through():
    model = net()
    wrapped = nn.DataParallel(model)
    ema = EMA(wrapped)
    ema.update(wrapped)
    ema.update(model)
    assert list(ema.model.state_dict()) == list(model.state_dict())
    compiled = torch.compile(model, backend="eager")
    EMA(compiled).update(model)


def test_refusals():
    with pytest.raises(ConfigurationError, match="decay"):
        EMA(net(), 1.0)
    with pytest.raises(ConfigurationError, match="model"):
        SWA(lambda x: x)
    with pytest.raises(ConfigurationError, match="same parameters"):
        EMA(net()).update(nn.Linear(3, 4))
    with pytest.raises(ConfigurationError, match="state"):
        EMA(net()).load_state_dict({"model": {}})
