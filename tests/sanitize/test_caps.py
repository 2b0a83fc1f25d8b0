"""Caps on what is taken of a class or a group, and classes that are too small to be judged."""

import pytest
import torch

from aidefend import ConfigurationError
from aidefend.sanitize import screen
from aidefend.sanitize.caps import Cap, depleted, read_cap, words_of_caps
from tests.worlds import poisoned_clusters


@pytest.fixture(scope="module")
def planted():
    return poisoned_clusters()


def test_the_least_suspicious_rows_beyond_the_cap_stay():
    removed = torch.tensor([True, True, True, True, False, True])
    scores = torch.tensor([0.9, 0.6, 0.8, 0.7, 0.1, 0.99])
    names = ["a", "a", "a", "a", "a", "b"]
    usable = torch.ones(6, dtype=torch.bool)
    assert Cap(names, 0.4, "group").beyond(removed, usable, scores) == {"a": [1, 3], "b": [5]}
    assert Cap(names, {"a": 0.4}, "group").beyond(removed, usable, scores) == {"a": [1, 3]}
    assert Cap(names, 1.0, "group").beyond(removed, usable, scores) == {}


def test_a_group_with_a_cap_loses_no_more_and_each_kept_row_says_why(planted):
    groups = ["north" if row % 2 else "south" for row in range(600)]
    data, caps = (planted.x, planted.y), {"max_removed": {0: 0.27}, "max_removed_group": {"north": 0.05}}
    report = screen(data, detectors=[], groups=groups, **caps, seed=0)
    north = torch.tensor([name == "north" for name in groups])
    allowed = int(0.05 * int(north.sum()))
    assert int((~report.keep & north).sum()) == allowed
    cap = report.parameters["cap"]
    of_class, spared = cap["spared"], cap["spared_groups"]
    assert list(of_class) == ["0"] and len(of_class["0"]) == 60 - int(0.27 * 210)  # three rows
    poison, left = planted.is_poison & north, sum(row % 2 for row in of_class["0"])
    assert list(spared) == ["north"] and len(spared["north"]) == int(poison.sum()) - left - allowed
    others = sorted((planted.is_poison & ~north).nonzero().flatten().tolist())
    assert (~report.keep & ~north).nonzero().flatten().tolist() == [row for row in others if row not in of_class["0"]]
    row = spared["north"][0]
    assert report.reasons[row][-1] == "kept: more than 0.05 of its group would go"
    table = report.decisions()
    assert table.actions[row] == "down-weight" and float(table.weights[row]) < 0.5
    lost, kept = (report.scores["structured_poison"][rows] for rows in (~report.keep & north, spared["north"]))
    assert float(lost.min()) >= float(kept.max())


def test_malformed_caps_name_the_cure():
    for share, parts, match in (
        (0.0, ["a"], "max_removed_group"),
        ({"b": 0.5}, ["a"], "some row has"),
        ({"a": 2.0}, ["a"], "max_removed_group"),
        (0.5, None, "Pass groups="),
    ):
        with pytest.raises(ConfigurationError, match=match):
            read_cap(share, parts, "max_removed_group", "group")


def test_abstention_on_a_tiny_class_is_in_the_limits_the_parameters_and_the_rows(planted):
    x = torch.cat([planted.x, planted.x[:8] + 20])
    y = torch.cat([planted.y, torch.full((8,), 4)])
    report = screen((x, y), detectors=[], seed=0)
    assert report.parameters["not_searched"] == {"4": 8}
    assert "Not searched, fewer than 24 rows: classes 4." in report.limits
    assert all("kept: not searched, its class has 8 rows" in report.reasons[row] for row in range(600, 608))
    assert not any("not searched" in words for row in range(600) for words in report.reasons[row])


def test_a_class_that_loses_more_than_half_of_its_usable_rows_is_named():
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2])
    removed = torch.tensor([True, True, True, False, False, True, True, False, False, False])
    usable = torch.tensor([True, True, True, True, False, True, True, True, True, False])
    found = depleted(labels, usable, removed)
    assert found == {"0": {"removed": 3, "left": 1}}, "half of class 1 is not more than half"
    assert words_of_caps({"depleted": found}).startswith("Class 0 loses 3 of its 4 rows to quarantine")
    assert words_of_caps({"max_removed": 1.0, "spared": {}, "depleted": {}}) == ""


def test_by_default_no_cap_keeps_proven_poison_and_a_cap_says_what_it_kept(planted):
    data = planted.x, planted.y
    free, capped = screen(data, detectors=[], seed=0), screen(data, detectors=[], max_removed=0.1, seed=0)
    cap = free.parameters["cap"]
    assert cap["max_removed"] == 1.0 and not cap["spared"] and cap["depleted"] == {}
    assert "max_removed" not in free.limits
    kept = sum(len(rows) for rows in capped.parameters["cap"]["spared"].values())
    assert kept and f"max_removed kept {kept} rows of groups that were found to be poison" in capped.limits
