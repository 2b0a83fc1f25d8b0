"""Attacks on the number of features and on the sum of changes, against the closed forms of a linear model."""

import dataclasses

import pytest
import torch

from aidefend import Threat, ThreatModelError
from aidefend.attacks.evasion import FMN, SigmaZero
from tests.attacks.evasion.test_counts_and_goals import Counting
from tests.worlds import linear_world

LOW, HIGH = 0.2, 0.8


def far_world(seed=0):
    """Right rows moved away from the boundary, so that several features are needed."""
    world = linear_world(n=12, shape=(40,), seed=seed)
    away = torch.where(world.clean_margin < 0, 0.1, 0.0)[:, None] * world.slope.sign()
    margin = world.clean_margin - (away * world.slope).sum(dim=1)
    return dataclasses.replace(world, x=world.x - away, clean_margin=margin)


def fewest(world, low=LOW, high=HIGH):
    """The number of features that flip each row: the largest gains first; features + 1 where all are too few."""
    ends = torch.where(world.slope > 0, high - world.x, low - world.x)
    gain = (ends * world.slope).sort(dim=1, descending=True).values.cumsum(dim=1)
    missing = (gain + world.clean_margin[:, None] <= 0).sum(dim=1) + 1
    return torch.where(world.clean_margin > 0, 0, missing)


@pytest.mark.parametrize("seed", range(3))
def test_sigma_zero_finds_the_fewest_features(seed):
    world = far_world(seed)
    needed, threat = fewest(world), Threat("l0", 40, (LOW, HIGH))
    possible = needed <= 40
    result = SigmaZero(threat, 300).run(world.model, world.x, world.y)
    found = threat.distance(result.x_adv, world.x)
    assert torch.equal(result.success, possible) and (needed[possible] > 2).any()
    assert (found >= needed)[possible].all()
    assert (found <= needed + 1)[possible].all() and (found == needed)[possible].double().mean() >= 0.75


@pytest.mark.parametrize("goal", ["max_loss", "first_success", "min_norm"])
def test_beyond_eps_the_best_allowed_point_comes_out(goal):
    world = far_world()
    needed, threat = fewest(world), Threat("l0", 4, (LOW, HIGH))
    model = Counting(world.model)
    result = SigmaZero(threat, 150).run(model, world.x, world.y, goal=goal)
    assert threat.contains(result.x_adv, world.x).all() and (threat.distance(result.x_adv, world.x) <= 4).all()
    assert not result.success[needed > 4].any()
    assert result.success[needed == 4].double().mean() >= 0.5
    assert torch.equal(result.success, world.model(result.x_adv).argmax(1) != world.y)
    assert int(result.forwards.sum()) == model.counts["forward"]
    assert int(result.backwards.sum()) == model.counts["backward"]


def test_sigma_zero_wants_l0_and_finite_bounds():
    with pytest.raises(ThreatModelError, match="norm l0"):
        SigmaZero(Threat("l2", 1.0))
    with pytest.raises(ThreatModelError, match="finite bounds"):
        SigmaZero(Threat("l0", 1.0, (0.0, torch.inf)))


def test_fmn_reaches_the_l1_optimum():
    """Where no bound is in the way, the whole change goes into the steepest feature."""
    world, threat = linear_world(n=12), Threat("l1", 20.0, (-20.0, 20.0))
    needed = (-world.clean_margin / world.slope.abs().amax(dim=1)).clamp(min=0)
    result = FMN(threat, 300).run(world.model, world.x, world.y)
    distance = threat.distance(result.x_adv, world.x)
    assert result.success.all() and (distance >= needed - 1e-9).all() and (distance <= 1.1 * needed + 1e-6).all()


def test_fmn_comes_near_the_fewest_features():
    world, threat = far_world(), Threat("l0", 40, (LOW, HIGH))
    needed = fewest(world)
    result = FMN(threat, 300).run(world.model, world.x, world.y)
    distance = threat.distance(result.x_adv, world.x)
    assert (distance >= needed)[result.success].all() and (distance <= 1.5 * needed + 1)[result.success].all()
