"""One list of adversarial training objectives; each line inherits every convention."""

import pickle

import pytest
import torch
from torch import nn

from aidefend import AidefendError, Threat
from aidefend.adversarial import (
    AWP,
    HAT,
    MACER,
    MART,
    NFGSM,
    SABR,
    TRADES,
    Consistency,
    CrownIBPTraining,
    FastTraining,
    FreeTraining,
    Gaussian,
    GradAlign,
    IBPTraining,
    LogitPairing,
    PGDTraining,
    SmoothAdv,
)
from aidefend.attacks.evasion import APGD, PGD

THREAT = Threat("linf", 0.05)


def helper(x):
    """A model of the same classes for HAT: the right answer on `rows`."""
    return x[:, :3]


OBJECTIVES = {
    "pgd-training": lambda: PGDTraining(PGD(THREAT, 3, 0.02)),
    "pgd-training-given": lambda: PGDTraining(PGD(THREAT, 3, 0.02), attack_mode="given"),
    "trades": lambda: TRADES(PGD(THREAT, 3, 0.02)),
    "trades-apgd-l2": lambda: TRADES(APGD(Threat("l2", 0.1), 3), beta=2.0),
    "trades-given": lambda: TRADES(PGD(THREAT, 3, 0.02), attack_mode="given"),
    "trades-reuse-clean": lambda: TRADES(PGD(THREAT, 3, 0.02), reuse_clean=True),
    "fast-training": lambda: FastTraining(PGD(THREAT)),
    "fast-training-l2": lambda: FastTraining(PGD(Threat("l2", 0.1)), attack_mode="given"),
    "n-fgsm": lambda: NFGSM(PGD(THREAT)),
    "mart": lambda: MART(PGD(THREAT, 3, 0.02), weight=2.0),
    "awp-pgd": lambda: AWP(PGDTraining(PGD(THREAT, 3, 0.02))),
    "hat": lambda: HAT(PGD(THREAT, 3, 0.02), helper),
    "logit-pairing": lambda: LogitPairing(PGD(THREAT, 3, 0.02)),
    "grad-align": lambda: GradAlign(FastTraining(PGD(THREAT)), THREAT),
    "free-training": lambda: FreeTraining(THREAT),
    "ibp": lambda: IBPTraining(THREAT),
    "crown-ibp": lambda: CrownIBPTraining(Threat("l2", 0.1), beta=0.6),
    "sabr": lambda: SABR(PGD(THREAT, 3, 0.02)),
    "gaussian": lambda: Gaussian(0.05, samples=2),
    "consistency": lambda: Consistency(0.05),
    "macer": lambda: MACER(0.05, samples=4, weight=0.5),
    "smooth-adv": lambda: SmoothAdv(PGD(Threat("l2", 0.1), 2), 0.05),
    "awp-trades": lambda: AWP(TRADES(PGD(THREAT, 3, 0.02))),
}
NO_THREAT = {"gaussian", "consistency", "macer"}  # noise knows no bounds
TRAINING_PASSES = {"trades": 2, "mart": 2, "awp-trades": 2, "logit-pairing": 2, "hat": 3}


def training_passes(name):
    return next((n for start, n in TRAINING_PASSES.items() if name.startswith(start)), 1)


every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def plain():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def with_batch_norm():
    """One BatchNorm that trains and one that is frozen."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[3].eval()
    return model


def rows(n=6):
    x = torch.rand(n, 5, generator=stream(1))
    return x, x[:, :3].argmax(dim=1)


@every_objective
@pytest.mark.parametrize("make", [plain, with_batch_norm])
def test_scalar_is_the_mean_of_the_examples(name, make):
    objective, model, (x, y) = OBJECTIVES[name](), make(), rows()
    losses = objective.per_example(model, x, y, generator=stream())
    if make is with_batch_norm:
        model[1].reset_running_stats()
    scalar = objective(model, x, y, generator=stream())
    assert losses.shape == (6,) and scalar.shape == () and losses.requires_grad and scalar.requires_grad
    torch.testing.assert_close(losses.mean(), scalar)


@every_objective
@pytest.mark.parametrize("make", [plain, with_batch_norm])
def test_only_the_training_passes_touch_the_model(name, make):
    """Flags, .grad and requires_grad are as before; BatchNorm counts the training forward passes alone."""
    objective, model, (x, y) = OBJECTIVES[name](), make(), rows()
    model[0].bias.requires_grad_(False)
    before = [module.training for module in model.modules()]
    global_stream = torch.get_rng_state()
    loss = objective(model, x, y)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()][:2] == [True, False]
    assert torch.equal(torch.get_rng_state(), global_stream) and not x.requires_grad
    if make is with_batch_norm:
        assert model[1].num_batches_tracked == next(
            (n for start, n in TRAINING_PASSES.items() if name.startswith(start)), 1
        )
        assert model[3].num_batches_tracked == 0
    loss.backward()
    assert model[0].weight.grad is not None and model[0].bias.grad is None


@every_objective
def test_training_lowers_it(name):
    objective, model, (x, y) = OBJECTIVES[name](), plain(), rows(60)
    optimizer, g = torch.optim.Adam(model.parameters(), 0.03), stream()
    first = objective(model, x, y, generator=g).item()
    for _ in range(60):
        optimizer.zero_grad()
        objective(model, x, y, generator=g).backward()
        optimizer.step()
    assert objective(model, x, y, generator=g).item() < 0.7 * first


@every_objective
def test_pickle_and_seeds(name):
    objective, model, (x, y) = OBJECTIVES[name](), plain(), rows()
    again = pickle.loads(pickle.dumps(objective))
    assert again == objective
    first = objective.per_example(model, x, y, generator=stream(3))
    assert torch.equal(first, again.per_example(model, x, y, generator=stream(3)))
    other = objective.per_example(model, x, y, generator=stream(4))
    assert torch.equal(first, other) == (name in ("free-training", "ibp", "crown-ibp"))  # nothing there is random


@every_objective
def test_float64_and_bfloat16(name):
    for dtype in (torch.float64, torch.bfloat16):
        model, (x, y) = plain().to(dtype), rows()
        loss = OBJECTIVES[name]()(model, x.to(dtype), y)
        loss.backward()
        assert loss.isfinite() and model[0].weight.grad.isfinite().all()


@every_objective
def test_bad_arguments(name):
    objective, model, (x, y) = OBJECTIVES[name](), plain(), rows()
    cases = [
        (x[:0], y[:0], "at least one sample"),
        (x, y[:2], "same number of rows"),
        (x + 1, y, "inside the bounds"),
        (x[:, :3], y, "model"),
    ]
    if name in NO_THREAT:
        del cases[2]
    for bad_x, bad_y, rule in cases:
        with pytest.raises(AidefendError, match=rule):
            objective(model, bad_x, bad_y)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@every_objective
def test_an_exception_on_the_way_restores_the_model(name):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.passes, self.fail_at = with_batch_norm(), 0, 99

        def forward(self, x):
            self.passes += 1
            if self.passes >= self.fail_at:
                raise RuntimeError("broken pass")
            return self.body(x)

    count = Fails()
    OBJECTIVES[name]()(count, *rows())
    for fail_at in range(1, count.passes + 1):
        model = Fails()
        model.fail_at = fail_at
        flags = [module.training for module in model.modules()]
        with pytest.raises(AidefendError, match=r"model=.*broken pass"):
            OBJECTIVES[name]()(model, *rows())
        assert [module.training for module in model.modules()] == flags
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
