"""Epsilon: closed forms, the PLD accountant of dp-accounting as an oracle, and the edges."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from aidefend import ConfigurationError
from aidefend.privacy import calibrate_noise, epsilon, max_steps_within
from aidefend.privacy.accounting import spent
from aidefend.privacy.privacy_loss import Mechanism, _discretise, _interval_masses, _pair, _thresholds, composed_epsilon

TABLE = [  # (noise multiplier, sample rate, steps, delta): research notes, section 5
    (1.1, 256 / 60000, 14062, 1e-5),
    (1.23, 512 / 60000, 4680, 1e-5),
    (3.04, 4096 / 60000, 560, 1e-5),
    (2.0, 256 / 1437, 168, 1e-4),
    (3.0, 4096 / 50000, 2500, 1e-5),
    (4.0, 0.25, 100, 1e-3),
]
ADD_REMOVE = [2.382, 2.361, 2.254, 5.070, 6.579, 1.839]
REPLACE_ONE = [4.22, 4.27, 4.69, 10.48, 14.71, 4.12]


def oracle(history, delta, neighboring, pessimistic=True, interval=1e-4):
    """dp-accounting's privacy loss distribution, rounded up or down."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dp_accounting import privacy_accountant
        from dp_accounting.pld import privacy_loss_distribution
    relation = privacy_accountant.NeighboringRelation
    chosen = relation.ADD_OR_REMOVE_ONE if neighboring == "add_remove" else relation.REPLACE_ONE
    total = None
    for sigma, q, steps in history:
        kind = {"sampling_prob": q, "neighboring_relation": chosen, "pessimistic_estimate": pessimistic}
        one = privacy_loss_distribution.from_gaussian_mechanism(sigma, value_discretization_interval=interval, **kind)
        one = one.self_compose(steps)
        total = one if total is None else total.compose(one)
    return total.get_epsilon_for_delta(delta)


@pytest.mark.parametrize(("row", "expected"), list(zip(TABLE, ADD_REMOVE, strict=True)))
def test_table_of_published_settings(row, expected):
    sigma, q, steps, delta = row
    assert epsilon([(sigma, q, steps)], delta) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize(("row", "expected"), list(zip(TABLE, REPLACE_ONE, strict=True)))
def test_table_for_replaced_rows(row, expected):
    sigma, q, steps, delta = row
    assert epsilon([(sigma, q, steps)], delta, "replace_one") == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("neighboring", ["add_remove", "replace_one"])
@pytest.mark.parametrize("row", [(1.0, 0.5, 3, 1e-2), (8.0, 0.9, 200, 1e-5)])
def test_between_the_two_bounds_of_the_oracle(row, neighboring):
    sigma, q, steps, delta = row
    ours = epsilon([(sigma, q, steps)], delta, neighboring)
    low = oracle([(sigma, q, steps)], delta, neighboring, pessimistic=False, interval=1e-3)
    high = oracle([(sigma, q, steps)], delta, neighboring, interval=1e-3)
    assert low <= ours <= high + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("neighboring", ["add_remove", "replace_one"])
@pytest.mark.parametrize("row", TABLE)
def test_table_between_the_two_bounds_of_the_oracle(row, neighboring):
    sigma, q, steps, delta = row
    ours = epsilon([(sigma, q, steps)], delta, neighboring)
    low = oracle([(sigma, q, steps)], delta, neighboring, pessimistic=False)
    high = oracle([(sigma, q, steps)], delta, neighboring)
    assert low <= ours <= high + 0.002


def test_mixed_history_against_the_oracle():
    history = [(2.0, 0.1, 20), (1.5, 0.02, 50), (3.0, 1.0, 2)]
    ours = epsilon(history, 1e-5)
    low, high = (oracle(history, 1e-5, "add_remove", rounded_up, 1e-3) for rounded_up in (False, True))
    assert low <= ours <= high + 0.02


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.4, 10), st.floats(1e-3, 0.99), st.integers(1, 500), st.sampled_from([1e-3, 1e-5, 1e-7]), st.booleans()
)
def test_any_setting_against_the_oracle(sigma, q, steps, delta, replace):
    neighboring = "replace_one" if replace else "add_remove"
    ours = epsilon([(sigma, q, steps)], delta, neighboring)
    low = oracle([(sigma, q, steps)], delta, neighboring, pessimistic=False)
    assert low - 1e-9 <= ours <= oracle([(sigma, q, steps)], delta, neighboring) * 1.001 + 0.02


