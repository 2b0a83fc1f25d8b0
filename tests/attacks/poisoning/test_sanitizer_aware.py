"""Poison that knows the filters: exact count, inside every region, true slopes, and it works undefended."""

import pickle

import pytest
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer

from aidefend import ConfigurationError
from aidefend.attacks.poisoning import LabelFlip, SanitizerAware
from aidefend.attacks.poisoning.allowed_region import Box, HalfSpace, Quadric, nearest, region
from aidefend.attacks.poisoning.logistic_model import (
    Rows,
    curvature,
    effect_of_moving,
    fit_logistic,
    margins,
    smooth_error,
)

FILTERS = ("sphere", "slab", "subspace", "ellipsoid", "range", "loss")


def two_clouds(n=200, d=5, seed=0, apart=1.5):
    stream = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    spreads = torch.linspace(0.3, 1.5, d)
    return torch.randn(n, d, generator=stream) * spreads + apart * y[:, None], y


def breast_cancer(seed=0):
    """Standardised columns, a third held out."""
    found = load_breast_cancer()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(found.data)[order], torch.tensor(found.target)[order].long()
    cut = len(x) * 2 // 3
    x = (x - x[:cut].mean(dim=0)) / x[:cut].std(dim=0)
    return x[:cut], y[:cut], x[cut:], y[cut:]


def all_rows(poisoned):
    samples = [poisoned.dataset[i] for i in range(len(poisoned.is_poison))]
    return torch.stack([x for x, _ in samples]), torch.tensor([int(y) for _, y in samples])


def model_of(x, y, ridge=1e-3):
    mass = torch.full((len(y),), 1 / len(y), dtype=torch.float64)
    return fit_logistic(Rows(x.double(), y), mass, ridge, torch.zeros(x.shape[1] + 1, dtype=torch.float64))


def error_of(x, y, test_x, test_y):
    return float((margins(model_of(x, y), Rows(test_x.double(), test_y)) <= 0).double().mean())


@pytest.mark.parametrize("rate", [0.03, 0.1])
def test_count_is_exact_other_rows_stay_and_labels_are_of_the_data(rate):
    x, y = two_clouds()
    poisoned = SanitizerAware(rate, steps=5).poison((x, y + 3), seed=1)
    new_x, new_y = all_rows(poisoned)
    assert int(poisoned.is_poison.sum()) == round(rate * 200) and poisoned.target is None
    assert torch.equal(new_x[~poisoned.is_poison], x[~poisoned.is_poison])
    assert torch.equal(new_y[~poisoned.is_poison], y[~poisoned.is_poison] + 3)
    assert set(new_y.tolist()) == {3, 4} and new_x.dtype == x.dtype


def test_a_rate_that_rounds_to_no_row_changes_nothing():
    x, y = two_clouds()
    poisoned = SanitizerAware(0.001, steps=2).poison((x, y))
    assert not poisoned.is_poison.any() and torch.equal(all_rows(poisoned)[0], x)


def test_every_copy_lies_inside_every_region_of_its_class():
    x, y = two_clouds()
    poisoned = SanitizerAware(0.1, FILTERS[:-1], steps=20).poison((x, y), seed=0)
    new_x, new_y = all_rows(poisoned)
    clean = ~poisoned.is_poison
    assert _outside(new_x.double(), new_y, clean, poisoned.is_poison) < 1e-3
    plain = SanitizerAware(0.1, (), steps=20).poison((x, y), seed=0)  # a planted violation: nothing was asked of it
    assert _outside(*(part.double() if i == 0 else part for i, part in enumerate(all_rows(plain))), clean, ~clean) > 1


def _outside(x, y, clean, poison):
    """How far the farthest poison lies outside a region of its class."""
    worst = 0.0
    for label in (0, 1):
        own, other = x[clean & (y == label)], x[clean & (y != label)]
        for point in x[poison & (y == label)]:
            gaps = [float((one.nearest(point) - point).norm()) for one in region(own, other, FILTERS, 0.05)]
            worst = max(worst, *gaps)
    return worst


def test_losses_stay_below_the_cut_of_the_attackers_own_model():
    x, y = two_clouds(apart=0.8)
    shares = {}
    for filters in (("sphere",), ("sphere", "loss")):
        poisoned = SanitizerAware(0.1, filters, spread=0.0, steps=30).poison((x, y), seed=0)
        new_x, new_y = all_rows(poisoned)
        found = margins(model_of(new_x, new_y), Rows(new_x.double(), new_y))
        cuts = torch.stack([torch.quantile(found[~poisoned.is_poison & (new_y == label)], 0.05) for label in (0, 1)])
        shares[filters] = float((found >= cuts[new_y] - 0.3)[poisoned.is_poison].double().mean())
    assert shares[("sphere", "loss")] == 1.0 and shares[("sphere",)] < 0.5, shares


