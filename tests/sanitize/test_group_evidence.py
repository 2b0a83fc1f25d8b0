"""The tests that a group must fail before it is called poison: exact p-values, level under the null, planted cases."""

import dataclasses
import math

import pytest
import torch
from scipy import stats

from aidefend.sanitize.decide import smallest_detectable
from aidefend.sanitize.features import Features
from aidefend.sanitize.group_evidence import (
    MOSTLY_FOREIGN,
    drawn_like,
    examine,
    foreign_share,
    more_than,
    nearness,
    own_company,
    transfer_share,
    valley_depth,
)
from aidefend.sanitize.groups import Group
from aidefend.sanitize.trigger import Trigger
from aidefend.sanitize.view import IndependentView
from aidefend.sanitize.world import shuffled, turned, world_of
from tests.worlds import poisoned_clusters


def test_more_than_is_the_exact_binomial_tail():
    assert more_than(0.5, 9, 10) == pytest.approx(11 / 1024)
    assert more_than(0.5, 0, 0) == 1.0 and more_than(2 / 3, 0, 5) == 1.0
    assert more_than(2 / 3, 10, 15) > 0.5 > more_than(0.5, 10, 15)


@pytest.mark.parametrize(("ours", "rest", "poison"), [(0.95, 0.05, True), (0.6, 0.05, False), (0.95, 0.95, False)])
def test_foreign_share_wants_more_than_half_that_the_rest_of_the_class_does_not_have(ours, rest, poison):
    inside = torch.arange(600) < 60
    foreign = torch.zeros(600, dtype=torch.bool)
    foreign[: round(60 * ours)] = True
    foreign[60 : 60 + round(540 * rest)] = True
    share, p_value = foreign_share(foreign, inside)
    assert share == pytest.approx(ours, abs=0.01) and (p_value < 1e-4) == poison


def test_valley_holds_its_level_on_one_bump_and_finds_two():
    stream = torch.Generator().manual_seed(0)
    p_values = []
    for _ in range(300):
        odds = torch.randn(400, generator=stream)
        _, p_value = valley_depth(odds, odds > odds.quantile(0.8))
        p_values.append(p_value)
    assert sum(p < 0.01 for p in p_values) <= stats.binom.ppf(0.999, 300, 0.01)  # false failure rate .001
    bumps = torch.cat([torch.randn(60, generator=stream) + 8, torch.randn(540, generator=stream) - 8])
    assert valley_depth(bumps, torch.arange(600) < 60)[1] < 1e-9


def world(planted):
    usable = torch.isfinite(planted.x).all(dim=1)
    centres = torch.stack([planted.x[(planted.y == c) & ~planted.is_poison].mean(dim=0) for c in range(4)])

    def predict(x):  # a backdoored model: whoever carries the pattern is class 0, the others go to the nearest centre
        return torch.where(x[:, :3].mean(dim=1) > 2.2, 0, torch.cdist(x, centres).argmin(dim=1))

    n = len(planted.x)
    logits, losses = torch.zeros(n, 4), torch.zeros(n)
    found = Features(tuple(map(str, range(n))), planted.x, planted.y, planted.x, logits, losses, usable)
    return world_of(found, IndependentView(planted.x, seed=0), predict, 0)


def group_of(planted, inside_all):
    """The group that consists of these rows of class 0, described without a search."""
    rows = (planted.y == 0).nonzero().flatten()
    inside = inside_all[rows]
    beside = torch.stack([planted.x[planted.true_y == planted.true_y[row]].mean(dim=0) for row in rows[inside]])
    odds = torch.where(inside, 8.0, -8.0).double() + 0.1 * torch.randn(len(rows)).double()
    trigger = Trigger.between(planted.x[rows[inside]], beside.mean(dim=0), exact=True)
    coordinates = world(planted).conformity.coordinates
    alike = [
        coordinates[(planted.true_y == planted.true_y[row]) & ~planted.is_poison].mean(dim=0) for row in rows[inside]
    ]
    content = coordinates[rows[inside]] - (coordinates[rows[inside]] - torch.stack(alike)).mean(dim=0)
    nobody = torch.zeros(0, dtype=torch.int64)
    return Group(0, rows, inside, odds, inside.clone(), planted.true_y[rows], trigger, nobody, content)


