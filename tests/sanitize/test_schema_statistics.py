"""The tests behind a schema against independent references, and limits that clean data seldom cross."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from aidefend.sanitize.schema.drift_tests import beyond_extremes, chi_square, holm, kolmogorov_smirnov, rates
from aidefend.sanitize.schema.ranges import far_limits, fences


def test_kolmogorov_smirnov_against_a_naive_twin():
    stream = np.random.default_rng(0)
    for n, m in ((30, 40), (300, 200), (3000, 2500)):
        a, b = stream.normal(size=n).round(1), stream.normal(0.2, 1, m).round(1)
        points = np.concatenate([a, b])
        naive = max(abs((a <= point).mean() - (b <= point).mean()) for point in points)
        distance, p_value = kolmogorov_smirnov(a, b)
        assert distance == pytest.approx(naive) and 0 < p_value <= 1
    assert kolmogorov_smirnov(a, b[:5]) is None


def test_chi_square_against_scipy_where_nothing_is_pooled():
    one, two = {"a": 50, "b": 70, "c": 30}, {"a": 40, "b": 20, "c": 45}
    table = [[50, 70, 30], [40, 20, 45]]
    assert chi_square(one, two)[1] == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue)


def test_chi_square_pools_rare_values_and_says_where_nothing_is_left():
    rare = {f"r{i}": 1 for i in range(30)}
    assert chi_square({"a": 500, "b": 500, **rare}, {"a": 250, "b": 250, "r1": 1})[1] > 0.001
    assert chi_square({"a": 100}, {"a": 50}) is None
    assert chi_square({f"u{i}": 1 for i in range(100)}, {f"v{i}": 1 for i in range(20)}) is None
    assert chi_square({"a": 100}, {"b": 100})[1] < 1e-20


def test_the_level_of_each_test_by_simulation():
    """At 0.05 with 1,500 trials: more than 100 rejections have probability below 0.001 for a valid test."""
    stream, rejected = np.random.default_rng(1), {"ks": 0, "chi": 0, "extremes": 0, "rates": 0}
    for _ in range(1500):
        a, b = stream.exponential(size=200), stream.exponential(size=90)
        drawn = [stream.multinomial(n, [0.4, 0.3, 0.2, 0.06, 0.03, 0.01]) for n in (300, 90)]
        counts = [dict(zip("abcdef", part, strict=True)) for part in drawn]
        outside = int(((b < a.min()) | (b > a.max())).sum())
        rejected["ks"] += kolmogorov_smirnov(a, b)[1] <= 0.05
        rejected["chi"] += chi_square(*counts)[1] <= 0.05
        rejected["extremes"] += beyond_extremes(outside, 90, 200) <= 0.05
        rejected["rates"] += rates(int((a > 2).sum()), 200, int((b > 2).sum()), 90) <= 0.05
    assert max(rejected.values()) <= 100 and min(rejected.values()) >= 5


def test_exceedances_against_a_simulated_share():
    """P(at least 3 of 50 new values outside the range of 40 old ones), to 4 standard errors of 20,000 trials."""
    stream = np.random.default_rng(2)
    values = stream.random((20_000, 90))
    low, high = values[:, :40].min(axis=1)[:, None], values[:, :40].max(axis=1)[:, None]
    share = float((((values[:, 40:] < low) | (values[:, 40:] > high)).sum(axis=1) >= 3).mean())
    assert beyond_extremes(3, 50, 40) == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)
    assert beyond_extremes(0, 50, 40) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_against_a_naive_twin(p_values):
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.2):
        left, rejected = list(range(len(p_values))), set()
        while left:
            best = min(left, key=lambda i: p_values[i])
            if p_values[best] * len(left) > level:
                break
            rejected |= {best}
            left.remove(best)
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected


LAWS = {
    "normal": lambda stream, n: stream.normal(size=n),
    "uniform": lambda stream, n: stream.random(n),
    "exponential": lambda stream, n: stream.exponential(size=n),
    "lognormal": lambda stream, n: stream.lognormal(size=n),
    "t with 3 degrees": lambda stream, n: stream.standard_t(3, n),
    "Cauchy": lambda stream, n: stream.standard_cauchy(n),
    "ages": lambda stream, n: stream.integers(18, 91, n).astype(float),
    "counts": lambda stream, n: stream.poisson(3, n).astype(float),
    "rare counts": lambda stream, n: stream.poisson(0.02, n).astype(float),
    "geometric": lambda stream, n: stream.geometric(0.3, n).astype(float),
    "flags": lambda stream, n: (stream.random(n) < 0.02).astype(float),
    "mostly zero": lambda stream, n: np.where(stream.random(n) < 0.9, 0.0, stream.exponential(size=n)),
}


def limits_of(values):
    whole = bool((values == values.round()).all())
    return far_limits(values, values.min(), values.max(), len(values), whole=whole)


@pytest.mark.parametrize("law", LAWS)
def test_clean_values_seldom_cross_the_limits_and_wild_ones_do(law):
    """A crossing in 1 of 100 checks at most: 8 or more of 200 have probability below 0.002."""
    stream, crossed = np.random.default_rng(7), 0
    for _ in range(200):
        values, new = LAWS[law](stream, 1000), LAWS[law](stream, 1000)
        low, high = limits_of(values)
        assert low <= values.min() and values.max() <= high
        crossed += bool(((new < low) | (new > high)).any())
        heavy = law in ("Cauchy", "lognormal", "t with 3 degrees")
        assert high < (1e15 if heavy else values.max() + 1e6)
    assert crossed <= 7


def test_limits_are_near_where_the_law_ends():
    stream = np.random.default_rng(3)
    low, high = limits_of(stream.random(2000))
    assert -0.25 < low < 0 and 1 < high < 1.25
    low, high = limits_of(stream.integers(18, 91, 2000).astype(float))
    assert low > 0 and high < 115
    assert limits_of(stream.poisson(3, 2000).astype(float)).low == 0.0
    assert limits_of(np.full(400, 5.0)) == (5.0, 5.0)
    assert limits_of(np.full(40, 5.0)).high > 5


def test_fences_are_tukeys():
    assert fences(np.arange(101.0)) == (25 - 150, 75 + 150)
    assert fences(np.zeros(100)) is None and fences(np.arange(5.0)) is None