@pytest.mark.parametrize("row", TABLE[2:3])
def test_never_above_the_accountants_of_opacus(row):
    from opacus.accountants import PRVAccountant, RDPAccountant

    sigma, q, steps, delta = row
    for accountant in (PRVAccountant(), RDPAccountant()):
        accountant.history = [(sigma, q, steps)]
        assert epsilon([(sigma, q, steps)], delta) <= accountant.get_epsilon(delta) + 1e-6


def gaussian_delta(mu, eps):
    return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.3, 50), st.integers(1, 100), st.sampled_from([1e-2, 1e-5, 1e-9]), st.booleans())
def test_full_batches_are_exactly_gaussian(sigma, steps, delta, replace):
    eps = epsilon([(sigma, 1.0, steps)], delta, "replace_one" if replace else "add_remove")
    mu = (2 if replace else 1) * math.sqrt(steps) / sigma
    if eps > 0:
        assert gaussian_delta(mu, eps) <= delta * (1 + 1e-6)
        assert gaussian_delta(mu, eps - 1e-6) >= delta * (1 - 1e-3)
    else:
        assert gaussian_delta(mu, 0.0) <= delta


def test_known_gaussian_values():
    assert epsilon([(1.0, 1.0, 10)]) == pytest.approx(17.8566, abs=1e-3)
    assert spent([(1.0, 1.0, 10)], 1e-5, "add_remove").accountant == "exact Gaussian"


@pytest.mark.parametrize("neighboring", ["add_remove", "replace_one"])
def test_the_grid_meets_the_exact_gaussian(neighboring):
    """A rate of one written as two entries that the exact path cannot take must cost the same."""
    almost = epsilon([(5.0, 1.0, 9), (5.0, 1 - 1e-9, 1)], 1e-5, neighboring)
    exact = epsilon([(5.0, 1.0, 10)], 1e-5, neighboring)
    assert exact - 1e-6 <= almost <= exact + 0.005


def test_edges():
    assert epsilon([]) == 0.0
    assert epsilon([(1.0, 0.1, 0)]) == 0.0
    assert epsilon([(0.0, 0.1, 1)]) == math.inf
    assert epsilon([(0.0, 0.1, 0), (1.0, 1.0, 0)]) == 0.0
    assert epsilon([(1e4, 1e-3, 1)], 1e-3) == 0.0
    assert math.isfinite(epsilon([(0.02, 0.01, 5)]))
    assert epsilon([(1.0, 0.1, 3)], neighboring="replace_one") > epsilon([(1.0, 0.1, 3)])


def test_order_and_splitting_of_the_history_do_not_matter():
    assert epsilon([(1.0, 0.1, 3), (2.0, 0.1, 4), (1.0, 0.1, 2)]) == epsilon([(2.0, 0.1, 4), (1.0, 0.1, 5)])


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise():
    values = [epsilon([(1.0, 0.05, steps)]) for steps in (1, 10, 100, 1000)]
    assert values == sorted(values) and values[0] < values[-1]
    assert epsilon([(1.0, 0.02, 100)]) < epsilon([(1.0, 0.2, 100)])
    assert epsilon([(2.0, 0.05, 100)]) < epsilon([(1.0, 0.05, 100)])


def test_too_long_for_the_grid_falls_back_and_stays_an_upper_bound():
    """Ten million steps at a tiny delta would drown in the rounding of the transforms."""
    answer = spent([(50.0, 0.01, 10**7)], 1e-9, "add_remove")
    assert answer.accountant == "Rényi" and epsilon([(50.0, 0.01, 10**6)], 1e-7) < answer.epsilon < 20


def test_tiny_noise_falls_back_to_renyi_and_stays_an_upper_bound():
    answer = spent([(0.05, 0.01, 2)], 1e-5, "add_remove")
    assert answer.accountant == "Rényi"
    assert answer.epsilon >= epsilon([(0.1, 0.01, 2)])
    assert spent([(0.05, 0.01, 2)], 1e-5, "replace_one").epsilon > answer.epsilon


