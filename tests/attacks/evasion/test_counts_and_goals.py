"""What a run costs is counted exactly, and each goal does what it says."""

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError, Threat
from aidefend.attacks.evasion import APGD, PGD, cross_entropy
from tests.worlds import linear_world

FREE = (-10.0, 10.0)


class Count(torch.autograd.Function):
    """Identity that counts the rows of forward and backward passes."""

    @staticmethod
    def forward(ctx, x, counts):
        counts["forward"] += len(x)
        counts["calls"] += 1
        ctx.counts = counts
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.counts["backward"] += len(grad)
        return grad, None


class Counting(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.counts = model, {"forward": 0, "backward": 0, "calls": 0}

    def forward(self, x):
        return self.model(Count.apply(x, self.counts))


@pytest.fixture
def world():
    return linear_world(n=10)


def counted(world):
    model = Counting(world.model)
    return model, model.counts


@pytest.mark.parametrize("steps", [1, 7])
def test_pgd_in_training_costs_its_steps_and_nothing_more(world, steps):
    model, counts = counted(world)
    PGD(Threat("linf", 0.01, FREE), steps)(model, world.x, world.y)
    assert counts == {"forward": 10 * steps, "backward": 10 * steps, "calls": steps}


def test_restarts_score_each_end_point(world):
    model, counts = counted(world)
    PGD(Threat("linf", 0.01, FREE), 4, restarts=3)(model, world.x, world.y)
    assert (counts["forward"], counts["backward"]) == (10 * 3 * 5, 10 * 3 * 4)


@pytest.mark.parametrize("attack", [PGD, APGD])
def test_max_loss_run_adds_one_forward_a_restart(world, attack):
    model, counts = counted(world)
    result = attack(Threat("linf", 0.01, FREE), 5, restarts=2).run(model, world.x, world.y)
    assert (counts["forward"], counts["backward"]) == (10 * 2 * 6, 10 * 2 * 5)
    assert result.forwards.tolist() == [12] * 10 and result.backwards.tolist() == [10] * 10


@pytest.mark.parametrize("attack", [PGD, APGD])
@pytest.mark.parametrize("goal", ["first_success", "min_norm"])
def test_counts_of_every_goal_are_the_passes_that_ran(world, attack, goal):
    model, counts = counted(world)
    eps = float(world.flipping_eps("linf").median())
    result = attack(Threat("linf", eps, FREE), 12, restarts=2).run(model, world.x, world.y, goal=goal)
    assert int(result.forwards.sum()) == counts["forward"]
    assert int(result.backwards.sum()) == counts["backward"]


def test_first_success_drops_broken_rows(world):
    model, counts = counted(world)
    wrong = world.clean_margin > 0
    tiny = PGD(Threat("linf", 1e-6, FREE), 20).run(model, world.x, world.y, goal="first_success")
    assert torch.equal(tiny.success, wrong)
    assert tiny.forwards[wrong].tolist() == [1] * int(wrong.sum())
    assert tiny.forwards[~wrong].tolist() == [22] * int((~wrong).sum())
    assert torch.equal(tiny.x_adv[wrong], world.x[wrong])
    assert counts["forward"] == int(tiny.forwards.sum())


def test_first_success_stops_early_and_max_loss_never_does(world):
    threat = Threat("linf", 1.0, FREE)
    seeded = {"generator": torch.Generator().manual_seed(0)}
    early = PGD(threat, 40).run(world.model, world.x, world.y, goal="first_success", **seeded)
    assert early.success.all() and early.forwards.max() <= 12
    full = PGD(threat, 40).run(world.model, world.x, world.y, goal="max_loss")
    assert full.forwards.tolist() == [41] * 10
    assert (full.loss >= early.loss).all() and full.loss.sum() > early.loss.sum()


def test_clean_logits_are_reused(world):
    model, counts = counted(world)
    logits = world.model(world.x)
    PGD(Threat("linf", 1e-6, FREE), 3).run(model, world.x, world.y, goal="first_success", logits=logits)
    right = int((world.clean_margin <= 0).sum())
    assert counts["forward"] == right * 4


def test_the_loss_reported_is_the_loss_at_x_adv(world):
    for goal in ("max_loss", "first_success", "min_norm"):
        for attack in (PGD(Threat("l2", 0.2, FREE), 6), APGD(Threat("l2", 0.2, FREE), 6, restarts=2)):
            result = attack.run(world.model, world.x, world.y, goal=goal)
            outputs = world.model(result.x_adv).detach()
            torch.testing.assert_close(result.loss, cross_entropy(outputs, world.y), check_dtype=False)
            assert torch.equal(result.success, outputs.argmax(1) != world.y)


class Moody(nn.Module):
    """Two local optima: which side a row ends on depends on its start."""

    def forward(self, x):
        peak = torch.where(x > 0, 2 * x, -x).sum(dim=1)
        return torch.stack([torch.zeros_like(peak), peak - 1.5], dim=1)


@pytest.mark.parametrize("attack", [PGD, APGD])
def test_restarts_keep_the_worst_of_each_row(attack):
    x, y = torch.zeros(64, 1), torch.zeros(64, dtype=torch.int64)
    threat = Threat("linf", 1.0, (-1.0, 1.0))
    single = attack(threat, 10, loss="margin").run(Moody(), x, y, generator=torch.Generator().manual_seed(0))
    assert 10 < single.success.sum() < 54
    many = attack(threat, 10, restarts=12, loss="margin").run(Moody(), x, y, generator=torch.Generator().manual_seed(0))
    assert many.success.all() and torch.allclose(many.x_adv, torch.ones_like(x))
    x_adv = attack(threat, 10, restarts=12, loss="margin")(Moody(), x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x_adv, many.x_adv)


def test_one_more_restart_never_lowers_a_row():
    world, threat = linear_world(n=20, seed=3), Threat("l2", 0.1, FREE)
    losses = []
    for restarts in (1, 2, 4):
        stream = torch.Generator().manual_seed(5)
        losses.append(PGD(threat, 3, restarts=restarts).run(world.model, world.x, world.y, generator=stream).loss)
    assert (losses[1] >= losses[0]).all() and (losses[2] >= losses[1]).all()
    assert (losses[2] > losses[0]).any()


def test_row_seeds_make_rows_independent_of_their_batch():
    world, seeds = linear_world(n=12), torch.arange(12)
    attack = PGD(Threat("l2", 0.1, FREE), 3, restarts=2)
    whole = attack.run(world.model, world.x, world.y, goal="first_success", row_seeds=seeds)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = attack.run(world.model, world.x[order], world.y[order], goal="first_success", row_seeds=seeds[order])
    torch.testing.assert_close(mixed.x_adv, whole.x_adv[order])
    parts = [
        attack.run(
            world.model, world.x[i : i + 5], world.y[i : i + 5], goal="first_success", row_seeds=seeds[i : i + 5]
        )
        for i in range(0, 12, 5)
    ]
    torch.testing.assert_close(torch.cat([part.x_adv for part in parts]), whole.x_adv)
    other = attack.run(world.model, world.x, world.y, goal="first_success", row_seeds=seeds + 100)
    assert not torch.equal(other.x_adv, whole.x_adv)


def test_unknown_goal_and_two_sources_of_randomness_are_refused(world):
    attack = PGD(Threat("linf", 0.1, FREE))
    with pytest.raises(ConfigurationError, match="goal"):
        attack.run(world.model, world.x, world.y, goal="fast")
    with pytest.raises(ConfigurationError, match="one source of randomness"):
        attack.run(world.model, world.x, world.y, generator=torch.Generator(), row_seeds=torch.arange(10))


def test_regression_needs_to_say_what_success_is():
    model, x, y = nn.Linear(3, 1), torch.rand(4, 3), torch.rand(4)

    def squared(outputs, y):
        return (outputs[:, 0] - y) ** 2

    attack = PGD(Threat("linf", 0.1), 5, loss=squared)
    x_adv = attack(model, x, y)
    assert (squared(model(x_adv), y) > squared(model(x), y)).all()
    with pytest.raises(ConfigurationError, match="is_success"):
        attack.run(model, x, y)
    wide = PGD(Threat("linf", 0.1), 5, loss=squared, is_success=lambda outputs, y: squared(outputs, y) > 1e9)
    assert not wide.run(model, x, y, goal="first_success").success.any()
