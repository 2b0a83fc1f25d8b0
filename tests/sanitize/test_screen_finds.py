"""End to end on real digits: each kind of poison is found without a hint, its harmless counterpart is kept."""

import functools

import pytest
import torch

from aidefend.attacks import poisoning
from aidefend.datasets import mnist_subset
from aidefend.sanitize import screen

pytestmark = pytest.mark.slow
ROWS, CLASSES = 2500, 5
SQUARE = poisoning.Patch(size=4).stamp


@functools.cache
def digits(rows=ROWS, classes=CLASSES):
    """Real digits (N, 1, 28, 28) in [0, 1] with labels; five classes, where that shows the thing, in half the time."""
    data = mnist_subset()
    chosen = (data.train_y < classes).nonzero().flatten()[:rows]
    return data.train_x[chosen], data.train_y[chosen]


def screened(x, y):
    return ~screen((x, y), seed=0).keep


ATTACKS = {
    "patch": poisoning.Patch(0, 0.04),
    "blend": poisoning.Blend(0, 0.04),
    "all to all": poisoning.AllToAll(SQUARE, CLASSES, 0.1),
    "adaptive blend": poisoning.AdaptiveBlend(0, 0.02, 0.02),
    "adaptive patch": poisoning.AdaptivePatch(0, 0.02, 0.04),
    "source targeted": poisoning.SourceTargeted(poisoning.Patch().stamp, 0, 1, 0.02, 0.02),
    "sinusoid, right labels": poisoning.Sinusoid(0, 0.1, 0.5, clean_label=True),
}


def rates(attack, data):
    """Share of the poison that is found, and of honest rows that go."""
    poisoned = attack.poison(data, seed=1)
    pairs = [poisoned.dataset[i] for i in range(len(data[0]))]
    x, y = torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])
    gone, bad = screened(x, y), poisoned.is_poison
    return float(gone[bad].double().mean()), float(gone[~bad].double().mean())


@pytest.mark.parametrize("name", ATTACKS)
def test_poison_is_found_without_a_hint_and_little_else_goes(name):
    found, lost = rates(ATTACKS[name], digits())
    assert found >= 0.9 and lost <= 0.01


def test_a_displacement_of_many_rows_is_found_where_enough_classes_tell_it():
    """Of five classes with 250 rows it is not: four pairs of means tell the field too roughly."""
    found, lost = rates(poisoning.Warp(0, 0.1, 1.5), digits(5000, 10))
    assert found >= 0.9 and lost <= 0.01


def every_tenth():
    return torch.arange(ROWS) % 10 == 0


def of_class(label, count=60):
    chosen = torch.zeros(ROWS, dtype=torch.bool)
    chosen[(digits()[1] == label).nonzero().flatten()[:count]] = True
    return chosen


def framed(x):
    marked = x.clone()
    marked[..., [0, -1], :], marked[..., :, [0, -1]] = 1.0, 1.0
    return marked


STYLES = {
    "as they are": (lambda x: x, every_tenth),
    "a square in every class": (SQUARE, every_tenth),
    "a frame in every class": (framed, every_tenth),
    "warped in every class": (poisoning.Warp(0, 0.1, 1.5).stamp, every_tenth),
    "faint noise in every class": (poisoning.Blend(0, 0.1).stamp, every_tenth),
    "negatives in one class": (lambda x: 1 - x, functools.partial(of_class, 3)),
    "thick strokes in one class": (
        lambda x: torch.nn.functional.max_pool2d(x, 3, 1, 1),
        functools.partial(of_class, 2),
    ),
}


@pytest.mark.parametrize("name", STYLES)
def test_the_harmless_counterpart_is_kept(name):
    change, chosen = STYLES[name]
    x, y = digits()
    rows = chosen()
    x = torch.where(rows[:, None, None, None], change(x), x)
    assert not bool(screened(x, y).any())


def test_a_rare_subclass_is_kept():
    """Class 0 holds zeros and a few fours, and nobody else has fours: rare, apart, and rightly labelled."""
    x, y = digits()
    keep = torch.ones(ROWS, dtype=torch.bool)
    keep[(y == 4).nonzero().flatten()[40:]] = False
    assert not bool(screened(x[keep], torch.where(y == 4, 0, y)[keep]).any())
