"""Robust losses against naive twins, their bound on a row's influence, and rows whose labels lie."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from aidefend import ConfigurationError, IncompatibleModel
from aidefend.sanitize import robust_loss

pytestmark = pytest.mark.global_random("first weights, dropout")


def world(n=24, seed=0):
    stream = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(n, 4, generator=stream, dtype=torch.float64)
    return model, x, torch.arange(n) % 3


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_trimmed_is_the_mean_of_the_lowest_losses():
    model, x, y = world()
    losses = cross_entropy(model(x), y, reduction="none")
    found = robust_loss(model, x, y, method="trimmed", share=0.25)
    assert found.item() == pytest.approx(losses.sort().values[:18].mean().item(), rel=1e-12)
    assert torch.allclose(
        gradient(model, found), gradient(model, cross_entropy(model(x), y, reduction="none").sort().values[:18].mean())
    )


def test_trimmed_without_a_share_is_the_mean_loss():
    model, x, y = world()
    assert torch.allclose(robust_loss(model, x, y, share=0.0), cross_entropy(model(x), y))


def test_a_loss_that_is_not_a_number_is_trimmed_first():
    model, x, y = world()
    x[3] = torch.nan
    assert torch.isfinite(robust_loss(model, x, y, share=0.05))


def naive_clipped(model, x, y, bound):
    rows = [gradient(model, cross_entropy(model(x[i : i + 1]), y[i : i + 1])) for i in range(len(x))]
    return torch.stack([g * min(1.0, bound / float(g.norm())) for g in rows]).mean(dim=0)


@pytest.mark.parametrize("bound", [0.05, 0.5, 100.0])
def test_clipped_has_the_gradient_of_the_naive_twin_and_the_value_of_the_mean(bound):
    model, x, y = world()
    found = robust_loss(model, x, y, method="clipped", max_grad_norm=bound)
    assert found.item() == pytest.approx(cross_entropy(model(x), y).item(), rel=1e-12)
    assert torch.allclose(gradient(model, found), naive_clipped(model, x, y, bound), rtol=1e-9, atol=1e-12)


def test_one_row_moves_the_clipped_gradient_by_no_more_than_stated_and_the_plain_one_by_more():
    _, x, y = world()
    model = nn.Linear(4, 3).double()
    bad_x = x.clone()
    bad_x[0] *= 1e4
    reach = 2 * 0.1 / len(x)

    def moved(loss):
        return float((gradient(model, loss(bad_x)) - gradient(model, loss(x))).norm())

    assert moved(lambda a: robust_loss(model, a, y, method="clipped", max_grad_norm=0.1)) <= reach * (1 + 1e-9)
    assert moved(lambda a: cross_entropy(model(a), y)) > 10 * reach


def test_the_bound_holds_under_dropout_and_a_row_that_is_not_a_number_has_no_say():
    model, x, y = world()
    model = nn.Sequential(model[0], nn.Dropout(0.5), model[2]).train()
    x[0] = torch.nan
    found = gradient(model, robust_loss(model, x, y, method="clipped", max_grad_norm=0.1))
    assert torch.isfinite(found).all() and float(found.norm()) <= 0.1


def test_frozen_parameters_stay_out():
    model, x, y = world()
    model[0].weight.requires_grad_(False)
    robust_loss(model, x, y, method="clipped").backward()
    assert model[0].weight.grad is None and model[2].weight.grad is not None


def test_wrong_labels_do_less_harm_when_trimmed():
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(600, 10, generator=stream)
    truth = (x[:, 0] > 0).long()
    y = truth.clone()
    y[(truth == 1) & (torch.rand(600, generator=stream) < 0.4)] = 0

    def trained(method, share):
        model = nn.Linear(10, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(150):
            optimizer.zero_grad()
            robust_loss(model, x, y, method=method, share=share).backward()
            optimizer.step()
        return float((model(x).argmax(dim=1) == truth).double().mean())

    assert trained("trimmed", 0.15) > trained("trimmed", 0.0) + 0.05


def test_another_loss_may_be_given():
    model, x, _ = world()
    wanted = torch.zeros(len(x), 3, dtype=torch.float64)

    def squares(outputs, targets):
        return (outputs - targets).square().sum(dim=1)

    found = robust_loss(model, x, wanted, method="clipped", max_grad_norm=1e6, per_example_loss=squares)
    assert torch.allclose(gradient(model, found), gradient(model, squares(model(x), wanted).mean()))


def test_bad_arguments_are_named():
    model, x, y = world()
    for name, value in {"method": "median", "share": 1.0, "max_grad_norm": 0.0, "per_example_loss": 3}.items():
        with pytest.raises(ConfigurationError, match=name):
            robust_loss(model, x, y, **{name: value})
    with pytest.raises(ConfigurationError, match="at least one row"):
        robust_loss(model, x[:0], y[:0])
    with pytest.raises(ConfigurationError, match="per_example_loss"):
        robust_loss(model, x, y, per_example_loss=cross_entropy)
    mixing = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    with pytest.raises(IncompatibleModel, match="mixes the rows"):
        robust_loss(mixing, x, y, method="clipped")
    robust_loss(mixing.eval(), x, y, method="clipped").backward()
