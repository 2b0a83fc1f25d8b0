"""The AVID report has the published shape, measured findings only as results, and no settings."""

import json

import pytest

from aidefend import ConfigurationError, Evidence, Finding
from aidefend.collaborate import to_avid

METHODS = {"Significance Test", "Static Threshold"}


def evidence():
    return Evidence(
        [
            Finding("poisoning.asr", "Attack success", value=0.9, low=0.8, high=0.95, n=50, limits="one trigger",
                    setting={"secret": "row 17"}, mapping={"atlas": "AML.T0018, AML.T0020"}),
            Finding("artifacts.problems", "Problems", value=3, mapping={"atlas": "AML.T0010"}),
            Finding("membership.auc", "Membership", status="failed", mapping={"atlas": "AML.T0024.000"}),
            Finding("extraction.agreement", "Extraction", status="not tested", mapping={"other": "x"}),
            Finding("odd", "Odd", value=float("inf"), mapping={"atlas": "AML.M0015"}),
        ]
    )  # fmt: skip


def test_the_published_shape():
    report = to_avid(evidence(), artifact="digits", developer="us", deployer="them", date="2026-01-31")
    assert set(report) == {
        "data_type", "data_version", "metadata", "affects", "problemtype", "metrics", "references", "description",
        "impact", "credit", "reported_date",
    }  # fmt: skip
    assert report["data_type"] == "AVID" and report["reported_date"] == "2026-01-31"
    assert report["affects"] == {
        "developer": ["us"],
        "deployer": ["them"],
        "artifacts": [{"type": "Model", "name": "digits"}],
    }
    assert report["problemtype"]["classof"] == "Undefined" and report["problemtype"]["type"] == "Measurement"
    for text in (report["description"], report["problemtype"]["description"]):
        assert set(text) == {"lang", "value"} and text["lang"] == "eng"
    impact = report["impact"]["avid"]
    assert set(impact) == {"vuln_id", "risk_domain", "sep_view", "lifecycle_view", "taxonomy_version"}
    assert impact["risk_domain"] == ["Security"] and impact["lifecycle_view"] == ["L05: Evaluation"]
    assert impact["sep_view"] == [
        "S0200: Supply Chain Compromise",
        "S0201: Model Compromise",
        "S0301: Information Leak",
        "S0600: Data Poisoning",
    ]
    for metric in report["metrics"]:
        assert set(metric) == {"name", "detection_method", "results"}
        assert set(metric["detection_method"]) == {"type", "name"} and metric["detection_method"]["type"] in METHODS
    for reference in report["references"]:
        assert set(reference) == {"type", "label", "url"}
        assert reference["url"] == f"https://atlas.mitre.org/techniques/{reference['label']}"


def test_only_what_was_measured_is_a_result():
    report = to_avid(evidence())
    assert [metric["name"] for metric in report["metrics"]] == ["poisoning.asr", "artifacts.problems", "odd"]
    assert report["metrics"][0]["results"] == {"value": 0.9, "low": 0.8, "high": 0.95, "n": 50}
    assert [metric["detection_method"]["type"] for metric in report["metrics"][:2]] == [
        "Significance Test",
        "Static Threshold",
    ]
    lines = report["description"]["value"].splitlines()
    assert lines[0] == f"Evidence digest {evidence().digest}."
    assert "membership.auc: failed" in lines and "extraction.agreement: not tested" in lines
    assert "poisoning.asr: one trigger" in lines
    assert [reference["label"] for reference in report["references"]] == [
        "AML.T0010",
        "AML.T0018",
        "AML.T0020",
        "AML.T0024.000",
    ]


def test_strict_json_the_same_every_time_and_without_settings():
    text = json.dumps(to_avid(evidence()), allow_nan=False)
    assert text == json.dumps(to_avid(evidence()), allow_nan=False)
    assert "row 17" not in text and '"value": "inf"' in text
    assert json.loads(text) == to_avid(evidence())
    assert to_avid(Evidence())["metrics"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"evidence": {}}, "evidence, got"),
        ({"artifact": ""}, "a printable name"),
        ({"developer": "a\nb"}, "a printable name"),
        ({"deployer": 7}, "a printable name"),
        ({"date": "31.01.2026"}, "a day such as"),
        ({"date": "2026-02-30"}, "a day such as"),
        ({"date": None}, "a day such as"),
    ],
)
def test_malformed_calls_are_refused_by_name(arguments, message):
    call = {"evidence": evidence(), **arguments}
    with pytest.raises(ConfigurationError, match=message):
        to_avid(call.pop("evidence"), **call)
