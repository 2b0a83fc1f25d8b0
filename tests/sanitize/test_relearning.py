"""Relearning: fresh weights where they should be, lessons that name no other class, a backdoor that goes."""

import copy

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError
from aidefend.sanitize import repair, retest
from aidefend.sanitize.repair import relearning
from aidefend.sanitize.repair.relearning import divided, relearned, renewed, varied
from aidefend.sanitize.repair.repair import _first_that_holds
from aidefend.sanitize.repair.tuning import accuracy, trusted_rows
from tests.sanitize.test_repair import CLASSES, world  # noqa: F401  # a fixture


class WithToken(nn.Module):
    """A parameter that no `reset_parameters` knows, a normalising layer, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.arange(6.0))
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x + self.token)))


@pytest.fixture
def token():
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = WithToken()
    with torch.no_grad():
        model.norm.running_mean.fill_(7.0)
        model.norm.weight.fill_(2.0)
        model.norm.bias.fill_(1.0)
    return model.eval()


@pytest.mark.global_random("fresh weights are drawn from a seed of their own")
def test_all_weights_are_fresh_and_nothing_but_a_distribution_is_left_of_the_others(token):
    before, stream = copy.deepcopy(token.state_dict()), torch.get_rng_state()
    twin = renewed(token, None, seed=3)
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in token.state_dict().items())
    assert not any(torch.equal(before[name], value) for name, value in twin.named_parameters())
    assert torch.equal(twin.token.sort().values, torch.arange(6.0))
    assert float(twin.norm.running_mean.abs().max()) == 0 and bool((twin.norm.weight == 1).all())
    again = renewed(token, None, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), again.parameters(), strict=True))


def test_named_layers_alone_are_fresh(token):
    twin = renewed(token, ["last"], seed=3)
    changed = {name for name, value in twin.named_parameters() if not torch.equal(value, token.get_parameter(name))}
    assert changed == {"last.weight", "last.bias"}


def test_a_restricted_answer_names_no_other_class():
    logits = torch.tensor([[9.0, 1.0, 1.0, 0.0], [torch.nan, torch.inf, 0.0, 0.0]])
    among = torch.tensor([[False, True, True, False], [False, False, False, True]])
    torch.testing.assert_close(divided(logits, among), torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]]))


def test_lessons_never_hold_a_class_that_their_rows_do_not_have(world):  # noqa: F811
    """Planted: a teacher that says 0 to everything, and rows without class 0."""
    x, y = world.trusted
    rows = trusted_rows(world.model, (x[y != 0], y[y != 0]), 0)

    def teacher(x):
        return torch.tensor([50.0, 0, 0, 0, 0]).repeat(len(x), 1)

    stream = torch.Generator().manual_seed(0)
    for _ in range(5):
        _, wanted = relearning._lesson(teacher, rows, CLASSES, 0.5, stream)
        assert bool((wanted[:, 0] == 0).all())
        torch.testing.assert_close(wanted.sum(dim=1), torch.ones(len(wanted)))


def test_variants_of_no_strength_are_the_images_and_others_stay_in_their_range(monkeypatch):
    x = torch.rand(6, 2, 9, 12, generator=torch.Generator().manual_seed(0))
    changed = varied(x, torch.Generator().manual_seed(0))
    assert changed.shape == x.shape and bool(((changed >= x.amin()) & (changed <= x.amax())).all())
    assert bool(((changed - x).abs().flatten(1).amax(dim=1) > 0.1).all())
    assert torch.equal(varied(x[:, 0, 0], torch.Generator()), x[:, 0, 0])
    for strength in ("_TURN", "_SCALE", "_SHEAR", "_SHIFT", "_BEND"):
        monkeypatch.setattr(relearning, strength, 0.0)
    torch.testing.assert_close(varied(x, torch.Generator().manual_seed(0)), x, atol=1e-5, rtol=0)


def test_a_turn_turns_and_a_shift_shifts(monkeypatch):
    for strength in ("_TURN", "_SCALE", "_SHEAR", "_BEND"):
        monkeypatch.setattr(relearning, strength, 0.0)
    x = torch.zeros(40, 1, 10, 10)
    x[:, :, 5, 5] = 1.0
    moved = varied(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved.sum(dim=(1, 2, 3)), torch.ones(40))  # a shift keeps the mass
    places = (moved[:, 0].sum(dim=1) * torch.arange(10)).sum(dim=1) - 5
    assert 0.3 < float(places.abs().max()) <= 0.12 * 5 + 1e-4


def test_clutter_stays_in_range_and_leaves_rows_that_are_no_images():
    x = torch.full((400, 2, 12, 8), 0.4)
    changed = relearning.cluttered(x, 0.2, 0.9, torch.Generator().manual_seed(0))
    assert 0.2 <= float(changed.min()) < 0.4 < float(changed.max()) <= 0.9
    kept = (changed == x).flatten(1).all(dim=1).double().mean()
    assert 0.18 < float(kept) < 0.32  # half are left by the pattern, half of these by the rectangle
    assert torch.equal(relearning.cluttered(x[:, 0, 0], 0.0, 1.0, torch.Generator()), x[:, 0, 0])


def test_rectangles_cover_a_quarter_of_each_side_at_most():
    inside = relearning._rectangles(300, 16, 24, torch.Generator().manual_seed(0))[:, 0]
    sides = inside.any(dim=2).sum(dim=1), inside.any(dim=1).sum(dim=1)
    assert int(sides[0].max()) <= 5 and int(sides[1].max()) <= 7
    assert torch.equal(inside.sum(dim=(1, 2)), sides[0] * sides[1])  # whole rectangles
    assert 0.4 < float(inside.flatten(1).any(dim=1).double().mean()) < 0.6


@pytest.mark.global_random("fresh weights are drawn from a seed of their own")
def test_the_first_copy_knows_nothing_of_the_model(world):  # noqa: F811
    """Whatever the weights were, the copy is the same: what they held cannot be in it."""
    rows = trusted_rows(world.model, world.trusted, 0)
    copies = [next(relearned(model, rows, epochs=1, seed=4)) for model in (world.model, world.clean)]
    assert not torch.equal(world.model[0].weight, world.clean[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(copies[0].parameters(), copies[1].parameters(), strict=True))


def test_the_backdoor_goes_and_stays_away(world):  # noqa: F811
    repaired = repair(world.model, world.trusted, epochs=8)
    assert world.success(repaired) < 0.02
    assert accuracy(repaired, *world.test) > accuracy(world.model, *world.test) - 0.02
    assert retest(world.model, repaired, world.trusted, world.trigger, 0).verdict == "held"


def test_fewer_fresh_layers_come_after_more_and_only_if_asked(world):  # noqa: F811
    rows, made = trusted_rows(world.model, world.trusted, 0), []

    def candidates():
        for candidate in relearned(world.model, rows, epochs=1, seed=0):
            made.append(candidate)
            yield candidate

    assert _first_that_holds(candidates(), rows, 0.0, world.model) is made[0] and len(made) == 1
    best = _first_that_holds(candidates(), rows, 2.0, world.model)  # none holds: the most accurate one
    assert len(made) == 5
    assert accuracy(best, rows.held_x, rows.held_y) == max(accuracy(m, rows.held_x, rows.held_y) for m in made[1:])


def test_a_class_that_would_be_forgotten_is_named(world):  # noqa: F811
    x, y = world.trusted
    with pytest.raises(ConfigurationError, match=r"every class .*\[2\]"):
        repair(world.model, (x[y != 2], y[y != 2]), "relearning")
