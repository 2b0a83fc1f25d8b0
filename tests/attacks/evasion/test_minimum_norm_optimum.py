"""Minimum-norm and black-box attacks against closed forms on linear models, with exact counts of their passes."""

import pytest
import torch

from aidefend import Threat
from aidefend.attacks.evasion import (
    DDN,
    FMN,
    NES,
    PGD,
    AdversarialPatch,
    CarliniWagner,
    HopSkipJump,
    Square,
    Transfer,
    UniversalPerturbation,
    margin,
)
from tests.attacks.evasion.test_counts_and_goals import Counting
from tests.worlds import linear_world

FREE = (-10.0, 10.0)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


# attack, norm, and the factor of the closed-form distance within which it ends
CLOSE = {
    "fmn-linf": (lambda eps: FMN(Threat("linf", eps, FREE), 100), "linf", 1.001),
    "fmn-l2": (lambda eps: FMN(Threat("l2", eps, FREE), 100), "l2", 1.001),
    "ddn": (lambda eps: DDN(Threat("l2", eps, FREE), 200), "l2", 1.01),
    "carlini-wagner": (lambda eps: CarliniWagner(Threat("l2", eps, FREE), 100), "l2", 1.05),
    "hop-skip-jump-l2": (lambda eps: HopSkipJump(Threat("l2", eps, (-1.0, 2.0)), 12), "l2", 1.25),
    "hop-skip-jump-linf": (lambda eps: HopSkipJump(Threat("linf", eps, (-1.0, 2.0)), 12), "linf", 1.35),
}


@pytest.mark.parametrize("shape", [(12,), (1, 3, 4)])
@pytest.mark.parametrize("name", CLOSE)
def test_minimum_norm_reaches_the_closed_form(name, shape):
    world = linear_world(n=12, shape=shape)
    make, norm, factor = CLOSE[name]
    attack, needed = make(3.0), world.flipping_eps(norm)
    result = attack.run(world.model, world.x, world.y, goal="min_norm", generator=stream())
    distance = attack.threat.distance(result.x_adv, world.x)
    assert result.success.all()
    assert (distance >= needed - 1e-9).all()
    assert (distance <= needed * factor + 1e-6).all()
    assert torch.equal(result.x_adv[::5], world.x[::5])  # wrong already: distance 0


def lopsided(offset: float) -> torch.nn.Module:
    """Two classes; nearly all of the gradient lies in feature 0, which can go no further; nine others have a unit."""
    model = torch.nn.Linear(10, 2, bias=True).double()
    with torch.no_grad():
        model.weight.zero_()
        model.weight[1] = torch.tensor([1000.0, *[1.0] * 9], dtype=torch.float64)
        model.bias.copy_(torch.tensor([1000.0 + offset, 0.0], dtype=torch.float64))
    return model


@pytest.mark.parametrize(("norm", "factor"), [("linf", 1.01), ("l2", 1.01), ("l1", 1.02)])
def test_a_feature_at_its_bound_does_not_eat_the_step(norm, factor):
    x = torch.tensor([[1.0, *[0.2] * 9]], dtype=torch.float64).repeat(4, 1)
    attack = FMN(Threat(norm, 10.0), 200)  # bounds 0 and 1: the nine must rise by 1.8 in all
    result = attack.run(lopsided(9 * 0.2 + 1.8), x, torch.zeros(4, dtype=torch.long), goal="min_norm")
    needed = {"linf": 0.2, "l2": 0.2 * 3, "l1": 1.8}[norm]
    assert result.success.all()
    distance = attack.threat.distance(result.x_adv, x)
    assert (distance >= needed * (1 - 1e-9)).all()
    assert (distance <= needed * factor).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_unit_of_the_data_does_not_matter(norm):
    world = linear_world(n=12)
    bytes_model = torch.nn.Sequential(Times(1 / 256), world.model)
    small = FMN(Threat(norm, 50.0, FREE), 50).run(world.model, world.x, world.y)
    large = FMN(Threat(norm, 50.0 * 256, (-2560.0, 2560.0)), 50).run(bytes_model, world.x * 256, world.y)
    torch.testing.assert_close(large.x_adv, small.x_adv * 256)


