"""Certified margins hold for nets, threats and methods of any kind, and those of a mistaken twin do not."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aidefend import IncompatibleModel, Threat
from aidefend.adversarial import certify_bounds
from aidefend.adversarial.bound_operations import Bent
from aidefend.attacks import APGD
from tests.adversarial.test_bound_graph import Body, Module, arguments

ACTIVATIONS = [nn.ReLU, lambda: nn.LeakyReLU(0.2), nn.Tanh, nn.Sigmoid, lambda: nn.Hardtanh(-0.5, 0.5), nn.Softplus]
MIDDLES = [
    lambda: nn.Identity(),
    lambda: nn.BatchNorm2d(3),
    lambda: nn.MaxPool2d(2),
    lambda: nn.AvgPool2d(2, stride=1),
    lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3),
]
EPS = {"linf": 0.2, "l2": 1.0, "l1": 2.0, "l0": 5.0}


def net(seed, activation, middle):
    """A convolution, something in the middle, two linear layers; random weights and running statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = [nn.Conv2d(1, 3, 3, stride=1, padding=1), activation(), middle(), nn.Flatten()]
        features = nn.Sequential(*body)(torch.zeros(2, 1, 4, 4)).shape[1]
        model = nn.Sequential(*body, nn.Linear(features, 6), activation(), nn.Linear(6, 3))
        for part in model:
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.uniform_(-0.5, 0.5), part.running_var.uniform_(0.3, 2)
                part.weight.data.uniform_(-1, 1)
    return model.eval()


def smallest_seen(model, x, y, threat, seed):
    """The smallest margin among random points, corners of the threat, and the end of an attack."""
    stream = torch.Generator().manual_seed(seed)
    points = [threat.random_start(x, generator=stream) for _ in range(50)]
    points += [threat.project(x + 1e3 * (point - x), x) for point in points]
    points += [APGD(threat, 20, loss="margin")(model, x, y, generator=stream)]
    with torch.no_grad():
        logits = torch.stack([model(point) for point in points if bool(threat.contains(point, x).all())])
    others = logits.scatter(2, y[None, :, None].expand(len(logits), -1, 1), -torch.inf).amax(dim=2)
    return (logits.gather(2, y[None, :, None].expand(len(logits), -1, 1))[:, :, 0] - others).amin(dim=0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    activation=st.sampled_from(ACTIVATIONS),
    middle=st.sampled_from(MIDDLES),
    norm=st.sampled_from(list(EPS)),
    share=st.floats(0, 1),
)
def test_no_point_falls_below_the_certified_margin(seed, activation, middle, norm, share):
    model = net(seed, activation, middle)
    x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    y = model(x).argmax(dim=1)
    threat = Threat(norm, EPS[norm] * share)
    seen = smallest_seen(model, x, y, threat, seed).double()
    margins = [certify_bounds(model, x, y, threat, method).margins for method in ("ibp", "crown-ibp", "crown")]
    for found in margins:
        assert (found <= seen).all()
    for looser, tighter in itertools.pairwise(margins):
        assert (tighter >= looser).all()


def test_a_slope_of_the_wrong_sign_is_caught(monkeypatch):
    """The planted violation: a bend whose upper line lies below it gives margins that points fall short of."""
    honest = Bent.back

    def mistaken(self, form, boxes):
        inner, constant = honest(self, form, boxes)
        return inner, constant.abs()

    monkeypatch.setattr(Bent, "back", mistaken)
    model, threat = net(0, nn.ReLU, MIDDLES[0]), Threat("linf", 0.2)
    x = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(dim=1)
    seen = smallest_seen(model, x, y, threat, 0).double()
    assert (certify_bounds(model, x, y, threat, "crown-ibp").margins > seen).any()


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda self, h: h + h.view(-1, 1, 4), "tensors of one shape"),
        (lambda self, h: h.view(-1, 1, 4) * torch.ones(3, 1, 1), "one sample"),
    ],
)
def test_shapes_that_broadcast_are_refused(method, forward, words):
    x, y, threat = arguments()
    model = Body(Module(forward)).eval()
    model.last = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    model(x)
    with pytest.raises(IncompatibleModel, match=words):
        certify_bounds(model.eval(), x, y, threat, method)
