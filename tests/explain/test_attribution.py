"""Attributions against closed forms: linear models, polynomials, and a naive loop over windows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aidefend import AidefendError, ConfigurationError
from aidefend.explain import attribute, sanity_check
from aidefend.explain.attribution import METHODS

SHAPES = [(5,), (2, 7), (1, 6, 6)]


def linear(shape, classes=3, seed=0):
    weight = torch.randn(classes, int(torch.tensor(shape).prod()), generator=torch.Generator().manual_seed(seed))
    return weight, lambda x: x.flatten(1) @ weight.T.to(x.dtype)


def batch(shape, n=4, seed=1):
    stream = torch.Generator().manual_seed(seed)
    return torch.rand((n, *shape), generator=stream), torch.randint(0, 3, (n,), generator=stream)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_linear_model_gives_the_closed_form(shape):
    weight, model = linear(shape)
    x, y = batch(shape)
    gradient = weight[y].reshape(x.shape)
    assert torch.allclose(attribute(model, x, y, "saliency").values, gradient.abs())
    noisy = attribute(model, x, y, "smoothgrad", generator=torch.Generator().manual_seed(0))
    assert torch.allclose(noisy.values, gradient, atol=1e-5)
    path = attribute(model, x, y, baseline=0.25, steps=1)
    assert torch.allclose(path.values, gradient * (x - 0.25), atol=1e-5)
    assert float(path.completeness_error.max()) < 1e-5
    single = attribute(model, x, y, "occlusion", window=1, baseline=0.25)
    drop = gradient * (x - 0.25)
    together = drop.sum(dim=1, keepdim=True).expand_as(drop) if len(shape) == 2 else drop  # all channels at once
    assert torch.allclose(single.values, together, atol=1e-4)


def test_integrated_gradients_of_a_cubic_are_exact_with_two_points():
    model = lambda x: torch.stack([(x**3).sum(1), x.sum(1)], dim=1)  # noqa: E731
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    for steps, exact in ((1, False), (2, True)):
        found = attribute(model, x, 0, steps=steps)
        assert torch.allclose(found.values, x**3, atol=1e-12) is exact
        assert (float(found.completeness_error.max()) < 1e-12) is exact


def test_the_completeness_error_tells_the_truth():
    """A kinked model with one point: the reported error equals the difference that is really missing."""
    model = lambda x: torch.stack([(x.sum(1) - 1).relu(), -x.sum(1)], dim=1)  # noqa: E731
    x = torch.tensor([[1.0, 1.0], [0.1, 0.1]], dtype=torch.float64)
    found = attribute(model, x, 0, steps=3)
    missing = (found.values.sum(1) - (model(x) - model(x * 0))[:, 0]).abs()
    assert torch.allclose(found.completeness_error, missing) and float(missing[0]) > 0.1 and float(missing[1]) == 0


@given(st.sampled_from(SHAPES), st.integers(1, 4))
def test_occlusion_equals_a_naive_loop(shape, window):
    _, model = linear(shape)
    x, y = batch(shape, 2)
    stride, total, cover = max(1, window // 2), torch.zeros_like(x), torch.zeros_like(x)
    sides = list(shape[-2:]) if len(shape) == 3 else [shape[-1]]
    starts = [sorted({*range(0, max(0, side - window) + 1, stride), max(0, side - window)}) for side in sides]
    for first in starts[0]:
        for second in starts[1] if len(starts) == 2 else [None]:
            place = torch.zeros_like(x, dtype=torch.bool)
            if second is None:
                place[..., first : first + window] = True
            else:
                place[..., first : first + window, second : second + window] = True
            drop = (model(x) - model(torch.where(place, 0.5, x))).gather(1, y[:, None])[:, 0]
            total += place * drop.reshape(-1, *[1] * (x.ndim - 1))
            cover += place
    found = attribute(model, x, y, "occlusion", window=window, baseline=0.5).values
    assert torch.allclose(found, total / cover, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_conventions(method):
    body = nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh()
    model = nn.Sequential(nn.Flatten(), *body, nn.Linear(8, 3))
    model.train()
    model[2].eval()
    x, y = batch((1, 6, 6), 7)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    original = x.clone()
    whole = attribute(model, x, y, method, generator=torch.Generator().manual_seed(0))
    assert whole.values.shape == x.shape and whole.values.dtype == x.dtype and torch.equal(x, original)
    assert [module.training for module in model] == [True, True, False, True, True, True]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    small = attribute(model, x, y, method, batch_size=2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(whole.values, small.values, atol=1e-6)
    assert attribute(model, x[:0], y[:0], method).values.shape == (0, 1, 6, 6)
    assert attribute(model.double(), x.double(), y, method).values.dtype == torch.float64
    assert torch.allclose(whole.mass().flatten(1).sum(1), torch.ones(7, dtype=torch.float64))
    with torch.no_grad():
        assert attribute(model, x.double(), 1, method).target.tolist() == [1] * 7


def test_a_zero_attribution_has_even_mass():
    x = torch.rand(2, 4, generator=torch.Generator())
    found = attribute(lambda x: torch.stack([x.sum(1) * 0, x.sum(1)], dim=1), x, 0)
    assert torch.allclose(found.mass(), torch.full((2, 4), 0.25, dtype=torch.float64))


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.tensor([[float("nan"), 0.0]])},
        {"x": torch.ones(1, 2).long()},
        {"target": 3},
        {"target": torch.tensor([0, 1])},
        {"target": torch.tensor([-1])},
        {"method": "gradcam"},
        {"steps": 0},
        {"window": 0},
        {"noise": -1.0},
        {"baseline": torch.zeros(5)},
        {"model": lambda x: x[:, 0]},
    ],
)
def test_bad_calls_are_refused(change):
    call = {"model": lambda x: x, "x": torch.ones(1, 2), "target": 0, **change}
    with pytest.raises(AidefendError, match="Expected"):
        attribute(**call)


def test_sanity_check_tells_a_method_that_looks_from_one_that_does_not():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = batch((1, 6, 6), 10)
    before = [parameter.clone() for parameter in model.parameters()]
    check = sanity_check(model, x, y)
    assert check.passed and check.layers == ("3", "1") and check.to_evidence().findings[0].value == check.similarity[-1]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert check == sanity_check(model, x, y)


class EdgeDetector(nn.Module):
    """Planted violation: the gradient shows a fixed picture, whatever the weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        picture = torch.arange(1.0, 1 + x[0].numel())
        return (x.flatten(1) @ picture)[:, None] * self.scale.weight[:, 0]


def test_sanity_check_catches_an_edge_detector():
    x, _ = batch((1, 6, 6), 10)
    check = sanity_check(EdgeDetector(), x, 0, "saliency")
    assert not check.passed and check.similarity[-1] > 0.99
    with pytest.raises(ConfigurationError, match="parameters"):
        sanity_check(nn.Identity(), x.flatten(1), 0)
