"""Marks with right labels: what is found, and each way of being harmless that saves a group."""

import dataclasses

import pytest
import torch

from aidefend.sanitize.decide import decide
from aidefend.sanitize.findings import RowVerdicts, facts_of
from aidefend.sanitize.groups import Group
from aidefend.sanitize.own_marks import MarkEvidence, examine_mark, marked_groups, unlike_marked
from aidefend.sanitize.trigger import Trigger
from tests.sanitize.mark_worlds import (
    A_CLASS,
    MARKED,
    SIDE,
    believes_mark,
    checks,
    contrast,
    features_of,
    pictures,
    roughness,
    search,
    world,
)


def evidence_of(here, score, chosen):
    """The evidence of the group that consists of these rows."""
    groups = marked_groups(search(here, score))
    (group,) = [one for one in groups if torch.equal(one.rows[one.inside], chosen.nonzero().flatten())]
    return examine_mark(here, group, threshold=1.0)


@pytest.fixture(scope="module")
def decided():
    x, labels, _ = pictures()
    return decide(world(x, labels, believes_mark), [contrast(x).double()], alpha=0.01)


def test_a_constant_mark_that_the_model_believes_is_found_whole_and_nothing_else(decided):
    _, _, marked = pictures()
    (verdict,) = decided.poison
    told = verdict.to_dict()
    assert told["right_labels"] and told["class"] == 0 and told["p_value"] < 0.01
    assert torch.equal(verdict.group.rows[verdict.group.inside], marked.nonzero().flatten())
    assert told["transfer"] > 0.9 and told["scrambled"] < 0.2 and told["unlike"] < 0.65
    assert 0 not in {one.group.label for one in decided.harmless}


def test_reasons_say_that_the_labels_are_right_and_what_the_mark_does(decided):
    x, labels, marked = pictures()
    rows = RowVerdicts(features_of(x, labels), decided, torch.zeros(len(x), dtype=torch.bool))
    assert torch.equal(rows.removed, marked) and torch.equal(rows.p_values < 0.01, marked)
    group, evidence, *_ = rows.reasons[int(marked.nonzero()[0])]
    assert group.startswith(f"mark with right labels in class 0: group of {MARKED} of its {A_CLASS} rows")
    assert "constant mark" in evidence and "turns 1.00 of rows of other classes into 0" in evidence
    (told,) = facts_of(decided, MARKED, len(x))["poison"]
    assert told["looks_like"] == {}, "rows that look like no other class are not counted as class 0"
    assert told["right_labels"] and set(told) >= {"transfer", "scrambled", "unlike", "p_unlike", "poisoned_share"}


def test_the_strongest_null_decides():
    x, labels, marked = pictures()
    evidence = evidence_of(world(x, labels, believes_mark), contrast(x), marked)
    nulls = (evidence.p_valley, evidence.p_transfer, evidence.p_scrambled, evidence.p_unlike)
    assert evidence.p_value == max(nulls) < 1e-5


def test_a_style_is_no_constant_mark_though_the_model_believes_it():
    """Negatives in one class only: the model takes every negative for the class, and is right about this data."""
    x, labels, negative = pictures("negative")
    brightness = x.mean(dim=(1, 2, 3))
    middle = (brightness[negative].min() + brightness[~negative].max()) / 2

    def believes(rows):
        return torch.where(rows.mean(dim=(1, 2, 3)) > middle, 0, 1)

    features = torch.cat([10 * negative[:, None].float(), x.flatten(1)[:, ::29]], dim=1)
    here = world(x, labels, believes, features)
    evidence = evidence_of(here, brightness, negative)
    assert evidence.p_valley < 1e-5 and evidence.p_transfer < 1e-5, "it stands apart and works: only its form saves it"
    assert evidence.unlike > 0.75 and evidence.p_unlike > 0.5
    assert decide(here, [brightness.double()], alpha=0.01).poison == ()


