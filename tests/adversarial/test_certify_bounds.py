"""Bounds against closed forms, a dense twin, random points and attacks; every unknown layer is refused by name."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from aidefend import IncompatibleModel, Threat, ThreatModelError
from aidefend.adversarial import certify_bounds
from aidefend.adversarial.bound_graph import BoundGraph
from aidefend.adversarial.linear_bounds import Region, crown_boxes, lowest
from aidefend.attacks import APGD, PGD
from tests.worlds import linear_world

METHODS = ("ibp", "crown-ibp", "crown")
every_method = pytest.mark.parametrize("method", METHODS)


class Residual(nn.Module):
    """Everything at once: normalisation by buffers, BatchNorm, a residual sum, both poolings, leaky ReLU."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5]).reshape(1, 2, 1, 1))
        self.register_buffer("std", torch.tensor([0.3, 0.2]).reshape(2, 1, 1))
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, stride=1, padding=1, groups=2, bias=False)
        self.pool, self.mean_pool = nn.MaxPool2d(2), nn.AvgPool2d(2)
        self.drop, self.leaky = nn.Dropout(0.5), nn.LeakyReLU(0.1)
        self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        x = (x - self.mean) / self.std * 2 + 0.1
        x = torch.relu(self.norm(self.first(x)))
        x = self.pool(x + self.leaky(self.second(x)))
        return self.head(self.drop(self.mean_pool(x)).flatten(1))


