"""Minimum-norm attacks reach the closed-form distance of linear models, in exactly the passes they state."""

import pytest
import torch
from torch import nn

from aidefend import AidefendError, Threat
from aidefend.attacks import DDN, FMN
from tests.worlds import linear_world

FREE = (-10.0, 10.0)
WORLD = linear_world(n=60, dtype=torch.float32)
ATTACKS = {
    "fmn-linf": (FMN(Threat("linf", 10.0, FREE), 100), 1.003),
    "fmn-l2": (FMN(Threat("l2", 10.0, FREE), 100), 1.003),
    "ddn": (DDN(Threat("l2", 10.0, FREE), 300, first_norm=0.1), 1.02),
}
every = pytest.mark.parametrize(("attack", "slack"), ATTACKS.values(), ids=list(ATTACKS))


@every
def test_closed_form_distance(attack, slack):
    norm = attack.threat.norm
    needed = WORLD.flipping_eps(norm)
    result = attack.run(WORLD.model, WORLD.x, WORLD.y, goal="min_norm")
    found = attack.threat.distance(result.x_adv, WORLD.x)
    open_rows = needed > 0
    assert result.success.all()
    assert (found[open_rows] / needed[open_rows]).max() < slack
    assert (found[open_rows] >= needed[open_rows] * 0.9999 - 1e-7).all()  # nothing is closer than the closed form
    assert torch.equal(found[~open_rows], torch.zeros(int((~open_rows).sum())).double())


@every
def test_stays_inside_a_small_threat_and_says_who_broke(attack, slack):
    norm = attack.threat.norm
    needed = WORLD.flipping_eps(norm)
    eps = float(needed.median()) * 1.001
    small = type(attack)(Threat(norm, eps, FREE), attack.steps)
    for goal in ("min_norm", "first_success"):
        result = small.run(WORLD.model, WORLD.x, WORLD.y, goal=goal)
        assert small.threat.contains(result.x_adv, WORLD.x).all()
        assert torch.equal(result.success, WORLD.model(result.x_adv).argmax(1) != WORLD.y)
        assert torch.equal(result.success[needed > eps], torch.zeros(int((needed > eps).sum()), dtype=torch.bool))
        assert result.success[needed < eps / slack / 1.05].all()


@every
def test_counted_passes(attack, slack):
    result = attack.run(WORLD.model, WORLD.x, WORLD.y, goal="min_norm")
    clean = 2 if isinstance(attack, FMN) and attack.threat.norm == "l2" else 1  # it begins in linf
    assert set(result.forwards.tolist()) == {attack.steps + clean}
    assert set(result.backwards.tolist()) == {attack.steps}
    logits = WORLD.model(WORLD.x).detach()
    assert set(attack.run(WORLD.model, WORLD.x, WORLD.y, logits=logits).forwards.tolist()) == {attack.steps}
    early = attack.run(WORLD.model, WORLD.x, WORLD.y, goal="first_success")
    assert early.success.all() and early.backwards.max() < attack.steps / 2


def test_target_classes():
    model = nn.Linear(4, 4, bias=False)
    model.weight.data.copy_(torch.eye(4))
    x, target = torch.tensor([[0.9, 0.2, 0.3, 0.1]]), torch.tensor([1])
    attack = FMN(Threat("linf", 1.0, FREE), 200, targeted=True)
    result = attack.run(model, x, target, goal="min_norm")
    assert model(result.x_adv).argmax() == 1
    assert attack.threat.distance(result.x_adv, x).item() == pytest.approx(0.35, rel=0.02)


def test_a_model_that_cannot_be_fooled():
    fixed = lambda x: torch.stack([x.flatten(1).sum(1) * 0 + 1, x.flatten(1).sum(1) * 0], dim=1)  # noqa: E731
    x, y = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    result = FMN(Threat("l2", 0.3), 20).run(fixed, x, y, goal="min_norm")
    assert not result.success.any() and result.x_adv.isfinite().all()


def test_bad_fields():
    for make in (
        lambda: DDN(Threat("linf", 0.1)),
        lambda: DDN(Threat("l2", 0.1), rate=0.0),
        lambda: FMN(Threat("l2", 0.1), step_size=0.0),
        lambda: FMN(Threat("l2", 0.1), shrink_rate=2.0),
    ):
        with pytest.raises(AidefendError):
            make()
