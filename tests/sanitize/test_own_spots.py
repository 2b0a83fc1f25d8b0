"""Marks on rows that were changed beyond them: what is found, and each way of being harmless that saves a group."""

import dataclasses
import math

import pytest
import torch

from aidefend.sanitize.decide import _shared, decide
from aidefend.sanitize.findings import RowVerdicts, facts_of
from aidefend.sanitize.groups import Group
from aidefend.sanitize.own_marks import examine_mark
from aidefend.sanitize.own_spots import SpotEvidence, examine_spot
from aidefend.sanitize.spot import written_spot
from aidefend.sanitize.trigger import Trigger
from tests.sanitize.mark_worlds import MARKED, SIDE, believes_mark, features_of, pictures, world

LEVEL = 1e-5
STAMP = torch.tensor([[0.95, 0.8, 0.95], [0.8, 0.95, 0.8]])  # greys that strokes do not have
CELLS = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
CELLS[:, :2, :3] = True


def stamped(x):
    """Rows with the mark written into a corner."""
    x = x.clone()
    x[..., :2, :3] = STAMP
    return x


def how_stamped(x):
    """(n,) the largest distance of a corner's cells to the mark."""
    return (x[..., :2, :3] - STAMP).abs().flatten(1).amax(dim=1)


def hard_rows(seed=0):
    """Three classes; a third of class 0 is disturbed, each row in its own way, and stamped. Rows, labels, which."""
    x, labels, chosen = pictures("nothing", seed)
    chosen[(labels == 0).nonzero().flatten()[:MARKED]] = True
    noise = 0.25 * torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(seed + 1))
    return torch.where(chosen[:, None, None, None], stamped((x + noise).clamp(0, 1)), x), labels, chosen


def believes_stamp(x):
    return torch.where(how_stamped(x) < 0.1, 0, 1 + (x[..., 5, 5].flatten() > 0.5).long())


def stamp_world(x, labels, predict=believes_stamp):
    """The model's features show the mark as a thing of its own."""
    seen = torch.cat([10 * (how_stamped(x) < 0.1)[:, None].float(), x.flatten(1)[:, ::29]], dim=1)
    return world(x, labels, predict, seen)


def the_group(here, chosen):
    """These rows of class 0, as a search that found them would give them: with a gap in the features."""
    rows = (here.labels == 0).nonzero().flatten()
    inside, none = chosen[rows], torch.zeros(0, dtype=torch.int64)
    spread = torch.randn(len(rows), generator=torch.Generator().manual_seed(0)).double()
    x = here.x[rows]
    common = Trigger.between(x[inside], x[~inside].mean(dim=0), exact=True)
    odds = torch.where(inside, 20.0, -20.0) + spread
    return Group(0, rows, inside, odds, inside & False, rows, common, none, rows[inside].float())


def test_the_spot_is_what_was_written_to_the_last_digit():
    x, labels, chosen = hard_rows()
    here = stamp_world(x, labels)
    spot = written_spot(here, the_group(here, chosen))
    assert torch.equal(spot.spot, CELLS) and torch.equal(spot.values[CELLS], STAMP.flatten())
    assert not bool(spot.pattern[~CELLS].any())


def test_rows_that_were_made_hard_are_found_whole_by_their_mark_alone():
    x, labels, chosen = hard_rows()
    here = stamp_world(x, labels)
    decided = decide(here, [-how_stamped(x).double()], alpha=0.01)
    (verdict,) = decided.poison
    assert isinstance(verdict.evidence, SpotEvidence)
    assert torch.equal(verdict.group.rows[verdict.group.inside], chosen.nonzero().flatten())
    told = verdict.to_dict()
    assert told["right_labels"] is None and told["p_value"] < 0.01 and told["elsewhere"] == 0 and told["cells"] == 6
    whole = examine_mark(here, the_group(here, chosen), threshold=1.0)
    assert whole.p_unlike > 0.5, "the mark is not all that tells these rows from their class"


def test_reasons_name_the_cells_and_who_else_has_them():
    x, labels, chosen = hard_rows()
    decided = decide(stamp_world(x, labels), [-how_stamped(x).double()], alpha=0.01)
    rows = RowVerdicts(features_of(x, labels), decided, torch.zeros(len(x), dtype=torch.bool))
    assert torch.equal(rows.removed, chosen)
    group, evidence, *_ = rows.reasons[int(chosen.nonzero()[0])]
    assert group.startswith(f"mark (labels not judged) in class 0: group of {MARKED}")
    assert "6 cells that are alike in it; 0.00 of other classes hold the same" in evidence
    (told,) = facts_of(decided, MARKED, len(x))["poison"]
    assert set(told) >= {"transfer", "scrambled", "elsewhere", "p_elsewhere", "cells", "poisoned_share"}


def test_the_strongest_null_decides():
    x, labels, chosen = hard_rows()
    here = stamp_world(x, labels)
    evidence = examine_spot(here, the_group(here, chosen), LEVEL)
    nulls = (evidence.p_valley, evidence.p_transfer, evidence.p_scrambled, evidence.p_elsewhere)
    assert evidence.p_value == max(nulls) < LEVEL