def mlp(seed, sizes=(5, 16, 12, 3)):
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def images(n=6, seed=0):
    return torch.rand(n, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def residual(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Residual()
        model.norm.running_mean.uniform_(-0.5, 0.5), model.norm.running_var.uniform_(0.5, 2)
        model.norm.weight.data.uniform_(-1, 1), model.norm.bias.data.uniform_(-1, 1)
    return model.eval()


NETS = {
    "mlp": lambda seed: (mlp(seed), torch.rand(8, 5, generator=torch.Generator().manual_seed(seed))),
    "residual": lambda seed: (residual(seed), images(seed=seed)),
    "conv1d": lambda seed: (
        nn.Sequential(
            nn.Conv1d(2, 3, 3, stride=2, dilation=1), nn.ReLU(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(6, 4)
        ).eval(),
        torch.rand(5, 2, 12, generator=torch.Generator().manual_seed(seed)),
    ),
    "rising": lambda seed: (
        nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval(),
        torch.rand(8, 5, generator=torch.Generator().manual_seed(seed)),
    ),
}
THREATS = (("linf", 0.05), ("l2", 0.15), ("l1", 0.3), ("l0", 1))


def truth(model, x):
    return model(x).argmax(1)


@every_method
@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_a_linear_model_has_its_closed_form(norm, method):
    world = linear_world(n=20, shape=(8,))
    eps = {"linf": 0.05, "l2": 0.1, "l1": 0.2, "l0": 2}[norm]
    bounds = (0.3, 0.7) if norm == "l0" else (-10.0, 10.0)
    found = certify_bounds(world.model, world.x, world.y, Threat(norm, eps, bounds), method)
    worst = world.worst_margin_of_few("l0", 2, 0.3, 0.7) if norm == "l0" else world.worst_margin(norm, eps)
    torch.testing.assert_close(found.margins, -worst, atol=1e-9, rtol=0) if method != "ibp" or norm == "linf" else None
    assert (found.margins <= -worst + 1e-9).all()
    assert torch.equal(found.verified, found.margins > 0)


@every_method
def test_bounds_of_the_data_and_radii_by_feature_and_sample_count(method):
    world = linear_world(n=6, shape=(8,))
    box = certify_bounds(world.model, world.x, world.y, Threat("linf", 0.3, (0.35, 0.65)), method)
    torch.testing.assert_close(box.margins, -world.worst_margin_in_box(0.3, 0.35, 0.65), atol=1e-9, rtol=0)
    by_row = torch.linspace(0, 0.2, 6, dtype=torch.float64)
    own = certify_bounds(world.model, world.x, world.y, Threat("linf", by_row, (-9.0, 9.0)), method, batch_size=4)
    torch.testing.assert_close(own.margins, -world.worst_margin("linf", by_row), atol=1e-9, rtol=0)
    eps, mask = torch.linspace(0, 0.3, 8).double(), torch.arange(8) % 3 != 0
    few = certify_bounds(world.model, world.x, world.y, Threat("linf", eps, (-9.0, 9.0), mask=mask), method)
    worst = world.clean_margin + (world.slope.abs() * eps * mask).sum(dim=1)
    torch.testing.assert_close(few.margins, -worst, atol=1e-9, rtol=0)


@every_method
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat[0])
def test_certified_is_at_most_empirical_is_at_most_clean(net, threat, method):
    model, x = NETS[net](1)
    y = truth(model, x)
    y[0] = (y[0] + 1) % 3
    threat = Threat(*threat)
    certificate = certify_bounds(model, x, y, threat, method)
    assert not certificate.verified[0]
    broken = APGD(threat, 30, loss="margin").run(model, x, y, goal="first_success").success
    assert not (certificate.verified & broken).any()
    assert (certificate.margins <= smallest_margin(model, x, y)).all()
    for seed in range(40):
        point = threat.random_start(x, torch.Generator().manual_seed(seed))
        point = threat.project(x + 5 * (point - x), x) if seed % 2 else point
        assert (certificate.margins <= smallest_margin(model, point, y)).all()


def smallest_margin(model, x, y):
    with torch.no_grad():
        logits = model(x).double()
    own = logits.gather(1, y[:, None])
    return (own - logits).scatter(1, y[:, None], torch.inf).amin(dim=1)


@pytest.mark.parametrize("net", NETS)
def test_something_is_verified_and_dearer_methods_give_more(net):
    model, x = NETS[net](2)
    y = truth(model, x)
    near, far = Threat("linf", 1e-3), Threat("linf", 0.03)
    assert certify_bounds(model, x, y, near, "ibp").verified.any()
    margins = [certify_bounds(model, x, y, far, method).margins for method in METHODS]
    assert (margins[1] >= margins[0]).all() and (margins[2] >= margins[1]).all()
    assert (certify_bounds(model, x, y, near, "crown").margins >= margins[2]).all()
    if net in ("mlp", "residual"):
        assert (margins[2] > margins[0]).any()


@every_method
def test_at_eps_zero_the_margin_is_the_clean_one(method):
    model, x = NETS["residual"](3)
    y = truth(model, x)
    found = certify_bounds(model.double(), x.double(), y, Threat("linf", 0.0), method)
    torch.testing.assert_close(found.margins, smallest_margin(model, x.double(), y), atol=1e-9, rtol=0)
    assert found.verified.all()


def test_crown_equals_a_dense_twin():
    """Two bends, written out with matrices from Zhang et al. 2018."""
    model, x = mlp(4, (3, 6, 5, 2)).double(), torch.rand(7, 3, dtype=torch.float64)
    eps = 0.08
    y = truth(model, x)
    (w1, b1), (w2, b2), (w3, b3) = [(m.weight.detach(), m.bias.detach()) for m in model if isinstance(m, nn.Linear)]
    found = certify_bounds(model, x, y, Threat("linf", eps, (-5.0, 5.0)), "crown").margins

    def lines(low, up):
        below = torch.where(low >= 0, 1.0, torch.where(up <= 0, 0.0, (up > -low).double()))
        above = torch.where(low >= 0, 1.0, torch.where(up <= 0, 0.0, up / (up - low)))
        return below, above, torch.where((low < 0) & (up > 0), -above * low, 0.0)

    def through(form, constant, low, up):
        below, above, height = lines(low, up)
        plus, minus = form.clamp(min=0), form.clamp(max=0)
        return plus * below + minus * above, constant + (minus * height).sum(dim=1)

    for row in range(7):
        low1, up1 = (w1 @ x[row] + b1 - eps * w1.abs().sum(1), w1 @ x[row] + b1 + eps * w1.abs().sum(1))

        def bottom(form, constant, row=row, low1=low1, up1=up1):
            form, constant = through(form, constant, low1, up1)
            form, constant = form @ w1, constant + form @ b1
            return form @ x[row] + constant - eps * form.abs().sum(dim=1)

        low2, up2 = bottom(w2, b2), -bottom(-w2, -b2)
        form = (w3[y[row]] - w3[1 - y[row]])[None]
        form, constant = through(form, (b3[y[row]] - b3[1 - y[row]])[None], low2, up2)
        expected = bottom(form @ w2, constant + form @ b2)
        assert float(found[row]) >= float(expected) - 1e-9
        graph = BoundGraph.of(model.requires_grad_(False))
        region = Region.around(x[row : row + 1], Threat("linf", eps, (-5.0, 5.0)))
        boxes = crown_boxes(graph, region)
        ibp = graph.boxes(region.box)
        place = len(graph.nodes) - 3
        assert torch.allclose(boxes[place].lower, torch.maximum(low2, ibp[place].lower), atol=1e-12)
        if bool((low2 >= ibp[place].lower[0]).all()) and bool((up2 <= ibp[place].upper[0]).all()):
            eye = torch.eye(2, dtype=torch.float64)
            form = (eye[y[row]] - eye[1 - y[row]])[None, None]
            own = lowest(graph, boxes, len(graph.nodes) - 1, form, region).detach()
            assert abs(float(own) - float(expected)) < 1e-9


def test_bounds_that_are_a_little_too_good_are_caught():
    """The planted violation: margins raised by a ten-thousandth of their size are refuted by an attack."""
    world = linear_world(n=20, shape=(8,))
    threat = Threat("linf", 0.05, (-10.0, 10.0))
    found = certify_bounds(world.model, world.x, world.y, threat).margins
    x_adv = PGD(threat, 20, loss="margin")(world.model, world.x, world.y)
    reached = smallest_margin(world.model, x_adv, world.y)
    assert (found <= reached + 1e-12).all()
    assert not (found + 1e-4 * found.abs() <= reached + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rounding_of_the_model_itself_is_inside(dtype):
    """Cancellation: weights of 1e4 leave a margin that coarse arithmetic gets wrong; nothing false is verified."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 2, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(1e3 * torch.randn(2, 256))
    x = torch.rand(200, 256).to(dtype)
    y = layer(x).argmax(1)
    exact = smallest_margin(nn.Sequential(layer).double(), x.double(), y)
    layer.to(dtype)
    found = certify_bounds(layer.eval(), x, y, Threat("linf", 0.0, (0.0, 1.0)), "crown-ibp")
    assert (found.margins <= exact).all() and (found.margins < exact - 1e-9 * exact.abs()).all()
    assert dtype == torch.bfloat16 or found.verified.double().mean() > 0.9


def test_what_it_cannot_read_is_refused_by_path():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.Softmax(dim=1))

        def forward(self, x):
            return torch.sin(self.body(x))

    x, y = torch.rand(2, 4), torch.tensor([0, 1])
    with pytest.raises(IncompatibleModel) as caught:
        certify_bounds(Odd().eval(), x, y, Threat("linf", 0.1))
    assert [offender.path for offender in caught.value.offenders] == ["body.1"]
    assert "GELU" in str(caught.value)

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(IncompatibleModel, match="trace"):
        certify_bounds(Branch().eval(), x, y, Threat("linf", 0.1))
    with pytest.raises(IncompatibleModel, match=r"(?s)eval.*BatchNorm1d"):
        certify_bounds(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), x, y, Threat("linf", 0.1))
    same = nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"), nn.Flatten()).eval()
    with pytest.raises(IncompatibleModel, match="Conv2d"):
        certify_bounds(same, torch.rand(2, 1, 2, 2), y, Threat("linf", 0.1))
    with pytest.raises(IncompatibleModel, match="Module"):
        certify_bounds(lambda x: x, x, y, Threat("linf", 0.1))


def test_bad_arguments():
    model, x = NETS["mlp"](0)
    y = truth(model, x)
    with pytest.raises(ValueError, match="method"):
        certify_bounds(model, x, y, Threat("linf", 0.1), "magic")
    with pytest.raises(ThreatModelError, match="inside the bounds"):
        certify_bounds(model, x + 2, y, Threat("linf", 0.1))
    with pytest.raises(ValueError, match="y"):
        certify_bounds(model, x, y + 7, Threat("linf", 0.1))
    with pytest.raises(ValueError, match="y"):
        certify_bounds(model, x, y[:3], Threat("linf", 0.1))


def test_nan_weights_verify_nothing_and_empty_batches_are_fine():
    model, x = NETS["mlp"](0)
    y = truth(model, x)
    empty = certify_bounds(model, x[:0], y[:0], Threat("linf", 0.1))
    assert empty.verified.shape == (0,)
    model[0].weight.data[0, 0] = torch.nan
    for method in METHODS:
        assert not certify_bounds(model, x, y, Threat("linf", 0.0), method).verified.any()


def test_no_trace_is_left():
    model, x = NETS["residual"](0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    stream = torch.get_rng_state()
    certify_bounds(model, x, truth(model, x), Threat("linf", 0.01), "crown")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert flags == [(p.requires_grad, p.grad) for p in model.parameters()]
    assert torch.equal(stream, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_results_do_not_depend_on_batches():
    model, x = NETS["residual"](0)
    y = truth(model, x)
    whole = certify_bounds(model, x, y, Threat("linf", 0.02), "crown")
    parts = certify_bounds(model, x, y, Threat("linf", 0.02), "crown", batch_size=1)
    torch.testing.assert_close(whole.margins, parts.margins, atol=1e-9, rtol=0)
    share = whole.accuracy
    assert share.low <= share.value <= share.high and whole.n == 6
    finding = whole.to_evidence().findings[0]
    assert finding.id == "certificate.verified_accuracy" and finding.n == 6 and math.isclose(finding.value, share.value)
    assert dataclasses.is_dataclass(whole)


def test_max_pooling_knows_when_one_member_is_sure():
    """A window whose first member is above all others is the identity there: the bound behind it is near the truth."""
    model = nn.Sequential(nn.MaxPool2d(2, padding=1), nn.Flatten(), nn.Linear(9, 2)).eval()
    x = torch.zeros(3, 1, 4, 4)
    x[:, :, ::3, ::3], x[:, :, 1, 1], x[:, :, 1, 0] = 0.9, 0.5, 0.45
    x[:, :, 0, 1:3], x[:, :, 1:3, 3], x[:, :, 3, 1:3], x[:, :, 2, 0] = 0.4, 0.4, 0.4, 0.4
    y = truth(model, x)
    for eps in (0.01, 0.05):
        threat = Threat("linf", eps, (-1.0, 2.0))
        found = certify_bounds(model, x, y, threat, "crown-ibp").margins
        x_adv = PGD(threat, 60, loss="margin")(model, x, y, generator=torch.Generator().manual_seed(0))
        reached = smallest_margin(model, x_adv, y)
        assert (found <= reached + 1e-6).all() and (reached - found <= 0.1 * eps + 1e-4).all()