class Times(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize("goal", ["max_loss", "first_success", "min_norm"])
@pytest.mark.parametrize("name", CLOSE)
def test_beyond_eps_the_best_allowed_point_comes_out(name, goal):
    world = linear_world(n=12)
    make, norm, factor = CLOSE[name]
    needed = world.flipping_eps(norm)
    eps = float(needed.median())
    attack = make(eps)
    result = attack.run(world.model, world.x, world.y, goal=goal, generator=stream())
    assert attack.threat.contains(result.x_adv, world.x).all()
    assert result.success[needed * factor * 1.01 < eps].all() and not result.success[needed > eps].any()
    found = world.model(result.x_adv).detach()
    assert torch.equal(result.success, found.argmax(1) != world.y)
    torch.testing.assert_close(
        margin(found, world.y) > margin(world.model(world.x), world.y), result.x_adv.ne(world.x).any(1)
    )


@pytest.mark.parametrize("goal", ["max_loss", "first_success", "min_norm"])
@pytest.mark.parametrize("name", CLOSE)
def test_counts_are_the_passes_that_ran(name, goal):
    world = linear_world(n=10)
    model = Counting(world.model)
    attack = CLOSE[name][0](float(world.flipping_eps(CLOSE[name][1]).median()) * 1.2)
    result = attack.run(model, world.x, world.y, goal=goal)
    assert int(result.forwards.sum()) == model.counts["forward"]
    assert int(result.backwards.sum()) == model.counts["backward"]
    if goal == "first_success":
        wrong = world.clean_margin > 0
        assert result.forwards[wrong].tolist() == [1] * int(wrong.sum())
        assert len(set(result.forwards.tolist())) > 2 or "fmn" in name  # rows leave at several checkpoints


def test_costs_as_stated():
    world, tiny = linear_world(n=10), 1e-6

    def passes(attack, goal):
        result = attack.run(world.model, world.x, world.y, goal=goal, generator=stream())
        right = world.clean_margin <= 0
        assert len(set(result.forwards[right].tolist())) == 1
        return int(result.forwards[right][0]), int(result.backwards[right][0])

    linf, l2 = Threat("linf", tiny, FREE), Threat("l2", tiny, FREE)
    assert passes(FMN(linf, 30), "min_norm") == (31, 30)
    assert passes(DDN(l2, 30), "min_norm") == (31, 30)
    assert passes(Square(linf, 30, restarts=2), "max_loss") == (60, 0)
    assert passes(Square(linf, 30), "first_success") == (31, 0)
    assert passes(NES(l2, 5, pairs=3), "max_loss") == (31, 0)
    assert passes(AdversarialPatch(linf, (1, 3), 7), "max_loss") == (9, 8)
    assert passes(AdversarialPatch(linf, (1, 3), 7, place="random", places=3), "max_loss") == (22, 21)
    assert passes(UniversalPerturbation(linf, 4), "max_loss") == (5, 4)
    assert passes(UniversalPerturbation(linf, 4), "first_success") == (6, 4)
    assert passes(Transfer(world.model, PGD(linf, 3)), "first_success") == (2, 0)
    assert passes(CarliniWagner(l2, 6, searches=2), "first_success")[1] == 12


def test_clean_logits_are_reused():
    world, model = linear_world(n=10), None
    logits = world.model(world.x).detach()
    for attack in (FMN(Threat("l2", 1e-6, FREE), 9), CarliniWagner(Threat("l2", 1e-6, FREE), 3, searches=3)):
        model = Counting(world.model)
        attack.run(model, world.x, world.y, goal="first_success", logits=logits)
        assert (
            model.counts["forward"] <= 10 * 10 and model.counts["backward"] == int((world.clean_margin <= 0).sum()) * 9
        )


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (lambda threat: Square(threat, 600), 0.85),
        (lambda threat: NES(threat, 30, pairs=20, sigma=0.001), 0.93),
    ],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_black_box_comes_near_the_worst_margin(make, share, norm):
    world, eps = linear_world(n=12), 0.1
    threat = Threat(norm, eps, FREE)
    result = make(threat).run(world.model, world.x, world.y, generator=stream())
    gain = (result.loss - world.clean_margin) / (world.worst_margin(norm, eps) - world.clean_margin)
    assert (gain <= 1 + 1e-6).all() and (gain >= share).all()


