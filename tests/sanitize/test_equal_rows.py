"""Rows that stand several times: honest ones are not found for it, and of poisoned ones all copies go."""

import pytest
import torch

from aidefend.datasets import mnist_subset
from aidefend.sanitize import screen
from aidefend.sanitize.distinct import Distinct
from aidefend.sanitize.features import extract_features
from tests.worlds import poisoned_clusters


@pytest.mark.parametrize("times", [2, 3])
def test_honest_pictures_that_stand_several_times_stay(times):
    """Twice as many equal rows are no more evidence: 60 of 800 digits went, and of tables up to a third."""
    digits = mnist_subset()
    x, y = digits.train_x[:400], digits.train_y[:400]
    assert bool(screen((x.repeat(times, 1, 1, 1), y.repeat(times)), seed=0).keep.all())


@pytest.mark.parametrize("seed", [0, 2, 3, 7])
def test_honest_tables_that_stand_several_times_stay(seed):
    x = torch.rand(120, 6, generator=torch.Generator().manual_seed(seed))
    y = (x[:, 0] > 0.5).long()
    for times in (2, 3, 5):
        assert bool(screen((x.repeat(times, 1), y.repeat(times)), seed=0).keep.all())


def test_poison_is_found_with_all_its_copies():
    planted = poisoned_clusters()
    report = screen((planted.x.repeat(2, 1), planted.y.repeat(2)), seed=0)
    assert torch.equal(~report.keep, planted.is_poison.repeat(2))
    assert report.parameters["poison"][0]["group"] == int(planted.is_poison.sum())  # each counts once


def test_the_first_of_equal_usable_rows_stands_for_all():
    x = torch.tensor([[1.0], [2.0], [torch.nan], [1.0], [1.0], [3.0], [2.0]])
    y = torch.tensor([0, 1, 0, 0, 1, 1, 1])
    found = extract_features((x, y), None, layer=x)
    once = Distinct(found)
    assert once.features.usable.tolist() == [True, True, False, False, True, True, False]
    assert once.rows.tolist() == [0, 1, 3, 4] and once.twins.tolist() == [0, 1, 0, 2, 3, 1]
