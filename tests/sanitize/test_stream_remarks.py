"""Remarks on all rows of a stream: wrong labels, copies, outliers, sources; from disk, in bounded memory."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from aidefend.sanitize import FeatureStore, screen_stream
from aidefend.sanitize.moments import moments_of
from aidefend.sanitize.out_of_fold import FOLDS, FoldedHeads, fold_of, out_of_fold_logits
from aidefend.sanitize.stream_remarks import _copies, stream_remarks
from tests.worlds import poisoned_clusters

WRONG, COPIES, FAR, CONTRADICTED = tuple(range(3, 450, 31)), (40, 41, 42), 77, (50, 51)


@pytest.fixture(scope="module")
def world():
    """Clean clusters in which some labels are wrong, a row stands three times, one lies far out, two contradict."""
    clean = poisoned_clusters(poison=1, per_class=115, seed=2)
    x, y = clean.x[~clean.is_poison].clone(), clean.true_y[~clean.is_poison].clone()
    true = y.clone()
    for row in WRONG:
        y[row] = (y[row] + 1) % 4
    x[list(COPIES)], y[list(COPIES)] = x[COPIES[0]].clone(), y[COPIES[0]].clone()
    x[FAR] *= 8
    x[CONTRADICTED[1]] = x[CONTRADICTED[0]]
    return x, y, true


@pytest.fixture(scope="module")
def found(world, tmp_path_factory):
    x, y, _ = world
    sources = ["few" if row in WRONG[:4] else f"s{row % 5}" for row in range(len(y))]
    return screen_stream(
        zip(x, y, strict=True), nn.Sequential(nn.Identity(), nn.Linear(20, 4)), tmp_path_factory.mktemp("a"),
        sources=sources, groups=["g"] * len(y), rows_per_class=60, shard_rows=64, batch_size=50, seed=0,
    )  # fmt: skip


def test_each_kind_of_remark_is_made_and_quarantines_nothing(world, found):
    _, y, true = world
    assert bool(found.keep.all())
    rows = [row for block in found.rows(100) for row in block["reasons"]]
    proposed = found.remarks.proposed
    told = [row for row in WRONG if int(proposed[row]) == int(true[row])]
    assert WRONG[0] in told and len(told) >= 0.8 * len(WRONG)
    assert all(f"kept: wrong label: labelled {int(y[row])}, proposed {int(true[row])}" in rows[row][0] for row in told)
    assert int((proposed >= 0).sum()) <= len(told) + 3  # the two that contradict may be among them
    assert rows[COPIES[1]] == rows[COPIES[2]] == (f"kept: copy of row {COPIES[0]} (one of 3 with equal input)",)
    assert rows[COPIES[0]] == () and any(words.startswith("kept: outlier") for words in rows[FAR])
    assert all("kept: a row with equal input has another label" in rows[row] for row in CONTRADICTED)
    counts = found.parameters["remarks"]
    assert counts["near_duplicates"] == 3 and counts["contradicted"] == 2 and 1 <= counts["outliers"] <= 4


def test_weights_lines_and_the_report_follow_the_table_of_decisions(found, tmp_path):
    table = found.report().decisions()
    assert torch.equal(table.weights, found.weights()) and table.actions[WRONG[0]] == "relabel"
    assert float(table.weights[COPIES[1]]) == pytest.approx(1 / 3) and float(table.weights[FAR]) < 1
    found.to_jsonl(tmp_path / "rows.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["action"] for line in lines] == list(table.actions)
    assert [line["proposed_label"] for line in lines] == [n if n >= 0 else None for n in table.proposed_labels.tolist()]


def test_sources_and_groups_are_reported(found):
    assert found.parameters["sources"]["s1"]["removed"] == 0 and found.parameters["groups"]["g"]["rows"] == len(found)
    evidence = found.parameters["source_evidence"]
    assert "few" not in evidence and set(evidence) == {f"s{i}" for i in range(5)}  # four rows are too few to judge


def test_a_source_that_says_other_things_stands_out(world, tmp_path):
    x, y, _ = world
    y = y.clone()
    names = [f"s{row % 6}" for row in range(len(y))]
    y[2::6] = (y[2::6] + 1) % 4
    store = FeatureStore.write((x, y), nn.Linear(20, 4), tmp_path, shard_rows=200)
    evidence = stream_remarks(store, names, 0).sources
    assert max(evidence, key=lambda name: evidence[name]["excess"]) == "s2"


def test_neither_shards_nor_parts_of_the_keys_change_what_is_said(world, found, tmp_path):
    x, y, _ = world
    store = FeatureStore.write((x, y), nn.Sequential(nn.Identity(), nn.Linear(20, 4)), tmp_path, shard_rows=1000)
    again = stream_remarks(store, None, 0)
    assert torch.equal(again.proposed, found.remarks.proposed) and torch.equal(again.copies, found.remarks.copies)
    torch.testing.assert_close(again.gaps, found.remarks.gaps, rtol=1e-4, atol=1e-4)
    for at_once in (7, 100):  # keys that are looked at in many parts
        for one, other in zip(_copies(store, at_once), _copies(store), strict=True):
            assert torch.equal(one, other)


def test_copies_agree_with_a_dictionary(tmp_path):
    stream = np.random.default_rng(0)
    x, y = torch.from_numpy(stream.integers(0, 3, (300, 3))).float(), torch.from_numpy(stream.integers(0, 2, 300))
    copies, first, contradicted = _copies(FeatureStore.write((x, y), nn.Linear(3, 2), tmp_path))
    seen: dict[tuple, list[int]] = {}
    for row, values in enumerate(x.tolist()):
        seen.setdefault(tuple(values), []).append(row)
    for rows in seen.values():
        assert first[rows].tolist() == [-1] + [rows[0]] * (len(rows) - 1)
        assert copies[rows].tolist() == [0] + [len(rows)] * (len(rows) - 1)
        assert set(contradicted[rows].tolist()) == {len(set(y[rows].tolist())) > 1}


def test_heads_of_folds_are_those_of_the_whole_table(world):
    x, y, _ = world
    ids = [f"{row:032x}-0" for row in range(len(y))]
    fold = torch.tensor([fold_of(row_id, 0) for row_id in ids])
    parts = [moments_of(x[fold == number].double(), y[fold == number]) for number in range(FOLDS)]
    heads = FoldedHeads(parts, 4)
    blocks = [heads.logits(rows, mine) for rows, mine in zip(x.double().split(50), fold.split(50), strict=True)]
    torch.testing.assert_close(torch.cat(blocks), out_of_fold_logits(ids, x, y))


def test_wide_features_are_projected_and_rows_that_are_not_usable_have_no_remark(tmp_path):
    world = poisoned_clusters(poison=1, per_class=60, seed=3)
    x = torch.cat([world.x, torch.zeros(len(world.x), 100)], dim=1)
    x[7] = torch.nan
    store = FeatureStore.write((x, world.true_y), nn.Linear(120, 4), tmp_path)
    said = stream_remarks(store, None, 0)
    assert bool(said.wrong[7].isnan()) and float(said.weights()[7]) == 1 and said.words(7, 0) == []
    assert int((said.proposed >= 0).sum()) <= 3
