"""One table of what to do with each row: quarantine, relabel, down-weight, keep, each with its reasons."""

import json

import pytest
import torch

from aidefend import ConfigurationError, Report
from aidefend.sanitize import Decisions, ScreenReport, screen
from aidefend.sanitize.decisions import decisions_of
from tests.worlds import poisoned_clusters

WRONG, COPIES, FAR = 3, (40, 41, 42), 77


@pytest.fixture(scope="module")
def world():
    """Poison, some wrong labels, one row three times, one far out: the truth of each is known."""
    planted = poisoned_clusters(poison=30, per_class=70, seed=2)
    clean = (~planted.is_poison).nonzero().flatten()
    order = torch.cat([clean, planted.is_poison.nonzero().flatten()])
    x, y = planted.x[order].clone(), planted.y[order].clone()
    true = int(y[WRONG])
    y[WRONG] = (true + 1) % 4
    x[list(COPIES)], y[list(COPIES)] = x[COPIES[0]].clone(), y[COPIES[0]].clone()
    x[FAR] *= 8
    return x, y, len(clean), true


@pytest.fixture(scope="module")
def report(world):
    x, y = world[0].clone(), world[1].clone()
    found = screen((x, y), seed=0)
    assert torch.equal(x, world[0]) and torch.equal(y, world[1])  # nothing is dropped or relabelled in place
    return found


def test_each_kind_of_finding_leads_to_its_decision_and_weight(world, report):
    _, _, clean, true = world
    table = report.decisions()
    assert isinstance(table, Decisions) and len(table) == len(report)
    assert table.rows("quarantine").tolist() == list(range(clean, len(report)))
    assert table.actions[WRONG] == "relabel" and int(table.proposed_labels[WRONG]) == true
    assert 0 <= float(table.weights[WRONG]) <= 0.1  # the score is at least .95
    copies = [row for row in COPIES if table.actions[row] == "down-weight"]
    assert len(copies) == 2 and all(float(table.weights[row]) == pytest.approx(1 / 3) for row in copies)
    assert table.actions[FAR] == "down-weight" and float(table.weights[FAR]) < 1
    assert bool((table.weights[table.rows("keep")] == 1).all()) and bool((table.proposed_labels >= -1).all())
    assert sum(table.counts().values()) == len(report)


def test_every_decision_has_reasons_and_a_planted_one_without_grounds_is_caught(report):
    def without_grounds(table):
        return [row for row in range(len(table)) if table.actions[row] != "keep" and len(table.reasons[row]) < 2]

    table = report.decisions()
    assert all(words for reasons in table.reasons for words in reasons) and all(table.reasons)
    assert without_grounds(table) == []
    reasons = tuple(() if row == WRONG else said for row, said in enumerate(report.reasons))
    silenced = ScreenReport(report.ids, report.keep, reasons=reasons, columns=report.columns)
    assert without_grounds(silenced.decisions()) == [WRONG]


def test_weights_of_the_report_and_of_the_table_are_one_convention(report):
    table = report.decisions()
    assert torch.equal(report.weights(), table.weights)
    assert float(report.weights(least=0.5)[report.keep].min()) == 0.5


def test_the_table_survives_saving_lines_and_the_page(report, tmp_path):
    report.save(tmp_path / "report")
    back, table = ScreenReport.load(tmp_path / "report").decisions(), report.decisions()
    assert back.actions == table.actions and back.reasons == table.reasons
    assert torch.equal(back.weights, table.weights) and torch.equal(back.proposed_labels, table.proposed_labels)
    report.to_jsonl(tmp_path / "rows.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["action"] for line in lines] == list(table.actions)
    assert lines[WRONG]["proposed_label"] == int(table.proposed_labels[WRONG]) and lines[0]["proposed_label"] is None
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "relabel to" in page and "Rows that stay, with a proposal" in page


def test_trusted_and_released_rows_weigh_one_and_have_no_proposal(world, report):
    x, y, clean, _ = world
    trusted = screen((x, y), trusted=[WRONG, FAR, clean], seed=0).decisions()
    assert [trusted.actions[row] for row in (WRONG, FAR, clean)] == ["keep"] * 3
    assert "kept: the row is trusted" in trusted.reasons[clean]
    released = report.release([report.ids[clean]], by="R. Roe", why="seen by eye").decisions()
    assert released.actions[clean] == "keep" and float(released.weights[clean]) == 1
    assert released.actions[clean + 1] == "quarantine"


def test_of_a_plain_report_the_verdicts_are_the_table_and_joined_reports_keep_their_columns(report):
    plain = decisions_of(Report(["a", "b"], torch.tensor([True, False]), reasons=[(), ("too far",)]))
    assert plain.actions == ("keep", "quarantine") and plain.weights.tolist() == [1.0, 0.0]
    other = Report(list(reversed(report.ids)), torch.ones(len(report), dtype=torch.bool))
    assert torch.equal((report & other).columns["weight"], report.columns["weight"])
    with pytest.raises(ConfigurationError, match="action"):
        report.decisions().rows("delete")
    with pytest.raises(ConfigurationError, match="weight"):
        Report(["a"], torch.tensor([True]), columns={"weight": torch.ones(2)})
