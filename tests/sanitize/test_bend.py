"""A displacement told from means of classes: it comes back, can be taken off, and puts itself on other pictures."""

import torch

from aidefend.attacks.poisoning import Blend, Warp
from aidefend.datasets import mnist_subset
from aidefend.sanitize.bend import Bend


def means(stamp):
    """Mean digits of each class, plain and stamped: other rows on either side."""
    digits = mnist_subset()
    x, y = digits.train_x[:1200], digits.train_y[:1200]
    half = torch.arange(1200) % 2 == 0
    plain = torch.stack([x[half & (y == c)].mean(dim=0) for c in range(10)])
    stamped = torch.stack([stamp(x[~half & (y == c)]).mean(dim=0) for c in range(10)])
    return plain, stamped, x[:50]


def test_a_warp_is_told_from_means_and_comes_off_again():
    warp = Warp(strength=1.5)
    plain, bent, x = means(warp.stamp)
    bend = Bend.between(plain, bent, torch.ones(10))
    assert bend.left < bend.left_by_adding / 3
    missed = (bend.put_on(x) - warp.stamp(x)).square().mean()
    assert missed < 0.25 * (x - warp.stamp(x)).square().mean()
    assert (bend.taken_off(warp.stamp(x)) - x).square().mean() < 0.4 * (x - warp.stamp(x)).square().mean()


def test_an_added_pattern_is_no_bend():
    plain, marked, _ = means(Blend(alpha=0.2).stamp)
    bend = Bend.between(plain, marked, torch.ones(10))
    assert bend.left > bend.left_by_adding


def test_equal_means_give_no_displacement_and_the_streams_are_left_alone():
    plain, _, _ = means(lambda rows: rows)
    before = torch.random.get_rng_state()
    bend = Bend.between(plain, plain, torch.ones(10))
    assert torch.equal(before, torch.random.get_rng_state())
    assert float(bend.field.abs().max()) * 14 < 0.1  # cells


def test_what_cannot_be_bent():
    assert Bend.possible(torch.zeros(2, 1, 8, 8))
    assert not Bend.possible(torch.zeros(2, 20)) and not Bend.possible(torch.zeros(2, 1, 4, 28))


def test_the_dtype_of_the_data_is_kept():
    plain, bent, x = means(Warp().stamp)
    bend = Bend.between(plain, bent, torch.ones(10))
    raw = (x * 255).round().to(torch.uint8)
    assert bend.put_on(raw).dtype == torch.uint8
    assert (bend.put_on(raw).float() / 255 - bend.put_on(x)).abs().max() < 0.01
