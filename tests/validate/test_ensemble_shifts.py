"""An ensemble that learns from shifted inputs which member sees what, and whose calibrated rate holds all the same."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from aidefend import ConfigurationError
from aidefend._core.stats import roc_auc
from aidefend.validate import (
    Calibration,
    Energy,
    Ensemble,
    FittedEnsemble,
    Guard,
    Mahalanobis,
    NearestNeighbours,
    Shifts,
)
from aidefend.validate.odds import Odds
from tests.validate.small_world import model
from tests.validate.small_world import rows as world_rows
from tests.validate.test_ensemble import Column, rows

MOVE = torch.tensor([1.5, 0.0, 0.0], dtype=torch.float64)
MEMBERS = [Column(0), Column(1, 1e6), Column(2, 1e-6)]


def itself(x):
    return x, None


def moved(x):
    return {"moved": x + MOVE}


def learned(shifts=moved, outputs=itself, n=2000, seed=0):
    x = rows(n, seed)
    return Ensemble(MEMBERS, shifts=shifts).fit(x, x=x, outputs=outputs)


def area(fitted, shift, n=2000):
    return roc_auc(fitted.score(rows(n, 2) + shift), fitted.score(rows(n, 1))).value


def test_the_member_that_sees_the_shift_counts_more_and_the_ensemble_is_as_good():
    alone = roc_auc(rows(2000, 2)[:, 0] + 1.5, rows(2000, 1)[:, 0]).value
    alike = Ensemble(MEMBERS).fit(rows(2000, 0))
    assert area(learned(), MOVE) > alone - 0.005
    assert area(alike, MOVE) < alone - 0.03  # planted: without shifts two members that see nothing are noise


def test_several_kinds_are_several_rules():
    kinds = lambda x: {"first": x + MOVE, "last": x + MOVE.flip(0)}  # noqa: E731
    fitted, alike = learned(kinds), Ensemble(MEMBERS).fit(rows(2000, 0))
    for shift in (MOVE, MOVE.flip(0)):
        assert area(fitted, shift) > area(alike, shift) + 0.01


def test_no_member_is_ignored_for_good():
    """The shifts never touch the second column; rows far away in it alone are found all the same."""
    fitted = learned()
    assert area(fitted, torch.tensor([0.0, 200.0, 0.0])) > 0.99
    higher = rows(300, 4)
    for column in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[column] = 0.1
        assert bool((fitted.score(higher + step) > fitted.score(higher)).all())


def test_the_rules_are_the_logistic_regression_of_another_library():
    clean, shifted = rows(500, 0), rows(500, 1) + torch.tensor([1.0, 0.5, 2.0])
    odds = Odds.of(clean, {"one": shifted})
    x = (torch.cat([clean, shifted]) - odds.centre) / odds.spread
    peer = LogisticRegression(C=3 / (2 * 3e-3 * 1000), tol=1e-8, max_iter=1000).fit(x, [0] * 500 + [1] * 500)
    torch.testing.assert_close(odds.weights[0], torch.from_numpy(peer.coef_[0]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(odds.offsets, torch.from_numpy(peer.intercept_), rtol=1e-3, atol=1e-3)


def test_both_sets_count_alike_and_constant_members_are_safe():
    clean = rows(500, 0)
    clean[:, 2] = 7.0
    few, many = (Odds.of(clean, {"one": (rows(500, 1) + 1)[:n]}).offsets for n in (100, 500))
    torch.testing.assert_close(few, many, rtol=0, atol=0.4)
    assert Odds.of(clean, {"one": clean + 1}).surprise(clean + 1e9).isfinite().all()


@pytest.mark.parametrize("held_out", [True, False])
def test_the_calibrated_rate_holds_and_calibrating_on_the_rows_of_the_fit_is_noticed(held_out):
    """Planted violation: 60 rows that members, weights and calibration share; new rows then look stranger than they."""
    refused = []
    for seed in range(40):
        x = torch.randn(400, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        fit, own, new = x[:60], x[60:260] if held_out else x[:60], x[260:]
        joined = Ensemble([Mahalanobis(), NearestNeighbours(k=1)], shifts=Shifts()).fit(fit, x=fit, outputs=itself)
        refused.append(Calibration.of(joined.score(own), alpha=0.1).refused(joined.score(new)).double().mean())
    rate = float(torch.stack(refused).mean())
    assert (rate < 0.12) if held_out else (rate > 0.2)  # 5,600 rows, 40 calibrations: standard error below .006


def test_a_guard_asks_its_model_about_the_shifts_and_is_saved_with_what_it_learned(tmp_path):
    network, data = model(), world_rows(800, 1)[0]
    hooks, asked = dict(network[2]._forward_pre_hooks), []
    handle = network.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    members = [Energy(), Mahalanobis(), NearestNeighbours(k=5)]
    Guard.calibrate(network, data, detectors=[Ensemble(members)], alpha=0.05, batch_size=64).close()
    without = sum(asked)
    guard = Guard.calibrate(network, data, detectors=[Ensemble(members, shifts=Shifts())], alpha=0.05, batch_size=64)
    handle.remove()
    fitted = guard.detectors[0]
    assert isinstance(fitted, FittedEnsemble) and fitted.weights.shape == (5, 3)
    assert sum(asked) - 2 * without == 5 * len(fitted.reference) and max(asked) <= 64
    guard.save(tmp_path / "guard")
    test = world_rows(300, 2)[0]
    first = guard(test)
    again = Guard.load(tmp_path / "guard", network)
    assert torch.equal(first.p_values["ensemble"], again(test).p_values["ensemble"])
    assert float(first.accepted.double().mean()) > 0.9
    guard.close()
    again.close()
    assert dict(network[2]._forward_pre_hooks) == hooks


def test_kinds_that_the_model_cannot_answer_are_left_out():
    def outputs(x):
        return torch.where(x > 50, torch.nan, x), None

    kinds = lambda x: {"moved": x + MOVE, "far": x + 100}  # noqa: E731
    assert len(learned(kinds, outputs).offsets) == 1
    with pytest.raises(ConfigurationError, match="finite outputs"):
        learned(lambda x: {"far": x + 100}, outputs)


def test_what_shifts_need_is_asked_for():
    x = rows(100, 0)
    for given in ({}, {"x": x}, {"outputs": itself}):
        with pytest.raises(ConfigurationError, match="x and outputs beside shifts"):
            Ensemble(MEMBERS, shifts=moved).fit(x, **given)
    with pytest.raises(ConfigurationError, match="shifts"):
        Ensemble(MEMBERS, shifts="noisy")
    for made in ([x], x, {"moved": x.tolist()}, None):
        with pytest.raises(ConfigurationError, match=r"shifts\(x\)"):
            learned(lambda x, made=made: made)


@pytest.mark.parametrize("field", ["weights", "spread", "offsets", "centre"])
def test_rules_that_fit_did_not_make_are_refused(field):
    good = Odds(torch.zeros(2), torch.ones(2), torch.ones(1, 2), torch.zeros(1))
    members, reference = [nn.Identity(), nn.Identity()], torch.rand(30, 2)
    FittedEnsemble(members, reference, "geometric", good)
    with pytest.raises(ConfigurationError):
        FittedEnsemble(members, reference, "geometric", good._replace(**{field: torch.ones(3)}))
    if field in ("weights", "spread"):
        with pytest.raises(ConfigurationError, match="above 0"):
            FittedEnsemble(members, reference, "geometric", good._replace(**{field: -getattr(good, field)}))


def test_models_that_return_numbers_are_asked_too():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0)).eval()
    ensemble = Ensemble([Mahalanobis(), NearestNeighbours(k=5)], shifts=Shifts())
    with Guard.calibrate(network, world_rows(800, 1)[0], detectors=[ensemble], alpha=0.05, task="regression") as guard:
        decision = guard(torch.cat([world_rows(100, 2)[0], 1e3 * torch.ones(1, 6)]))
    assert not decision.accepted[-1] and float(decision.accepted[:100].double().mean()) > 0.85
