"""Schedules of eps: shares, objectives, wrappers, step sizes, tensors."""

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError, Threat
from aidefend.adversarial import (
    AWP,
    TRADES,
    EpsWarmup,
    FastTraining,
    FreeTraining,
    GradAlign,
    PGDTraining,
    with_eps_share,
)
from aidefend.attacks.evasion import PGD

THREAT = Threat("linf", 0.2)


def test_shares_run_from_start_to_one_and_stay():
    for shape in ("linear", "cosine"):
        shares = [EpsWarmup(10, 0.25, shape=shape).share(step) for step in range(15)]
        assert shares[0] == 0.25 and shares[10:] == [1.0] * 5 and shares == sorted(shares)
        assert shares[5] == pytest.approx(0.625)


def test_every_radius_and_stated_step_is_scaled():
    objective = GradAlign(AWP(TRADES(PGD(THREAT, 5, 0.1), beta=2.0)), THREAT)
    half = with_eps_share(objective, 0.5)
    inner = half.objective.objective
    assert (half.threat.eps, inner.attack.threat.eps, inner.attack.step_size) == (0.1, 0.1, 0.05)
    assert inner.beta == 2.0 and objective.threat.eps == 0.2
    assert with_eps_share(FreeTraining(THREAT), 0.5).threat.eps == 0.1
    by_feature = with_eps_share(PGD(Threat("linf", torch.tensor([0.1, 0.2]))), 0.5)
    torch.testing.assert_close(by_feature.threat.eps, torch.tensor([0.05, 0.1]))


def test_the_first_step_trains_at_x_itself():
    model, x, y = nn.Linear(4, 3), torch.rand(6, 4), torch.arange(6) % 3
    for objective in (PGDTraining(PGD(THREAT, 3, 0.1)), FastTraining(PGD(THREAT))):
        start = EpsWarmup(4).objective_at(objective, 0)
        torch.testing.assert_close(start(model, x, y), nn.functional.cross_entropy(model(x), y))
        assert EpsWarmup(4).objective_at(objective, 4) is objective


def test_refusals():
    with pytest.raises(ConfigurationError, match="threat"):
        with_eps_share(PGDTraining(lambda model, x, y: x), 0.5)
    with pytest.raises(ConfigurationError, match="share"):
        with_eps_share(PGD(THREAT), 2.0)
    with pytest.raises(ConfigurationError, match="steps"):
        EpsWarmup(0)
    with pytest.raises(ConfigurationError, match="shape"):
        EpsWarmup(3, shape="cubic")
    with pytest.raises(ConfigurationError, match="step"):
        EpsWarmup(3).share(-1)