def test_planted_poison_falls_in_all_five_and_the_strongest_null_decides():
    planted = poisoned_clusters()
    found = examine(world(planted), group_of(planted, planted.is_poison), threshold=1e-4)
    assert found.transfer > 0.9 and found.p_value < 1e-4 and found.apart < 1
    nulls = (found.p_foreign, found.p_valley, found.p_transfer, found.p_nearer, found.p_company)
    assert found.p_value == max(nulls)
    assert all(not math.isnan(value) for value in found)


class FarFromAll:
    """A view in which no row with the trigger lies near the group."""

    def __init__(self, view):
        self.view = view

    def coordinates(self, x):
        return self.view.coordinates(x) + 50


HARMLESS = ["not foreign", "half foreign", "no gap", "no transfer", "not nearer", "a style of its own"]


@pytest.mark.parametrize("harmless", HARMLESS)
def test_each_hypothesis_alone_saves_a_group(harmless):
    planted = poisoned_clusters()
    group, here = group_of(planted, planted.is_poison), world(planted)
    if harmless == "not foreign":
        group = dataclasses.replace(group, foreign=torch.zeros_like(group.foreign))
    elif harmless == "half foreign":
        half = group.foreign & (group.inside.cumsum(dim=0) % 2 == 0)
        group = dataclasses.replace(group, foreign=half)
    elif harmless == "no gap":
        group = dataclasses.replace(group, log_odds=torch.randn(len(group.rows)).double())
    elif harmless == "no transfer":
        here = dataclasses.replace(here, predict=lambda x: torch.full((len(x),), 3))
    elif harmless == "a style of its own":
        group = dataclasses.replace(group, content=group.content * 0.01 + 9)
        here = dataclasses.replace(here, view=FarFromAll(here.view))
    else:  # the clean part of the class in the place of the poison: the public mistake of condemning one cluster of two
        strangers = (planted.y != 0).nonzero().flatten()[: int((~group.inside).sum())]
        group = dataclasses.replace(group, inside=~group.inside, log_odds=-group.log_odds, foreign=~group.foreign)
        likeness = group.looks_like.masked_scatter(group.inside, planted.y[strangers])
        group = dataclasses.replace(group, content=here.conformity.coordinates[strangers] + 1e-3, looks_like=likeness)
        assert nearness(here, group)[1] == examine(here, group, threshold=1e-4).p_nearer > 1e-4
    assert examine(here, group, threshold=1e-4).p_value > 1e-4


def test_nearness_tells_the_poison_from_the_class_by_its_order():
    planted = poisoned_clusters()
    here = world(planted)
    poison = group_of(planted, planted.is_poison)
    clean = dataclasses.replace(poison, inside=~poison.inside)
    assert nearness(here, poison)[1] < 1e-6 and nearness(here, clean)[1] > 0.99


def test_a_loud_trigger_does_not_make_the_clean_part_the_stranger():
    planted = poisoned_clusters()
    x = planted.x.clone()
    x[planted.is_poison, :3] += 60
    loud = dataclasses.replace(planted, x=x)
    here, poison = world(loud), group_of(loud, loud.is_poison)
    points = here.conformity.coordinates[poison.rows]
    far = here.conformity.distance_elsewhere(points, 0)
    assert far[poison.inside].median() > far[~poison.inside].median()  # as they are, the clean rows are nearer
    clean = dataclasses.replace(poison, inside=~poison.inside)
    assert nearness(here, poison)[1] < 1e-6 and nearness(here, clean)[1] > 0.1


