"""p-values of every score, the poisoned share with its interval, the smallest group of each route: they hold."""

import numpy as np
import pytest
import torch
from scipy import stats

from aidefend.sanitize import screen
from aidefend.sanitize.calibration import ENOUGH, calibrated, references
from aidefend.sanitize.decide import POWER, smallest_detectable, smallest_kin
from aidefend.sanitize.written import smallest_written
from tests.worlds import poisoned_clusters

LEVELS = (0.01, 0.05, 0.2, 0.5)


def heavy(n, seed, classes=2, trusted=0):
    """Scores with heavy tails, of another scale in each class; the first rows are trusted."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=stream)
    scores = (torch.randn(n, generator=stream).exp() ** 2).double() * (1 + 5 * labels)
    good = torch.arange(n) < trusted
    return scores, labels, torch.ones(n, dtype=torch.bool), good


def too_often(p_values, level):
    """Whether the share of p-values at most `level` is significantly above it: what a planted violation shows."""
    n = len(p_values)
    return float(stats.binom.sf(int((p_values <= level).sum()) - 1, n, level)) < 1e-3


def normal_tails(scores):
    """What one must not do: robust deviations, as if scores were normal."""
    spread = 1.4826 * (scores - scores.median()).abs().median()
    return torch.from_numpy(stats.norm.sf((scores - scores.median()) / spread))


@pytest.mark.parametrize("trusted", [30, 400])
def test_with_trusted_rows_p_values_of_honest_rows_are_uniform(trusted):
    """Over draws of the data, one honest row each: reference pooled (30) and of the class (400)."""
    drawn = []
    for seed in range(400):
        scores, labels, usable, good = heavy(trusted + 5, seed, trusted=trusted)
        drawn.append(float(calibrated(scores, labels, usable, good)[-1]))
    p_values = torch.tensor(drawn)
    assert not any(too_often(p_values, level) for level in LEVELS)
    assert stats.kstest(p_values.numpy(), "uniform").statistic < 0.1


def test_the_check_of_uniformity_catches_a_planted_violation():
    scores, *_ = heavy(4000, 0, classes=1)
    assert too_often(normal_tails(scores), 0.01)
    drawn = [heavy(31, seed, classes=1)[0] for seed in range(400)]
    broken = torch.tensor([float((scores[:30] >= scores[30]).double().mean()) for scores in drawn])
    assert too_often(broken, 0.01)  # without the 1 in numerator and denominator


def test_against_their_own_class_small_p_values_are_as_rare_as_they_say_whatever_the_data():
    scores, labels, usable, good = heavy(997, 3, classes=3)
    scores[::7] = scores[1]  # ties
    p_values = calibrated(scores, labels, usable, good)
    for label in range(3):
        mine = p_values[labels == label]
        assert all(float((mine <= level).double().mean()) <= level for level in LEVELS)
        ranks = torch.tensor([float((scores[labels == label] >= s).double().mean()) for s in scores[labels == label]])
        torch.testing.assert_close(mine, ranks.double(), rtol=1e-6, atol=1e-9)  # the naive twin


def test_planted_rows_stand_out_against_trusted_ones_and_no_opinion_stays_none():
    scores, labels, usable, good = heavy(600, 5, classes=1, trusted=200)
    scores[500:550], scores[599] = 1e6, torch.nan
    p_values = calibrated(scores, labels, usable, good)
    assert bool((p_values[500:550] == 1 / 201).all()) and bool(p_values[599].isnan())
    assert too_often(p_values[200:599], 0.01)  # the data are not what trusted rows are like
    own = calibrated(scores, labels, usable, torch.zeros_like(good))
    assert float((own[~own.isnan()] <= 0.01).double().mean()) <= 0.01  # ranks cannot say so


def test_the_reference_is_the_class_where_it_is_trusted_enough():
    labels, usable = torch.tensor([0] * 50 + [1] * 50 + [2] * 50), torch.ones(150, dtype=torch.bool)
    good = torch.zeros(150, dtype=torch.bool)
    assert set(references(labels, usable, good).values()) == {"own class"}
    good[:ENOUGH] = True
    kinds = references(labels, usable, good)
    assert kinds == {0: "trusted rows of the class", 1: "trusted rows", 2: "trusted rows"}


@pytest.fixture(scope="module")
def clean():
    world = poisoned_clusters(poison=0, per_class=60, seed=4)
    return screen((world.x, world.y), seed=0, trusted=range(100)), world


def test_every_score_of_a_screen_has_p_values_that_hold_on_clean_data(clean):
    report, world = clean
    assert set(report.p_values) == set(report.scores)
    assert set(report.parameters["p_values"]["reference"].values()) <= {"trusted rows of the class", "trusted rows"}
    rest = torch.arange(len(world.y)) >= 100
    for name, values in report.p_values.items():
        known = values[rest & ~values.isnan()]
        assert bool((known > 0).all()) and bool((known <= 1).all()), name
        # trusted and other rows are drawn alike; the tail of a beta-binomial allows for the finite reference
        share = float((known <= 0.05).double().mean())
        assert share <= float(stats.betabinom.isf(1e-4, len(known), 1, 19)) / len(known), name


@pytest.mark.parametrize(("poison", "seed"), [(30, 0), (60, 1), (90, 2)])
def test_the_interval_covers_the_planted_share(poison, seed):
    world = poisoned_clusters(poison=poison, per_class=100, seed=seed)
    share = screen((world.x, world.y), detectors=[], seed=0).parameters["poisoned_share"]
    planted = float(world.is_poison.double().mean())
    assert share["low"] <= planted <= share["high"] and share["high"] - share["low"] < 0.15
    assert not share["low"] <= 2 * planted <= share["high"]  # an interval that covers everything would say nothing


def test_the_written_size_has_the_power_that_it_states():
    n, rest, alpha, tests = 300, 0.1, 0.005, 2000
    size = smallest_written(n, rest, alpha, tests)
    stream = np.random.default_rng(0)

    def power(size):
        others = round(rest * (n - size))
        ours = stream.binomial(size, 0.9, 4000)
        return float((stats.hypergeom.sf(ours - 1, n, ours + others, size) * tests <= alpha).mean())

    assert power(size) >= POWER - 0.03 and power(size - 1) < POWER + 0.03


def test_each_route_states_its_size_and_what_it_assumes():
    world = poisoned_clusters()
    report = screen((world.x, world.y), detectors=[], seed=0)
    routes = report.parameters["detectable_by_route"]
    assert list(routes) == ["pattern", "proven in another class", "written"]
    assert all(route["power"] == POWER and route["assumes"] for route in routes.values())
    n, levels = report.parameters["classes_searched"]["1"], report.parameters["levels"]
    kin, whole = routes["proven in another class"]["classes"]["1"]["rows"], routes["pattern"]["classes"]["1"]["rows"]
    assert kin == smallest_kin(n, levels["proven_in_another_class"]) and 0 < kin < n / 2
    assert whole == smallest_detectable(n, levels["foreign_and_gap"], levels["others"]) and 0 < whole < n / 2
    assert smallest_kin(12, levels["foreign_and_gap"]) is None
    assert f"No evidence there of at least {kin} rows (proven in another class), at power 0.8" in report.limits
    assert "clean. Not" in report.limits and "no evidence" in report.limits
