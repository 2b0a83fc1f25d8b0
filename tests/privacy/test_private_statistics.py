"""Private preprocessing: how far one row moves it, what an observer can tell, what it costs, and that it is useful."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from aidefend import BudgetExceeded, ConfigurationError
from aidefend._core.stats import clopper_pearson
from aidefend.privacy import (
    DPStandardizer,
    PrivacyLedger,
    epsilon,
    private_histogram,
    private_mean,
    private_quantile,
    private_statistics,
)
from tests.privacy.private_worlds import separation

N = 40


def table(seed=0, columns=3):
    return torch.randn(N, columns, generator=torch.Generator().manual_seed(seed))


ROWS = {
    "usual": [0.3, -0.2, 1.0],
    "huge": [1e9, -1e9, 1e9],
    "infinite": [math.inf, -math.inf, 0.0],
    "not numbers": [math.nan] * 3,
    "at the bounds": [2.0, -2.0, 2.0],
}
QUIET = {"public_size": N, "noise_multiplier": 1.0}


@pytest.fixture
def frozen(monkeypatch):
    """Noise switched off: what is left is what noise must hide."""
    monkeypatch.setattr(
        private_statistics, "secure_normal", lambda shape, device, dtype: torch.zeros(shape, dtype=dtype)
    )


def released(x):
    """Everything that is released, in units of the noise's standard deviation at noise multiplier one."""
    mean = private_mean(x, -2.0, 2.0, **QUIET) / 2 * N / math.sqrt(x.shape[1])
    images = x.reshape(len(x), 3, 1, 1).expand(-1, -1, 2, 2)
    parts = [mean]
    for data in (x, images):
        fitted = DPStandardizer(-2.0, 2.0, **QUIET).fit(data)
        first = fitted.mean / 2
        second = (fitted.deviation / 2).square() + first.square()
        parts.append(torch.cat([first, second]) * N / math.sqrt(1.25 * 3))
    labels = x[:, 0].nan_to_num(9, 9, -9).clamp(-9, 9).abs().long()
    parts.append(private_histogram(labels, 4, noise_multiplier=1.0))
    return parts


@pytest.mark.parametrize("row", ROWS)
def test_one_row_moves_a_release_by_one_deviation_at_most(frozen, row):
    x = table()
    more = torch.cat([x, torch.tensor([ROWS[row]])])
    other = torch.cat([x[:-1], torch.tensor([ROWS[row]])])
    for before, after, exchanged in zip(released(x), released(more), released(other), strict=True):
        assert float((after - before).norm()) <= 1 + 1e-9
        assert float((exchanged - before).norm()) <= 2 + 1e-9
    if row == "at the bounds":
        assert float((released(more)[0] - released(x)[0]).norm()) == pytest.approx(1.0)


def test_planted_bounds_from_the_rows(frozen):
    """Clipping to the largest value that occurs lets one row move the mean as far as it likes."""
    x = table()
    more = torch.cat([x, torch.tensor([ROWS["huge"]])])

    def careless(data):
        return private_mean(data, float(data.min()), float(data.max()), **QUIET) / 2 * N

    assert float((careless(more) - careless(x)).norm()) > 100


def observed(with_row, runs=600):
    """The mean of zeros, with or without one row at the bound, along that row."""
    x = torch.zeros(N + 1 if with_row else N, 1)
    if with_row:
        x[-1] = 2.0
    found = [float(private_mean(x, -2.0, 2.0, **QUIET)[0]) / 2 * N for _ in range(runs)]
    return np.array(found)


def test_an_observer_can_tell_no_more_than_the_noise_multiplier_allows():
    assert 0.3 < separation(observed(True), observed(False)) <= 1.0


def test_planted_half_of_the_noise(monkeypatch):
    honest = private_statistics.secure_normal
    monkeypatch.setattr(private_statistics, "secure_normal", lambda *given: honest(*given) / 2)
    assert separation(observed(True), observed(False)) > 1.0


def quantiles(values, pure_epsilon, runs=3000):
    return np.array([private_quantile(values, 0.5, 0.0, 1.0, pure_epsilon=pure_epsilon) for _ in range(runs)])


def quantile_bound(pure_epsilon, told=None):
    """Epsilon from below (99 %): how often the answer falls above 0.5 with one large value more or less."""
    low, more = torch.tensor([0.5]), torch.tensor([0.5, 1.0])
    found, others = ((quantiles(x, told or pure_epsilon) > 0.5).sum() for x in (more, low))
    hits, false = clopper_pearson(int(found), 3000, 0.98), clopper_pearson(int(others), 3000, 0.98)
    return max(math.log(hits.low / false.high), math.log((1 - false.high) / (1 - hits.low)))


def test_a_quantile_tells_no_more_than_its_epsilon():
    assert quantile_bound(0.5) <= 0.5
    assert quantile_bound(2.0) <= 2.0


