"""A broken model must not look like a measured, harmless number, nor a broken demand like one that all things meet."""

import pytest
import torch

from aidefend import AidefendError, ConfigurationError, Severity
from aidefend.audit import Policy, Rule, audit, audit_extraction, audit_membership, audit_poisoning

X = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 2
TRAIN, TEST = (X[:20], Y[:20]), (X[20:], Y[20:])


def broken(x):
    return torch.full((len(x), 2), float("nan"))


@pytest.mark.parametrize(
    "part",
    [
        lambda model: audit_membership(model, TRAIN, TEST),
        lambda model: audit_extraction(model, test=TEST, queries=(5,), epochs=1),
        lambda model: audit_poisoning(model, test=TEST, trigger=lambda x: x + 1),
    ],
    ids=["membership", "extraction", "poisoning"],
)
def test_a_model_that_answers_nan_leaks_nothing_and_is_still_no_result(part):
    with pytest.raises(AidefendError, match="an answer other than NaN"):
        part(broken)


def test_refused_rows_among_others_are_measured():
    def guarded(x):
        outputs = torch.cat([x[:, :1], -x[:, :1]], dim=1)
        return outputs.masked_fill(x[:, :1] > 0.8, float("nan"))

    assert audit_membership(guarded, TRAIN, TEST)["membership.auc"].status == "measured"


def test_the_whole_audit_reports_the_failure():
    report = audit(broken, train=TRAIN, test=TEST, show_progress=False)
    assert report.status("membership") == "failed" and not report.passed({"max_severity": "LOW"})


@pytest.mark.parametrize(
    "fields", [{"min": float("nan")}, {"max": "0.5"}, {"required": "no"}, {"interval": "kind"}, {"max_severity": 9}]
)
def test_a_rule_that_cannot_be_judged_is_refused(fields):
    with pytest.raises(ConfigurationError):
        Rule(**fields)


def test_a_policy_that_demands_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="demands something"):
        Policy({})
    assert Policy({}, Severity.LOW).max_severity == Severity.LOW


@pytest.mark.parametrize("name", ["model", "train_fn", "student_fn", "trigger", "guard", "inspector", "evaluator"])
def test_what_must_be_callable_is_refused_before_anything_runs(name):
    given = {"model": broken, name: "nonsense"}
    with pytest.raises(ConfigurationError, match=f"{name}='nonsense'"):
        audit(given.pop("model"), train=TRAIN, test=TEST, show_progress=False, **given)
