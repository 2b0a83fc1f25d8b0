"""FGSM-RS and N-FGSM: on a linear model the point is known in closed form; recipes over the attack given."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from aidefend import ConfigurationError, Threat, ThreatModelError
from aidefend.adversarial import NFGSM, FastTraining
from aidefend.attacks.evasion import APGD, PGD

THREAT = Threat("linf", 0.1)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=40):
    return 0.3 + 0.4 * torch.rand(n, 6, generator=stream(1)), torch.arange(n) % 2


def linear():
    model = nn.Linear(6, 2)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 6, generator=stream(2)))
    return model


def uphill(model, y):
    return (model.weight[1 - y] - model.weight[y]).sign()


def test_fgsm_rs_is_start_plus_step_projected():
    model, (x, y) = linear(), rows()
    x_adv = FastTraining(PGD(THREAT)).craft(model, x, y, generator=stream())
    start = THREAT.random_start(x, stream())
    expected = torch.minimum(torch.maximum(start + 0.125 * uphill(model, y), x - 0.1), x + 0.1)
    torch.testing.assert_close(x_adv, expected)
    assert THREAT.contains(x_adv, x).all()


def test_a_step_of_two_radii_ends_in_the_worst_corner():
    model, (x, y) = linear(), rows()
    worst = functional.cross_entropy(model(x + 0.1 * uphill(model, y)), y)
    torch.testing.assert_close(FastTraining(PGD(THREAT), step=2.0)(model, x, y), worst)
    assert FastTraining(PGD(THREAT))(model, x, y) < worst


def test_n_fgsm_keeps_noise_and_step():
    model, (x, y) = linear(), rows()
    x_adv = NFGSM(PGD(THREAT)).craft(model, x, y, generator=stream())
    noise = THREAT.with_eps(0.2).random_start(x, stream()) - x
    torch.testing.assert_close(x_adv, x + noise + 0.1 * uphill(model, y))
    assert THREAT.contains(x_adv, x).float().mean() < 0.2 and (x_adv - x).abs().max() <= 0.3 + 1e-6
    assert (x_adv >= 0).all() and (x_adv <= 1).all()


@pytest.mark.parametrize("make", [FastTraining, NFGSM])
def test_radii_by_feature_and_by_sample_bounds_and_mask(make):
    model, (x, y) = linear(), rows()
    by_feature = torch.tensor([0.0, 0.05, 0.1, 0.2, 0.3, 0.1])
    mask = torch.tensor([True, True, True, True, True, False])
    limit = 3 * by_feature if make is NFGSM else by_feature
    x_adv = make(PGD(Threat("linf", by_feature, mask=mask))).craft(model, x, y)
    assert ((x_adv - x).abs() <= limit * mask + 1e-6).all() and (x_adv[:, 1:5] != x[:, 1:5]).any(dim=0).all()
    by_sample = torch.linspace(0, 0.2, len(x))
    x_adv = make(PGD(Threat("linf", by_sample))).craft(model, x, y)
    assert torch.equal(x_adv[0], x[0])
    share = (x_adv - x).abs().amax(dim=1)[1:] / by_sample[1:]
    assert (share <= (3.0001 if make is NFGSM else 1.0001)).all() and (share > 0.5).all()


@pytest.mark.parametrize("make", [FastTraining, NFGSM])
def test_the_attack_given_keeps_its_loss_and_loses_its_schedule(make):
    calls = []

    def spy(outputs, y):
        calls.append(len(y))
        return functional.cross_entropy(outputs, y, reduction="none")

    model, (x, y) = linear(), rows()
    make(PGD(THREAT, 40, 0.01, restarts=3, loss=spy))(model, x, y)
    assert calls == [len(x)]


@pytest.mark.parametrize("make", [FastTraining, NFGSM])
def test_soft_labels_and_regression_climb_the_criterion(make):
    model, (x, y) = linear(), rows()
    soft = functional.one_hot(y, 2).float() * 0.8 + 0.1
    torch.testing.assert_close(
        make(PGD(THREAT)).craft(model, x, soft, generator=stream()),
        make(PGD(THREAT)).craft(model, x, y, generator=stream()),
    )

    def squared(outputs, y):
        return (outputs - y).square().flatten(1).mean(dim=1)

    target = torch.rand(len(x), 2, generator=stream(4))
    start = THREAT.random_start(x, stream()) if make is FastTraining else None
    loss = make(PGD(THREAT), squared)(model, x, target, generator=stream())
    assert loss > squared(model(x if start is None else start), target).mean()


@pytest.mark.parametrize("make", [FastTraining, NFGSM])
def test_refusals(make):
    for attack, rule in (
        (lambda model, x, y: x, "fields threat"),
        (PGD(THREAT, targeted=True), "untargeted"),
        (APGD(THREAT), "fields threat"),
        (PGD, "attack"),
    ):
        with pytest.raises(ConfigurationError, match=rule):
            make(attack)
    with pytest.raises(ConfigurationError, match="step"):
        make(PGD(THREAT), step=0.0)
    with pytest.raises(ThreatModelError, match="bounds"):
        make(PGD(THREAT))(linear(), rows()[0] + 1, rows()[1])
