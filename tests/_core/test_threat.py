"""The threat model: projection is feasible, idempotent and nearest; starts are inside; bad radii are refused."""

import pickle
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from aidefend import Threat, ThreatModelError

shapes = st.sampled_from([(5,), (3, 4), (2, 3, 4)])
norms = st.sampled_from(["linf", "l2", "l1", "l0"])
seeds = st.integers(0, 10_000)


def pair(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    x = torch.rand((4, *shape), generator=stream).to(dtype)
    return x, (x.float() + torch.randn(x.shape, generator=stream)).to(dtype)


@given(shapes, norms, seeds, st.floats(0, 5), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_projection_is_feasible_and_idempotent(shape, norm, seed, eps, dtype):
    threat = Threat(norm, eps)
    x, target = pair(shape, seed, dtype)
    point = threat.project(target, x)
    assert point.dtype == dtype
    assert threat.contains(point, x).all()
    again = threat.project(point, x)
    assert torch.allclose(again.double(), point.double(), atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("seed", range(5))
def test_l2_projection_is_the_nearest_point(seed):
    x, target = pair((3,), seed, torch.float64)
    threat = Threat("l2", 0.4)
    ours = threat.project(target, x)
    for row in range(len(x)):
        origin, goal = x[row].numpy(), target[row].numpy()
        inside = {"type": "ineq", "fun": lambda z, origin=origin: 0.4**2 - ((z - origin) ** 2).sum()}
        best = minimize(
            lambda z, goal=goal: ((z - goal) ** 2).sum(),
            origin,
            bounds=[(0, 1)] * 3,
            constraints=[inside],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert ((ours[row].numpy() - goal) ** 2).sum() <= best.fun + 1e-6
        assert np.abs(ours[row].numpy() - best.x).max() < 1e-3


def nearest_by_scipy(x, target, constraint):
    """The nearest point for a differentiable constraint on (up, down), the positive and negative parts of the step."""
    d = len(x)

    def split(z):
        return z[:d] - z[d:]

    best = minimize(
        lambda z: ((x + split(z) - target) ** 2).sum() + 1e-9 * z.sum(),
        np.full(2 * d, 1e-3),
        bounds=[(0, 1 - v) for v in x] + [(0, v) for v in x],
        constraints=[{"type": "ineq", "fun": constraint}],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return x + split(best.x)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eps", [0.1, 0.7])
def test_l1_projection_is_the_nearest_point(seed, eps):
    x, target = pair((5,), seed, torch.float64)
    ours = Threat("l1", eps).project(target, x)
    for row in range(len(x)):
        best = nearest_by_scipy(x[row].numpy(), target[row].numpy(), lambda z: eps - z.sum())
        assert np.abs(ours[row].numpy() - best).max() < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_l1_projection_of_many_features_meets_the_conditions_of_the_optimum(seed):
    """One fall for every feature that is neither at zero nor at its bound; more than it at none, less at none."""
    x, target = pair((500,), seed, torch.float64)
    step = Threat("l1", 3.0).project(target, x) - x
    assert torch.allclose(step.abs().sum(dim=1), torch.tensor(3.0, dtype=torch.float64))
    size = (target - x).abs()
    room = torch.where(target > x, 1 - x, x)
    inner = (step != 0) & (step.abs() < room - 1e-9)
    for row in range(4):
        falls = (size - step.abs())[row][inner[row]]
        assert float(falls.max() - falls.min()) < 1e-9
        assert (size[row][step[row] == 0] <= falls.max() + 1e-9).all()
        stopped = (step[row] != 0) & ~inner[row]
        assert ((size - step.abs())[row][stopped] >= falls.min() - 1e-9).all()


@pytest.mark.parametrize("seed", range(3))
def test_l0_projection_is_the_nearest_point(seed):
    x, target = pair((7,), seed, torch.float64)
    ours = Threat("l0", 3.9).project(target, x)
    for row in range(len(x)):
        clipped = target[row].clamp(0, 1)
        trials = (
            x[row].clone().index_put((torch.tensor(kept),), clipped[list(kept)]) for kept in combinations(range(7), 3)
        )
        best = min(float(((trial - target[row]) ** 2).sum()) for trial in trials)
        assert abs(float(((ours[row] - target[row]) ** 2).sum()) - best) < 1e-12
        assert int((ours[row] != x[row]).sum()) <= 3


def test_scale_measures_in_the_original_units():
    """Normalised data with Threat.normalised does what plain data does with the plain threat."""
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    plain_x = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = plain_x + torch.randn(plain_x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift, spread = mean.double().reshape(3, 1, 1), std.double().reshape(3, 1, 1)
    for norm, eps in (("linf", 0.1), ("l2", 0.8), ("l1", 2.0), ("l0", 5)):
        plain, normalised = Threat(norm, eps), Threat.normalised(norm, eps, mean, std)
        x, point = (plain_x - shift) / spread, (target - shift) / spread
        ours = normalised.project(point, x)
        there = plain.project(target, plain_x)
        assert torch.allclose(ours * spread + shift, there, atol=1e-6), norm
        assert torch.allclose(normalised.distance(ours, x), plain.distance(there, plain_x), atol=1e-5)
        assert normalised.contains(ours, x).all()
        assert normalised.contains(normalised.random_start(x), x).all()
        assert not normalised.contains(x + 1.02 * (ours - x), x).any() or norm == "l0"


def test_random_start_fills_the_l1_ball():
    """In the plane, the l1 ball of half the radius holds a quarter of the area; no corner is preferred."""
    x = torch.full((20_000, 2), 0.5)
    threat = Threat("l1", 0.2)
    start = threat.random_start(x, torch.Generator().manual_seed(0)) - x
    assert abs(float((start.abs().sum(dim=1) < 0.1).float().mean()) - 0.25) < 0.016
    assert abs(float((start[:, 0].abs() < start[:, 1].abs()).float().mean()) - 0.5) < 0.018
    assert start.mean(dim=0).abs().max() < 0.003


def test_random_start_of_l0_changes_that_many_features_anywhere():
    x = torch.full((4000, 10), 0.5)
    start = Threat("l0", 3).random_start(x, torch.Generator().manual_seed(0))
    assert ((start != x).sum(dim=1) == 3).all()
    assert ((start != x).float().mean(dim=0) - 0.3).abs().max() < 0.04
    free = Threat("l0", 3, (-torch.inf, torch.inf)).random_start(x)
    assert free.isfinite().all() and ((free != x).sum(dim=1) == 3).all()


def test_linf_projection_is_the_clamp():
    x, target = pair((6,), 1)
    expected = target.clamp(0, 1).maximum(x - 0.1).minimum(x + 0.1).clamp(0, 1)
    assert torch.equal(Threat("linf", 0.1).project(target, x), expected)


@given(shapes, norms, seeds, st.floats(0, 1))
def test_random_start_is_inside(shape, norm, seed, eps):
    x, _ = pair(shape, seed)
    threat = Threat(norm, eps)
    start = threat.random_start(x, torch.Generator().manual_seed(seed))
    assert threat.contains(start, x).all()


def test_random_start_fills_the_ball_and_not_its_surface():
    """Uniform in a d-ball: the share of points within half the radius is 2 ** -d. False failure below 1e-6."""
    x = torch.full((20_000, 2), 0.5)
    distance = Threat("l2", 0.2).distance(Threat("l2", 0.2).random_start(x, torch.Generator().manual_seed(0)), x)
    assert abs(float((distance < 0.1).float().mean()) - 0.25) < 0.016
    wide = Threat("linf", 0.2).random_start(x, torch.Generator().manual_seed(0)) - x
    assert abs(float((wide.abs() < 0.1).float().mean()) - 0.5) < 0.013


def test_random_start_repeats_with_its_generator_only():
    x, _ = pair((5,), 0)
    before = torch.get_rng_state()
    first = Threat().random_start(x, torch.Generator().manual_seed(7))
    assert torch.equal(first, Threat().random_start(x, torch.Generator().manual_seed(7)))
    assert not torch.equal(Threat().random_start(x), Threat().random_start(x))
    assert torch.equal(before, torch.get_rng_state())


def test_contains_catches_every_kind_of_violation():
    x = torch.full((5, 3), 0.5)
    threat = Threat("linf", 0.1, mask=torch.tensor([True, True, False]))
    moved = x.clone()
    moved[1, 0] = 0.61
    moved[2, 1] = -0.01
    moved[3, 2] = 0.51
    moved[4, 0] = float("nan")
    assert threat.contains(moved, x).tolist() == [True, False, False, False, False]
    assert Threat("l2", 0.1).contains(x + 0.1 / 3**0.5, x).all()
    assert not Threat("l2", 0.1).contains(x + 0.101 / 3**0.5, x).any()


def test_mask_freezes_features():
    x, target = pair((6,), 3)
    mask = torch.tensor([True, False] * 3)
    for norm, eps in (("linf", 0.3), ("l2", 0.3), ("l1", 0.3), ("l0", 2)):
        threat = Threat(norm, eps, mask=mask)
        for point in (threat.project(target, x), threat.random_start(x)):
            assert torch.equal(point[:, ~mask], x[:, ~mask])
            assert (point != x).flatten(1).any(dim=1).all()


def test_radius_by_sample_by_feature_and_by_channel():
    x = torch.full((3, 2, 4, 4), 0.5)
    by_sample = Threat("linf", torch.tensor([0.0, 0.1, 0.2]))
    assert torch.allclose(by_sample.distance(by_sample.project(x + 1, x), x), torch.tensor([0.0, 0.1, 0.2]).double())
    subset = by_sample.rows(x, torch.tensor([2, 0]))
    assert torch.allclose(subset.distance(subset.project(x[:2] + 1, x[:2]), x[:2]), torch.tensor([0.2, 0.0]).double())
    by_channel = Threat("linf", torch.tensor([0.1, 0.2]).reshape(2, 1, 1))
    moved = by_channel.project(x + 1, x) - x
    assert torch.allclose(moved[:, 0], torch.tensor(0.1)) and torch.allclose(moved[:, 1], torch.tensor(0.2))
    table = torch.full((2, 2), 0.5)
    radii = torch.tensor([0.1, 0.3])
    assert torch.allclose(Threat("linf", radii).project(table + 1, table), table + radii)
    l2 = Threat("l2", radii)
    assert torch.allclose(l2.distance(l2.project(table + 1, table), table), radii.double(), atol=1e-6)


def test_empty_batch():
    x = torch.zeros(0, 1, 4, 4)
    for norm in ("linf", "l2", "l1", "l0"):
        assert Threat(norm).project(x, x).shape == x.shape
        assert Threat(norm).random_start(x).shape == x.shape
        assert Threat(norm).distance(x, x).shape == (0,)


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf"), torch.tensor([0.1, -0.1]), "0.1", True])
def test_bad_radius_is_refused(eps):
    with pytest.raises(ThreatModelError, match="eps"):
        Threat("linf", eps)


def test_bad_bounds_norm_mask_and_data_are_refused():
    with pytest.raises(ThreatModelError, match="low < high"):
        Threat(bounds=(1.0, 0.0))
    with pytest.raises(ThreatModelError, match="bounds"):
        Threat(bounds=0.5)
    with pytest.raises(ValueError, match="norm"):
        Threat("l7")
    with pytest.raises(ThreatModelError, match="mask"):
        Threat(mask=torch.ones(3))
    with pytest.raises(ThreatModelError, match="one l2 radius"):
        Threat("l2", torch.rand(2, 3))
    with pytest.raises(ThreatModelError, match="inside the bounds"):
        Threat().check(torch.tensor([[1.1]]))
    with pytest.raises(ValueError, match="finite"):
        Threat().check(torch.tensor([[float("nan")]]))
    with pytest.raises(ThreatModelError, match="Match eps"):
        Threat(eps=torch.rand(3)).check(torch.rand(4, 1, 5, 5))
    with pytest.raises(ThreatModelError, match="Match the mask"):
        Threat(mask=torch.tensor([True, False])).check(torch.rand(4, 5))
    assert Threat().check(torch.tensor([[1 + 5e-7, -5e-7]])).shape == (1, 2)


def test_threat_is_a_value():
    threat = Threat("l2", torch.tensor([0.1, 0.2]), mask=torch.tensor([True]))
    copy = pickle.loads(pickle.dumps(threat))
    assert copy == threat and hash(copy) == hash(threat) and copy != threat.with_eps(0.5)
    assert str(Threat("linf", 0.1)) == "linf eps=0.1 in [0.0, 1.0]"
