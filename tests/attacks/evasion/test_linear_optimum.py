"""On a linear model the optimum is known: attacks reach it, and never pass it."""

import dataclasses

import pytest
import torch

from aidefend import Threat
from aidefend.attacks.evasion import APGD, PGD, margin
from tests.worlds import linear_world

FREE = (-10.0, 10.0)


def step_size(threat):
    """In l2 a step turns the point by its own size only: the default of 2.5 eps / steps ends before the optimum."""
    return None if threat.norm == "linf" or torch.is_tensor(threat.eps) else threat.eps / 2


MAKERS = {
    "pgd": lambda threat, loss: PGD(threat, 40, step_size(threat), loss=loss),
    "apgd": lambda threat, loss: APGD(threat, steps=80, loss=loss),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("shape", [(12,), (2, 6), (1, 3, 4)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_reach_the_optimum(maker, loss, shape, norm):
    world, eps = linear_world(shape=shape), 0.05
    attack = MAKERS[maker](Threat(norm, eps, FREE), loss)
    x_adv = attack(world.model, world.x, world.y, generator=torch.Generator().manual_seed(0))
    found = margin(world.model(x_adv), world.y).detach()
    torch.testing.assert_close(found, world.worst_margin(norm, eps), atol=1e-5, rtol=0)


def test_fgsm_is_one_step_of_pgd_and_exact_here():
    world = linear_world()
    attack = PGD(Threat("linf", 0.03, FREE), steps=1, random_start=False)
    expected = world.x + 0.03 * world.slope.sign()
    torch.testing.assert_close(attack(world.model, world.x, world.y), expected)


@pytest.mark.parametrize("maker", MAKERS)
def test_bounds_cut_the_cube(maker):
    world, eps = linear_world(), 0.3
    attack = MAKERS[maker](Threat("linf", eps, (0.35, 0.65)), "margin")
    result = attack.run(world.model, world.x, world.y)
    torch.testing.assert_close(
        margin(world.model(result.x_adv), world.y).detach(),
        world.worst_margin_in_box(eps, 0.35, 0.65),
        atol=1e-5,
        rtol=0,
    )
    assert attack.threat.contains(result.x_adv, world.x).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radius_by_sample(norm):
    world = linear_world(n=6)
    eps = torch.tensor([0.0, 0.01, 0.02, 0.05, 0.1, 0.2], dtype=torch.float64)
    threat = Threat(norm, eps, FREE)
    straight = PGD(threat, 40, loss="margin", random_start=False)
    for attack in (straight, APGD(threat, 80, loss="margin")):
        result = attack.run(world.model, world.x, world.y, goal="max_loss")
        torch.testing.assert_close(result.loss, world.worst_margin(norm, eps), atol=1e-5, rtol=0)
        assert torch.equal(result.x_adv[0], world.x[0])


def test_radius_by_feature_and_mask():
    world = linear_world(shape=(4,))
    eps, mask = torch.tensor([0.1, 0.0, 0.02, 0.3]), torch.tensor([True, True, True, False])
    x_adv = PGD(Threat("linf", eps, FREE, mask=mask), 20)(world.model, world.x, world.y)
    expected = world.x + world.slope.sign() * (eps * mask)
    torch.testing.assert_close(x_adv, expected)
    assert torch.equal(x_adv[:, [1, 3]], world.x[:, [1, 3]])


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_min_norm_finds_the_flipping_radius(maker, norm):
    world = linear_world()
    needed, eps = world.flipping_eps(norm), 1.0
    result = MAKERS[maker](Threat(norm, eps, FREE), "margin").run(world.model, world.x, world.y, goal="min_norm")
    distance = Threat(norm, eps, FREE).distance(result.x_adv, world.x)
    assert result.success.all()
    assert (distance >= needed - 1e-9).all()
    assert (distance <= needed + 1.01 * eps / 1024).all()
    assert torch.equal(result.x_adv[::5], world.x[::5])


@pytest.mark.parametrize("maker", MAKERS)
def test_success_exactly_where_the_radius_suffices(maker):
    world = linear_world(n=40)
    eps = float(world.flipping_eps("linf").median()) * 1.001
    result = MAKERS[maker](Threat("linf", eps, FREE), "margin").run(world.model, world.x, world.y, goal="first_success")
    assert torch.equal(result.success, world.worst_margin("linf", eps) > 0)
    assert 0 < result.success.sum() < 40


@pytest.mark.parametrize("maker", MAKERS)
def test_targeted_reaches_the_target(maker):
    world = linear_world(n=20)
    eps = float(world.flipping_eps("linf").max()) * 1.5
    base = MAKERS[maker](Threat("linf", eps, FREE), "margin")
    attack, target = dataclasses.replace(base, targeted=True), 1 - world.y
    result = attack.run(world.model, world.x, target)
    assert result.success.all()
    torch.testing.assert_close(-result.loss, world.worst_margin("linf", eps), atol=1e-5, rtol=0)


def test_a_weaker_attack_is_told_apart():
    world = linear_world()
    weak = PGD(Threat("l2", 0.05, FREE), steps=3, step_size=0.001, random_start=False, loss="margin")
    assert (weak.run(world.model, world.x, world.y).loss < world.worst_margin("l2", 0.05) - 1e-3).all()
