"""Correlated noise: the strategy matrix, the groups that make its accounting true, and what it is good for."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from aidefend import ConfigurationError
from aidefend.privacy import epsilon
from aidefend.privacy.banded_noise import BandedNoise, band_coefficients, participations
from tests.privacy.private_worlds import one_step, private_run, released, rows, settings

STEPS, BANDS = 60, 6
BANDED = {"noise": "banded", "bands": BANDS, "steps": STEPS, "expected_batch_size": 3}


def strategy(bands, steps):
    """The matrix C."""
    column = np.zeros(steps)
    column[:bands] = band_coefficients(bands, steps)[:steps]
    return np.array([[column[i - j] if i >= j else 0.0 for j in range(steps)] for i in range(steps)])


@pytest.mark.parametrize("bands", [2, 3, 8, 20])
def test_rows_that_take_turns_never_exceed_the_sensitivity(bands):
    """Gradients of length one, one in each cycle, signs and phases at will: |C g|^2 <= the number of turns."""
    matrix, stream = strategy(bands, STEPS), np.random.default_rng(0)
    for _ in range(300):
        turns = np.zeros(STEPS)
        phase = int(stream.integers(bands))
        for step in range(phase, STEPS, bands):
            turns[step] = stream.choice([-1.0, 0.0, 1.0])
        taken = np.count_nonzero(turns)
        assert np.sum((matrix @ turns) ** 2) <= taken + 1e-9
        assert taken <= participations(STEPS, bands)


def test_planted_rows_without_turns_exceed_it():
    """A row at every step, as plain Poisson sampling allows: more than as many independent steps would show."""
    turns = np.ones(STEPS)
    assert np.sum((strategy(BANDS, STEPS) @ turns) ** 2) > 1.5 * STEPS


@pytest.mark.parametrize(("bands", "steps"), [(2, 40), (8, 60), (16, 500)])
def test_the_running_sum_moves_less_than_with_independent_noise(bands, steps):
    inverse = np.linalg.inv(strategy(bands, steps))
    correlated = np.square(np.cumsum(inverse, axis=0)).sum()
    independent = np.square(np.tril(np.ones((steps, steps)))).sum()
    assert correlated < independent
    root = np.cumprod([1.0, *((2 * k - 1) / (2 * k) for k in range(1, bands))])
    column = np.zeros(steps)
    column[: len(root)] = root / np.linalg.norm(root)
    banded_root = np.array([[column[i - j] if i >= j else 0.0 for j in range(steps)] for i in range(steps)])
    assert correlated <= np.square(np.cumsum(np.linalg.inv(banded_root), axis=0)).sum() * (1 + 1e-9)


def test_the_noise_is_the_inverse_of_the_matrix_times_independent_noise():
    band, fresh = BandedNoise(band_coefficients(BANDS, STEPS)), torch.randn(STEPS, 5, dtype=torch.float64)
    made = torch.stack([band.correlated(z.clone(), "w", step + 1).clone() for step, z in enumerate(fresh)])
    expected = np.linalg.solve(strategy(BANDS, STEPS), fresh.numpy())
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("gap", [1, 2, 40])
def test_a_skipped_step_starts_a_new_block(gap):
    """The whole is a block-diagonal matrix: what comes after a gap has nothing of the noise before."""
    coefficients = band_coefficients(BANDS, STEPS)
    band, fresh = BandedNoise(coefficients), torch.randn(8, 3, dtype=torch.float64)
    for step in range(4):
        band.correlated(fresh[step].clone(), "w", step + 1)
    after = [band.correlated(fresh[4 + k].clone(), "w", 5 + gap + k).clone() for k in range(4)]
    alone = BandedNoise(coefficients)
    expected = [alone.correlated(fresh[4 + k].clone(), "w", 1 + k).clone() for k in range(4)]
    assert all(map(torch.equal, after, expected))


def test_epsilon_is_that_of_the_turns():
    config = settings(**BANDED, noise_multiplier=1.5)
    assert config.history(STEPS) == [(1.5, BANDS * 3 / 24, STEPS // BANDS)]
    assert config.history(7) == [(1.5, BANDS * 3 / 24, 2)]
    assert config.spent(STEPS).epsilon == epsilon([(1.5, 0.75, 10)], 1e-3)
    whole = settings(**{**BANDED, "bands": 8}, noise_multiplier=1.5)
    assert whole.spent(STEPS).epsilon == epsilon([(1.5, 1.0, 8)], 1e-3)
    solved = settings(**BANDED, noise_multiplier=None, target_epsilon=3.0)
    assert solved.spent(STEPS).epsilon <= 3.0 < epsilon([(solved.multiplier - 2e-4, 0.75, 10)], 1e-3)


def test_every_row_has_one_turn_in_a_cycle():
    """40 runs of 24 rows: always at the same place of a cycle, and as often as the rate says (binomial, 6 sigma)."""
    x = torch.arange(24.0).reshape(24, 1)
    counts, runs = torch.zeros(24), 40
    for seed in range(runs):
        private = private_run(nn.Linear(1, 3), (x, rows()[1]), settings(**BANDED, insecure_seed=seed))
        turns: dict[int, set[int]] = {}
        for step, (batch, _) in enumerate(private.loader):
            for row in batch[:, 0].long().tolist():
                counts[row] += 1
                turns.setdefault(row, set()).add(step % BANDS)
        assert all(len(phases) == 1 for phases in turns.values())
    mean = runs * STEPS * 3 / 24
    assert bool((counts - mean).abs().max() < 6 * math.sqrt(runs * (STEPS / BANDS) * 0.75 * 0.25))


def test_the_steps_of_a_run_carry_the_band():
    """The released gradients with lr 0 and seeded noise: multiplied with C they are independent noise again."""
    config = settings(**BANDED, noise_multiplier=50.0, insecure_seed=7)
    private = private_run(config=config, lr=0.0)
    noise = []
    for _ in range(STEPS):
        one_step(private)
        noise.append(torch.cat([g.flatten() for g in released(private).values()]) * 3 / (0.7 * 50.0))
    fresh = strategy(BANDS, STEPS) @ torch.stack(noise).double().numpy()
    assert np.std(fresh) == pytest.approx(1.0, abs=0.06)
    lagged = np.corrcoef(fresh[1:].ravel(), fresh[:-1].ravel())[0, 1]
    raw = np.corrcoef(np.stack(noise)[1:].ravel(), np.stack(noise)[:-1].ravel())[0, 1]
    assert abs(lagged) < 0.1 < abs(raw)


def test_a_run_that_is_taken_up_begins_a_new_cycle(tmp_path):
    config = settings(**BANDED, noise_multiplier=1.5)
    private = private_run(config=config)
    for _ in range(8):
        one_step(private)
    private.save(tmp_path / "run")
    again = private_run(config=config)
    again.resume(tmp_path / "run")
    assert again.steps_taken == 12 and again.epsilon() == private.epsilon()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"noise": "banded"}, "bands"),
        ({"bands": 4}, "bands"),
        ({"noise": "banded", "bands": 1}, "bands"),
        ({"noise": "banded", "bands": 5}, "bands"),
        ({"noise": "banded", "bands": 4, "steps": 3}, "bands"),
        ({"noise": "banded", "bands": 3, "clipping": "adaptive"}, "clipping"),
        ({"noise": "pink"}, "noise"),
    ],
)
def test_what_does_not_fit_is_refused(changes, rule):
    with pytest.raises(ConfigurationError, match=rule):
        settings(**changes)


def test_the_statement_says_so():
    text = private_run(config=settings(**BANDED)).statement().to_markdown()
    assert "cyclic Poisson: 6 random groups" in text and "correlated over 6 steps" in text
