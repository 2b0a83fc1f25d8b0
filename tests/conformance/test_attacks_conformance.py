"""One list of evasion attacks; each line inherits every convention."""

import dataclasses
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from aidefend import AidefendError, ThreatModelError
from aidefend._core.threat import Threat
from aidefend.attacks.evasion import APGD, DDN, FMN, PGD, Square

ATTACKS = {
    "apgd-l2": lambda eps: APGD(Threat("l2", eps), 6),
    "apgd-l2-restarts": lambda eps: APGD(Threat("l2", eps), 4, restarts=2, loss="dlr"),
    "apgd-t": lambda eps: APGD(Threat("linf", eps), 3, targets=9),
    "apgd-linf": lambda eps: APGD(Threat("linf", eps), 6, loss="margin"),
    "apgd-l0": lambda eps: APGD(Threat("l0", min(1, eps) * 30), 5),
    "apgd-l1": lambda eps: APGD(Threat("l1", 10 * eps), 12),
    "apgd-scaled": lambda eps: APGD(Threat("l2", eps, scale=torch.tensor(2.0)), 5),
    "ddn": lambda eps: DDN(Threat("l2", eps), 5),
    "fgsm": lambda eps: PGD(Threat("linf", eps), 1, random_start=False),
    "fmn-l0": lambda eps: FMN(Threat("l0", min(1, eps) * 30), 5),
    "fmn-l1": lambda eps: FMN(Threat("l1", 10 * eps), 5),
    "fmn-l2": lambda eps: FMN(Threat("l2", eps), 5),
    "fmn-linf": lambda eps: FMN(Threat("linf", eps), 5),
    "pgd-l0": lambda eps: PGD(Threat("l0", min(1, eps) * 30), 4),
    "pgd-l1": lambda eps: PGD(Threat("l1", 10 * eps), 5, restarts=2),
    "pgd-l2": lambda eps: PGD(Threat("l2", eps), 5),
    "pgd-linf": lambda eps: PGD(Threat("linf", eps), 5),
    "pgd-linf-restarts": lambda eps: PGD(Threat("linf", eps), 3, restarts=2, loss="dlr"),
    "pgd-targeted": lambda eps: PGD(Threat("linf", eps), 3, targeted=True),
    "square-l2": lambda eps: Square(Threat("l2", eps), 9),
    "square-linf": lambda eps: Square(Threat("linf", eps), 9),
}
GOALS = ("max_loss", "first_success", "min_norm")
every_attack = pytest.mark.parametrize("name", ATTACKS)


class Mixed(nn.Module):
    """BatchNorm in train mode and frozen BatchNorm, dropout, a shared layer, a buffer that counts, frozen weights."""

    def __init__(self, classes=3, channels=2):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout(0.5)
        )
        self.head = nn.Linear(4, classes)
        self.register_buffer("calls", torch.zeros(()))
        self.body[0].weight.requires_grad_(False)
        self.body[3].eval()

    def forward(self, x):
        self.calls += 1
        return self.head(self.body(x).mean((2, 3)))


def state(model):
    return {
        "values": [(key, value.tolist()) for key, value in model.state_dict().items()],
        "objects": [id(tensor) for tensor in [*model.parameters(), *model.buffers()]],
        "flags": [module.training for module in model.modules()],
        "requires": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "streams": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
        "grad mode": torch.is_grad_enabled(),
    }


def images(n=4, seed=0, dtype=torch.float32):
    stream = torch.Generator().manual_seed(seed)
    return torch.rand(n, 2, 6, 6, generator=stream, dtype=dtype), torch.arange(n) % 3


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


