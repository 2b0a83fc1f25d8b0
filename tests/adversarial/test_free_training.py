"""Free training: the user's own backward pass moves the perturbation; its cost is one plain step."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from aidefend import ConfigurationError, Threat
from aidefend.adversarial import FreeTraining


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=6):
    return 0.3 + 0.4 * torch.rand(n, 5, generator=stream(1)), torch.arange(n) % 3


def test_equal_to_the_published_loop():
    """Replays, one backward pass each, the perturbation carried over: written plainly for the linf cube."""
    (x, y), model = rows(), nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    twin = pickle.loads(pickle.dumps(model))
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (model, twin)]
    objective = FreeTraining(Threat("linf", 0.1), replays=3, step=0.4)
    for a, b in objective.replayed([(x, y), (x.flip(0), y.flip(0))]):
        optimizers[0].zero_grad()
        objective(model, a, b).backward()
        optimizers[0].step()
    delta = torch.zeros_like(x)
    for a, b in [(x, y)] * 3 + [(x.flip(0), y.flip(0))] * 3:
        delta.requires_grad_()
        optimizers[1].zero_grad()
        functional.cross_entropy(twin(a + delta), b).backward()
        delta = (delta.detach() + 0.04 * delta.grad.sign()).clamp(-0.1, 0.1)
        optimizers[1].step()
    torch.testing.assert_close(objective.perturbation, delta)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_after_some_replays_it_is_the_worst_point_of_a_linear_model(norm):
    model, (x, y), threat = nn.Linear(5, 2), rows(), Threat(norm, 0.1)
    objective = FreeTraining(threat)
    for _ in range(3):
        last = objective(model, x, y % 2)
        last.backward()
    uphill = model.weight[1 - y % 2] - model.weight[y % 2]
    unit = uphill.sign() if norm == "linf" else uphill / uphill.norm(dim=1, keepdim=True)
    torch.testing.assert_close(last, functional.cross_entropy(model(x + 0.1 * unit), y % 2))


def test_smaller_batches_keep_the_rest_and_other_shapes_start_anew():
    model, (x, y), objective = nn.Linear(5, 3), rows(), FreeTraining(Threat("linf", 0.1))
    objective(model, x[:4], y[:4]).backward()
    first = objective.perturbation.clone()
    objective(model, x[:2], y[:2]).backward()
    assert torch.equal(objective.perturbation[2:], first[2:])
    objective(model, x, y)
    assert objective.perturbation.shape == x.shape and torch.equal(objective.perturbation[4:], torch.zeros(2, 5))
    objective(nn.Linear(3, 3), x[:, :3], y).backward()
    assert objective.perturbation.shape == (6, 3)


def test_without_gradients_or_with_broken_ones_nothing_moves():
    model, (x, y), objective = nn.Linear(5, 3), rows(), FreeTraining(Threat("linf", 0.1))
    with torch.no_grad():
        objective(model, x, y)
    (objective(model, x, y) * torch.inf).backward()
    assert objective.perturbation.abs().max() == 0
    objective(model, x, y).backward()
    again = pickle.loads(pickle.dumps(objective))
    assert torch.equal(again.perturbation, objective.perturbation) and objective.perturbation.abs().max() > 0


def test_refusals():
    with pytest.raises(ConfigurationError, match="threat"):
        FreeTraining(0.1)
    with pytest.raises(ConfigurationError, match="replays"):
        FreeTraining(Threat("linf", 0.1), 0)
    with pytest.raises(ConfigurationError, match="step"):
        FreeTraining(Threat("linf", 0.1), step=0.0)
