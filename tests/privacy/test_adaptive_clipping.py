"""The adaptive bound: its noise is paid for, it finds the median, it survives a resume."""

import math

import pytest
import torch
from torch import nn

from aidefend.privacy.clip_bound import ClipBound
from aidefend.privacy.ranks import Ranks
from tests.privacy.private_worlds import one_step, private_run, quiet, rows, settings


def bound_of(config):
    return ClipBound(config, Ranks(None, nn.Linear(1, 1)))


def test_sum_and_count_together_are_the_noise_multiplier_of_the_configuration():
    for noise in (0.5, 1.0, 7.3):
        bound = bound_of(settings(clipping="adaptive", noise_multiplier=noise))
        of_sum = bound.noise_deviation / bound.value
        together = 1 / math.sqrt(1 / of_sum**2 + (0.5 / bound.count_deviation) ** 2)
        assert together == pytest.approx(noise, rel=1e-12)
        assert of_sum > noise


def test_other_kinds_have_the_noise_as_it_is_and_a_bound_that_stays():
    for kind in ("flat", "per_layer", "automatic"):
        bound = bound_of(settings(clipping=kind, noise_multiplier=2.0))
        bound.follow(10.0, 1)
        assert bound.noise_deviation == 2.0 * 0.7 and bound.value == 0.7


@pytest.mark.parametrize("start", [1e-3, 1e3])
def test_the_bound_finds_the_median_length(start):
    x, y = rows(200)
    config = quiet(
        clipping="adaptive",
        max_grad_norm=start,
        expected_batch_size=200,
        public_size=200,
        steps=200,
        noise_multiplier=1.0,
    )
    model = nn.Linear(6, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    private = private_run(model, (x, y), config, lr=0.0)
    for _ in range(150):
        one_step(private)
    lengths = math.sqrt(2 / 3) * torch.sqrt(1 + x.square().sum(1))
    assert private._bound.value == pytest.approx(float(lengths.median()), rel=0.05)


def test_the_count_is_noisy_and_never_the_same_twice():
    moved = set()
    for _ in range(3):
        bound = bound_of(settings(clipping="adaptive"))
        bound.follow(0.0, 1)
        moved.add(bound.value)
    assert len(moved) == 3
    seeded = [bound_of(settings(clipping="adaptive", insecure_seed=1)) for _ in range(2)]
    for bound in seeded:
        bound.follow(1.0, 1)
    assert seeded[0].value == seeded[1].value != 0.7


def test_one_row_moves_the_count_by_a_half():
    from aidefend.privacy import training

    seen = []
    honest = training.clipped_sum

    def watched(*arguments):
        seen.append(honest(*arguments))
        return seen[-1]

    x, y = rows()
    config = quiet(clipping="adaptive", expected_batch_size=24, steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "clipped_sum", watched)
        torch.manual_seed(0)
        for data in ((x, y), (x[1:], y[1:]), (torch.cat([x[:1] * torch.nan, x[1:]]), y)):
            private = private_run(data=data, config=config)
            one_step(private)
    whole, less, broken = (found.balance for found in seen)
    assert abs(whole - less) == 0.5 and broken == less
    assert abs(whole) <= 12


def test_an_extreme_step_does_not_run_away():
    bound = bound_of(settings(clipping="adaptive", insecure_no_noise=True, insecure_seed=0))
    for step in range(1000):
        bound.follow(-1e9, step)
    assert bound.value == pytest.approx(0.7e6)


def test_resume_goes_on_with_the_bound_as_it_was(tmp_path):
    first = private_run(config=quiet(clipping="adaptive"))
    one_step(first)
    first.save(tmp_path / "run")
    second = private_run(config=quiet(clipping="adaptive"))
    second.resume(tmp_path / "run")
    assert second._bound.value == first._bound.value != 0.7
