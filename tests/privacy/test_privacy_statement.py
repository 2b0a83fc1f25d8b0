"""The statement says what holds, what does not, and nothing private."""

import json
import math

import pytest
from scipy.stats import norm

from aidefend import Severity
from aidefend.privacy import epsilon
from aidefend.privacy.accounting import gaussian_delta
from aidefend.privacy.statement import make_statement
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
    assert bound <= min(1, math.exp(private.epsilon()) * 0.01 + 1e-3)
    assert evidence["privacy.tpr_bound_at_fpr_0.001"].value < bound
    assert private.statement().tpr_bound(1.0) == 1.0


@pytest.mark.parametrize("neighboring", ["add_remove", "replace_one"])
def test_mu_and_trade_off_of_full_batches_are_those_of_the_gaussian(neighboring):
    """Closed form: TPR = Phi(Phi^-1(FPR) + mu); the bound lies above it, and not far."""
    config = settings(expected_batch_size=24, steps=6, noise_multiplier=4.0, neighboring=neighboring)
    statement = make_statement(config, 6)
    mu = (2 if neighboring == "replace_one" else 1) * math.sqrt(6) / 4.0
    assert statement.gdp_mu == pytest.approx(mu) and statement.gdp_mu_exact
    for fpr in (0.5, 0.1, 0.01, 0.001):
        exact = norm.cdf(norm.ppf(fpr) + mu)
        assert exact <= statement.tpr_bound(fpr) <= 1.6 * exact


def test_mu_of_poisson_batches_covers_every_point_and_no_less_would_do():
    statement = make_statement(settings(noise_multiplier=2.0, steps=50), 50)
    assert not statement.gdp_mu_exact and "eleven deltas" in statement.to_markdown()
    over = [gaussian_delta(statement.gdp_mu, eps) - delta for eps, delta in statement.curve]
    under = [gaussian_delta(0.999 * statement.gdp_mu, eps) - delta for eps, delta in statement.curve]
    assert min(over) >= 0 > min(under)


def test_no_step_and_no_noise_have_their_edges():
    idle = make_statement(settings(), 0)
    assert idle.gdp_mu == 0 and idle.tpr_bound(0.01) == pytest.approx(0.01, abs=1e-7)
    assert make_statement(settings(insecure_seed=1), 1).gdp_mu == math.inf


def test_planted_limit_theorem_would_promise_too_much():
    """The mu of the central limit theorem lies below the true curve for few steps: never used."""
    config = settings(noise_multiplier=0.6, expected_batch_size=2, steps=5)
    statement, rate = make_statement(config, 5), 2 / 24
    limit = rate * math.sqrt(5 * (math.exp(1 / 0.6**2) - 1))
    assert any(gaussian_delta(limit, eps) < delta for eps, delta in statement.curve)
    assert statement.gdp_mu > limit