def test_planted_quantile_that_is_too_sharp():
    """A mechanism with eight times the exponent, under the name of the first."""
    assert quantile_bound(0.5, told=4.0) > 0.5


def test_quantile_draws_from_the_distribution_of_the_exponential_mechanism():
    """Two values in [0, 1]: three gaps with known weights; a chi-square of 3,000 draws."""
    values, told = torch.tensor([0.2, 0.7]), 1.5
    weights = np.array([0.2, 0.5, 0.3]) * np.exp(-told * np.array([1.0, 0.0, 1.0]))
    counts = np.histogram(quantiles(values, told), [0.0, 0.2, 0.7, 1.0])[0]
    expected = 3000 * weights / weights.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.6  # one in a million, two degrees of freedom
    assert np.all((quantiles(torch.zeros(0), 1.0, 5) >= 0) & (quantiles(torch.tensor([math.nan]), 1.0, 5) <= 1))


def test_they_are_close_to_what_they_estimate():
    stream = torch.Generator().manual_seed(3)
    x = torch.rand(20_000, 2, generator=stream) * 4 - 1
    made = {"public_size": 20_000, "noise_multiplier": 3.0}
    torch.testing.assert_close(private_mean(x, -2.0, 4.0, **made), x.double().mean(0), rtol=0, atol=0.01)
    scale = DPStandardizer(-2.0, 4.0, **made).fit(x)
    torch.testing.assert_close(scale(x).mean(0), torch.zeros(2), rtol=0, atol=0.02)
    torch.testing.assert_close(scale(x).std(0), torch.ones(2), rtol=0, atol=0.02)
    counts = private_histogram((x[:, 0] > 0).long(), 3, noise_multiplier=3.0)
    assert counts.tolist() == pytest.approx([5000, 15000, 0], abs=200)
    median = private_quantile(x[:, 0].double(), 0.25, -10.0, 10.0, pure_epsilon=0.5)
    assert median == pytest.approx(0.0, abs=0.05)


def test_images_have_one_pair_for_each_channel_and_it_travels():
    x = torch.rand(500, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    made = {"public_size": 500, "noise_multiplier": 1.0}
    scale = DPStandardizer(0.0, 1.0, **made).fit(x)
    assert scale.mean.shape == (3,) and scale(x).shape == x.shape and scale(x).dtype == x.dtype
    again = DPStandardizer(0.0, 1.0, **made)
    with pytest.raises(ConfigurationError, match="fit"):
        again(x)
    again.load_state_dict(scale.state_dict())
    assert torch.equal(again(x), scale(x))
    constant = DPStandardizer(0.0, 1.0, **made).fit(torch.full((500, 2), 0.5))
    assert bool(torch.isfinite(constant(torch.full((2, 2), 0.5))).all())


def test_everything_is_charged_before_the_rows_are_looked_at(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger")
    x, made = table(), {**QUIET, "ledger": ledger}
    private_mean(x, -2.0, 2.0, **made)
    DPStandardizer(-2.0, 2.0, **made).fit(x)
    private_histogram(torch.zeros(3, dtype=torch.long), 2, noise_multiplier=2.0, ledger=ledger)
    private_quantile(x[:, 0], 0.5, -2.0, 2.0, pure_epsilon=0.3, ledger=ledger)
    assert ledger.epsilon() == pytest.approx(epsilon([(1.0, 1.0, 2), (2.0, 1.0, 1)]) + 0.3)
    assert [charge.name for charge in ledger.charges()] == [
        "private_mean",
        "DPStandardizer",
        "private_histogram",
        "private_quantile",
    ]
    full = PrivacyLedger(tmp_path / "full", target_epsilon=0.1)
    for call in (
        lambda: private_mean(x, -2.0, 2.0, **{**made, "ledger": full}),
        lambda: DPStandardizer(-2.0, 2.0, **{**made, "ledger": full}).fit(x),
        lambda: private_histogram(torch.zeros(3, dtype=torch.long), 2, noise_multiplier=2.0, ledger=full),
        lambda: private_quantile(x[:, 0], 0.5, -2.0, 2.0, pure_epsilon=0.3, ledger=full),
    ):
        with pytest.raises(BudgetExceeded):
            call()
    assert full.charges() == ()


def test_noise_is_fresh():
    x = table()
    first, second = (private_mean(x, -2.0, 2.0, **QUIET) for _ in range(2))
    assert not torch.equal(first, second)
    spread = np.array(
        [float(private_histogram(torch.zeros(1, dtype=torch.long), 1, noise_multiplier=2.0)) for _ in range(400)]
    )
    low, high = 2.0 * (1 - 6 / math.sqrt(800)), 2.0 * (1 + 6 / math.sqrt(800))
    assert low < spread.std() < high and abs(spread.mean() - 1) < student.isf(1e-7, 399) * 2 / 20
