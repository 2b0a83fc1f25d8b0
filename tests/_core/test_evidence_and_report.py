"""Evidence and reports: byte-identical, tamper-evident, markup-safe, and lossless through files."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from aidefend import Evidence, Finding, Report, Severity
from aidefend._core.report import reasons_by_row


def example() -> Evidence:
    findings = [
        Finding("a.share", "Share", Severity.HIGH, 0.5, 0.4, 0.6, 9, {"seed": 1}, "linf", "one seed", {"cwe": "CWE-1"}),
        Finding("b.skipped", "Skipped", status="not tested"),
    ]
    return Evidence(findings, {"seed": 1, "run": {"time": "now"}})


def test_json_round_trip_is_byte_identical(tmp_path):
    first = example().to_json(tmp_path / "e.json")
    assert first == example().to_json() == (tmp_path / "e.json").read_text()
    again = Evidence.from_dict(json.loads(first))
    assert again.to_json() == first
    assert again["a.share"].severity is Severity.HIGH and "b.skipped" in again and "c" not in again
    with pytest.raises(KeyError):
        again["c"]


def test_time_and_secure_randomness_are_outside_the_digest():
    base = example()
    later = Evidence(base.findings, {**base.metadata, "run": {"time": "later"}})
    noisy = base + Evidence([Finding("c.noise", "Noise", value=0.1, deterministic=False)])
    assert base.digest == later.digest == noisy.digest
    assert base.digest != (base + Evidence([Finding("c", "C", value=0.1)])).digest
    assert base.digest != Evidence(base.findings, {"seed": 2}).digest


def test_edited_evidence_is_refused():
    data = example().to_dict()
    data["findings"][0]["value"] = 0.9
    with pytest.raises(ValueError, match="changed after export"):
        Evidence.from_dict(data)
    with pytest.raises(ValueError, match="schema"):
        Evidence.from_dict({"findings": []})
    with pytest.raises(ValueError, match="unknown keys"):
        Finding.from_dict({"id": "a", "title": "b", "colour": 1})
    with pytest.raises(ValueError, match="status"):
        Finding("a", "b", status="safe")


def test_non_finite_values_are_strict_json():
    text = Evidence([Finding("a", "A", value=math.inf, low=math.nan)]).to_json()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["findings"][0]["value"] == "inf"


def test_markdown_cannot_be_injected():
    text = Evidence([Finding("a", "x | y\n<script>", value="|", limits="<b>\n")]).to_markdown()
    assert "<script" not in text and "<b>" not in text
    row = next(line for line in text.splitlines() if "`a`" in line and line.startswith("|"))
    assert row.replace("\\|", "").count("|") == 7


def test_severity_orders():
    assert Severity.INFO < Severity.LOW < Severity.MEDIUM < Severity.HIGH < Severity.CRITICAL == example().worst + 1
    assert Evidence().worst is Severity.INFO


def judged(n: int = 4) -> Report:
    keep = torch.tensor([True, False, True, False])[:n]
    reasons = reasons_by_row(n, [(1, "too far"), (3, "too far"), (3, "twice"), (0, "note")])
    scores = {"s": torch.tensor([0.1, 0.9, math.nan, 0.8])[:n]}
    return Report(tuple("abcd"[:n]), keep, scores, {"p": torch.rand(n)}, reasons, "filter", {"k": 3}, "patch", "none")


def test_report_views_and_counts():
    report = judged()
    data = TensorDataset(torch.arange(4.0), torch.arange(4))
    assert [int(y) for _, y in report.view(data)] == [0, 2] == report.keep_indices.tolist()
    assert [int(y) for _, y in report.quarantine(data)] == [1, 3] == report.quarantine_indices.tolist()
    assert [int(y) for _, y in report.view((torch.arange(4.0), torch.arange(4)))] == [0, 2]
    assert len(report.view(np.arange(4))) == 2
    assert report.counts() == {"too far": 2, "twice": 1}
    assert report.summary() == "filter: 2 of 4 rows kept, 2 not (too far: 2, twice: 1)"
    with pytest.raises(ValueError, match="the 4 samples that were judged"):
        report.view(torch.arange(5))
    finding = report.to_evidence()["filter.rejected_share"]
    assert (finding.value, finding.n) == (0.5, 4) and finding.low < 0.5 < finding.high


def test_report_file_round_trip(tmp_path):
    report = judged()
    report.save(tmp_path / "r.safetensors")
    again = Report.load(tmp_path / "r.safetensors")
    assert again.to_dict() == report.to_dict() and again.reasons == report.reasons
    (tmp_path / "bad").write_bytes(b"not a report")
    with pytest.raises(ValueError, match=r"Report\.save"):
        Report.load(tmp_path / "bad")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["bad", "r.safetensors"]


@given(st.permutations(range(4)))
def test_joining_reports_matches_rows_by_id(order):
    left = judged()
    keep = torch.tensor([True, True, False, True])
    right = Report(
        tuple(left.ids[i] for i in order), keep[list(order)], {"s": torch.arange(4.0)[list(order)]}, method="other"
    )
    both = left & right
    assert both.keep.tolist() == [True, False, False, False]
    assert both.scores["other/s"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert torch.equal(both.scores["s"], left.scores["s"]) or torch.isnan(both.scores["s"][2])
    assert both.keep.tolist() == (right & left).keep[[right.ids.index(name) for name in left.ids]].tolist()


def test_malformed_reports_are_refused():
    keep = torch.tensor([True, True])
    for bad in (
        lambda: Report(["a", "a"], keep),
        lambda: Report(["a"], keep),
        lambda: Report(["a", "b"], torch.tensor([1, 1])),
        lambda: Report(["a", "b"], keep, {"s": torch.rand(3)}),
        lambda: Report(["a", "b"], keep, reasons=((),)),
        lambda: Report(["a", "b"], keep) & Report(["a", "c"], keep),
    ):
        with pytest.raises(ValueError, match="Expected"):
            bad()


def test_an_empty_report():
    empty = Report((), torch.zeros(0, dtype=torch.bool))
    assert empty.summary() == "report: 0 of 0 rows kept, 0 not"
    assert empty.to_evidence().findings[0].status == "not tested"
    assert len(empty.view(torch.zeros(0, 3))) == 0