@every_attack
@pytest.mark.parametrize("goal", [None, *GOALS])
def test_leaves_no_trace(name, goal):
    model, (x, y) = Mixed(), images()
    with torch.random.fork_rng():
        model(x).square().sum().backward()
    before, x_before, y_before = state(model), x.clone(), y.clone()
    attack = ATTACKS[name](0.1)
    attack(model, x, y) if goal is None else attack.run(model, x, y, goal=goal)
    assert state(model) == before
    assert torch.equal(x, x_before) and torch.equal(y, y_before) and x.grad is None and not x.requires_grad


@every_attack
def test_a_model_that_raises_is_named_and_left_as_it_was(name):
    x, y = images()
    unbroken = one_hot((y + ("targeted" in name)) % 3, 3)

    class Fails(Mixed):
        def forward(self, x):
            outputs = super().forward(x)
            if self.calls > 2:
                raise ZeroDivisionError("the third pass")
            return outputs + 100 * unbroken  # whatever dropout does: no attack ends early

    model = Fails()
    before = state(model)
    with pytest.raises(AidefendError, match=r"model=.*ZeroDivisionError.*the third pass") as caught:
        ATTACKS[name](0.1).run(model, x, y, goal="min_norm")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert state(model) == before


@every_attack
@pytest.mark.parametrize("goal", GOALS)
def test_eps_zero_is_the_identity(name, goal):
    model, (x, y) = Mixed().eval(), images()
    result = ATTACKS[name](0.0).run(model, x, y, goal=goal)
    assert torch.equal(result.x_adv, x)
    assert torch.equal(ATTACKS[name](0.0)(model, x, y), x)


@every_attack
@pytest.mark.parametrize("shape", [(7,), (2, 9), (1, 4, 4), (1, 2, 3, 3)])
@pytest.mark.parametrize("classes", [2, 5])
def test_any_rank_and_class_count_stays_inside(name, shape, classes):
    features = int(np.prod(shape))
    model = nn.Sequential(nn.Flatten(), nn.Linear(features, classes))
    x, y = torch.rand(6, *shape, generator=stream()), torch.arange(6) % classes
    attack = ATTACKS[name](0.3)
    x_adv = attack(model, x, y, generator=stream())
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert attack.threat.contains(x_adv, x).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert not torch.equal(x_adv, x)


@every_attack
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(name, dtype):
    model, (x, y) = Mixed().eval().to(dtype), images()
    x = x.to(dtype)
    result = ATTACKS[name](0.1).run(model, x, y)
    assert result.x_adv.dtype == dtype and result.x_adv.isfinite().all()
    assert ATTACKS[name](0.1).threat.contains(result.x_adv, x).all()


@every_attack
@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single_row(name, n):
    model, (x, y) = Mixed().eval(), images(n)
    assert ATTACKS[name](0.1)(model, x, y).shape == x.shape
    for goal in GOALS:
        result = ATTACKS[name](0.1).run(model, x, y, goal=goal)
        assert [len(part) for part in dataclasses.astuple(result)] == [n] * 5


@every_attack
def test_seeds(name):
    model, (x, y) = Mixed().eval(), images()
    first = ATTACKS[name](0.1)(model, x, y, generator=stream(1))
    assert torch.equal(first, ATTACKS[name](0.1)(model, x, y, generator=stream(1)))
    if name not in ("fgsm", "ddn") and not name.startswith("fmn"):  # these draw numbers only where there is no gradient
        assert not torch.equal(first, ATTACKS[name](0.1)(model, x, y, generator=stream(2)))


@every_attack
def test_works_where_gradients_are_switched_off(name):
    model, (x, y) = Mixed().eval(), images()
    expected = ATTACKS[name](0.1)(model, x, y, generator=stream())
    with torch.no_grad():
        assert torch.equal(ATTACKS[name](0.1)(model, x, y, generator=stream()), expected)
    with torch.inference_mode():
        again = ATTACKS[name](0.1)(model, x.clone(), y.clone(), generator=stream())
        assert ATTACKS[name](0.1).run(model, x.clone(), y.clone(), goal="min_norm").x_adv.shape == x.shape
    assert torch.equal(again, expected)


