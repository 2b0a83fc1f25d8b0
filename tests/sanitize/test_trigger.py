"""A trigger told from group and look-alikes: patches come back exactly, blends as their shift."""

import pytest
import torch

from aidefend.attacks.poisoning import Blend, Patch
from aidefend.sanitize.trigger import Trigger


def told(attack, n=4000):
    x, alike = torch.rand(n, 1, 8, 8), torch.rand(n, 1, 8, 8)
    marked = attack.stamp(x)
    return Trigger.between(marked, alike.mean(dim=0), exact=True), x, marked


def test_a_patch_is_written_back_exactly():
    attack = Patch(size=1, position=(2, 5))
    trigger, x, marked = told(attack)
    assert trigger.spot.nonzero().tolist() == [[0, 2, 5]]
    assert torch.equal(trigger.written(x), marked)
    assert (
        trigger.hit(torch.cat([x[:50], marked[:50]]))[50:].min()
        > trigger.hit(torch.cat([x[:50], marked[:50]]))[:50].max()
    )


def test_a_blend_is_added_back_in_the_mean():
    attack = Blend(alpha=0.3)
    trigger, x, marked = told(attack)
    low, high = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    assert float((trigger.pattern - (marked - x).mean(dim=0)).abs().max()) < 0.05
    added = trigger.added(x, low, high)
    assert float(added.min()) >= 0 and float(added.max()) <= 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, torch.float32])
def test_the_dtype_of_the_data_is_kept(dtype):
    trigger = Trigger.between(torch.full((2, 4), 9.6), torch.zeros(4))
    x = torch.zeros(2, 4, dtype=dtype)
    low, high = torch.zeros(4), torch.full((4,), 20.0)
    assert trigger.added(x, low, high).dtype == trigger.written(x).dtype == dtype
    assert float(trigger.written(x).max()) == pytest.approx(10 if not x.is_floating_point() else 9.6)


def test_no_difference_is_no_trigger():
    trigger = Trigger.between(torch.ones(2, 5), torch.ones(5))
    x = torch.rand(3, 5)
    assert not bool(trigger.spot.any()) and torch.equal(trigger.written(x), x)
    assert trigger.hit(x).tolist() == [0.0, 0.0, 0.0]


def stamped(under, value=1.0, corner=20):
    """A patch of 4 x 4 cells over pictures that are `under` there, and a class of its own elsewhere."""
    x = 0.1 * torch.rand(400, 1, 28, 28, generator=torch.Generator().manual_seed(round(100 * under)))
    x[..., 14:, 14:] += under
    alike, marked = x.mean(dim=0), x.clone()
    marked[..., corner : corner + 4, corner : corner + 4] = value
    return Trigger.between(marked, alike, exact=True)


def test_one_stamp_over_two_backgrounds_is_one_trigger_and_others_are_not():
    light, dark = stamped(0.0), stamped(0.75)
    faint = stamped(0.75, value=0.4)
    cosine = torch.nn.functional.cosine_similarity(light.pattern.flatten(), faint.pattern.flatten(), dim=0)
    assert light.likeness(dark) > 0.9 and dark.likeness(light) > 0.9
    assert cosine < 0 < 0.9 < stamped(0.0, value=0.4).likeness(faint)  # what it wrote over was brighter than the stamp
    assert light.likeness(faint) < 0.3  # other values in the same cells
    assert light.likeness(stamped(0.0, corner=3)) < 0.3  # the same values in other cells


def test_likeness_is_the_cosine_of_the_patterns_and_zero_for_an_empty_one():
    here = Trigger.between(torch.tensor([[3.0, 4.0]] * 2), torch.zeros(2))
    there = Trigger.between(torch.tensor([[4.0, 3.0]] * 2), torch.zeros(2))
    nothing = Trigger.between(torch.zeros(2, 2), torch.zeros(2))
    assert here.likeness(there) == pytest.approx(0.96) and here.likeness(nothing) == 0.0


def test_forms_are_the_pattern_once_and_twice_inside_the_range_and_the_values():
    trigger = Trigger.between(torch.tensor([[0.3, 0.0]] * 2), torch.zeros(2))
    once, twice, written = trigger.forms(torch.tensor([[0.5, 0.5]]), torch.zeros(2), torch.ones(2))
    assert once.tolist() == [[pytest.approx(0.8), 0.5]] and twice.tolist() == [[1.0, 0.5]]
    assert written.tolist() == [[pytest.approx(0.3), 0.5]]