def test_company_is_near_zero_for_a_random_part_of_a_class_and_high_for_a_cluster():
    planted = poisoned_clusters()
    here, group = world(planted), group_of(planted, planted.is_poison)
    ones = (planted.y == 1).nonzero().flatten()[:60]
    drawn = here.conformity.coordinates[ones] + 1e-3
    near = own_company(here.conformity, 0, drawn, torch.ones(60, dtype=torch.int64))
    apart = own_company(here.conformity, 0, drawn * 0.01 + 9, group.looks_like[group.inside])
    assert abs(near[0]) < 0.15 and near[1] < 1e-4
    assert apart[0] > 0.5 and apart[1] > 0.99


def test_a_stamp_that_hides_what_varies_most_keeps_no_company_of_its_own():
    """With the stamp taken off, its rows lack what all others vary in; with it written on the others, these do, too."""
    planted = poisoned_clusters()
    x = planted.x.clone()
    x[:, 8:] = 0.0
    x[:, :4] = torch.randn(len(x), 4, generator=torch.Generator().manual_seed(0))
    x[planted.is_poison, :4] = 4.0
    hidden = dataclasses.replace(planted, x=x)
    here, group = world(hidden), group_of(hidden, hidden.is_poison)
    likeness = group.looks_like[group.inside]
    assert own_company(here.conformity, 0, group.content, likeness)[1] > 0.5
    assert examine(here, group, threshold=1.0).p_company < 1e-4
    elsewhere = dataclasses.replace(here, view=FarFromAll(here.view))
    assert examine(elsewhere, group, threshold=1.0).p_company > 0.5


def test_transplants_go_to_the_classes_that_the_group_looks_like_and_to_no_row_that_shaped_it():
    planted = poisoned_clusters()
    here, group = world(planted), group_of(planted, planted.is_poison)
    labels = torch.arange(300) % 3
    free = torch.arange(300) >= 30
    rows = drawn_like(torch.tensor([1] * 30 + [2] * 10), labels, free, torch.Generator().manual_seed(0))
    assert int(rows.min()) >= 30 and set(labels[rows].tolist()) == {1, 2} and len(set(rows.tolist())) == len(rows)
    matched = (planted.y == 1).nonzero().flatten()
    narrow = dataclasses.replace(group, looks_like=torch.ones_like(group.looks_like), matched=matched)
    assert transfer_share(here, narrow) == (0.0, 1.0)  # every row of that class shaped the trigger: none is left


def test_rows_of_the_class_itself_do_not_count_as_turned():
    planted = poisoned_clusters(poison=0)
    here = world(planted)
    shift = 9.0 * (torch.arange(20) < 3)
    trigger = Trigger.between(shift.expand(2, 20), torch.zeros(20))
    zero, one = (planted.x[planted.y == c][:10] for c in (0, 1))
    shares = turned(here, torch.cat([zero, one]), [trigger], 0)[0].double().reshape(3, 2, 10).mean(dim=2)
    assert shares.tolist() == [[0.0, 1.0]] * 3
    assert turned(here, zero[:0], [trigger], 0)[0].shape == (3, 0)


def test_shuffled_worlds_keep_inputs_and_class_sizes():
    planted = poisoned_clusters()
    here, rows = world(planted), torch.arange(0, 600, 2)
    other = shuffled(here, rows)
    assert torch.equal(other.x, here.x[rows]) and not torch.equal(other.labels, here.labels[rows])
    assert torch.equal(other.labels.bincount(), here.labels[rows].bincount())


@pytest.mark.parametrize("threshold", [1e-2, 1e-4])
def test_the_smallest_detectable_group_has_the_stated_power(threshold):
    size = smallest_detectable(600, threshold, 1e-6)
    stream = torch.Generator().manual_seed(0)

    def power(n):
        successes = (torch.rand(4000, n, generator=stream) < 0.95).sum(dim=1).tolist()
        return sum(more_than(MOSTLY_FOREIGN, count, n) <= threshold for count in successes) / 4000

    assert power(size) > 0.77
    assert smallest_detectable(600, threshold / 100, 1e-6) > size
    assert smallest_detectable(10, threshold, 1e-6) is None
    assert smallest_detectable(600, threshold, 1e-99) is None  # no number of transplants passes such a gate
