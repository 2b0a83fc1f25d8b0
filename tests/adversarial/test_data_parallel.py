"""Under DistributedDataParallel: attack passes stay away from the reducer, losses and gradients are the plain ones."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from aidefend import Threat
from aidefend.adversarial import (
    AWP,
    MACER,
    MART,
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
from aidefend.attacks.evasion import PGD


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def weight_perturbed(attack):
    return AWP(PGDTraining(attack), gamma=0.1)


def aligned(attack):
    return GradAlign(FastTraining(attack), attack.threat)


MAKERS = [
    (PGDTraining, 1),
    (TRADES, 2),
    (MART, 2),
    (LogitPairing, 2),
    (FastTraining, 1),
    (weight_perturbed, 1),
    (aligned, 1),
    (lambda attack: IBPTraining(attack.threat), 1),
    (lambda attack: CrownIBPTraining(attack.threat, beta=0.5), 1),
    (lambda attack: SABR(attack), 1),
    (lambda attack: Gaussian(0.1, 2), 1),
    (lambda attack: Consistency(0.1), 1),
    (lambda attack: MACER(0.1, 3), 1),
    (lambda attack: SmoothAdv(PGD(Threat("l2", 0.1), 3), 0.1), 1),
]


@pytest.mark.parametrize(("make", "training_passes"), MAKERS)
@pytest.mark.parametrize("norm_layer", [nn.Identity(), nn.BatchNorm1d(6)])
def test_only_training_passes_go_through_the_wrapper(one_process, make, training_passes, norm_layer):
    plain = nn.Sequential(nn.Linear(5, 6), copy.deepcopy(norm_layer), nn.Linear(6, 3))
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    x, y = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3
    objective, passes = make(PGD(Threat("linf", 0.1), 3)), []
    handle = wrapped.register_forward_hook(lambda *_: passes.append(1))
    for model in (plain, wrapped):
        for _ in range(2):
            model.zero_grad()
            objective(model, x, y, generator=torch.Generator().manual_seed(1)).backward()
    handle.remove()
    assert len(passes) == 2 * training_passes
    for ours, expected in zip(wrapped.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    for ours, expected in zip(wrapped.module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)


def from_the_row(model, x, y, generator=None):
    """An attack whose point depends on the row alone, so that shards and the whole batch see the same points."""
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        grad = torch.autograd.grad(nn.functional.cross_entropy(model(point), y, reduction="sum"), point)[0]
    return (x + 0.1 * grad.sign()).clamp(0, 1)


STEPS = 3
TOGETHER = {
    "pgd": lambda: PGDTraining(from_the_row),
    "mart": lambda: MART(from_the_row),
    "awp": lambda: AWP(PGDTraining(from_the_row), gamma=0.1),
    "awp-mart": lambda: AWP(MART(from_the_row), gamma=0.1),
    "pairing": lambda: LogitPairing(from_the_row),
    "ibp": lambda: IBPTraining(Threat("linf", 0.05)),
    "crown-ibp": lambda: CrownIBPTraining(Threat("linf", 0.05), beta=0.5),
    "free": lambda: FreeTraining(Threat("linf", 0.1)),
}


def small_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def train(model, name, rows):
    objective, optimizer = TOGETHER[name](), torch.optim.SGD(model.parameters(), 0.5)
    x = torch.rand(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(8) % 3
    for _ in range(STEPS):
        optimizer.zero_grad()
        objective(model, x[rows], y[rows]).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def rank_main(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        weights = {}
        for name in TOGETHER:
            model = nn.parallel.DistributedDataParallel(small_net())
            weights[name] = train(model, name, slice(4 * rank, 4 * rank + 4))
        torch.save(weights, f"{folder}/weights-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_at_the_weights_of_one(tmp_path):
    processes.spawn(rank_main, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in TOGETHER:
        alone = train(small_net(), name, slice(0, 8))
        assert not torch.equal(alone[0], next(small_net().parameters()))
        for ours, other, expected in zip(first[name], second[name], alone, strict=True):
            assert torch.equal(ours, other), f"{name}: the ranks differ"
            torch.testing.assert_close(ours, expected, msg=lambda text, name=name: f"{name}: {text}")