@pytest.mark.parametrize("kind", ["sphere", "slab", "subspace", "ellipsoid", "range"])
def test_the_nearest_point_agrees_with_a_general_solver(kind):
    x, y = two_clouds(d=4)
    (one,) = region(x[y == 0].double(), x[y == 1].double(), (kind,), 0.05)
    point = torch.tensor([3.0, -4.0, 2.0, 7.0], dtype=torch.float64)
    found = one.nearest(point)
    inside = x[y == 0].double().mean(dim=0)
    if isinstance(one, Quadric):
        limits = [{"type": "ineq", "fun": lambda p: float(one.radius**2 - one.length(torch.tensor(p)) ** 2)}]
        bounds = None
    else:
        limits, bounds = [], list(zip(one.low.tolist(), one.high.tolist(), strict=True))
    best = minimize(
        lambda p: float(((torch.tensor(p) - point) ** 2).sum()), inside.numpy(), constraints=limits, bounds=bounds
    )
    torch.testing.assert_close(found, torch.tensor(best.x), atol=2e-3, rtol=0)
    torch.testing.assert_close(one.nearest(inside), inside)


def test_the_nearest_point_of_an_intersection_agrees_with_a_general_solver():
    ball = Quadric(torch.zeros(2).double(), None, torch.ones(()).double(), torch.tensor(1.0).double())
    half = HalfSpace(torch.tensor([1.0, 2.0]).double(), torch.tensor(1.0).double())
    box = Box(torch.tensor([-1.0, -1.0]).double(), torch.tensor([0.2, 2.0]).double())
    found = nearest(torch.tensor([2.0, 0.5]).double(), [ball, half, box])
    torch.testing.assert_close(found, torch.tensor([0.2, 0.5]).double(), atol=1e-4, rtol=0)
    found = nearest(torch.tensor([-3.0, 3.0]).double(), [ball, half, box])
    best = minimize(
        lambda p: (p[0] + 3) ** 2 + (p[1] - 3) ** 2,
        [0.0, 0.6],
        constraints=[
            {"type": "ineq", "fun": lambda p: 1 - p[0] ** 2 - p[1] ** 2},
            {"type": "ineq", "fun": lambda p: p[0] + 2 * p[1] - 1},
        ],
        bounds=[(-1, 0.2), (-1, 2)],
    )
    torch.testing.assert_close(found, torch.tensor(best.x), atol=1e-3, rtol=0)


def test_a_region_without_extent_is_its_centre():
    point = Quadric(torch.ones(3).double(), None, torch.ones(()).double(), torch.zeros(()).double())
    assert torch.equal(point.nearest(torch.tensor([4.0, 0.0, 1.0]).double()), torch.ones(3).double())


def test_newton_ends_where_the_slope_vanishes():
    x, y = two_clouds()
    theta = model_of(x, y).requires_grad_()
    penalty = torch.full_like(theta.detach(), 1e-3)
    penalty[-1] = 1e-6
    loss = torch.nn.functional.softplus(-margins(theta, Rows(x.double(), y))).mean()
    (slope,) = torch.autograd.grad(loss + (penalty * theta.square()).sum() / 2, theta)
    assert float(slope.norm()) < 1e-8


def test_the_effect_of_moving_a_row_agrees_with_retraining():
    x, y = two_clouds(60, 3)
    rows = Rows(x.double(), y)
    mass = torch.full((60,), 1 / 60, dtype=torch.float64)

    def trained(at):
        return fit_logistic(Rows(torch.cat([at, rows.x[1:]]), y), mass, 1e-2, torch.zeros(4, dtype=torch.float64))

    theta = trained(rows.x[:1])
    back = torch.linalg.solve(curvature(theta, rows, mass, 1e-2), smooth_error(theta, rows)[1])
    found = effect_of_moving(theta, Rows(rows.x[:1], y[:1]), back)[0] / 60
    for column in range(3):
        step = torch.zeros(1, 3, dtype=torch.float64)
        step[0, column] = 3e-3
        up, down = (float(smooth_error(trained(rows.x[:1] + sign * step), rows)[0]) for sign in (1, -1))
        assert float(found[column]) == pytest.approx((up - down) / 6e-3, rel=1e-3, abs=1e-9)


