"""Batches of a fixed size: the accounting for exchanged rows, the sampler, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from aidefend import ConfigurationError, PrivacyError
from aidefend._core.stats import clopper_pearson
from aidefend.privacy import PrivacyLedger, epsilon
from aidefend.privacy.accounting import spent
from tests.privacy.private_worlds import private_run, rows, settings

FIXED = {"sampling": "fixed_size", "neighboring": "replace_one"}


def exact_delta(sigma, rate, eps):
    """One step: the mixture (1 - q) N(0) + q N(2) against N(0), by its threshold (Zhu, Dong, Wang 2022)."""
    where = sigma**2 / 2 * math.log((math.exp(eps) - (1 - rate)) / rate) + 1  # there the loss is eps
    mixture = (1 - rate) * norm.sf(where / sigma) + rate * norm.sf((where - 2) / sigma)
    return mixture - math.exp(eps) * norm.sf(where / sigma)


@pytest.mark.parametrize("delta", [1e-2, 1e-5])
@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.1), (2.0, 0.25), (4.0, 0.9), (3.0, 1.0)])
def test_one_step_is_the_closed_form(sigma, rate, delta):
    found = epsilon([(sigma, rate, 1, "fixed_size")], delta, "replace_one")
    assert exact_delta(sigma, rate, found) <= delta * (1 + 1e-6)
    assert found == 0 or exact_delta(sigma, rate, found - 0.01) > delta


def oracle(sigma, rate, steps, delta):
    """dp-accounting's Renyi accountant of sampling without replacement (Wang, Balle, Kasiviswanathan 2019)."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import dp_accounting
        from dp_accounting import dp_event, privacy_accountant, rdp
    relation = privacy_accountant.NeighboringRelation.REPLACE_ONE
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    one = dp_event.SampledWithoutReplacementDpEvent(
        10_000, int(rate * 10_000), dp_accounting.GaussianDpEvent(sigma / 2)
    )
    accountant.compose(dp_accounting.SelfComposedDpEvent(one, steps))
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize("row", [(2.2, 0.01, 1000), (4.0, 0.1, 100), (8.0, 0.5, 50), (2.0, 0.25, 1)])
def test_between_no_sampling_at_all_and_the_accountants_before(row):
    sigma, _, steps = row
    found = spent([(*row, "fixed_size")], 1e-5, "replace_one")
    assert found.accountant == "privacy loss distribution"
    assert found.epsilon < oracle(*row, 1e-5)
    assert found.epsilon < epsilon([(sigma, 1.0, steps)], 1e-5, "replace_one")
    assert found.epsilon > epsilon([row], 1e-5, "replace_one")  # Poisson batches hide more


def test_the_other_rows_make_it_tight():
    """An adversary who knows all other rows at -C: batch sums -B against -B + 2, which Poisson accounting denies."""
    sigma, rate, draws, eps = 1.0, 0.25, 200_000, 1.5
    stream = np.random.default_rng(0)
    where = sigma**2 / 2 * math.log((math.exp(eps) - (1 - rate)) / rate) + 1
    there = sigma * stream.standard_normal(draws) + 2 * (stream.random(draws) < rate)
    away = sigma * stream.standard_normal(draws)
    hits = clopper_pearson(int((there > where).sum()), draws, 0.98).low
    false = clopper_pearson(int((away > where).sum()), draws, 0.98).high
    shown = hits - math.exp(eps) * false  # a delta at eps that is really there
    assert 0 < shown <= exact_delta(sigma, rate, eps)
    assert epsilon([(sigma, rate, 1, "fixed_size")], shown, "replace_one") >= eps
    assert epsilon([(sigma, rate, 1)], shown, "replace_one") < eps  # planted: the sampler's name left out


def test_full_batches_and_mixed_histories():
    whole = [(2.0, 1.0, 3, "fixed_size")]
    assert epsilon(whole, 1e-5, "replace_one") == epsilon([(2.0, 1.0, 3)], 1e-5, "replace_one")
    parts = [(2.0, 0.1, 30), (3.0, 0.2, 20, "fixed_size")]
    both = epsilon(parts, 1e-5, "replace_one")
    assert max(epsilon(parts[:1], 1e-5, "replace_one"), epsilon(parts[1:], 1e-5, "replace_one")) < both
    assert both < sum(epsilon([part], 5e-6, "replace_one") for part in parts)
    small = spent([(0.05, 0.2, 20, "fixed_size")], 1e-5, "replace_one")
    assert small.accountant == "Rényi" and small.epsilon >= epsilon([(0.05, 1.0, 20)], 1e-5, "replace_one")


def test_every_batch_is_a_uniform_subset_of_one_size():
    """60 runs of 4 steps: exact size, each row and each pair as often as it should be (binomial, 6 sigma)."""
    x = torch.arange(24.0).reshape(24, 1)
    draws = []
    for seed in range(60):
        private = private_run(nn.Linear(1, 3), (x, rows()[1]), settings(**FIXED, insecure_seed=seed))
        draws += [set(batch[:, 0].long().tolist()) for batch, _ in private.loader]
    assert all(len(draw) == 8 for draw in draws)
    counts = np.array([sum(row in draw for draw in draws) for row in range(24)])
    assert np.abs(counts - 240 / 3).max() < 6 * math.sqrt(240 * 2 / 9)
    pairs = np.array([sum({row, (row + 7) % 24} <= draw for draw in draws) for row in range(24)])
    chance = 8 * 7 / (24 * 23)
    assert np.abs(pairs - 240 * chance).max() < 6 * math.sqrt(240 * chance * (1 - chance))


def test_a_run_is_accounted_for_what_it_is(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger", delta=1e-3, neighboring="replace_one")
    config = settings(**FIXED, noise_multiplier=3.0)
    private = private_run(config=config, ledger=ledger)
    for x, y in private.loader:
        private.optimizer.zero_grad()
        private.loss(private.model(x), y).backward()
        private.optimizer.step()
    expected = epsilon([(3.0, 8 / 24, 4, "fixed_size")], 1e-3, "replace_one")
    assert private.epsilon() == ledger.epsilon() == expected
    assert "subset of 8 rows" in private.statement().to_markdown()
    solved = settings(**FIXED, noise_multiplier=None, target_epsilon=2.0)
    assert (
        solved.spent(4).epsilon
        <= 2.0
        < epsilon([(solved.multiplier - 2e-4, 8 / 24, 4, "fixed_size")], 1e-3, "replace_one")
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"neighboring": "add_remove"},
        {"expected_batch_size": 8.5},
        {"public_size": None, "sample_rate": 0.25},
        {"noise": "banded", "bands": 2},
        {"sampling": "shuffled"},
    ],
)
def test_what_does_not_fit_is_refused(changes):
    with pytest.raises(ConfigurationError, match="sampling"):
        settings(**{**FIXED, **changes})


def test_other_sizes_and_relations_are_refused(tmp_path):
    with pytest.raises(PrivacyError, match="public_size"):
        private_run(data=rows(23), config=settings(**FIXED))
    with pytest.raises(ConfigurationError, match="Poisson"):
        PrivacyLedger(tmp_path / "ledger").open_run(settings(**FIXED))
    with pytest.raises(ConfigurationError, match="Poisson"):
        epsilon([(1.0, 0.1, 1, "fixed_size")])
    with pytest.raises(ConfigurationError, match="sampler"):
        epsilon([(1.0, 0.1, 1, "shuffled")])
