"""AWP: one attack, a real climb in closed form, weights never written, the gradient at the moved weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from aidefend import AidefendError, ConfigurationError, Threat
from aidefend.adversarial import AWP, TRADES, PGDTraining
from aidefend.attacks.evasion import PGD


def rows(n=8):
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 3


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, model, x, y):
        self.calls += 1
        return (x + 0.1).clamp(0, 1)


def test_equal_to_add_backward_subtract_on_a_copy():
    """The published procedure on a copy of the model: move the copy, differentiate there."""
    model, (x, y), gamma = net(), rows(), 0.05
    twin, proxy = copy.deepcopy(model), copy.deepcopy(model)
    x_adv = (x + 0.1).clamp(0, 1)
    loss = AWP(PGDTraining(Counting()), gamma)(model, x, y)
    loss.backward()
    functional.cross_entropy(proxy(x_adv), y).backward()
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            grad = dict(proxy.named_parameters())[name].grad
            if weight.ndim > 1:
                weight += gamma * grad * weight.norm() / grad.norm()
    expected = functional.cross_entropy(twin(x_adv), y)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)


def test_it_attacks_once_and_climbs():
    model, (x, y), attack = net(), rows(), Counting()
    values = [AWP(PGDTraining(attack), gamma)(model, x, y).item() for gamma in (0.0, 0.01, 0.1)]
    assert attack.calls == 3 and values[0] < values[1] < values[2]
    assert values[0] == pytest.approx(PGDTraining(attack)(model, x, y).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_stay_bit_for_bit(dtype):
    model, (x, y) = net().to(dtype), rows()
    before = {name: value.clone() for name, value in model.named_parameters()}
    objects = [id(value) for value in model.parameters()]
    for _ in range(5):
        AWP(PGDTraining(PGD(Threat("linf", 0.1), 2)), 0.1)(model, x.to(dtype), y).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert [id(value) for value in model.parameters()] == objects


@pytest.mark.parametrize("broken_pass", [1, 2])
def test_also_when_the_model_raises_at_the_moved_weights(broken_pass):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.passes = net(), 0

        def forward(self, x):
            self.passes += 1
            if self.passes == broken_pass:
                raise RuntimeError("broken pass")
            return self.body(x)

    model, (x, y) = Breaks(), rows()
    before, objects = copy.deepcopy(model.state_dict()), [id(value) for value in model.parameters()]
    with pytest.raises(AidefendError, match="broken pass"):
        AWP(PGDTraining(Counting()), 0.1)(model, x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [id(value) for value in model.parameters()] == objects


def test_frozen_unused_and_tied_weights():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(9, 9)
            self.second.weight = self.first.weight
            self.head = nn.Linear(5, 3)
            self.head.weight.requires_grad_(False)

        def forward(self, x):
            return self.head(self.second(self.first(x).relu()))

    model, (x, y) = Odd(), rows()
    loss = AWP(PGDTraining(Counting()), 0.1)(model, x, y)
    loss.backward()
    assert loss.isfinite() and model.head.weight.grad is None and model.first.weight.grad.isfinite().all()


def test_dropout_uses_the_same_mask_uphill_and_draws_once():
    model, (x, y) = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)), rows()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PGDTraining(Counting())(model, x, y)
        plain = torch.rand(3)
        torch.manual_seed(0)
        AWP(PGDTraining(Counting()))(model, x, y)
        assert torch.equal(torch.rand(3), plain)


def test_under_no_grad_it_is_a_number():
    model, (x, y) = net(), rows()
    with torch.no_grad():
        assert not AWP(TRADES(PGD(Threat("linf", 0.1), 2)))(model, x, y).requires_grad


def test_refusals():
    with pytest.raises(ConfigurationError, match="craft"):
        AWP(nn.CrossEntropyLoss())
    with pytest.raises(ConfigurationError, match="gamma"):
        AWP(PGDTraining(Counting()), -0.1)
    with pytest.raises(ConfigurationError, match="module"):
        AWP(PGDTraining(Counting()))(lambda x: x, *rows())