def test_a_black_box_is_obeyed_and_asked_with_the_poisoned_data():
    x, y = two_clouds()
    asked = []

    def accept(inputs, labels):
        asked.append((inputs.shape, labels.shape))
        return inputs.norm(dim=1) < 3.0

    for chosen, share in ((None, 0.0), (accept, 0.9)):
        poisoned = SanitizerAware(0.1, (), accept=chosen, steps=20).poison((x, y), seed=0)
        kept = all_rows(poisoned)[0].norm(dim=1)[poisoned.is_poison] < 3.0
        assert float(kept.double().mean()) >= share if share else not kept.all()
    assert len(asked) <= 8 and set(asked) == {(x.shape, y.shape)}


def test_same_seed_same_poison_also_after_pickling_and_images_keep_their_shape():
    x, y = two_clouds(80, 16)
    attack, data = SanitizerAware(0.1, steps=3), (x.reshape(80, 1, 4, 4), y)
    first = attack.poison(data, seed=3)
    again = pickle.loads(pickle.dumps(attack)).poison(data, seed=3)
    assert all_rows(first)[0].shape == (80, 1, 4, 4)
    assert torch.equal(all_rows(first)[0], all_rows(again)[0])
    assert torch.equal(all_rows(first)[0], all_rows(pickle.loads(pickle.dumps(first)))[0])
    assert not torch.equal(first.is_poison, attack.poison(data, seed=4).is_poison)


def test_one_column_has_every_region():
    x, y = two_clouds(60, 1)
    new_x, new_y = all_rows(SanitizerAware(0.1, FILTERS, steps=5).poison((x, y), seed=0))
    assert new_x.shape == (60, 1) and new_x.isfinite().all() and set(new_y.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SanitizerAware(rate=0.0), "rate"),
        (lambda: SanitizerAware(filters=("cube",)), "filters"),
        (lambda: SanitizerAware(filters="sphere"), "filters"),
        (lambda: SanitizerAware(filters=(["sphere"],)), "filters"),
        (lambda: SanitizerAware(removed=1.0), "removed"),
        (lambda: SanitizerAware(ridge=0.0), "ridge"),
        (lambda: SanitizerAware(spread=-1.0), "spread"),
        (lambda: SanitizerAware(accept=3), "accept"),
        (lambda: SanitizerAware(aim=(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))), "aim"),
        (lambda: SanitizerAware(aim=(torch.zeros(2, 4), torch.arange(2)), steps=1).poison(two_clouds()), "aim"),
        (lambda: SanitizerAware(aim=(torch.zeros(2, 5), torch.arange(2) + 1), steps=1).poison(two_clouds()), "aim"),
        (lambda: SanitizerAware(aim=(torch.zeros(2), torch.arange(2))), "aim"),
        (lambda: SanitizerAware(steps=1).poison((torch.rand(30), torch.arange(30) % 2)), "dataset"),
        (lambda: SanitizerAware(accept=lambda x, y: y, steps=1).poison(two_clouds()), "accept"),
        (lambda: SanitizerAware(steps=1).poison((torch.rand(30, 3), torch.arange(30) % 3)), "two classes"),
        (lambda: SanitizerAware(steps=1).poison((torch.rand(30, 3), (torch.arange(30) == 0).long())), "two classes"),
    ],
)
def test_malformed_calls_name_argument_and_cure(make, match):
    with pytest.raises(ConfigurationError, match=match):
        make()


def test_it_works_undefended_and_through_the_filters_where_flipped_labels_do_not():
    """Breast cancer, 3 %: the error at least doubles inside all of Koh's regions; as many flipped labels do little."""
    x, y, test_x, test_y = breast_cancer()
    clean = error_of(x, y, test_x, test_y)
    errors = {}
    for filters in ((), ("sphere", "slab", "subspace", "loss")):
        poisoned = SanitizerAware(0.03, filters, aim=(test_x, test_y)).poison((x, y), seed=0)
        errors[filters] = error_of(*all_rows(poisoned), test_x, test_y)
    flipped = error_of(*all_rows(LabelFlip(0.03).poison((x, y), seed=0)), test_x, test_y)
    assert min(errors.values()) > 2 * clean + 0.03 and errors[()] > 0.1, (clean, errors)
    assert min(errors.values()) > flipped + 0.02, (flipped, errors)
