"""How the chance of a false verdict is spent: it never exceeds alpha, and what is not needed is passed on."""

import pytest
import torch
from scipy import stats

from aidefend.sanitize.decide import Verdict, _joined, verdicts_on
from aidefend.sanitize.group_evidence import GroupEvidence
from aidefend.sanitize.groups import ClassSearch, Group
from aidefend.sanitize.levels import Levels, in_turn
from aidefend.sanitize.trigger import Trigger
from tests.sanitize.test_group_evidence import world
from tests.worlds import poisoned_clusters

NOTHING = torch.zeros(0, dtype=torch.int64)
TRIGGER = Trigger.between(torch.zeros(2, 1), torch.zeros(1))
P_VALUES = ("p_foreign", "p_valley", "p_transfer", "p_nearer", "p_company")
HARMLESS = GroupEvidence(0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
POISON = GroupEvidence(1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0)


def group(label, rows=20):
    inside = torch.arange(100) < rows
    return Group(label, torch.arange(100), inside, inside.double(), inside, inside.long(), TRIGGER, NOTHING, inside)


def stands(groups, evidence, levels, **words):
    return [verdict.poison for verdict in verdicts_on(groups, evidence, levels, **words)[0]]


def test_in_turn_spends_three_quarters_each_and_all_in_the_end_and_passes_on_what_fell():
    assert in_turn([1.0, 1.0, 1.0], 0.16) == pytest.approx([0.12, 0.03, 0.01])
    assert in_turn([0.0, 1.0, 1.0], 0.16) == pytest.approx([0.12, 0.15, 0.01])
    assert in_turn([0.0, 0.0, 1.0], 0.16) == pytest.approx([0.12, 0.15, 0.16])
    assert in_turn([0.5], 0.16) == [0.16] and in_turn([], 0.16) == []


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("true", [(0, 1, 2, 3, 4), (1, 3), (4,), (0,)])
def test_in_turn_errs_no_more_often_than_its_level(alike, true):
    stream, level, wrong = torch.Generator().manual_seed(len(true)), 0.1, 0
    for _ in range(2000):
        drawn = torch.rand(5, generator=stream)
        p_values = [float(drawn[0 if alike else place]) if place in true else 0.0 for place in range(5)]
        levels = in_turn(p_values, level)
        wrong += any(p_values[place] <= levels[place] for place in true)
    assert wrong <= stats.binom.ppf(0.999, 2000, level)


def test_one_screen_of_harmless_groups_errs_no_more_often_than_alpha():
    """Each of 60 groups in three classes is harmless in one way of five, and looks like poison in the other four."""
    stream, alpha, wrong = torch.Generator().manual_seed(0), 0.2, 0
    groups = [group(label) for label in (0, 1, 2) for _ in range(20)]
    levels = Levels.of(alpha, len(groups))
    for _ in range(1500):
        ways, chances = torch.randint(5, (60,), generator=stream).tolist(), torch.rand(60, generator=stream).tolist()
        evidence = [POISON._replace(**{P_VALUES[way]: chance}) for way, chance in zip(ways, chances, strict=True)]
        wrong += any(stands(groups, evidence, levels))
    assert wrong <= stats.binom.ppf(0.999, 1500, alpha)


def test_groups_that_fail_the_gate_cost_those_past_it_nothing():
    levels = Levels.of(0.008, 400)
    p_value = 0.7 * levels.rest
    faint = POISON._replace(p_foreign=p_value, p_valley=p_value)
    assert stands([group(0)] + 50 * [group(1)], [faint] + 50 * [HARMLESS], levels) == [True] + 50 * [False]
    assert not stands([group(0), group(1)], [faint, POISON], levels)[0]  # a second class past the gate takes its half
    assert p_value > 10 * 0.008 / 400  # one level for every proposal would have missed it by far


def test_the_gate_is_as_strict_as_for_every_proposal():
    levels = Levels.of(0.008, 400)
    for name in ("p_transfer", "p_nearer", "p_company"):
        assert stands([group(0)], [POISON._replace(**{name: 0.9 * levels.gate})], levels) == [True]
        assert stands([group(0)], [POISON._replace(**{name: 1.1 * levels.gate})], levels) == [False]


def test_a_gap_that_rows_lie_in_is_proven_at_the_gate_also_of_kin():
    levels = Levels.of(0.008, 400)
    for kin in (False, True):
        empty, filled = POISON._replace(p_valley=2e-4, valley=0.05), POISON._replace(p_valley=2e-4, valley=0.29)
        assert stands([group(0)], [empty], levels, kin=kin) == [True]
        assert stands([group(0)], [filled], levels, kin=kin) == [False]
        assert stands([group(0)], [filled._replace(p_valley=0.9 * levels.gate)], levels, kin=kin) == [True]


def test_the_group_nearest_to_other_classes_is_asked_first_and_of_equal_ones_the_largest():
    levels = Levels.of(0.008, 400)
    p_value = 0.3 * levels.rest  # falls at three quarters of the level, not at three sixteenths
    faint = POISON._replace(p_foreign=p_value, apart=0.34)
    mixed = POISON._replace(p_foreign=0.01, apart=0.6)
    assert stands([group(0, 40), group(0)], [mixed, faint], levels) == [False, True]
    part = POISON._replace(p_foreign=0.01, apart=0.31)
    assert stands([group(0, 12), group(0, 15)], [part, faint], levels) == [False, True]


def test_p_values_are_corrected_so_that_a_group_stands_where_its_own_is_at_most_alpha():
    levels = Levels.of(0.008, 100)
    groups = [group(label) for label in (0, 1, 2)]
    third = levels.rest / 3
    evidence = [POISON, POISON._replace(p_foreign=0.9 * third), POISON._replace(p_foreign=1.1 * third)]
    verdicts, classes = verdicts_on(groups, evidence, levels)
    assert classes == 3 and [verdict.poison for verdict in verdicts] == [True, True, False]
    assert verdicts[0].p_value == 0.0 and verdicts[1].p_value < 0.01 < verdicts[2].p_value


def test_of_kin_transfer_and_nearness_are_not_asked():
    levels = Levels.of(0.008, 400)
    carrier = POISON._replace(p_transfer=1.0, p_nearer=1.0)
    assert stands([group(0)], [carrier], levels, kin=True) == [True]
    assert stands([group(0)], [carrier], levels) == [False]
    assert stands([group(0)], [carrier._replace(p_company=1.1 * levels.gate)], levels, kin=True) == [False]


def clusters_with(further):
    """Poisoned clusters, of which the first half of the poison is proven, and a verdict that takes `further`, too."""
    planted = poisoned_clusters(poison=80)
    here, rows = world(planted), (planted.y == 0).nonzero().flatten()
    bad = planted.is_poison[rows]
    first = bad & (bad.cumsum(dim=0) <= 40)
    more = bad & ~first if further == "poison" else ~bad & ((~bad).cumsum(dim=0) <= 40)
    found = [ClassSearch(here, 0, rows).described(side) for side in (first, first | more)]
    verdicts = [Verdict(found[0], POISON, 0.0, poison=True), Verdict(found[1], POISON, 0.0, poison=True)]
    return here, verdicts, first, more


@pytest.mark.parametrize("further", ["poison", "honest"])
def test_what_another_verdict_takes_beyond_the_strongest_is_joined_where_it_works_by_itself(further):
    here, verdicts, first, more = clusters_with(further)
    whole = _joined(here, verdicts, 1e-6).group.inside
    assert torch.equal(whole, first | more if further == "poison" else first)
