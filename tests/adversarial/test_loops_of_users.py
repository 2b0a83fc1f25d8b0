"""What a user's loop brings along: soft labels, regression, several outputs, accumulation, autocast, torch.compile."""

import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from aidefend import Threat
from aidefend.adversarial import (
    AWP,
    HAT,
    MART,
    NFGSM,
    TRADES,
    FastTraining,
    FreeTraining,
    GradAlign,
    LogitPairing,
    PGDTraining,
)
from aidefend.attacks.evasion import PGD

THREAT = Threat("linf", 0.05)
ATTACK = PGD(THREAT, 2)


def helper(x):
    return x[:, :3]


def smoothed(outputs, y):
    return functional.cross_entropy(outputs, y, reduction="none", label_smoothing=0.1)


OBJECTIVES = {
    "pgd": PGDTraining(ATTACK),
    "trades": TRADES(ATTACK),
    "mart": MART(ATTACK),
    "hat": HAT(ATTACK, helper),
    "pairing": LogitPairing(ATTACK),
    "fast": FastTraining(ATTACK),
    "n-fgsm": NFGSM(ATTACK),
    "free": FreeTraining(THREAT),
    "grad-align": GradAlign(FastTraining(ATTACK), THREAT),
    "awp": AWP(PGDTraining(ATTACK)),
    "awp-trades": AWP(TRADES(ATTACK)),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=8):
    return torch.rand(n, 5, generator=stream(1)), torch.arange(n) % 3


def net():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


@every_objective
def test_mixed_labels(objective):
    model, (x, y) = net(), rows()
    one_hot = functional.one_hot(y, 3).float()
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    loss = objective(model, x, mixed, generator=stream())
    loss.backward()
    assert loss.isfinite() and model[0].weight.grad.abs().max() > 0
    if not isinstance(objective, FreeTraining):  # its second call is one step further
        hard = objective(model, x, y, generator=stream())
        torch.testing.assert_close(objective(model, x, one_hot, generator=stream()), hard)


@pytest.mark.parametrize("make", [PGDTraining, FastTraining, NFGSM])
def test_label_smoothing_is_what_the_attack_climbs(make):
    model, (x, y) = net(), rows()
    stated = make(PGD(THREAT, 2, loss=smoothed), smoothed)(model, x, y, generator=stream())
    torch.testing.assert_close(make(PGD(THREAT, 2), smoothed)(model, x, y, generator=stream()), stated)
    margin = make(PGD(THREAT, 2, loss="margin"), smoothed).craft(model, x, y, generator=stream())
    expected = make(PGD(THREAT, 2, loss="margin")).craft(model, x, y, generator=stream())
    assert torch.equal(margin, expected), "Expected a loss that was stated to stay."


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x):
        features = self.body(x).tanh()
        return {"kind": self.kind(features), "size": self.size(features)[:, 0]}


def both(outputs, y):
    kind = functional.cross_entropy(outputs["kind"], y[:, 0].long(), reduction="none")
    return kind + (outputs["size"] - y[:, 1]).square()


@pytest.mark.parametrize("make", [PGDTraining, FastTraining, NFGSM, lambda *a: AWP(PGDTraining(*a))])
def test_several_outputs_with_the_users_loss(make):
    model, (x, y) = TwoHeads(), rows()
    target = torch.stack([y.float(), torch.rand(len(x), generator=stream(2))], dim=1)
    loss = make(ATTACK, both)(model, x, target, generator=stream())
    loss.backward()
    assert loss > both(model(x), target).mean() and model.size.weight.grad.abs().max() > 0


def shifted(model, x, y):
    return (x + 0.02).clamp(0, 1)


ACCUMULATED = [PGDTraining(shifted), MART(shifted), LogitPairing(shifted), FreeTraining(THREAT)]


@pytest.mark.parametrize("objective", ACCUMULATED, ids=lambda objective: type(objective).__name__)
def test_accumulated_micro_batches_equal_the_whole(objective):
    model, (x, y) = net().double(), rows()

    def gradient(parts):
        model.zero_grad()
        for part in parts:
            (objective.per_example(model, x[part].double(), y[part]).sum() / len(x)).backward()
            if isinstance(objective, FreeTraining):
                objective.perturbation = None
        return [parameter.grad.clone() for parameter in model.parameters()]

    for a, b in zip(gradient([slice(0, 8)]), gradient([slice(0, 4), slice(4, 8)]), strict=True):
        torch.testing.assert_close(a, b)


@every_objective
def test_autocast_reaches_every_weight(objective):
    """Autocast keeps narrow copies of weights: one made for crafting must not serve the training pass."""
    model, (x, y) = net(), rows()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(model, x, y)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("c++"), reason="no C++ compiler")
@pytest.mark.parametrize("name", ["pgd", "trades", "mart", "fast", "awp"])
def test_a_compiled_model_trains_as_the_plain_one(name):
    objective, model, (x, y) = OBJECTIVES[name], net(), rows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the compiler
        compiled = torch.compile(model)
        loss = objective(compiled, x, y, generator=stream())
        loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected = objective(model, x, y, generator=stream())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for ours, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["pgd", "trades", "mart", "awp", "awp-trades", "free"])
def test_a_traced_model_trains_as_the_plain_one(name):
    """The tracer of torch.compile without its code generator."""
    objective, model, (x, y) = OBJECTIVES[name], net(), rows()
    if name == "free":
        objective.perturbation = None
    traced = torch.compile(model, backend="eager")
    loss = objective(traced, x, y, generator=stream())
    torch.testing.assert_close(loss, objective(model, x, y, generator=stream()))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["trades", "hat"])
def test_autocast_with_a_clean_answer_of_its_own(name):
    """Where BatchNorm trains, the attack's clean answer is a pass without a gradient before the training pass."""
    (x, y), model = rows(), nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    with torch.autocast("cpu", torch.bfloat16):
        OBJECTIVES[name](model, x, y).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