@pytest.mark.parametrize("neighboring", ["add_remove", "replace_one"])
def test_the_renyi_fallback_is_above_the_grid(neighboring):
    from aidefend.privacy.accounting import _renyi

    for sigma, q, steps, delta in TABLE[2:3]:
        mechanism = (Mechanism(sigma, q, steps),)
        assert _renyi(mechanism, delta, neighboring) >= epsilon([(sigma, q, steps)], delta, neighboring)


def hockey_stick(sigma, mixture_p, mixture_q, eps):
    """By quadrature: the integral of (p - e^eps q)+."""
    x = np.linspace(-9 * sigma - 1, 9 * sigma + 1, 20_001)
    p = sum(w * norm.pdf(x, m, sigma) for w, m in mixture_p)
    q = sum(w * norm.pdf(x, m, sigma) for w, m in mixture_q)
    return float(np.maximum(p - math.exp(eps) * q, 0).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("direction", ["remove", "add", "replace"])
@pytest.mark.parametrize(("sigma", "q"), [(0.7, 0.3), (2.0, 0.05), (1.0, 1.0)])
def test_the_grid_keeps_every_hockey_stick_divergence(direction, sigma, q):
    mechanism, spacing = Mechanism(sigma, q, 1), 0.01
    masses = _discretise(mechanism, direction, 1e-12, spacing)
    losses = spacing * (masses.first + np.arange(len(masses.values)))
    for eps in (-0.2, 0.0, 0.1, 0.5, 1.0):
        ours = float(masses.values @ np.maximum(1 - np.exp(eps - losses), 0)) + masses.infinite
        assert ours == pytest.approx(hockey_stick(sigma, *_pair(mechanism, direction), eps), abs=1e-6)


@pytest.mark.parametrize("direction", ["remove", "add", "replace"])
def test_thresholds_invert_the_privacy_loss(direction):
    sigma, q = 1.3, 0.2
    losses = np.linspace(-0.15, 0.2, 8)
    x = _thresholds(Mechanism(sigma, q, 1), direction, losses)
    p, other = _pair(Mechanism(sigma, q, 1), direction)
    density = [sum(w * norm.pdf(x, m, sigma) for w, m in mixture) for mixture in (p, other)]
    np.testing.assert_allclose(np.log(density[0] / density[1]), losses, atol=1e-9)


@settings(max_examples=8, deadline=None)
@given(st.floats(0.5, 3), st.floats(0.05, 1), st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 2))
def test_opposite_extremes_are_the_worst_replacement(sigma, q, old, new, eps):
    """Exchanging a row with contribution `old` for one with `new` costs no more than +1 for -1."""
    anything = hockey_stick(sigma, [(1 - q, 0.0), (q, old)], [(1 - q, 0.0), (q, new)], eps)
    worst = hockey_stick(sigma, [(1 - q, 0.0), (q, 1.0)], [(1 - q, 0.0), (q, -1.0)], eps)
    assert anything <= worst + 1e-6


def test_masses_of_far_tails_keep_their_digits():
    x = np.array([8.0, 8.5, 9.0])
    for side in (1, -1):
        masses = _interval_masses([(1.0, 0.0)], 1.0, side * x if side == 1 else -x[::-1])
        expected = [norm.sf(8.0) - norm.sf(8.5), norm.sf(8.5) - norm.sf(9.0)]
        np.testing.assert_allclose(masses, expected if side == 1 else expected[::-1], rtol=1e-9)


def test_a_grid_without_its_upward_rounding_would_be_caught(monkeypatch):
    """Planted: rounding losses down gives an epsilon below the oracle's optimistic bound."""
    from aidefend.privacy import privacy_loss

    honest = privacy_loss._discretise

    def optimistic(*arguments):
        masses = honest(*arguments)
        return masses._replace(first=masses.first - 1)

    sigma, q, steps, delta = TABLE[2]
    low = oracle([(sigma, q, steps)], delta, "add_remove", pessimistic=False, interval=1e-3)
    monkeypatch.setattr(privacy_loss, "_discretise", optimistic)
    planted = max(composed_epsilon([Mechanism(sigma, q, steps)], side, delta) for side in ("remove", "add"))
    assert planted < low - 1e-3


