"""APGD against a naive twin: one row, scalars and lists, written from the paper's Algorithm 1."""

import math

import pytest
import torch
from torch import nn

from aidefend import Threat
from aidefend.attacks.evasion import APGD
from aidefend.attacks.evasion.apgd import _checkpoints


def bumpy_model(seed):
    stream = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(2 * torch.randn(parameter.shape, generator=stream, dtype=torch.float64))
    return model


def twin(model, x, y, eps, steps):
    """Best point of one row x (d,) for cross-entropy in the linf cube, start at x."""

    def value_and_gradient(point):
        point = point.clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(point[None]), y[None])
        return float(loss.detach()), torch.autograd.grad(loss, point)[0]

    def project(point):
        return torch.minimum(torch.maximum(point, x - eps), x + eps)

    marks, shares = [0], [0.0, 0.22]
    while shares[-1] <= 1:
        marks.append(math.ceil(round(shares[-1] * steps, 6)))
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    eta, history = 2 * eps, []
    f, grad = value_and_gradient(x)
    points, best = [x, x], (f, x, grad)
    improved, last_eta, last_best = 0, eta, f
    for k in range(1, steps + 1):
        z = project(points[-1] + eta * grad.sign())
        if k > 1:
            z = project(points[-1] + 0.75 * (z - points[-1]) + 0.25 * (points[-1] - points[-2]))
        points.append(z)
        value, grad = value_and_gradient(z)
        improved += value > f
        f = value
        if f > best[0]:
            best = (f, z, grad)
        if k in marks:
            before = marks[marks.index(k) - 1]
            stalled = improved < 0.75 * (k - before) or (last_eta == eta and last_best == best[0])
            last_eta, last_best, improved = eta, best[0], 0
            history.append(stalled)
            if stalled:
                eta, (f, points[-1], grad) = eta / 2, best
    return best[1], history


@pytest.mark.parametrize("seed", range(4))
def test_same_path_as_the_twin(seed):
    model, steps, eps = bumpy_model(seed), 40, 0.5
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, generator=stream, dtype=torch.float64)
    y = torch.randint(0, 3, (6,), generator=stream)
    x_adv = APGD(Threat("linf", eps, (-100.0, 100.0)), steps, random_start=False)(model, x, y)
    stalls = []
    for row in range(6):
        expected, history = twin(model, x[row], y[row], eps, steps)
        stalls += history
        torch.testing.assert_close(x_adv[row], expected, atol=1e-9, rtol=0)
    assert any(stalls) and not all(stalls)


def test_checkpoints_as_published():
    assert list(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