def test_a_universal_perturbation_of_one_slope_is_the_optimum():
    """Rows of one class share their slope: the best common step is the best step of each."""
    world = linear_world(n=40)
    rows = world.y == 0
    x, y, eps = world.x[rows], world.y[rows], 0.1
    attack = UniversalPerturbation(Threat("linf", eps, FREE), 10, 8)
    step = attack.perturbation(world.model, x, y, generator=stream())
    torch.testing.assert_close(step, eps * world.slope[rows][:1].sign())
    torch.testing.assert_close(attack(world.model, x, y, generator=stream()), x + step)
    smallest = attack.run(world.model, x, y, goal="min_norm")
    distance, needed = attack.threat.distance(smallest.x_adv, x), world.flipping_eps("linf")[rows]
    assert torch.equal(smallest.success, needed <= eps) and smallest.success.any()
    hit = smallest.success & (needed > 0)
    assert ((distance - needed)[hit] <= eps / 1000).all() and ((distance - needed)[hit] >= 0).all()


def best_window(world, height, width, change):
    """The largest sum of |slope| over windows, times the change: the gain of the best patch."""
    strength = world.slope.abs().sum(dim=1, keepdim=True)
    sums = torch.nn.functional.avg_pool2d(strength, (height, width), stride=1) * height * width
    return sums.flatten(1).amax(dim=1) * change


def test_the_patch_finds_the_best_place():
    world = linear_world(n=8, shape=(2, 6, 7))
    attack = AdversarialPatch(Threat("linf", 0.2, FREE), (2, 3), 30)
    result = attack.run(world.model, world.x, world.y, generator=stream())
    changed = (result.x_adv != world.x).any(dim=1).flatten(1).sum(dim=1)
    assert (changed <= 6).all()
    found = margin(world.model(result.x_adv).detach(), world.y) - world.clean_margin
    torch.testing.assert_close(found, best_window(world, 2, 3, 0.2), atol=1e-6, rtol=0)
    anywhere = AdversarialPatch(Threat("linf", 0.2, FREE), (2, 3), 10, place="random")
    elsewhere = margin(world.model(anywhere(world.model, world.x, world.y)).detach(), world.y) - world.clean_margin
    assert (elsewhere <= found + 1e-9).all() and (elsewhere < found).any()


def test_a_shared_patch_is_one_patch():
    world = linear_world(n=8, shape=(1, 5, 5))
    attack = AdversarialPatch(Threat("linf", 20.0, FREE), (2, 2), 10, shared=True)
    x_adv = attack(world.model, world.x, world.y, generator=stream())
    inside = x_adv != world.x
    assert torch.equal(inside.any(0), inside.all(0)) and int(inside[0].sum()) == 4
    patches = x_adv[inside].reshape(8, 4)
    assert torch.equal(patches, patches[:1].expand_as(patches))


@pytest.mark.parametrize("name", ["fmn-linf", "ddn", "hop-skip-jump-l2"])
def test_row_seeds_make_rows_independent_of_their_batch(name):
    world, seeds = linear_world(n=9), torch.arange(9)
    attack = CLOSE[name][0](1.0)
    whole = attack.run(world.model, world.x, world.y, row_seeds=seeds)
    parts = [
        attack.run(world.model, world.x[i : i + 4], world.y[i : i + 4], row_seeds=seeds[i : i + 4]).x_adv
        for i in range(0, 9, 4)
    ]
    torch.testing.assert_close(torch.cat(parts), whole.x_adv)


@pytest.mark.parametrize("name", CLOSE)
def test_the_smallest_of_masked_features(name):
    """Fixed features stay, and the distance is that of the free ones alone."""
    world = linear_world(n=10)
    make, norm, factor = CLOSE[name]
    mask = torch.arange(12) % 3 > 0
    attack = make(3.0)
    attack = type(attack)(Threat(norm, 3.0, attack.threat.bounds, mask=mask), *[attack.steps])
    result = attack.run(world.model, world.x, world.y, goal="min_norm", generator=stream())
    free = world.slope[:, mask]
    needed = (-world.clean_margin / (free.abs().sum(1) if norm == "linf" else free.norm(dim=1))).clamp(min=0)
    distance = attack.threat.distance(result.x_adv, world.x)
    assert torch.equal(result.x_adv[:, ~mask], world.x[:, ~mask]) and result.success.all()
    assert (distance >= needed - 1e-9).all() and (distance <= needed * (factor + 0.05) + 1e-6).all()