@pytest.mark.parametrize(
    ("target", "delta", "q", "steps", "neighboring"),
    [
        (3.0, 1e-5, 256 / 6000, 600, "add_remove"),
        (1.2, 1e-5, 0.05, 300, "replace_one"),
        (3.0, 1e-5, 1.0, 50, "add_remove"),
    ],
)
def test_the_solved_noise_is_the_least_that_serves(target, delta, q, steps, neighboring):
    noise = calibrate_noise(target, delta, q, steps, neighboring)
    assert epsilon([(noise, q, steps)], delta, neighboring) <= target
    assert epsilon([(noise - 2e-4, q, steps)], delta, neighboring) > target


def test_published_noise_levels():
    assert calibrate_noise(3.0, 1e-5, 1.0, 50, "add_remove") == pytest.approx(9.83, abs=0.01)
    assert calibrate_noise(1.0, 1e-5, 1.0, 50, "add_remove") == pytest.approx(26.4, abs=0.05)


@pytest.mark.parametrize(
    "arguments",
    [
        ([(1.0, 0.1)],),
        ([(-1.0, 0.1, 3)],),
        ([(1.0, 0.0, 3)],),
        ([(1.0, 1.1, 3)],),
        ([(1.0, 0.1, 2.5)],),
        ([(math.nan, 0.1, 3)],),
        (["abc"],),
        ([(1.0, 0.1, 3)], 0.0),
        ([(1.0, 0.1, 3)], 1.0),
        ([(1.0, 0.1, 3)], 1e-5, "clt"),
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(ConfigurationError, match="Expected"):
        epsilon(*arguments)


def test_an_unreachable_target_is_named():
    with pytest.raises(ConfigurationError, match="target_epsilon"):
        calibrate_noise(1e-9, 1e-9, 1.0, 10**6, "add_remove")


@pytest.mark.parametrize("neighboring", ["add_remove", "replace_one"])
@pytest.mark.parametrize(
    ("target", "noise", "rate", "delta"),
    [
        (2.0, 1.1, 0.01, 1e-5),
        (0.5, 4.0, 1.0, 1e-5),
        (8.0, 0.7, 0.2, 1e-3),
        (0.01, 1.0, 0.5, 1e-6),
        (1.0, 0.05, 0.1, 1e-5),
    ],
)
def test_one_step_more_than_fits_exceeds_the_target(target, noise, rate, delta, neighboring):
    steps = max_steps_within(target, noise, rate, delta, neighboring)
    assert steps == 0 or epsilon([(noise, rate, steps)], delta, neighboring) <= target
    assert epsilon([(noise, rate, steps + 1)], delta, neighboring) > target


def test_steps_without_end_are_counted_to_a_limit():
    assert max_steps_within(1.0, 1e6, 1e-3) == 10**8
    for bad in ({"target_epsilon": 0.0}, {"noise_multiplier": 0.0}, {"sample_rate": 1.5}, {"delta": 1.0}):
        with pytest.raises(ConfigurationError, match=next(iter(bad))):
            max_steps_within(**{"target_epsilon": 1.0, "noise_multiplier": 1.0, "sample_rate": 0.1, **bad})
    with pytest.raises(ConfigurationError, match="steps"):
        calibrate_noise(1.0, 1e-5, 0.1, 0)


@pytest.mark.parametrize("row", TABLE)
def test_what_is_reported_is_the_smallest_of_the_valid_answers(row):
    """The privacy loss distribution, wherever its grid fits, is below Rényi's answer; full batches are exact."""
    from aidefend.privacy.accounting import _exact_gaussian, _renyi

    sigma, q, steps, delta = row
    for neighboring in ("add_remove", "replace_one"):
        found = spent([(sigma, q, steps)], delta, neighboring)
        assert found.epsilon <= _renyi((Mechanism(sigma, q, steps),), delta, neighboring)
        whole = (Mechanism(sigma, 1.0, 3),)
        exact = _exact_gaussian(whole, delta, neighboring)
        assert spent([(sigma, 1.0, 3)], delta, neighboring) == (exact, "exact Gaussian")
        assert exact <= _renyi(whole, delta, neighboring)
