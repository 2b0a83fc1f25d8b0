"""Threats on tables and stored images: whole numbers, one-hot groups, 8-bit rounding; against brute force."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aidefend import Threat, ThreatModelError

INTEGER = torch.tensor([True, True, False, False, False, False, False])
GROUPS = ((3, 4, 5),)
BOUNDS = (torch.tensor([0.0, 0, -1, 0, 0, 0, -2]), torch.tensor([9.0, 9.5, 1, 1, 1, 1, 2]))
norms = st.sampled_from(["linf", "l2", "l1", "l0"])


def table(seed, n=6):
    stream = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 7, generator=stream, dtype=torch.float64)
    x[:, :2] = torch.randint(0, 10, (n, 2), generator=stream)
    x[:, 3:6] = torch.eye(3, dtype=torch.float64)[torch.randint(0, 3, (n,), generator=stream)]
    return x, x + 2 * torch.randn(x.shape, generator=stream, dtype=torch.float64)


@given(norms, st.integers(0, 10_000), st.floats(0, 6), st.booleans(), st.booleans())
def test_projection_is_feasible_and_idempotent(norm, seed, eps, masked, scaled):
    x, target = table(seed)
    mask = torch.tensor([True, False, True, True, True, False, True]) if masked else None
    scale = torch.tensor([0.5, 1, 2, 1, 0.7, 1, 3]) if scaled else None
    threat = Threat(norm, eps, BOUNDS, mask=mask, integer=INTEGER, groups=GROUPS, scale=scale)
    threat.check(x)
    for point in (threat.project(target, x), threat.random_start(x, torch.Generator().manual_seed(seed))):
        assert threat.contains(point, x).all()
        assert torch.equal(point[:, :2], point[:, :2].round())
        assert (point[:, 3:6].sum(dim=1) == 1).all() and ((point[:, 3:6] == 0) | (point[:, 3:6] == 1)).all()
        assert torch.allclose(threat.project(point, x), point, atol=1e-12)
        if masked:
            assert torch.equal(point[:, ~mask], x[:, ~mask])


@pytest.mark.parametrize("seed", range(4))
def test_linf_on_whole_numbers_and_categories_is_the_nearest_point(seed):
    x, target = table(seed)
    threat = Threat("linf", torch.tensor([2.0, 1.7, 0.1, 1, 1, 1, 0.3]), BOUNDS, integer=INTEGER, groups=GROUPS)
    ours = threat.project(target, x)
    codes = torch.eye(3, dtype=torch.float64)
    for row in range(len(x)):
        best = torch.inf
        for first, second, code in itertools.product(range(10), range(10), range(3)):
            trial = ours[row].clone()
            trial[0], trial[1], trial[3:6] = first, second, codes[code]
            if threat.contains(trial[None], x[row][None]):
                best = min(best, float(((trial - target[row]) ** 2).sum()))
        assert float(((ours[row] - target[row]) ** 2).sum()) <= best + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_l0_weighs_categories_against_features(seed):
    """The best two changes of five: brute force over which ones."""
    x, target = table(seed)
    threat = Threat("l0", 2, BOUNDS, groups=GROUPS)
    ours = threat.project(target, x)
    units = [[0], [1], [2], [6], [3, 4, 5]]
    low, high = BOUNDS[0].double(), BOUNDS[1].double()
    for row in range(len(x)):
        wanted = torch.minimum(torch.maximum(target[row], low), high)
        wanted[3:6] = torch.eye(3, dtype=torch.float64)[target[row, 3:6].argmax()]
        best = torch.inf
        for pick in itertools.combinations(units, 2):
            trial, places = x[row].clone(), [place for unit in pick for place in unit]
            trial[places] = wanted[places]
            best = min(best, float(((trial - target[row]) ** 2).sum()))
        assert abs(float(((ours[row] - target[row]) ** 2).sum()) - best) < 1e-9
    assert (threat.distance(ours, x) <= 2).all()


def test_a_category_costs_what_it_says():
    x = torch.tensor([[0.0, 1, 0, 0.5]])
    moved = torch.tensor([[1.0, 0, 0, 0.5]])
    groups = ((0, 1, 2),)
    lengths = {norm: Threat(norm, 1, groups=groups).distance(moved, x).item() for norm in ("linf", "l2", "l1", "l0")}
    assert lengths == {"linf": 1, "l2": pytest.approx(2**0.5), "l1": 2, "l0": 1}
    for norm, enough in lengths.items():
        assert torch.equal(Threat(norm, enough, groups=groups).project(moved, x), moved)
        assert torch.equal(Threat(norm, enough * 0.99, groups=groups).project(moved, x), x)
    cheap = Threat("l2", 0.2, groups=groups, scale=torch.tensor([0.1, 0.1, 0.1, 1]))
    assert torch.equal(cheap.project(moved, x), moved)


def test_random_starts_reach_every_category_and_whole_number():
    x = torch.tensor([[4.0, 4, 0, 1, 0, 0, 0]]).repeat(500, 1)
    for norm, eps in (("linf", 2.0), ("l2", 3.0), ("l1", 6.0), ("l0", 3)):
        start = Threat(norm, eps, BOUNDS, integer=INTEGER, groups=GROUPS).random_start(
            x, torch.Generator().manual_seed(0)
        )
        assert (start[:, 3:6].sum(dim=0) > 20).all(), norm
        assert len(start[:, 0].unique()) >= 3, norm


def test_planted_violations_are_seen():
    x, _ = table(0)
    threat = Threat("linf", 3.0, BOUNDS, integer=INTEGER, groups=GROUPS)
    half, two, none, between = x.clone(), x.clone(), x.clone(), x.clone()
    half[:, 0] = (half[:, 0] + 0.5).clamp(max=8.5)
    two[:, 3:5], none[:, 3:6] = 1, 0
    between[:, 3:6] = 1 / 3
    assert threat.contains(x, x).all()
    for planted in (half, two, none, between):
        assert not threat.contains(planted, x).any()
    assert Threat("linf", 3.0, BOUNDS).contains(half, x).all()


def test_data_that_the_threat_cannot_mean_is_refused():
    x, _ = table(1)
    with pytest.raises(ThreatModelError, match="whole numbers"):
        Threat(bounds=(-9.0, 9.0), integer=torch.ones(7, dtype=torch.bool)).check(x)
    with pytest.raises(ThreatModelError, match="one-hot"):
        Threat(bounds=(-9.0, 9.0), groups=((0, 1),)).check(x)
    with pytest.raises(ThreatModelError, match="positions below 7"):
        Threat(bounds=(-9.0, 9.0), groups=((6, 7),)).check(x)
    for groups in ((), ((1,),), ((0, 1), (1, 2)), ((-1, 2),), (3, 4), "ab"):
        with pytest.raises(ThreatModelError, match="groups"):
            Threat(groups=groups)
    for scale in (0.5, torch.tensor([0.0, 1]), torch.tensor([1]), torch.tensor([float("inf")])):
        with pytest.raises(ThreatModelError, match="scale"):
            Threat(scale=scale)
    with pytest.raises(ThreatModelError, match="Match the integer"):
        Threat(integer=torch.ones(3, dtype=torch.bool)).check(torch.ones(2, 4))
    with pytest.raises(ThreatModelError, match="std > 0"):
        Threat.normalised("linf", 0.1, [0.5], [0.0])
    with pytest.raises(ThreatModelError, match="mean"):
        Threat.normalised("linf", 0.1, "half", [1.0])


@given(st.sampled_from([("linf", 8 / 255), ("l2", 1.0), ("l1", 3.0), ("l0", 4)]), st.integers(0, 10_000))
def test_to_uint8_stays_inside_and_loses_nothing_of_linf(setting, seed):
    threat, stream = Threat(*setting), torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (3, 1, 6, 6), generator=stream).float() / 255
    x_adv = threat.project(x + torch.randn(x.shape, generator=stream), x)
    stored = threat.to_uint8(x_adv, x)
    assert stored.dtype == torch.uint8 and threat.contains(stored.float() / 255, x).all()
    if setting[0] == "linf":
        far = (x + 8 / 255 * torch.randn(x.shape, generator=stream).sign()).clamp(0, 1)
        assert torch.equal(threat.to_uint8(far, x), (far * 255).round().to(torch.uint8))


def test_plain_rounding_would_leave_the_threat():
    """What `to_uint8` is for: rounding to the nearest level breaks the radius."""
    x = torch.full((1, 1, 4, 4), 100 / 255)
    threat = Threat("linf", 1.6 / 255)
    x_adv = x + 1.6 / 255
    assert not threat.contains((x_adv * 255).round() / 255, x).any()
    assert (threat.to_uint8(x_adv, x) == 101).all()
    whole = Threat("linf", 1.6, (0.0, 255.0))
    assert (whole.to_uint8(x * 255 + 1.6, x * 255) == 101).all()


def test_to_uint8_refuses_what_it_cannot_keep():
    x = torch.full((1, 2), 0.5)
    with pytest.raises(ThreatModelError, match="8-bit grid"):
        Threat().to_uint8(x, x)
    grid = torch.full((1, 2), 0.2)
    with pytest.raises(ThreatModelError, match="inside the threat"):
        Threat("linf", 0.1).to_uint8(grid + 0.2, grid)
    with pytest.raises(ThreatModelError, match="bounds"):
        Threat("linf", 0.1, (-1.0, 1.0)).to_uint8(grid, grid)
