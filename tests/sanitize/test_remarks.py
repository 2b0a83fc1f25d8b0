"""What a screen says of single rows: a remark in auto, a quarantine when the detector was named."""

import pytest
import torch

from aidefend.sanitize import ConfidentLearning, NearDuplicates, NeighbourDisagreement, Outliers, screen
from aidefend.sanitize.choose import OVERLAID_AT_MOST, chosen_for
from aidefend.sanitize.features import Features
from aidefend.sanitize.out_of_fold import out_of_fold_logits
from tests.worlds import poisoned_clusters

WRONG, COPY, FAR = 3, 40, 77


@pytest.fixture(scope="module")
def world():
    """Clean clusters, in which some labels are wrong, one row is a copy of another, and one lies far out."""
    clean = poisoned_clusters(poison=1, per_class=100, seed=2)
    x, y = clean.x[~clean.is_poison].clone(), clean.true_y[~clean.is_poison].clone()
    true = int(y[WRONG])
    y[WRONG::31] = (y[WRONG::31] + 1) % 4
    x[COPY], y[COPY] = x[COPY + 1], y[COPY + 1]
    x[FAR] *= 8
    return x, y, true


def row_with(report, words):
    return [row for row, reasons in enumerate(report.reasons) if any(words in reason for reason in reasons)]


def test_in_auto_they_are_remarks_and_nothing_is_quarantined(world):
    x, y, true = world
    report = screen((x, y), seed=0)
    assert bool(report.keep.all())
    assert WRONG in row_with(report, f"kept: wrong label: labelled {int(y[WRONG])}, proposed {true}")
    wrong = set(range(WRONG, len(y), 31))
    assert len(wrong & set(row_with(report, "wrong label"))) >= 0.8 * len(wrong)
    assert len(set(row_with(report, "wrong label")) - wrong) <= 3
    assert row_with(report, "kept: near duplicate of row") in ([COPY], [COPY + 1])
    assert FAR in row_with(report, "kept: outlier")
    remarks = report.parameters["remarks"]
    assert remarks["near_duplicates"] == 1 and 1 <= remarks["outliers"] <= 3


@pytest.mark.parametrize(
    ("detector", "row", "words"),
    [
        (ConfidentLearning(), WRONG, "wrong label"),
        (NearDuplicates(), COPY, "near duplicate"),
        (Outliers(), FAR, "outlier"),
    ],
)
def test_named_detectors_quarantine_the_rows_they_flag(world, detector, row, words):
    x, y, _ = world
    report = screen((x, y), detectors=[detector], seed=0)
    rows = {row, row + 1} if words == "near duplicate" else {row}
    assert rows & set(report.quarantine_indices.tolist())
    assert len(report.quarantine_indices) <= 16
    assert report.quarantine_indices.tolist() == row_with(report, words)
    trusted = screen((x, y), detectors=[detector], trusted=sorted(rows), seed=0)
    assert not rows & set(trusted.quarantine_indices.tolist())


def test_what_was_chosen_is_said_with_reasons(world):
    x, y, _ = world
    plain = screen((x, y), seed=0).parameters["chosen_because"]
    assert {"source_evidence", "influence"}.isdisjoint(plain)
    names = [f"s{i % 3}" for i in range(len(y))]
    told = screen((x, y), sources=names, trusted=range(50, 90), seed=0)
    assert told.parameters["chosen_because"]["source_evidence"].startswith("sources")
    assert told.parameters["chosen_because"]["influence"].startswith("trusted rows")
    assert told.scores["source_evidence"].unique().numel() == 3
    named = screen((x, y), detectors=[NeighbourDisagreement()], seed=0)
    assert named.parameters["chosen_because"] == {"neighbour_disagreement": "named by the caller"}


def test_on_large_data_the_overlays_are_left_out_and_the_report_says_so():
    n = OVERLAID_AT_MOST + 1
    rows, ids = torch.zeros(n, 1), tuple(map(str, range(n)))
    found = Features(ids, rows, torch.zeros(n).long(), rows, torch.zeros(n, 2), torch.zeros(n), torch.ones(n) > 0)
    chosen = chosen_for("auto", found, lambda x: x, torch.zeros(n) > 0, None)
    assert "trigger_consistency" not in chosen.detectors
    assert chosen.why["trigger_consistency"].startswith("left out: 20 forward passes")


def test_out_of_fold_predictions_never_see_the_row_or_its_copy():
    """Labels that are noise cannot be predicted; a row that could see itself or its copy would be."""
    stream = torch.Generator().manual_seed(0)
    points = torch.randn(40, 30, generator=stream).repeat(10, 1)
    labels = torch.randint(0, 4, (40,), generator=stream).repeat(10)
    ids = [f"{i % 40:032x}-0#{i // 40}" for i in range(400)]
    right = (out_of_fold_logits(ids, points, labels).argmax(dim=1) == labels).double().mean()
    assert float(right) < 0.5


def test_out_of_fold_predictions_are_good_where_there_is_something_to_learn(world):
    x, y, _ = world
    ids = [f"{i:032x}-0" for i in range(len(y))]
    logits = out_of_fold_logits(ids, x, y)
    assert logits.shape == (len(y), 4) and logits.exp().sum(dim=1).allclose(torch.ones(len(y)).double())
    assert float((logits.argmax(dim=1) == y).double().mean()) > 0.95
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    moved = out_of_fold_logits([ids[i] for i in order.tolist()], x[order], y[order])
    torch.testing.assert_close(moved, logits[order], rtol=1e-6, atol=1e-6)
