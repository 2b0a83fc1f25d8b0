"""MART against the published formula, written plainly, with its gradients; soft labels; extreme logits."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from aidefend import AidefendError, ConfigurationError, Threat
from aidefend.adversarial import MART
from aidefend.attacks.evasion import PGD


def rows(n=7):
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(n) % 3


def shifted(model, x, y):
    return (x + 0.1).clamp(0, 1)


def naive_mart(model, x, x_adv, y, weight):
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    total = 0
    for i in range(len(x)):
        others = torch.stack([q[i, k] for k in range(q.shape[1]) if k != y[i]])
        boosted = -q[i, y[i]].log() - (1 - others.max()).log()
        divergence = (p[i] * (p[i] / q[i]).log()).sum()
        total = total + boosted + weight * divergence * (1 - p[i, y[i]])
    return total / len(x)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_equal_to_the_naive_twin_with_its_gradients(classes, weight):
    model, (x, y) = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, classes)).double(), rows()
    y = y % classes
    twin = copy.deepcopy(model)
    ours, naive = MART(shifted, weight)(model, x, y), naive_mart(twin, x, shifted(None, x, y), y, weight)
    torch.testing.assert_close(ours, naive)
    ours.backward()
    naive.backward()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_soft_labels_are_the_expectation_over_the_class():
    model, (x, y) = nn.Linear(5, 3).double(), rows()
    hard = [MART(shifted, 0.0).per_example(model, x, torch.full_like(y, k)) for k in range(3)]
    soft = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).expand(len(x), 3)
    expected = 0.2 * hard[0] + 0.5 * hard[1] + 0.3 * hard[2]
    torch.testing.assert_close(MART(shifted, 0.0).per_example(model, x, soft), expected)
    one_hot = functional.one_hot(y, 3).double()
    torch.testing.assert_close(MART(shifted)(model, x, one_hot), MART(shifted)(model, x, y))


def test_a_sure_and_wrong_model_has_a_finite_loss_and_gradient():
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 1e4, -1e4]], requires_grad=True)
    losses = MART(lambda model, x, y: x).per_example(lambda x: logits, torch.zeros(2, 1), torch.tensor([1, 0]))
    losses.sum().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all() and logits.grad[0, 0] > 0


def test_refusals():
    with pytest.raises(ConfigurationError, match="weight"):
        MART(shifted, -1.0)
    x, y = rows()
    with pytest.raises(AidefendError, match="y"):
        MART(shifted)(nn.Linear(5, 3).double(), x, y + 3)
    with pytest.raises(AidefendError, match="probabilities"):
        MART(PGD(Threat("linf", 0.1), loss=lambda z, y: z[:, 0]))(nn.Linear(5, 3).double(), x, torch.rand(7, 2))
