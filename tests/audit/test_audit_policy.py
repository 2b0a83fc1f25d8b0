"""The release gate fails closed, reads the unfavourable end, and refuses policies that say nothing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidefend._core.errors import ConfigurationError
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend.audit import AuditReport, Policy, compare

ACCURACY = Finding("evasion.robust_accuracy", "robust", Severity.LOW, 0.8, 0.75, 0.85, 200)
AUC = Finding("membership.auc", "auc", Severity.MEDIUM, 0.55, 0.5, 0.6, 400)
REPORT = AuditReport(Evidence([ACCURACY, AUC]))


def report(*findings):
    return AuditReport(Evidence(findings))


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"evasion.robust_accuracy": {"min": 0.75}}, 0),
        ({"evasion.robust_accuracy": {"min": 0.76}}, 1),
        ({"evasion.robust_accuracy": {"min": 0.76, "interval": "value"}}, 0),
        ({"interval": "value", "findings": {"evasion.robust_accuracy": {"min": 0.8}}}, 0),
        ({"membership.auc": {"max": 0.6}}, 0),
        ({"membership.auc": {"max": 0.59}}, 1),
        ({"membership": {"auc": {"max": 0.59}}}, 1),
        ({"membership.auc": {}}, 0),
        ({"membership.lira.auc": {"max": 0.6}}, 2),
        ({"membership.lira.auc": {"max": 0.6, "required": False}}, 0),
        ({"max_severity": "MEDIUM"}, 0),
        ({"max_severity": "LOW"}, 1),
        ({"membership.auc": {"max_severity": "LOW"}}, 1),
        ({"membership.auc": {"max": 0.5}, "membership.lira.auc": {"max": 0.6}}, 2),
    ],
)
def test_verdicts(policy, code):
    result = REPORT.passed(policy)
    assert result.exit_code == code and result.ok == (code == 0) == bool(result)
    assert bool(result.problems) == (code != 0)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_unfavourable_end_decides(value, half, bound):
    low, high = value - half, value + half
    one = report(Finding("evasion.clean_accuracy", "t", value=value, low=low, high=high))
    assert one.passed({"evasion.clean_accuracy": {"min": bound}}).ok == (low >= bound)
    assert one.passed({"evasion.clean_accuracy": {"max": bound}}).ok == (high <= bound)


@pytest.mark.parametrize("status", ["not tested", "not shown", "failed"])
def test_planted_a_demanded_finding_that_was_not_measured_never_passes(status):
    one = report(Finding("membership.auc", "t", value=0.5, low=0.5, high=0.5, status=status))
    assert one.passed({"membership.auc": {"max": 0.6}}).exit_code == 2


def test_planted_a_broken_check_never_passes_whatever_the_policy_demands():
    one = report(ACCURACY, Finding("inversion", "Model inversion: the check broke", status="failed"))
    assert one.passed({"evasion.robust_accuracy": {"min": 0.1}}).exit_code == 2


def test_planted_an_audit_that_measured_nothing_never_passes():
    assert report().passed({"max_severity": "HIGH"}).exit_code == 2
    idle = report(Finding("membership", "not tested", status="not tested"))
    assert idle.passed({"max_severity": "HIGH"}).exit_code == 2


def test_one_unmeasured_finding_of_several_with_the_same_id_is_missing():
    one = report(Finding("storage.secret", "a", value=0), Finding("storage.secret", "b", status="not shown"))
    assert one.passed({"storage.secret": {"max": 1}}).exit_code == 2
    both = report(Finding("storage.secret", "a", value=0), Finding("storage.secret", "b", value=5))
    assert both.passed({"storage.secret": {"max": 1}}).exit_code == 1


@pytest.mark.parametrize("value", [None, "high", math.nan, True])
def test_values_that_are_no_numbers_do_not_pass_a_threshold(value):
    assert report(Finding("a.b", "t", value=value)).passed({"a.b": {"max": 1}}).exit_code == 2


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        ({}, "demands something"),
        ({"findings": {}}, "demands something"),
        ({"evasion.robust_accuracy": {"minimum": 0.5}}, "minimum"),
        ({"membership": {"auc": {"max": 0.5}, "mx": 0.5}}, "membership.mx"),
        ({"unknown": 3}, "unknown"),
        ({"a.b": {"min": "0.5"}}, "a.b.min"),
        ({"a.b": {"min": True}}, "a.b.min"),
        ({"a.b": {"min": math.nan}}, "finite"),
        ({"a.b": {"required": 1}}, "required"),
        ({"max_severity": "huge"}, "max_severity"),
        ({"a.b": {"interval": "best"}}, "interval"),
    ],
)
def test_unreadable_policies_are_refused(policy, match):
    with pytest.raises(ConfigurationError, match=match):
        REPORT.passed(policy)


def test_toml_files(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(
        'max_severity = "HIGH"\n[findings."evasion.robust_accuracy"]\nmin = 0.7\n'
        "[membership]\nauc = { max = 0.6 }\n[membership.lira]\nauc = { max = 0.6, required = false }\n"
    )
    policy = Policy.read(path)
    assert sorted(policy.rules) == ["evasion.robust_accuracy", "membership.auc", "membership.lira.auc"]
    assert REPORT.passed(path).ok and REPORT.passed(str(path)).ok and REPORT.passed(policy).ok
    path.write_text("min = = 3")
    with pytest.raises(ConfigurationError, match="TOML"):
        REPORT.passed(path)
    with pytest.raises(ConfigurationError, match=r"missing\.toml"):
        REPORT.passed(tmp_path / "missing.toml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="TOML"):
        REPORT.passed(path)


# comparison -----------------------------------------------------------------------------------------------------------


def measured(identity, value, half=0.02, **more):
    return Finding(identity, "t", value=value, low=value - half, high=value + half, **more)


def verdicts(before, after):
    return {change.finding_id: change.verdict for change in compare(report(*before), report(*after)).changes}


@pytest.mark.parametrize(
    ("identity", "old", "new", "verdict"),
    [
        ("evasion.robust_accuracy", 0.8, 0.7, "regression"),
        ("evasion.robust_accuracy", 0.7, 0.8, "improvement"),
        ("membership.auc", 0.5, 0.6, "regression"),
        ("membership.auc", 0.6, 0.5, "improvement"),
        ("membership.auc", 0.50, 0.53, "unclear"),
        ("membership.auc", 0.5, 0.5, "unchanged"),
        ("unheard.of", 0.1, 0.9, "unclear"),
    ],
)
def test_a_change_counts_only_beyond_both_intervals(identity, old, new, verdict):
    assert verdicts([measured(identity, old)], [measured(identity, new)]) == {identity: verdict}


@pytest.mark.parametrize("status", ["failed", "not tested", "not shown"])
def test_lost_evidence_is_a_regression(status):
    result = compare(report(AUC), report(Finding("membership.auc", "t", status=status)))
    assert not result.ok and result.regressions[0].verdict == "lost"
    assert (
        compare(report(AUC), report(Finding("membership", "the check broke", status="failed"))).changes[0].verdict
        == "lost"
    )


def test_file_problems_are_matched_by_path():
    def secret(path):
        return Finding("storage.secret", "t", Severity.HIGH, setting={"path": path})

    count = Finding("storage.problems", "n", value=1)
    changes = compare(report(count, secret("a"), secret("b")), report(count, secret("b"), secret("c"))).changes
    found = {(change.verdict, (change.after or change.before).setting.get("path")) for change in changes}
    assert found == {("regression", "c"), ("improvement", "a"), ("unchanged", "b"), ("unchanged", None)}


def test_regressions_come_first_and_severity_counts_where_there_is_no_number():
    before = [
        measured("membership.auc", 0.7),
        Finding("x.y", "t", Severity.LOW),
        measured("evasion.clean_accuracy", 0.9),
    ]
    after = [
        measured("membership.auc", 0.5),
        Finding("x.y", "t", Severity.HIGH),
        measured("evasion.clean_accuracy", 0.5),
    ]
    result = compare(report(*before), report(*after))
    assert [change.verdict for change in result.changes] == ["regression", "regression", "improvement"]
    assert result.to_markdown().splitlines()[2].startswith("| regression |")
    assert compare(report(*before).evidence, report(*before).evidence).ok
