"""GradAlign: zero on linear models, the plain cosine elsewhere, gradients through both, order and refusals."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from aidefend import ConfigurationError, Threat
from aidefend.adversarial import FastTraining, GradAlign
from aidefend.attacks.evasion import PGD

THREAT = Threat("linf", 0.1)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=7):
    return torch.rand(n, 5, generator=stream(1), dtype=torch.float64), torch.arange(n) % 2


def objective(**changes):
    return GradAlign(FastTraining(PGD(THREAT)), THREAT, **changes)


def net():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def test_a_linear_model_pays_nothing():
    model, (x, y) = nn.Linear(5, 2).double(), rows()
    assert objective().misalignment(model, x, y).abs().max() < 1e-12
    assert objective().misalignment(net(), x, y).min() > 1e-6


def test_equal_to_the_cosine_and_its_derivative_by_differences():
    model, (x, y) = net(), rows()
    near = THREAT.random_start(x, stream(3))

    def naive():
        gradients = []
        for point in (x, near):
            variable = point.clone().requires_grad_()
            loss = functional.cross_entropy(model(variable), y, reduction="sum")
            gradients.append(torch.autograd.grad(loss, variable)[0])
        return (1 - functional.cosine_similarity(*gradients, dim=1)).mean()

    value = objective().misalignment(model, x, y, generator=stream(3)).mean()
    torch.testing.assert_close(value, naive())
    value.backward()
    weight, step = model[0].weight, 1e-5
    for place in ((0, 0), (3, 2)):
        with torch.no_grad():
            weight[place] += step
            up = naive_value(naive)
            weight[place] -= 2 * step
            down = naive_value(naive)
            weight[place] += step
        assert weight.grad[place].item() == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-8)


def naive_value(naive):
    with torch.enable_grad():
        return naive().item()


def test_weight_adds_it_to_the_objective():
    model, (x, y) = net(), rows()
    values = [objective(weight=w)(model, x, y, generator=stream()) for w in (0.0, 1.0, 2.0)]
    torch.testing.assert_close(values[0], FastTraining(PGD(THREAT))(model, x, y, generator=stream()))
    torch.testing.assert_close(values[2] - values[1], values[1] - values[0])
    assert values[1] > values[0]


def test_with_batch_norm_the_backward_pass_still_runs():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    for mode in ("eval", "given"):
        objective(attack_mode=mode)(model, *rows()).backward()
    assert model[1].num_batches_tracked == 2 and model[0].weight.grad.isfinite().all()


def test_a_sample_without_a_gradient_counts_as_aligned():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.constant_(model[0].bias, -100.0)
    loss = objective()(model, *rows())
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_refusals():
    with pytest.raises(ConfigurationError, match="per_example"):
        GradAlign(nn.CrossEntropyLoss(), THREAT)
    with pytest.raises(ConfigurationError, match="threat"):
        GradAlign(FastTraining(PGD(THREAT)), 0.1)
    with pytest.raises(ConfigurationError, match="weight"):
        objective(weight=-1.0)
