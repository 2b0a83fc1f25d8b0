"""A trigger that was proven in one class is looked for in the others, where the model may turn nothing with it."""

import dataclasses

import pytest
import torch

from aidefend.sanitize.decide import Verdict, _with_kin, decide
from aidefend.sanitize.features import Features
from aidefend.sanitize.group_evidence import GroupEvidence, transfer_share
from aidefend.sanitize.groups import CARRIER_GROUPS, ClassSearch
from aidefend.sanitize.levels import Levels
from aidefend.sanitize.trigger import Trigger
from aidefend.sanitize.view import IndependentView
from aidefend.sanitize.world import world_of
from tests.worlds import PoisonedClusters

FIRST, SECOND = 90, 80
LEVELS = Levels(0.008, gate=1e-5, rest=1e-5, kin=1e-5)


def planted_twice(right_labels=False, first=FIRST):
    """Poison in class 0, and 80 rows with the same trigger in class 1: of classes 2 and 3, or of class 1 itself."""
    stream = torch.Generator().manual_seed(0)
    true_y = torch.arange(4).repeat(300)
    centres = 1.5 * torch.randn(4, 20, generator=stream)
    centres[:, :3] = 0.0  # the trigger writes over nothing that tells the classes
    x = centres[true_y] + 0.6 * torch.randn(len(true_y), 20, generator=stream)
    places = torch.arange(len(true_y))
    here = places[(true_y != 0) & (places < 600)][:first]
    there = places[((true_y == 1) if right_labels else (true_y >= 2)) & (places >= 600)][:SECOND]
    y, bad = true_y.clone(), torch.zeros(len(true_y), dtype=torch.bool)
    y[here], y[there], bad[here], bad[there] = 0, 1, True, not right_labels
    x[here, :3], x[there, :3] = 4.0, 4.0
    return PoisonedClusters(x, y, bad, true_y), there


def searched(planted):
    """A model for which the trigger always means class 0: with it no row turns into class 1."""
    centres = torch.stack([planted.x[(planted.y == c) & (planted.true_y == c)].mean(dim=0) for c in range(4)])

    def predict(x):
        return torch.where((x[:, :3] - 4).abs().mean(dim=1) < 1.0, 0, torch.cdist(x, centres).argmin(dim=1))

    n = len(planted.x)
    logits, losses, usable = torch.zeros(n, 4), torch.zeros(n), torch.ones(n, dtype=torch.bool)
    found = Features(tuple(map(str, range(n))), planted.x, planted.y, planted.x, logits, losses, usable)
    return world_of(found, IndependentView(planted.x, seed=0), predict, 0)


def convicted(decision):
    rows = [verdict.group.rows[verdict.group.inside] for verdict in decision.poison]
    return {verdict.group.label: set(part.tolist()) for verdict, part in zip(decision.poison, rows, strict=True)}


def test_carriers_of_a_trigger_are_found_whole_where_the_model_turns_nothing_with_it():
    planted, there = planted_twice()
    here = searched(planted)
    rows = {label: (planted.y == label).nonzero().flatten() for label in (0, 1)}
    told = Trigger.between(planted.x[planted.is_poison & (planted.y == 0)], planted.x[planted.y > 1].mean(dim=0))
    search = ClassSearch(here, 1, rows[1])
    own, carried = search.groups([]), search.carriers(told)
    assert not any(set(there.tolist()) == set(rows[1][group.inside].tolist()) for group in own)
    assert [rows[1][group.inside].tolist() for group in carried] == [there.tolist()] * CARRIER_GROUPS
    assert transfer_share(here, carried[0])[0] == 0.0


def verdict(world, label, inside, evidence, poison):
    """A verdict on some rows of a class, with the trigger as it was planted."""
    rows = (world.labels == label).nonzero().flatten()
    group = ClassSearch(world, label, rows).described(inside[rows])
    planted = Trigger.between(4.0 * (torch.arange(20) < 3).float().expand(2, 20), torch.zeros(20))
    return Verdict(dataclasses.replace(group, trigger=planted), evidence, 0.5, poison)


def _elsewhere():
    return Trigger.between(4.0 * (torch.arange(20) > 16).float().expand(2, 20), torch.zeros(20))


@pytest.mark.parametrize(("changed", "carries"), [({}, True), ({"p_company": 0.5}, False), ({"p_foreign": 0.5}, False)])
def test_kin_need_not_turn_rows_nor_lie_near_but_all_else_must_fall(changed, carries):
    planted, _ = planted_twice()
    here = searched(planted)
    nothing_turned = dict(zip(GroupEvidence._fields, (0.9, 0.0, 0.0, 0.0, 0.0, 1.0, 1.2, 1.0, 0.0, 0.0), strict=True))
    first = verdict(here, 0, planted.is_poison, GroupEvidence(0.9, 0, 1, 0, 0, 0, 0.5, 0, 0, 0), poison=True)
    other = verdict(here, 1, planted.is_poison, GroupEvidence(**nothing_turned | changed), poison=False)
    found = _with_kin(here, [first, other], [], LEVELS)
    assert [one.poison for one in found] == [True, carries] and [one.kin for one in found] == [False, carries]
    other_trigger = dataclasses.replace(other, group=dataclasses.replace(other.group, trigger=_elsewhere()))
    assert not _with_kin(here, [first, other_trigger], [], LEVELS)[1].poison
    assert _with_kin(here, [other], [], LEVELS) == [other]


def test_carriers_with_right_labels_are_kept():
    """Covers: they carry the trigger and belong to their class."""
    planted, _ = planted_twice(right_labels=True)
    assert set(convicted(decide(searched(planted), [], alpha=0.01))) == {0}


def test_carriers_are_kept_where_the_trigger_was_proven_nowhere():
    planted, _ = planted_twice(first=0)
    assert convicted(decide(searched(planted), [], alpha=0.01)) == {}


def test_carriers_spend_no_further_chance_of_their_own(monkeypatch):
    """They count as kin only: judged in full as well, they would take the share of ordinary proposals a second time."""
    planted, _ = planted_twice()
    here, rows = searched(planted), (planted.y == 1).nonzero().flatten()
    certain = GroupEvidence(1.0, 0, 1, 0, 0, 0, 0.5, 0.0, 0, 0)
    monkeypatch.setattr("aidefend.sanitize.decide.examine", lambda world, group, threshold: certain)
    group = ClassSearch(here, 1, rows).described(planted.is_poison[rows])
    assert [one.poison for one in _with_kin(here, [], [group], LEVELS)] == [False]
