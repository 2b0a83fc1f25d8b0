"""Square: exact query counts, any rank of input, blind to masked gradients, as strong as it should be."""

import pytest
import torch
from torch import nn

from aidefend import AidefendError, Threat
from aidefend.attacks import PGD, Square
from aidefend.attacks.evasion.windows import Grid, opposed_hills
from tests.worlds import linear_world

FREE = (-10.0, 10.0)
WORLD = linear_world(n=60, dtype=torch.float32)


class Rounded(nn.Module):
    """The linear model behind rounded inputs: no gradient reaches x."""

    def forward(self, x):
        return WORLD.model((x * 512).round() / 512)


def test_breaks_what_gradients_cannot():
    threat = Threat("linf", float(WORLD.flipping_eps("linf").quantile(0.6)), FREE)
    breakable = WORLD.flipping_eps("linf") < 0.8 * threat.eps
    by_query = Square(threat, 500).run(Rounded(), WORLD.x, WORLD.y, goal="first_success", row_seeds=torch.arange(60))
    by_gradient = PGD(threat, 50).run(Rounded(), WORLD.x, WORLD.y, goal="first_success", row_seeds=torch.arange(60))
    assert by_query.success[breakable].float().mean() > 0.95
    assert by_gradient.success[breakable].float().mean() < by_query.success[breakable].float().mean() - 0.1
    assert torch.equal(by_query.success, Rounded()(by_query.x_adv).argmax(1) != WORLD.y)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_most_of_what_the_closed_form_allows(norm):
    needed = WORLD.flipping_eps(norm)
    threat = Threat(norm, float(needed.quantile(0.8)), FREE)
    result = Square(threat, 1000).run(WORLD.model, WORLD.x, WORLD.y, goal="first_success", row_seeds=torch.arange(60))
    assert threat.contains(result.x_adv, WORLD.x).all()
    assert not result.success[needed > threat.eps * 1.0001].any()
    assert result.success[needed < 0.7 * threat.eps].float().mean() > 0.9


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (1, 2, 2), (3, 9, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("classes", [2, 5])
def test_any_rank_and_number_of_classes(norm, shape, classes):
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), classes))
    y = model(x).argmax(dim=1)
    attack = Square(Threat(norm, 0.2), 30)
    result = attack.run(model, x, y, generator=torch.Generator().manual_seed(1))
    assert result.x_adv.shape == x.shape and attack.threat.contains(result.x_adv, x).all()
    assert (
        result.loss >= Square(Threat(norm, 0.2), 1).run(model, x, y, generator=torch.Generator().manual_seed(1)).loss
    ).all()
    assert result.loss.mean() > -2 and not torch.equal(result.x_adv, x)


def test_counted_queries_and_no_backward_pass():
    class Counted(nn.Module):
        calls = 0

        def forward(self, x):
            Counted.calls += 1
            assert not torch.is_grad_enabled()
            return WORLD.model(x)

    result = Square(Threat("linf", 1e-6, FREE), 25, restarts=2).run(Counted(), WORLD.x, WORLD.y)
    assert Counted.calls == 50 and set(result.forwards.tolist()) == {50} and set(result.backwards.tolist()) == {0}


def test_rows_do_not_depend_on_their_mates():
    attack, seeds = Square(Threat("linf", 0.05, FREE), 40), torch.arange(60)
    whole = attack.run(WORLD.model, WORLD.x, WORLD.y, row_seeds=seeds)
    part = attack.run(WORLD.model, WORLD.x[7:9], WORLD.y[7:9], row_seeds=seeds[7:9])
    torch.testing.assert_close(part.x_adv, whole.x_adv[7:9])


def test_other_norms_are_refused():
    with pytest.raises(AidefendError):
        Square(Threat("l1", 0.1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (6, 6), (3, 8)])
@pytest.mark.parametrize("along_rows", [True, False])
def test_hills_have_length_one_and_two_signs(height, width, along_rows):
    hills = opposed_hills(height, width, along_rows=along_rows)
    assert hills.shape == (height, width) and hills.norm().item() == pytest.approx(1.0)
    if (height if along_rows else width) > 1:
        assert (hills > 0).any() and (hills < 0).any()


def test_windows_stay_on_the_grid():
    grid = Grid.of(torch.zeros(1, 2, 5, 7))
    for corner in (0.0, 0.5, 1 - 1e-7):
        numbers = torch.full((3, 7), corner)
        places = grid.window(numbers, 3, 4)
        assert places.shape == (3, 2, 12) and places.min() >= 0 and places.max() < 35
        assert len(set(places[0, 0].tolist())) == 12
    assert grid.size(1.0) == (5, 7) and grid.size(1e-9) == (1, 1) and grid.size(1e-9, odd=True) == (3, 3)
