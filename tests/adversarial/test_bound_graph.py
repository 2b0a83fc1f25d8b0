"""What a trace would read wrongly is refused by name: a bound for another net than the one that runs is no bound."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from aidefend import IncompatibleModel, Threat
from aidefend.adversarial import certify_bounds
from aidefend.adversarial.bound_graph import BoundGraph
from aidefend.adversarial.bound_operations import Box


class Body(nn.Module):
    """Two linear layers with something of the test's own in between."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 4), nn.Linear(4, 3), between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Module(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.steps, self.act, self.alike = forward, nn.ReLU(inplace=True), nn.Identity()

    def forward(self, h):
        return self.steps(self, h)


def iadd(self, h):
    keep = h
    h += 1.5  # torch.fx alone reads h = h + 1.5
    return h * 2.0 + keep


def isub(self, h):
    keep = h.flatten(1)
    h -= 1.5
    return h + keep


def in_place_then_read(self, h):
    return self.act(h) + h


REUSED = {
    "module": in_place_then_read,
    "function": lambda self, h: functional.relu(h, inplace=True) + h,
    "positional": lambda self, h: functional.relu(h, True) + h,
    "method": lambda self, h: h.relu_() + h,
    "augmented": iadd,
    "augmented, view": isub,
    "view": lambda self, h: self.act(h.flatten(1)) + h,
    "identity": lambda self, h: self.act(self.alike(h)) + h,
    "read before": lambda self, h: (h * 1.0 + 0.0) + self.act(h),
}


def arguments():
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0, 1, 2]), Threat("linf", 0.01)


@pytest.mark.parametrize("name", REUSED)
def test_changes_in_place_of_what_is_read_again_are_refused(name):
    with pytest.raises(IncompatibleModel, match="in place"):
        certify_bounds(Body(Module(REUSED[name])).eval(), *arguments())


def test_changes_in_place_along_a_chain_are_what_they_say():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    )
    twin = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU(), model[4])
    own, other = (certify_bounds(net.eval(), *arguments()).margins for net in (model, twin))
    assert torch.equal(own, other)
    summed = Body(Module(lambda self, h: self.act(h + self.alike(h) * 0.5)))
    assert certify_bounds(summed.eval(), *arguments()).n == 3


def test_hooks_and_replaced_forwards_are_refused():
    def hooked(change):
        model = Body(nn.ReLU()).eval()
        change(model)
        return model

    changes = {
        "first": lambda m: m.first.register_forward_hook(lambda module, args, out: out + 1),
        "last": lambda m: m.last.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        "": lambda m: m.register_forward_hook(lambda module, args, out: -out),
        "between": lambda m: setattr(m.between, "forward", lambda x: -x),
    }
    for path, change in changes.items():
        with pytest.raises(IncompatibleModel) as caught:
            certify_bounds(hooked(change), *arguments())
        assert [offender.path for offender in caught.value.offenders] == [path]
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out)
    try:
        with pytest.raises(IncompatibleModel, match="all modules"):
            certify_bounds(Body(nn.ReLU()).eval(), *arguments())
    finally:
        handle.remove()


def test_activations_that_fall_and_functions_of_the_same_name_are_refused():
    for layer in (nn.ELU(alpha=-1.0), nn.Softplus(beta=-1.0), nn.LeakyReLU(-0.1)):
        with pytest.raises(IncompatibleModel, match=type(layer).__name__):
            certify_bounds(Body(layer).eval(), *arguments())
    with pytest.raises(IncompatibleModel, match="relu"):
        certify_bounds(Body(Module(lambda self, h: relu(h))).eval(), *arguments())


@torch.fx.wrap
def relu(h):
    """Not what its name says."""
    return -h


def test_a_changed_group_moves_two_features_for_one():
    """Against all points of an l0 threat with one category of three."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    threat = Threat("l0", 1, groups=((0, 1, 2),), mask=torch.tensor([True, True, True, False]))
    x = torch.cat([torch.eye(3), torch.rand(3, 1)], dim=1)
    y = model(x).argmax(1)
    found = {how: certify_bounds(model, x, y, threat, how).margins for how in ("ibp", "crown-ibp", "crown")}
    for row in range(3):
        points = torch.cat([torch.eye(3), x[row, 3].expand(3, 1)], dim=1)
        logits = model(points).detach()
        reached = (logits[:, y[row]] - logits[:, 1 - y[row]]).min()
        assert all(margins[row] <= reached for margins in found.values())


def test_arguments_that_equal_true_are_no_change_in_place():
    assert certify_bounds(Body(Module(lambda self, h: torch.flatten(h, 1) * 1 + h)).eval(), *arguments()).n == 3


def test_a_trace_that_answers_otherwise_is_refused():
    """The planted violation: a net that behaves differently while it is traced, where no rule looks."""

    def forward(self, h):
        return h + (0.0 if isinstance(h, torch.Tensor) else 3.0)

    with pytest.raises(IncompatibleModel, match="reads as it runs"):
        certify_bounds(Body(Module(forward)).eval(), *arguments())


def test_the_usual_ways_to_flatten():
    for forward in (
        lambda self, h: h.view(h.size(0), -1),
        lambda self, h: h.reshape(h.shape[0], -1),
        lambda self, h: h.view(-1, 4),
        lambda self, h: torch.flatten(h, 1),
    ):
        assert certify_bounds(Body(Module(forward)).eval(), *arguments()).n == 3
    with pytest.raises(IncompatibleModel, match="rows apart"):
        box = Box(torch.zeros(3, 4), torch.ones(3, 4))
        BoundGraph.of(Body(Module(lambda self, h: h.view(-1, 2))).eval()).boxes(box)


def test_random_points_stay_inside_every_box_of_a_nonlinear_net():
    """The planted violation: boxes a thousandth smaller are left by points that reach them."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.rand(4, 2)
    boxes = BoundGraph.of(model).boxes(Box((x - 0.1).double(), (x + 0.1).double()), unit=2.0**-23)
    points = x + 0.2 * torch.rand(5000, 4, 2) - 0.1
    ends = x + 0.1 * torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])[:, None]
    with torch.no_grad():
        for some in (points, ends):
            hidden, logits = model[0](some).double(), model(some).double()
            for values, box in ((hidden, boxes[1]), (logits, boxes[-1])):
                assert (values >= box.lower).all() and (values <= box.upper).all()
        hidden = model[0](ends).double()
    shrunk = 1e-3 * (boxes[1].upper - boxes[1].lower)
    assert not ((hidden >= boxes[1].lower + shrunk).all() and (hidden <= boxes[1].upper - shrunk).all())
