"""The threat model: projection is feasible, idempotent and nearest; starts are inside; bad radii are refused."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from aidefend import Threat, ThreatModelError

shapes = st.sampled_from([(5,), (3, 4), (2, 3, 4)])
norms = st.sampled_from(["linf", "l2"])
seeds = st.integers(0, 10_000)


def pair(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    x = torch.rand((4, *shape), generator=stream).to(dtype)
    return x, (x.float() + torch.randn(x.shape, generator=stream)).to(dtype)


@given(shapes, norms, seeds, st.floats(0, 2), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
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
    for norm in ("linf", "l2"):
        threat = Threat(norm, 0.3, mask=mask)
        assert torch.equal(threat.project(target, x)[:, ~mask], x[:, ~mask])
        assert torch.equal(threat.random_start(x)[:, ~mask], x[:, ~mask])


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
    for norm in ("linf", "l2"):
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
