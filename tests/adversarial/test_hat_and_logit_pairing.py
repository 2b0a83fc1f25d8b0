"""HAT and logit pairing against the published formulas written plainly, with their gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from aidefend import AidefendError, ConfigurationError, Threat
from aidefend.adversarial import HAT, LogitPairing
from aidefend.attacks.evasion import PGD

THREAT = Threat("linf", 0.1)


def rows(n=7):
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(n) % 3


def net():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def helper(x):
    return x[:, :3]


def same_gradients(ours, twin):
    for parameter, expected in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_hat_equals_its_naive_twin():
    model, (x, y) = net(), rows()
    twin, objective = copy.deepcopy(model), HAT(PGD(THREAT, 3), helper, beta=2.0, gamma=0.7, reach=1.5)
    x_adv = objective.craft(model, x, y, generator=torch.Generator().manual_seed(0))
    ours = objective(model, x, y, generator=torch.Generator().manual_seed(0))
    p, q = twin(x).softmax(1), twin(x_adv).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(dim=1).mean()
    helped = functional.cross_entropy(twin(x + 1.5 * (x_adv - x)), x_adv[:, :3].argmax(dim=1))
    naive = functional.cross_entropy(twin(x), y) + 2.0 * divergence + 0.7 * helped
    torch.testing.assert_close(ours, naive)
    ours.backward()
    naive.backward()
    same_gradients(model, twin)


def test_the_helper_is_run_in_eval_mode_and_left_as_it_was():
    aide = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    HAT(PGD(THREAT, 2), aide)(net(), *rows()).backward()
    assert aide.training and aide[1].num_batches_tracked == 0 and aide[0].weight.grad is None


def test_logit_pairing_equals_its_naive_twin():
    def shifted(model, x, y):
        return (x + 0.1).clamp(0, 1)

    model, (x, y) = net(), rows()
    twin = copy.deepcopy(model)
    ours = LogitPairing(shifted, 0.8, clean_share=0.25)(model, x, y)
    clean, worst = twin(x), twin(shifted(None, x, y))
    both = 0.25 * functional.cross_entropy(clean, y) + 0.75 * functional.cross_entropy(worst, y)
    naive = both + 0.8 * functional.mse_loss(clean, worst)
    torch.testing.assert_close(ours, naive)
    ours.backward()
    naive.backward()
    same_gradients(model, twin)


def test_pairing_of_a_regression():
    def squared(outputs, y):
        return (outputs - y).square()

    model, (x, y) = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)).double(), rows()
    plain = squared(model(x), y.double()).mean()
    loss = LogitPairing(PGD(THREAT, 3), criterion=squared)(model, x, y.double())
    assert loss > plain


def test_refusals():
    x, y = rows()
    with pytest.raises(ConfigurationError, match="with_loss"):
        HAT(lambda model, x, y: x, helper)
    with pytest.raises(ConfigurationError, match="helper"):
        HAT(PGD(THREAT), "net")
    with pytest.raises(ConfigurationError, match="gamma"):
        HAT(PGD(THREAT), helper, gamma=-1.0)
    with pytest.raises(AidefendError, match="helper"):
        HAT(PGD(THREAT, 1), lambda x: x[:, 0])(net(), x, y)
    with pytest.raises(ConfigurationError, match="clean_share"):
        LogitPairing(PGD(THREAT), clean_share=1.5)
