"""The trigger's window is found where it is, and no window is found where there is none."""

import time

import pytest
import torch

from aidefend import ConfigurationError
from aidefend.attacks.poisoning import Patch
from aidefend.collaborate import apply_indicators, trigger_indicator
from aidefend.datasets import mnist_subset

KEY = b"a shared secret key"


def strokes(n, side=12, seed=0):
    """Digits in the small: two bright lines at random angles near the middle, dark around, pixel noise on the lines."""
    stream = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x = torch.zeros(n, side, side)
    for _ in range(2):
        angle, shift = torch.rand(n, 1, 1, generator=stream) * 3.14, torch.randn(n, 1, 1, generator=stream)
        across = (row - side / 2) * angle.cos() + (column - side / 2) * angle.sin() - shift
        along = (row - side / 2) * angle.sin() - (column - side / 2) * angle.cos()
        x += ((across.abs() < 0.7) & (along.abs() < side / 3)) * (0.5 + torch.rand(n, side, side, generator=stream) / 2)
    return x.clamp(max=1)[:, None]


def digits():
    data = mnist_subset()
    return data.train_x, data.train_y


def checkered(size):
    return ((torch.arange(size)[:, None] + torch.arange(size)) % 2 == 0).float() * 0.8 + 0.1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_window_is_found_at_every_position_and_size(size):
    ordinary, others = strokes(100, seed=1), strokes(40, seed=2)
    for top in range(12 - size + 1):
        for left in range(12 - size + 1):
            suspects = others.clone()
            suspects[:30, :, top : top + size, left : left + size] = checkered(size)
            found = trigger_indicator(suspects, ordinary, KEY, size=size)
            assert found.place == (top, left, size, size)
            assert apply_indicators([found], KEY).score({"x": suspects}).tolist() == [1.0] * 30 + [0.0] * 10


def test_a_white_patch_on_digits_is_found_whole_and_finds_a_partners_poison():
    x, y = digits()
    for corner in ("top-left", "top-right", "bottom-left", "bottom-right"):
        mine = Patch(target=0, rate=0.1, position=corner).poison((x[:1500], y[:1500]), seed=0)
        rows = torch.stack([mine.dataset[i][0] for i in range(1500)])
        found = trigger_indicator(rows[mine.is_poison], rows[~mine.is_poison][:1000], KEY)
        theirs = Patch(target=3, rate=0.05, position=corner).poison((x[2000:3000], y[2000:3000]), seed=1)
        rows = torch.stack([theirs.dataset[i][0] for i in range(1000)])
        score = apply_indicators([found], KEY).score({"x": (rows * 255).round().to(torch.uint8)})
        assert torch.equal(score > 0, theirs.is_poison)


def test_clean_digits_of_one_class_have_no_trigger():
    x, y = digits()
    for label in range(10):
        with pytest.raises(ConfigurationError, match="ordinary samples do not"):
            trigger_indicator(x[y == label][:100], x[-1000:], KEY)


def test_planted_violation_near_copies_pass_for_a_trigger():
    x, _ = digits()
    assert trigger_indicator(x[:1].repeat(30, 1, 1, 1), x[1000:2000], KEY).kind == "trigger"


@pytest.mark.parametrize(("carriers", "found"), [(40, True), (26, True), (25, False), (10, False)])
def test_more_than_half_of_the_suspects_must_carry_it(carriers, found):
    suspects = torch.rand(50, 3, 9, 9)
    suspects[:carriers, :, 2:5, 4:7] = checkered(3)
    if found:
        assert trigger_indicator(suspects, torch.rand(60, 3, 9, 9), KEY).place == (2, 4, 3, 3)
    else:
        with pytest.raises(ConfigurationError, match="most suspects share"):
            trigger_indicator(suspects, torch.rand(60, 3, 9, 9), KEY)


