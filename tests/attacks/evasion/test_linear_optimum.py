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
    return None if threat.norm != "l2" or torch.is_tensor(threat.eps) else threat.eps / 2


MAKERS = {
    "pgd": lambda threat, loss: PGD(threat, 40, step_size(threat), loss=loss),
    "apgd": lambda threat, loss: APGD(threat, steps=80, loss=loss),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("shape", [(12,), (2, 6), (1, 3, 4)])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_reach_the_optimum(maker, loss, shape, norm):
    world, eps = linear_world(shape=shape), 0.05
    attack = MAKERS[maker](Threat(norm, eps, FREE), loss)
    x_adv = attack(world.model, world.x, world.y, generator=torch.Generator().manual_seed(0))
    found = margin(world.model(x_adv), world.y).detach()
    torch.testing.assert_close(found, world.worst_margin(norm, eps), atol=1e-5, rtol=0)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("norm", "eps"), [("l1", 0.4), ("l1", 1.1), ("l0", 1), ("l0", 4.5)])
def test_few_features_up_to_their_bounds(maker, norm, eps):
    """In l1 and l0 the bounds are always in the way: the best features go to them, the next one gets the rest."""
    world = linear_world(shape=(3, 10))
    threat = Threat(norm, eps, (0.2, 0.8))
    attack = MAKERS[maker](threat, "margin")
    straight = attack if maker == "apgd" or norm == "l0" else dataclasses.replace(attack, random_start=False)
    result = straight.run(world.model, world.x, world.y, generator=torch.Generator().manual_seed(0))
    optimum = world.worst_margin_of_few(norm, eps, 0.2, 0.8)
    assert threat.contains(result.x_adv, world.x).all()
    assert (result.loss <= optimum + 1e-9).all()
    share = (result.loss - world.clean_margin) / (optimum - world.clean_margin)
    assert (share >= (1 - 1e-6 if norm == "l0" else 0.98)).all()


@pytest.mark.parametrize("maker", MAKERS)
def test_normalised_data_and_plain_data_break_alike(maker):
    world = linear_world(shape=(3, 2, 2))
    mean, std = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.5, 0.1]).double()
    shift, spread = mean.reshape(3, 1, 1), std.reshape(3, 1, 1)
    for norm in ("linf", "l2", "l1"):
        threat = Threat.normalised(norm, 0.05, mean, std, FREE)
        attack = MAKERS[maker](threat, "margin")
        attack = dataclasses.replace(attack, step_size=None) if maker == "pgd" else attack
        inside = lambda x: world.model(x * spread + shift)  # noqa: E731
        stream = torch.Generator().manual_seed(0)
        result = attack.run(inside, (world.x - shift) / spread, world.y, generator=stream)
        loose = 1e-2 if (maker, norm) == ("pgd", "l2") else 1e-5
        torch.testing.assert_close(result.loss, world.worst_margin(norm, 0.05), atol=loose, rtol=0)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 1.2), ("l2", 2.2), ("l1", 3.1), ("l0", 3)])
def test_whole_numbers_and_categories_move(maker, norm, eps):
    """Steps below a half would never leave x: the path is continuous, the points are whole. Against brute force."""
    world = linear_world(n=10, shape=(7,), seed=3)
    x = world.x.clone()
    x[:, :3] = torch.randint(0, 4, (10, 3), generator=torch.Generator().manual_seed(0))
    x[:, 3:7] = torch.eye(4, dtype=x.dtype)[torch.arange(10) % 4]
    integer = torch.tensor([True] * 3 + [False] * 4)
    threat = Threat(norm, eps, (0.0, 4.0), integer=integer, groups=((3, 4, 5, 6),))
    stream = torch.Generator().manual_seed(0)
    result = MAKERS[maker](threat, "margin").run(world.model, x, world.y, generator=stream)
    assert threat.contains(result.x_adv, x).all()
    whole = torch.cartesian_prod(*[torch.arange(5)] * 3).repeat_interleave(4, dim=0)
    every = torch.cat([whole.to(x), torch.eye(4, dtype=x.dtype).repeat(125, 1)], dim=1)
    shares = []
    for row in range(10):
        allowed = every[threat.contains(every, x[row].expand_as(every))]
        best = margin(world.model(allowed), world.y[row].expand(len(allowed))).max().detach()
        clean = margin(world.model(x[row : row + 1]), world.y[row : row + 1])[0].detach()
        assert result.loss[row] <= best + 1e-9
        shares.append(float((result.loss[row] - clean) / (best - clean)))
    assert sum(shares) / 10 >= (0.99 if norm == "linf" else 0.6 if (maker, norm) == ("pgd", "l1") else 0.8), shares


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


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_radius_by_sample(norm):
    world = linear_world(n=6)
    eps = torch.tensor([0.0, 0.01, 0.02, 0.05, 0.1, 0.2], dtype=torch.float64)
    threat = Threat(norm, eps, FREE)
    straight = PGD(threat, 40, loss="margin", random_start=False)
    for attack in (straight, APGD(threat, 80, loss="margin")):
        stream = torch.Generator().manual_seed(0)
        result = attack.run(world.model, world.x, world.y, goal="max_loss", generator=stream)
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
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_min_norm_finds_the_flipping_radius(maker, norm):
    world = linear_world()
    needed, eps = world.flipping_eps(norm), 1.0
    attack, stream = MAKERS[maker](Threat(norm, eps, FREE), "margin"), torch.Generator().manual_seed(0)
    result = attack.run(world.model, world.x, world.y, goal="min_norm", generator=stream)
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