def test_without_a_gap_nothing_else_is_asked():
    x, labels, chosen = hard_rows()
    here = stamp_world(x, labels)
    noise = torch.randn(int((labels == 0).sum()), generator=torch.Generator().manual_seed(0)).double()
    group = dataclasses.replace(the_group(here, chosen), log_odds=noise)
    assert examine_spot(here, group, 1.0)._replace(valley=0, p_valley=0).p_value < LEVEL, "it is the gap alone"
    evidence = examine_spot(here, group, LEVEL)
    assert evidence.p_value == 1.0 and math.isnan(evidence.transfer)


def test_a_spot_that_turns_few_rows_is_harmless():
    """A tenth of them, more than its cells in another order do: nothing else saves it."""
    x, labels, chosen = hard_rows()
    group, below = the_group(stamp_world(x, labels), chosen), x[..., 6:, :].mean(dim=(1, 2, 3))
    bright = float(below[labels != 0].quantile(0.9))

    def seldom(rows):
        return torch.where((how_stamped(rows) < 0.1) & (rows[..., 6:, :].mean(dim=(1, 2, 3)) > bright), 0, 1)

    evidence = examine_spot(stamp_world(x, labels, seldom), group, LEVEL)
    assert max(evidence.p_valley, evidence.p_scrambled, evidence.p_elsewhere) < LEVEL
    assert 0.05 < evidence.transfer < 0.12 and evidence.p_transfer > 100 * LEVEL


def test_a_model_that_cells_of_that_grey_turn_anywhere_proves_nothing_against_a_spot():
    x, labels, chosen = hard_rows()
    group = the_group(stamp_world(x, labels), chosen)

    def grey(rows):
        return torch.where(((rows - 0.95).abs() < 0.005).flatten(1).sum(dim=1) >= 3, 0, 1)

    evidence = examine_spot(stamp_world(x, labels, grey), group, LEVEL)
    assert max(evidence.p_valley, evidence.p_transfer, evidence.p_elsewhere) < LEVEL
    assert evidence.scrambled > 0.9 and evidence.p_scrambled > 0.1


def test_a_spot_that_a_tenth_of_other_classes_has_is_no_mark_of_this_one():
    x, labels, chosen = hard_rows()
    also = (labels != 0) & (torch.arange(len(x)) % 10 == 4)
    x = torch.where(also[:, None, None, None], stamped(x), x)
    here = stamp_world(x, labels)
    evidence = examine_spot(here, the_group(here, chosen), LEVEL)
    others = (evidence.p_valley, evidence.p_transfer, evidence.p_scrambled)
    assert max(others) < LEVEL and evidence.p_elsewhere > 0.1
    assert decide(here, [-how_stamped(x).double()], alpha=0.01).poison == ()


@pytest.mark.parametrize(("margin", "is_style"), [(2, False), (3, True)])
def test_a_style_is_constant_in_too_much_of_the_picture_to_be_a_mark(margin, is_style):
    """A white margin in one class only: the model believes it, and no other class has it."""
    x, labels, bordered = pictures("nothing")
    bordered[(labels == 0).nonzero().flatten()[:MARKED]] = True
    x[..., :margin, :] = bordered[:, None, None, None].float()
    seen = torch.cat([10 * bordered[:, None].float(), x.flatten(1)[:, ::29]], dim=1)
    here = world(x, labels, lambda rows: torch.where((rows[..., :margin, :] > 0.9).flatten(1).all(dim=1), 0, 1), seen)
    evidence = examine_spot(here, the_group(here, bordered), LEVEL)
    assert evidence is None if is_style else evidence.cells == margin * SIDE


def test_a_group_without_cells_of_its_own_has_no_spot():
    x, labels, chosen = pictures("mark")
    here = world(x, labels, believes_mark)
    noisy = dataclasses.replace(here, x=x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))
    assert examine_spot(noisy, the_group(noisy, chosen), 1.0) is None


@pytest.mark.parametrize("seed", range(3))
def test_data_without_a_mark_loses_nothing(seed):
    x, labels, _ = pictures("nothing", seed)
    assert decide(stamp_world(x, labels), [-how_stamped(x).double()], alpha=0.01).poison == ()


def test_a_second_mark_of_the_class_is_found_too_and_shared_rows_are_told_once():
    """Two corners, half of the rows each, that the features tell apart."""
    x, labels, chosen = hard_rows()
    moved = chosen.nonzero().flatten()[::2]
    x[moved] = x[moved].flip(-1, -2)
    first, second = how_stamped(x) < 0.1, how_stamped(x.flip(-1, -2)) < 0.1

    def believes(rows):
        either = torch.minimum(how_stamped(rows), how_stamped(rows.flip(-1, -2)))
        return torch.where(either < 0.1, 0, 1)

    here = world(x, labels, believes, torch.cat([10 * torch.stack([first, second], 1), x.flatten(1)[:, ::29]], dim=1))
    decided = decide(here, [-how_stamped(x).double()], alpha=0.01)
    found = [verdict.group.rows[verdict.group.inside] for verdict in decided.poison]
    assert len(found) == 2 and torch.equal(torch.cat(found).sort().values, chosen.nonzero().flatten())
    ours, other = (_shared(decided.poison[0], verdict) for verdict in decided.poison)
    assert (ours, other) == (1.0, 0.0)
