"""Pipelines that hide their gradient: what breaks them, what must not count, and attacks of other libraries."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from aidefend import AidefendError, ConfigurationError, IncompatibleModel, Threat
from aidefend.attacks.evasion import BPDA, EOT, FMN, NES, PGD, HopSkipJump, Square, Transfer
from tests.worlds import linear_world

FREE = (-1.0, 2.0)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


class Masked(nn.Module):
    """A linear model whose logits are saturated and rounded: no gradient anywhere."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return (self.model(x) * 1e4).round()


@pytest.fixture
def masked():
    world = linear_world(n=16, shape=(24,))
    eps = float(world.flipping_eps("linf").max()) * 2
    return world, Masked(world.model), eps


def accuracy(model, x, y):
    return float((model(x).argmax(dim=1) == y).double().mean())


def test_masked_gradients_stop_white_box_attacks_and_not_black_box_ones(masked):
    world, model, eps = masked
    right = world.clean_margin < 0
    x, y = world.x[right], world.y[right]
    threat = Threat("linf", eps, FREE)
    blind = PGD(threat, 20, random_start=False).run(model, x, y, generator=stream())
    sighted = PGD(threat, 20).run(world.model, x, y)
    assert sighted.success.all() and blind.success.double().mean() < 0.5
    assert Square(threat, 400).run(model, x, y, goal="first_success", generator=stream()).success.all()
    assert NES(threat, 10).run(model, x, y, goal="first_success", generator=stream()).success.all()
    assert Transfer(world.model, PGD(threat, 10)).run(model, x, y).success.all()
    hop = HopSkipJump(threat, 10).run(model, x, y, goal="min_norm", generator=stream())
    needed = world.flipping_eps("linf")[right]
    assert hop.success.all() and (threat.distance(hop.x_adv, x) <= 1.5 * needed + 1e-3).all()