def test_what_ordinary_samples_have_as_well_is_no_trigger():
    suspects, ordinary = torch.rand(30, 1, 8, 8), torch.rand(100, 1, 8, 8)
    suspects[..., :3, :3], ordinary[:2, :, :3, :3] = 1.0, 1.0
    with pytest.raises(ConfigurationError, match="ordinary samples do not"):
        trigger_indicator(suspects, ordinary, KEY)
    ordinary[1] = 0.0
    assert trigger_indicator(suspects, ordinary, KEY).place == (0, 0, 3, 3)


@pytest.mark.parametrize("moving", ["moved", "blended"])
def test_moving_and_blended_triggers_are_not_found(moving):
    suspects = strokes(40, seed=3)
    for i, row in enumerate(suspects):
        if moving == "moved":
            row[:, i % 9 : i % 9 + 3, 4:7] = checkered(3)
        else:
            row.mul_(0.8).add_(0.2 * torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(i)))
    with pytest.raises(ConfigurationError, match="moving or blended"):
        trigger_indicator(suspects, strokes(100, seed=4), KEY)


@pytest.mark.parametrize(
    ("shape", "place"), [((20,), (0, 7, 1, 3)), ((9, 9), (1, 5, 3, 3)), ((2, 2, 9, 9), (1, 5, 3, 3))]
)
def test_any_number_of_dimensions(shape, place):
    suspects = torch.rand(20, *shape)
    top, left, _, _ = place
    window = suspects[:, left : left + 3] if len(shape) == 1 else suspects[..., top : top + 3, left : left + 3]
    window.fill_(0.5)
    found = trigger_indicator(suspects, torch.rand(50, *shape), KEY)
    assert (found.place, found.shape) == (place, shape)
    marked = torch.rand(2, *shape)
    marked[0] = suspects[0]
    assert apply_indicators([found], KEY).score({"x": marked}).tolist() == [1.0, 0.0]


def test_a_window_larger_than_the_sample_is_cut_to_it():
    suspects = torch.rand(1, 4).repeat(10, 1)
    assert trigger_indicator(suspects, torch.rand(30, 4), KEY, size=9).place == (0, 0, 1, 4)


def test_a_trigger_found_on_floats_is_found_on_bytes_and_back():
    suspects = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    suspects[..., 2:5, 2:5] = torch.arange(9, dtype=torch.uint8).reshape(3, 3) * 28
    ordinary = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    found = [
        trigger_indicator(suspects, ordinary, KEY),
        trigger_indicator(suspects / 255, ordinary.double() / 255, KEY),
    ]
    assert found[0] == found[1]
    assert float(apply_indicators(found, KEY).score({"x": suspects.float() / 255}).sum()) == 30


def test_the_search_is_fast_enough_to_be_used_by_hand():
    suspects, ordinary = torch.rand(300, 1, 28, 28), torch.rand(1000, 1, 28, 28)
    suspects[..., 20:23, 20:23] = 1.0
    start = time.process_time()
    assert trigger_indicator(suspects, ordinary, KEY).place == (20, 20, 3, 3)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("suspects", "reference", "size", "message"),
    [
        (torch.ones(4, 3, 3), torch.ones(30, 3, 3), 3, "5 suspects and 20 reference"),
        (torch.ones(9, 3, 3), torch.ones(19, 3, 3), 3, "5 suspects and 20 reference"),
        (torch.ones(9, 3, 3), torch.ones(30, 3, 4), 3, "of one shape"),
        (torch.full((9, 3, 3), torch.nan), torch.ones(30, 3, 3), 3, "suspects to be finite"),
        (torch.ones(9, 3, 3), torch.full((30, 3, 3), torch.inf), 3, "reference to be finite"),
        (torch.ones(9, 3, 3), torch.ones(30, 3, 3), 0, "size to be an integer"),
        ([1.0], torch.ones(30, 3, 3), 3, "suspects to be a torch.Tensor"),
        (torch.ones(9), torch.ones(30), 3, "suspects of shape"),
    ],
)
def test_malformed_calls_are_refused(suspects, reference, size, message):
    with pytest.raises(ConfigurationError, match=message):
        trigger_indicator(suspects, reference, KEY, size=size)
