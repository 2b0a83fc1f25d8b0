"""What the user knows beside the content: trusted rows, sources, groups."""

import numpy as np
import pytest
import torch

from aidefend import ConfigurationError
from aidefend.sanitize.provenance import read_names, read_trusted, removals

IDS = ("a", "b", "c", "d")


@pytest.mark.parametrize(
    "trusted",
    [[1, 3], ["b", "d"], {"b", "d"}, torch.tensor([1, 3]), torch.tensor([False, True, False, True]), np.array([1, 3])],
)
def test_trusted_rows_in_every_form(trusted):
    assert read_trusted(trusted, IDS).tolist() == [False, True, False, True]


@pytest.mark.parametrize("nothing", [None, [], torch.zeros(4, dtype=torch.bool)])
def test_nobody_trusted(nothing):
    assert not bool(read_trusted(nothing, IDS).any())


@pytest.mark.parametrize("wrong", [[4], [-1], ["x"], [True], [1.5], torch.zeros(3, dtype=torch.bool)])
def test_wrong_trusted_rows_are_refused(wrong):
    with pytest.raises(ConfigurationError, match="trusted"):
        read_trusted(wrong, IDS)


def test_names_of_any_kind_and_wrong_lengths():
    assert read_names(torch.tensor([1, 2]), 2, "groups") == ["1", "2"]
    assert read_names(None, 2, "groups") is None
    for wrong in (["a"], "ab", 3):
        with pytest.raises(ConfigurationError, match="groups"):
            read_names(wrong, 2, "groups")


def test_removals_count_compare_and_mark():
    removed = torch.tensor([True] * 30 + [False] * 70 + [True] + [False] * 99)
    found = removals(["bad"] * 100 + ["good"] * 100, removed)
    assert found["bad"]["removed"] == 30 and found["bad"]["times_the_rest"] == pytest.approx(30)
    assert found["bad"]["more_than_twice_the_rest"] and not found["good"]["more_than_twice_the_rest"]
    assert found["bad"]["p_value"] < 1e-6 < 0.9 < found["good"]["p_value"]
    assert found["bad"]["low"] < 0.3 < found["bad"]["high"]
