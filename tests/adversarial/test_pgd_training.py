"""PGDTraining: any attack, any criterion, one training pass; training with it helps where plain training does not."""

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError, Threat
from aidefend.adversarial import PGDTraining
from aidefend.adversarial.crafting import cross_entropy
from aidefend.attacks.evasion import APGD, PGD


def rows(n=7):
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 3


def test_foreign_attacks_are_one_lambda():
    model, (x, y) = nn.Linear(5, 3), rows()
    objective = PGDTraining(lambda model, x, y: (x + 0.1).clamp(0, 1))
    expected = nn.functional.cross_entropy(model((x + 0.1).clamp(0, 1)), y)
    torch.testing.assert_close(objective(model, x, y), expected)


def test_a_careless_foreign_attack_leaves_no_trace():
    """Common attack code flips the mode, fills .grad and draws from the global stream."""
    model, (x, y) = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), rows()
    model[1].eval()

    def careless(model, x, y):
        model.train()
        point = x.clone().requires_grad_()
        nn.functional.cross_entropy(model(point + 0.01 * torch.rand_like(x)), y).backward()
        return (x + 0.1 * point.grad.sign()).clamp(0, 1)

    before = torch.get_rng_state()
    PGDTraining(careless)(model, x, y)
    assert [module.training for module in model] == [True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[1].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_attacks_see_eval_mode_unless_told_otherwise():
    modes = []
    model, (x, y) = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)), rows()

    def spy(model, x, y):
        modes.append([module.training for module in model])
        return x

    with torch.random.fork_rng():
        PGDTraining(spy)(model, x, y)
        PGDTraining(spy, attack_mode="given")(model, x, y)
    assert modes == [[False, False], [True, True]]


def test_regression_with_its_own_criterion():
    def squared(outputs, y):
        return (outputs[:, 0] - y) ** 2

    model, x = nn.Linear(5, 1), rows()[0]
    y = torch.rand(7, generator=torch.Generator().manual_seed(2))
    losses = PGDTraining(PGD(Threat("linf", 0.1), 3, loss=squared), squared).per_example(model, x, y)
    assert (losses > squared(model(x), y)).all()


def test_refusals():
    model, (x, y) = nn.Linear(5, 3), rows()
    with pytest.raises(ConfigurationError, match="reduction"):
        PGDTraining(lambda model, x, y: x, nn.CrossEntropyLoss())(model, x, y)
    with pytest.raises(ConfigurationError, match="shape"):
        PGDTraining(lambda model, x, y: x[:2])(model, x, y)
    with pytest.raises(ConfigurationError, match="attack"):
        PGDTraining("pgd")
    with pytest.raises(ConfigurationError, match="criterion"):
        PGDTraining(lambda model, x, y: x, 3)


def test_cross_entropy_takes_soft_labels():
    z, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(cross_entropy(z, nn.functional.one_hot(y, 3).float()), cross_entropy(z, y))


def test_a_model_trained_so_resists_and_a_plain_one_does_not():
    """One strong feature and 200 weak ones tell the classes apart; eps 0.1 turns the weak ones round."""
    stream = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (400,), generator=stream)
    side = (2 * y - 1).float()[:, None]
    strong = 0.5 + 0.3 * side * (torch.rand(400, 1, generator=stream) < 0.93)
    weak = 0.5 + 0.05 * side + 0.02 * torch.randn(400, 200, generator=stream)
    x = torch.cat([strong, weak], dim=1).clamp(0, 1)
    threat = Threat("linf", 0.1)

    def train(objective):
        model = nn.Linear(201, 2)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(80):
            optimizer.zero_grad()
            objective(model, x, y).backward()
            optimizer.step()
        result = APGD(threat, 20).run(model, x, y, goal="first_success", generator=stream)
        return 1 - result.success.float().mean().item()

    assert train(lambda model, x, y: nn.functional.cross_entropy(model(x), y)) < 0.5
    assert train(PGDTraining(PGD(threat, 2))) > 0.85
