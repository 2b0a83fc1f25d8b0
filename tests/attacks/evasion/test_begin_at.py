"""Attacks that begin at points of the caller's own."""

import pytest
import torch

from aidefend import AidefendError, Threat
from aidefend.attacks.evasion import APGD, PGD
from tests.worlds import linear_world

FREE = (-10.0, 10.0)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


class Misled(torch.nn.Module):
    """Class 1 where the first feature is below -0.5; near x the gradient leads up, away from it."""

    def forward(self, x):
        first = x[:, 0]
        other = torch.where(first > -0.2, first - 10.0, -first - 0.5)
        return torch.stack([torch.zeros_like(other), other], dim=1)


@pytest.mark.parametrize("make", [PGD, APGD])
def test_the_first_point_is_the_one_given(make):
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    attack = make(Threat("linf", 1.0, FREE), 30, loss="margin")
    lost = attack.run(Misled(), x, y, goal="first_success", generator=stream(), begin_at=torch.ones(3, 2))
    led = attack.run(Misled(), x, y, goal="first_success", generator=stream(), begin_at=-0.25 * torch.ones(3, 2))
    assert not lost.success.any()
    assert led.success.all()


@pytest.mark.parametrize("make", [PGD, APGD])
def test_points_outside_the_threat_are_pulled_in(make):
    world = linear_world(n=6)
    threat = Threat("l2", 0.1, FREE)
    found = make(threat, 3).run(world.model, world.x, world.y, begin_at=world.x + 5, generator=stream())
    assert threat.contains(found.x_adv, world.x).all()


@pytest.mark.parametrize("make", [PGD, APGD])
def test_points_stay_with_their_rows(make):
    world = linear_world(n=10)  # every fifth row is wrong already and leaves at once
    attack = make(Threat("linf", 0.05, FREE), 6)
    points = world.x + 0.05 * torch.randn(world.x.shape, generator=stream(1)).to(world.x).sign()
    seeds = torch.arange(10)
    whole = attack.run(world.model, world.x, world.y, goal="first_success", row_seeds=seeds, begin_at=points)
    for i in range(10):
        rows = slice(i, i + 1)
        one = attack.run(
            world.model, world.x[rows], world.y[rows], goal="first_success", row_seeds=seeds[rows],
            begin_at=points[rows],
        )  # fmt: skip
        torch.testing.assert_close(one.x_adv[0], whole.x_adv[i])


@pytest.mark.parametrize("make", [PGD, APGD])
def test_the_second_start_is_random_again(make):
    world = linear_world(n=4)
    attack = make(Threat("linf", 0.1, FREE), 2, restarts=2)
    found = attack.run(world.model, world.x, world.y, begin_at=world.x, generator=stream())
    assert (found.backwards == 4).all()
    assert attack.threat.contains(found.x_adv, world.x).all()


@pytest.mark.parametrize(
    ("attack", "goal", "points"),
    [
        (PGD(Threat("linf", 0.1, FREE), 2), "min_norm", torch.zeros(4, 12)),
        (PGD(Threat("linf", 0.1, FREE), 2), "max_loss", torch.zeros(3, 12)),
        (PGD(Threat("linf", 0.1, FREE), 2), "max_loss", torch.zeros(4, 11)),
        (APGD(Threat("linf", 0.1, FREE), 2), "max_loss", torch.full((4, 12), float("nan"))),
        (APGD(Threat("linf", 0.1, FREE), 2), "max_loss", [0.0] * 4),
        (APGD(Threat("linf", 0.1, FREE), 2, targets=1), "max_loss", torch.zeros(4, 12)),
    ],
)
def test_malformed_points_are_refused(attack, goal, points):
    world = linear_world(n=4)
    with pytest.raises(AidefendError, match="begin_at"):
        attack.run(world.model, world.x, world.y, goal=goal, begin_at=points)