@every_attack
def test_a_graph_of_the_caller_survives(name):
    """A loss on the clean batch waits for its backward pass while the attack runs on the same BatchNorm."""
    model, (x, y) = Mixed(), images()
    with torch.random.fork_rng():
        loss = model(x).sum()
    ATTACKS[name](0.1)(model, x, y)
    loss.backward()
    assert model.head.weight.grad is not None


@every_attack
def test_pickle_equality_and_frozen(name):
    attack = ATTACKS[name](0.1)
    assert pickle.loads(pickle.dumps(attack)) == attack
    assert attack.with_loss("margin").loss == "margin" and attack.with_loss("margin").threat == attack.threat
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.steps = 3


@every_attack
@pytest.mark.parametrize("bad", ["nan outputs", "no gradient", "zero gradient", "nan gradient", "huge"])
def test_broken_models_give_no_nan(name, bad):
    class Broken(nn.Module):
        def forward(self, x):
            z = torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], 1)
            return {
                "nan outputs": z * torch.nan,
                "no gradient": z.detach(),
                "zero gradient": z.round(),
                "nan gradient": z + 0 * (x.flatten(1).sum(1, keepdim=True) * 0).sqrt(),
                "huge": z * 1e38 * 10,
            }[bad]

    x, y = torch.rand(3, 5, generator=stream()), torch.tensor([0, 1, 0])
    attack = ATTACKS[name](0.1)
    for x_adv in (attack(Broken(), x, y), attack.run(Broken(), x, y, goal="min_norm").x_adv):
        assert x_adv.isfinite().all() and attack.threat.contains(x_adv, x).all()
    result = attack.run(Broken(), x, y)
    assert attack.threat.contains(result.x_adv, x).all()
    assert bad != "nan outputs" or result.success.all() or attack.targeted


@every_attack
def test_bad_arguments(name):
    model, (x, y), attack = Mixed().eval(), images(), ATTACKS[name](0.1)
    before = state(model)
    cases = [
        (x.clone().fill_(torch.nan), y, "x to be finite"),
        (x + 0.5, y, "inside the bounds"),
        ((x * 255).to(torch.uint8), y, "floating point"),
        (x, y + 5, "y >= 0 and < 3"),
        (x, -y - 1, "y >= 0"),
        (x, y[:2], "same number of rows"),
        (x, y.float(), "integers"),
        (x.tolist(), y, "torch.Tensor"),
    ]
    for bad_x, bad_y, rule in cases:
        for call in (attack, attack.run):
            with pytest.raises(AidefendError, match=rule):
                call(model, bad_x, bad_y)
    with pytest.raises(AidefendError, match="logits of shape"):
        attack(nn.Flatten(0), x, y)
    with pytest.raises(TypeError, match="unexpected keyword"):
        attack(model, x, y, seeds=1)
    assert state(model) == before


@every_attack
def test_bad_fields(name):
    attack = ATTACKS[name](0.1)
    bad = {"steps": 0, "restarts": 0, "loss": "ce", "targeted": 1, "random_start": "no", "is_success": 3, "threat": 0.1}
    fields = {field.name for field in dataclasses.fields(attack)}
    for field, value in [(field, value) for field, value in bad.items() if field in fields]:
        with pytest.raises(AidefendError, match=field if field != "threat" else "Threat"):
            dataclasses.replace(attack, **{field: value})
    with pytest.raises(ThreatModelError, match="eps >= 0"):
        ATTACKS[name](-0.1)


def test_the_no_trace_check_can_fail():
    """The planted violation: what common attack code does is seen by `state`."""
    model, (x, y) = Mixed(), images()
    before = state(model)
    with torch.random.fork_rng():
        nn.functional.cross_entropy(model(x.requires_grad_()), y).backward()
    after = state(model)
    assert {key for key in before if before[key] != after[key]} == {"values", "grads"}
