"""Under DistributedDataParallel: attack passes stay away from the reducer, losses and gradients are the plain ones."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from aidefend import Threat
from aidefend.adversarial import TRADES, PGDTraining
from aidefend.attacks.evasion import PGD


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("make", "training_passes"), [(PGDTraining, 1), (TRADES, 2)])
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
