"""The empirical epsilon: mechanisms with a known one are never refuted, broken ones are."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from aidefend._core.errors import AidefendError, ConfigurationError
from aidefend._core.evidence import Severity
from aidefend._core.stats import clopper_pearson
from aidefend.audit import audit_privacy, epsilon_lower_bound

DATA = (torch.zeros(6, 1), torch.zeros(6, dtype=torch.int64))
CANARY = (torch.ones(1), torch.tensor(0))


def gaussian_sum(deviation, clip=1.0):
    """The Gaussian mechanism on a clipped sum: epsilon is known (Balle, Wang 2018)."""

    def train_fn(dataset, seed):
        total = sum(float(dataset[i][0].clamp(-clip, clip).sum()) for i in range(len(dataset)))
        value = total + deviation * float(np.random.Generator(np.random.Philox(seed)).normal())
        return lambda x: torch.full((len(x), 2), value)

    return train_fn


def released(model):
    return float(model(torch.zeros(1, 1))[0, 0])


def true_epsilon(deviation, delta):
    """Smallest epsilon of the Gaussian mechanism with sensitivity 1, by bisection on its closed form."""
    low, high = 0.0, 100.0
    normal = scipy_stats.norm.cdf
    for _ in range(100):
        eps = (low + high) / 2
        spent = normal(0.5 / deviation - eps * deviation) - math.exp(eps) * normal(-0.5 / deviation - eps * deviation)
        low, high = (eps, high) if spent > delta else (low, eps)
    return high


@pytest.mark.parametrize("deviation", [1.0, 3.0])
@pytest.mark.parametrize("threshold", [0.5, None])
def test_a_true_claim_is_not_refuted(deviation, threshold):
    claim = true_epsilon(deviation, 1e-5)
    evidence = audit_privacy(
        train=DATA,
        train_fn=gaussian_sum(deviation),
        claimed_epsilon=claim,
        canary=CANARY,
        statistic=released,
        threshold=threshold,
        runs=120,
    )
    excess = evidence["privacy.epsilon_excess"]
    assert excess.value <= 0 and excess.severity is Severity.INFO
    assert evidence["privacy.epsilon_lower_bound"].value <= claim
    assert evidence["privacy.epsilon_lower_bound"].deterministic


@pytest.mark.parametrize(
    ("name", "broken"),
    [("an eighth of the noise", gaussian_sum(3.0 / 8)), ("no clipping", gaussian_sum(3.0, clip=math.inf))],
)
def test_planted_a_broken_mechanism_is_caught(name, broken):
    canary = (torch.full((1,), 20.0), torch.tensor(0))
    claim = true_epsilon(3.0, 1e-5)
    evidence = audit_privacy(
        train=DATA, train_fn=broken, claimed_epsilon=claim, canary=canary, statistic=released, runs=200
    )
    excess = evidence["privacy.epsilon_excess"]
    assert excess.value > 0 and excess.severity is Severity.CRITICAL and "refuted" in excess.title
    assert evidence["privacy.epsilon_lower_bound"].value <= excess.setting["largest_demonstrable"]


def test_planted_a_scale_that_depends_on_the_size_of_the_data_is_caught():
    """The published defect: noise divided by the number of samples. A neighbour of another size tells them apart."""

    def sized(dataset, seed):
        stream = np.random.Generator(np.random.Philox(seed))
        values = stream.normal(size=400) * 4 / len(dataset)
        return lambda x: torch.full((len(x), 2), float(values.std()))

    neighbour = (torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64))
    evidence = audit_privacy(
        train=DATA, train_fn=sized, claimed_epsilon=0.94, neighbour=neighbour, statistic=released, runs=150
    )
    assert evidence["privacy.epsilon_excess"].severity is Severity.CRITICAL


@given(st.integers(0, 100), st.integers(0, 100), st.sampled_from([0.0, 1e-5, 0.05]))
def test_the_bound_equals_its_definition(hits, alarms, delta):
    with_sample = (torch.arange(100) < hits).double()
    without_sample = (torch.arange(100) < alarms).double()
    bound = epsilon_lower_bound(with_sample, without_sample, 0.5, delta=delta)
    power, alarm = clopper_pearson(hits, 100).low, clopper_pearson(alarms, 100).high
    candidates = [0.0]
    if power - delta > 0:
        candidates.append(math.log((power - delta) / alarm))
    if 1 - alarm - delta > 0:
        candidates.append(math.log((1 - alarm - delta) / (1 - power)))
    assert bound.epsilon == pytest.approx(max(candidates), abs=1e-12)
    assert (bound.true_positives, bound.false_positives, bound.n) == (hits, alarms, 100)


def test_the_level_of_the_bound_holds_for_randomised_response():
    """Tight pair at epsilon 1. 600 audits at 95 %: 30 violations expected at most, deviation 5.3; 52 is 4 of them."""
    stream = np.random.Generator(np.random.Philox(0))
    honest = math.e / (1 + math.e)
    violations = 0
    for _ in range(600):
        yes, no = (torch.from_numpy(stream.random(150) < share).double() for share in (honest, 1 - honest))
        violations += epsilon_lower_bound(yes, no, 0.5, delta=0.0).epsilon > 1.0
    assert violations <= 52


def test_the_threshold_comes_from_runs_that_are_not_counted():
    """Runs of the first half tell the data sets apart, those of the second half do not: nothing may be shown."""
    numbers = {"with": 0, "without": 0}

    def fading(dataset, seed):
        side = "with" if len(dataset) == 7 else "without"
        numbers[side] += 1
        value = float(side == "with") if numbers[side] <= 50 else float(numbers[side] % 2)
        return lambda x: torch.full((len(x), 2), value)

    evidence = audit_privacy(train=DATA, train_fn=fading, canary=CANARY, statistic=released, runs=100)
    assert evidence["privacy.epsilon_lower_bound"].setting["threshold"] == 0.5
    assert evidence["privacy.epsilon_lower_bound"].value == 0.0


def test_secure_noise_is_marked_and_stays_out_of_the_digest():
    calls = iter(range(10_000))

    def unrepeatable(dataset, seed):
        value = float(next(calls))
        return lambda x: torch.full((len(x), 2), value)

    evidence = audit_privacy(train=DATA, train_fn=unrepeatable, canary=CANARY, statistic=released, runs=4)
    assert not evidence["privacy.epsilon_lower_bound"].deterministic


def test_the_default_canary_is_a_mislabelled_copy_and_its_loss_is_the_statistic():
    seen = []

    def train_fn(dataset, seed):
        seen.append([(dataset[i][0].tolist(), int(dataset[i][1])) for i in range(len(dataset))])
        ones = float(sum(label for _, label in seen[-1]))
        return lambda x: torch.stack([torch.zeros(len(x)), torch.full((len(x),), 9 * ones)], dim=1)

    evidence = audit_privacy(train=DATA, train_fn=train_fn, runs=40)
    assert sorted({len(data) for data in seen}) == [6, 7] and seen[-2][-1] == ([0.0], 1)
    assert evidence["privacy.epsilon_lower_bound"].value > 1.5 and "privacy.epsilon_excess" not in evidence


def test_bad_input_is_refused():
    for arguments, error, match in [
        ({"runs": 3}, ConfigurationError, "runs"),
        ({"claimed_epsilon": -1.0}, ConfigurationError, "claimed_epsilon"),
        ({"delta": 1.0}, ConfigurationError, "delta"),
        ({"neighbour": DATA}, ConfigurationError, "statistic"),
        ({"statistic": lambda model: math.nan, "runs": 4}, AidefendError, "nan"),
    ]:
        with pytest.raises(error, match=match):
            audit_privacy(**{"train": DATA, "train_fn": gaussian_sum(1.0), "runs": 8, **arguments})
