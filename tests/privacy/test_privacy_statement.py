"""The statement says what holds, what does not, and nothing private."""

import json
import math

import pytest

from aidefend import Severity
from aidefend.privacy import epsilon
from tests.privacy.private_worlds import one_step, private_run, settings


def test_the_statement_of_a_run():
    private = private_run(config=settings(steps=4, delta=1e-3))
    assert private.epsilon() == 0.0 and private.statement().epsilon == 0.0
    one_step(private), one_step(private)
    statement = private.statement()
    assert statement.epsilon == private.epsilon() == epsilon([(1.0, 8 / 24, 2)], 1e-3)
    assert statement.steps_taken == 2 and statement.epsilon_planned == epsilon([(1.0, 8 / 24, 4)], 1e-3)
    text = statement.to_markdown()
    for part in ("Poisson", "add_remove", "Not covered", "tuning", "upper bound", "2 of 4", "one row", "torch"):
        assert part in text
    assert json.loads(json.dumps(statement.to_dict()))["delta"] == 1e-3
    assert "24" not in [str(value) for value in statement.to_dict().values()]


def test_replaced_rows_full_batches_and_accountants_are_named():
    private = private_run(config=settings(neighboring="replace_one", expected_batch_size=24, steps=2))
    one_step(private)
    statement = private.statement()
    assert statement.sampler == "full batch" and statement.accountant == "exact Gaussian"
    assert "something else" in statement.unit
    assert statement.epsilon == epsilon([(1.0, 1.0, 1)], 1e-3, "replace_one")


def test_a_drawn_batch_is_charged_before_its_step():
    private = private_run()
    next(iter(private.loader))
    assert private.epsilon() == epsilon([(1.0, 8 / 24, 1)], 1e-3) > 0


@pytest.mark.parametrize("changes", [{"insecure_seed": 4}, {"insecure_no_noise": True}])
def test_insecure_runs_say_so(changes):
    private = private_run(config=settings(**changes))
    one_step(private)
    statement = private.statement()
    assert private.epsilon() == math.inf and "Not private" in statement.to_markdown()
    assert statement.tpr_bound(0.01) == 1.0 and statement.to_dict()["epsilon"] == "inf"
    finding = statement.to_evidence()["privacy.epsilon"]
    assert finding.severity == Severity.CRITICAL and finding.status == "failed" and "insecure" in finding.limits


def test_evidence_is_stable_and_holds_the_bound():
    private = private_run()
    one_step(private)
    evidence = private.statement().to_evidence()
    assert evidence.digest == private.statement().to_evidence().digest
    assert evidence["privacy.epsilon"].value == private.epsilon()
    bound = evidence["privacy.tpr_bound_at_fpr_0.01"].value
    assert bound == pytest.approx(min(1, math.exp(private.epsilon()) * 0.01 + 1e-3))
    assert private.statement().tpr_bound(1.0) == 1.0