def test_decisions_are_enough_for_hop_skip_jump():
    """A model that tells the class alone, one-hot."""
    world = linear_world(n=12)

    class Labels(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(world.model(x).argmax(dim=1), 2).to(x)

    threat = Threat("l2", 3.0, FREE)
    result = HopSkipJump(threat, 10).run(Labels(), world.x, world.y, generator=stream())
    assert result.success.all()
    assert (threat.distance(result.x_adv, world.x) <= 1.3 * world.flipping_eps("l2") + 1e-6).all()


def test_bpda_breaks_a_preprocessing_without_a_gradient():
    world = linear_world(n=16)
    right = world.clean_margin < 0
    x, y, eps = world.x[right], world.y[right], float(world.flipping_eps("linf").max()) + 0.1

    def quantise(x):
        return (x * 20).round() / 20

    threat = Threat("linf", eps, FREE)
    attack = PGD(threat, 10, random_start=False)
    plain = nn.Sequential(Wrapped(quantise), world.model)
    wrapped = nn.Sequential(BPDA(quantise), world.model)
    assert torch.equal(plain(x), wrapped(x))
    kept = y == plain(x).argmax(dim=1)
    assert attack.run(plain, x[kept], y[kept], generator=stream()).success.double().mean() < 0.7
    result = attack.run(wrapped, x, y, generator=stream())
    assert result.success.all() and accuracy(plain, result.x_adv, y) == 0


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_bpda_takes_the_gradient_of_the_stand_in():
    x = torch.tensor([[0.3, 0.8]], requires_grad=True)
    halved = BPDA(lambda x: (x > 0.5).float()[:, :1], backward=lambda x: (x**2).sum(dim=1, keepdim=True))
    outputs = halved(x)
    assert outputs.tolist() == [[0.0]]
    torch.testing.assert_close(torch.autograd.grad(outputs.sum(), x)[0], 2 * x.detach())
    with pytest.raises(IncompatibleModel, match=r"stand-in with outputs of shape \(1, 1\)"):
        BPDA(lambda x: x[:, :1])(x)
    with pytest.raises(IncompatibleModel, match="floating point"):
        BPDA(lambda x: x > 0.5)(x)
    with pytest.raises(ConfigurationError, match="preprocess"):
        BPDA("jpeg")


class Noisy(nn.Module):
    """The right answer, but a wrong one by chance in a share of passes, row by row."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        flip = (torch.rand(len(x)) < self.share).to(x)
        z = x.flatten(1).mean(dim=1) + 1
        return torch.stack([z * (1 - flip), z * flip], dim=1)


def test_a_lucky_flip_is_no_success():
    x, y = torch.rand(200, 4, generator=stream()), torch.zeros(200, dtype=torch.int64)
    attack = PGD(Threat("linf", 0.01), 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lucky = attack.run(Noisy(0.2), x, y, goal="first_success", generator=stream())
    assert lucky.success.double().mean() > 0.5  # the planted violation: what a naive run calls success
    eot = EOT(Noisy(0.2), 12, generator=stream())
    honest = attack.run(eot, x, y, goal="first_success", generator=stream())
    assert honest.success.double().mean() < 0.2  # P(at least 6 of 12 flips) = 2 % a look, several looks
    # P(a row with 20 % flips is wrong in more than half of 100 passes) < 1e-10
    assert not eot.confirm(honest, y, passes=100).success.any()
    assert not eot.confirm(lucky, y, passes=100).success.any()
    wrong = EOT(Noisy(0.9), 12, generator=stream())
    repeated = attack.run(wrong, x, y, goal="first_success", generator=stream())
    assert wrong.confirm(repeated, y).success.all()


def test_eot_averages_and_sees_through_noise():
    """Dropout on a linear model: the mean gradient is the model's own, one pass's is a random part of it."""
    world = linear_world(n=8, shape=(16,))
    noisy = nn.Sequential(nn.Dropout(0.8), world.model).train()
    eps = 0.1
    threat = Threat("linf", eps, FREE)
    gains = []
    for samples in (1, 64):
        model = EOT(noisy, samples, generator=stream())
        x_adv = PGD(threat, 1, random_start=False)(model, world.x, world.y)
        step = (x_adv - world.x) * world.slope
        gains.append((step.sum(dim=1) / (eps * world.slope.abs().sum(dim=1))).mean())
    assert gains[0] < 0.6 and gains[1] > 0.9


def test_eot_leaves_every_stream_as_it_was_and_is_keyed():
    noisy, x = nn.Dropout(0.5).train(), torch.ones(4, 6)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first, again, other = (EOT(noisy, 3, generator=stream(seed)) for seed in (1, 1, 2))
    one, two = first(x), first(x)
    assert torch.equal(one, again(x)) and not torch.equal(one, other(x)) and not torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]

    class Fails(nn.Module):
        def forward(self, x):
            torch.rand(3), np.random.rand(), random.random()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        EOT(Fails(), 2)(x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


def test_eot_refuses_nonsense():
    eot = EOT(nn.Linear(2, 2), 2)
    result = PGD(Threat("linf", 0.1), 2).run(eot, torch.rand(3, 2), torch.tensor([0, 1, 0]))
    for call, rule in [
        (lambda: EOT(None), "model"),
        (lambda: EOT(nn.Linear(2, 2), 0), "samples"),
        (lambda: eot.confirm(result, torch.zeros(2)), "row"),
        (lambda: eot.confirm(result.x_adv, torch.zeros(3)), "AttackResult"),
        (lambda: eot.confirm(result, torch.zeros(3), share=1.0), "share"),
    ]:
        with pytest.raises(AidefendError, match=rule):
            call()


class StatefulAttack:
    """torchattacks: bound to a model, called on images and labels, switches modes."""

    def __init__(self, model, eps):
        self.model, self.eps = model, eps

    def __call__(self, images, labels):
        self.model.eval()
        images = images.clone().detach().requires_grad_()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        return (images + self.eps * images.grad.sign()).detach()


class ListAttack:
    """foolbox: an attack called on a wrapped model with a list of radii; gives three lists."""

    def __call__(self, wrapped, x, y, *, epsilons):
        clipped = [StatefulAttack(wrapped["model"], eps)(x, y).clamp(*wrapped["bounds"]) for eps in epsilons]
        return clipped, clipped, [wrapped["model"](one).argmax(dim=1) != y for one in clipped]


def function_attack(model, inputs, labels, eps):
    """adv-lib: a function of model, inputs and labels."""
    return StatefulAttack(model, eps)(inputs, labels)


FOREIGN = {
    "torchattacks": lambda model, x, y, **_: StatefulAttack(model, 0.1)(x, y),
    "foolbox": lambda model, x, y, **_: ListAttack()({"model": model, "bounds": FREE}, x, y, epsilons=[0.1])[1][0],
    "adv-lib": lambda model, x, y, **_: function_attack(model, x, y, eps=0.1),
}


@pytest.mark.parametrize("style", FOREIGN)
def test_attacks_of_other_libraries_fit_through_one_line(style):
    world = linear_world(n=12)
    expected = world.x + 0.1 * world.slope.sign()
    torch.testing.assert_close(FOREIGN[style](world.model, world.x, world.y), expected)
    world.model.zero_grad(set_to_none=True)
    surrogate = nn.Sequential(world.model, nn.Identity()).train()
    for eps, size in ((0.1, 0.1), (0.04, 0.04)):  # the threat binds whatever the foreign attack does
        attack = Transfer(surrogate, FOREIGN[style], threat=Threat("linf", eps, FREE))
        result = attack.run(world.model, world.x, world.y)
        torch.testing.assert_close(result.x_adv, world.x + size * world.slope.sign())
        torch.testing.assert_close(result.loss, world.worst_margin("linf", size))
        assert result.forwards.tolist() == [1] * 12 and result.backwards.tolist() == [0] * 12
    assert surrogate.training and all(parameter.grad is None for parameter in surrogate.parameters())


def test_transfer_needs_a_threat_and_examples():
    model, x, y = nn.Linear(2, 2), torch.rand(3, 2), torch.tensor([0, 1, 0])
    with pytest.raises(ConfigurationError, match="Threat"):
        Transfer(model, lambda model, x, y: x)
    for bad in (lambda model, x, y: (x, y), lambda model, x, y: x[:1], lambda model, x, y: x * torch.nan):
        with pytest.raises(AidefendError, match=r"attack\(surrogate, x, y\)"):
            Transfer(model, bad, threat=Threat("linf", 0.1))(model, x, y)


def test_transfer_of_equal_models_is_the_attack_itself():
    world = linear_world(n=10)
    attack = PGD(Threat("linf", 0.05, FREE), 20, random_start=False)
    for goal in ("max_loss", "min_norm"):
        moved = Transfer(world.model, attack).run(world.model, world.x, world.y, goal=goal)
        itself = attack.run(world.model, world.x, world.y, goal=goal)
        torch.testing.assert_close(moved.x_adv, itself.x_adv)
        assert torch.equal(moved.success, itself.success)
    far = Threat("linf", 3.0, FREE)
    assert Transfer(world.model, FMN(far, 60)).run(world.model, world.x, world.y).success.all()