def test_a_mark_that_the_model_does_not_read_is_harmless():
    x, labels, _ = pictures()
    here = world(x, labels, lambda rows: torch.ones(len(rows), dtype=torch.int64))
    assert marked_groups(search(here, contrast(x))) == []
    group = marked_groups(search(world(x, labels, believes_mark), contrast(x)))[0]
    assert examine_mark(here, group, threshold=1.0).p_transfer == 1.0


def test_a_model_that_any_roughness_turns_proves_nothing_against_a_mark():
    x, labels, marked = pictures()
    middle = (roughness(x[marked]).min() + roughness(x[~marked]).max()) / 2
    here = world(x, labels, lambda rows: torch.where(roughness(rows) > middle, 0, 1))
    evidence = evidence_of(here, contrast(x), marked)
    assert evidence.transfer > 0.9 and evidence.p_scrambled > 0.01


def test_without_a_gap_nothing_else_is_asked():
    x, labels, _ = pictures()
    here = world(x, labels, believes_mark)
    group = marked_groups(search(here, contrast(x)))[0]
    noise = torch.randn(len(group.rows), generator=torch.Generator().manual_seed(0)).double()
    evidence = examine_mark(here, dataclasses.replace(group, log_odds=noise), threshold=1e-5)
    assert evidence.p_value == 1.0 and evidence.transfer != evidence.transfer


@pytest.mark.parametrize("seed", range(3))
def test_data_without_a_mark_loses_nothing(seed):
    x, labels, _ = pictures("nothing", seed)
    assert decide(world(x, labels, believes_mark), [contrast(x).double()], alpha=0.01).poison == ()


def known_group(here, chosen, pattern):
    """These rows of class 0 with a pattern that was not estimated."""
    rows = (here.labels == 0).nonzero().flatten()
    inside, none = chosen[rows], torch.zeros(0, dtype=torch.int64)
    trigger = Trigger(pattern, pattern, pattern.abs() > 0.1)
    return Group(0, rows, inside, inside.double(), inside & False, rows, trigger, none, rows[inside].float())


@pytest.mark.parametrize(("style", "low", "high"), [("mark", 0.3, 0.6), ("negative", 0.75, 1.0)])
def test_with_the_true_mark_on_the_rest_is_as_near_to_the_group_as_to_itself(style, low, high):
    x, labels, chosen = pictures(style)
    here = world(x, labels, believes_mark)
    pattern = checks().unsqueeze(0) if style == "mark" else (x[chosen].mean(dim=0) - x[~chosen & (labels == 0)].mean(0))
    unlike, p_value = unlike_marked(here, known_group(here, chosen, pattern), torch.Generator().manual_seed(0))
    assert low < unlike <= high and (p_value < 1e-6) == (style == "mark")


def test_without_the_mark_on_the_rest_stays_unlike():
    x, labels, chosen = pictures()
    here = world(x, labels, believes_mark)
    nothing = torch.zeros(1, SIDE, SIDE)
    assert unlike_marked(here, known_group(here, chosen, nothing), torch.Generator().manual_seed(0)) == (1.0, 1.0)


def test_in_a_table_a_shared_value_is_an_ordinary_thing():
    x, labels, _ = pictures()
    here = world(x, labels, believes_mark)
    found = search(here, contrast(x))
    found.world = dataclasses.replace(here, x=x.flatten(1))
    assert marked_groups(found) == []


@pytest.mark.parametrize(("valley", "found"), [(0.03, True), (0.26, False)])
def test_a_gap_that_rows_lie_in_saves_a_mark_however_small_the_p_values(monkeypatch, valley, found):
    x, labels, _ = pictures()
    certain = MarkEvidence(valley, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    monkeypatch.setattr("aidefend.sanitize.decide.examine_mark", lambda *_: certain)
    monkeypatch.setattr("aidefend.sanitize.decide.examine_spot", lambda *_: None)
    assert bool(decide(world(x, labels, believes_mark), [contrast(x).double()], alpha=0.01).poison) == found
