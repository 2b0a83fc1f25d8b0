"""APGD-T: towards the likeliest wrong classes, with exact costs."""

import pytest
import torch
from torch import nn

from aidefend import AidefendError, Threat
from aidefend.attacks import APGD
from aidefend.attacks.evasion.targets import towards

FREE = (-10.0, 10.0)


def world(classes, n=40):
    stream = torch.Generator().manual_seed(classes)
    model = nn.Linear(6, classes)
    model.weight.data.copy_(torch.randn(classes, 6, generator=stream))
    x = torch.randn(n, 6, generator=stream)
    y = model(x).argmax(dim=1)
    rows = torch.arange(n)
    gap = (model(x)[rows, y][:, None] - model(x)).detach()
    slopes = (model.weight[y][:, None] - model.weight[None]).abs().sum(2).detach()
    needed = (gap / slopes).masked_fill(nn.functional.one_hot(y, classes).bool(), torch.inf).amin(1)
    return model, x, y, needed


@pytest.mark.parametrize("classes", [2, 3, 4, 12])
def test_exact_on_linear_models_with_any_number_of_classes(classes):
    model, x, y, needed = world(classes)
    eps = float(needed.median()) * 1.0001
    attack = APGD(Threat("linf", eps, FREE), 30, targets=9)
    for goal in ("first_success", "max_loss", "min_norm"):
        result = attack.run(model, x, y, goal=goal, generator=torch.Generator().manual_seed(0))
        assert torch.equal(result.success, needed <= eps), goal
        assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)
        assert attack.threat.contains(result.x_adv, x).all()
    excess = (attack.threat.distance(result.x_adv, x) - needed)[result.success]
    assert excess.max() < eps / 500  # ten halvings of the radius


def test_costs():
    model, x, y, _ = world(12)
    attack = APGD(Threat("linf", 1e-6, FREE), 5, targets=9)
    result = attack.run(model, x, y, generator=torch.Generator().manual_seed(0))
    assert set(result.backwards.tolist()) == {9 * 5} and set(result.forwards.tolist()) == {1 + 9 * 6}
    logits = model(x).detach()
    given = attack.run(model, x, y, logits=logits, goal="first_success", generator=torch.Generator().manual_seed(0))
    assert set(given.backwards.tolist()) == {9 * 5} and set(given.forwards.tolist()) == {9 * 6}
    few = APGD(Threat("linf", 1e-6, FREE), 5, targets=2).run(model, x, y)
    assert set(few.backwards.tolist()) == {2 * 5}


def test_the_ratio_does_not_change_with_scale():
    outputs, pair = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1]] * 5)
    torch.testing.assert_close(towards(outputs * 100 + 3, pair), towards(outputs, pair), rtol=1e-4, atol=1e-5)
    assert torch.equal(towards(outputs, pair) > 0, outputs[:, 1] > outputs[:, 0])


def test_rows_do_not_depend_on_their_mates():
    model, x, y, needed = world(5)
    attack, seeds = APGD(Threat("linf", float(needed.median()), FREE), 8, targets=3), torch.arange(40)
    whole = attack.run(model, x, y, row_seeds=seeds)
    part = attack.run(model, x[3:6], y[3:6], row_seeds=seeds[3:6])
    torch.testing.assert_close(part.x_adv, whole.x_adv[3:6])


def test_refusals():
    threat = Threat("linf", 0.1)
    for options in ({"targets": 0}, {"targets": 3, "targeted": True}, {"targets": 3, "is_success": lambda z, y: y > 0}):
        with pytest.raises(AidefendError, match="targets"):
            APGD(threat, 5, **options)
