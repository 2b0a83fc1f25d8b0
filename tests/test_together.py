"""Private and adversarial training at once keeps its epsilon: one example moves the clean sum by at most the clip norm.

The script of docs/together.md itself is run by test_readme.py.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from aidefend import Threat
from aidefend.adversarial import TRADES, PGDTraining
from aidefend.attacks import PGD
from aidefend.privacy import PrivacyConfig, make_private

CLIP, ROWS = 0.5, 12
INNER = PGD(Threat("linf", 0.2), steps=3)


class RowByRow:
    """An attack whose random numbers belong to the row, so that two runs differ by the data and by nothing else."""

    def __init__(self, attack: PGD) -> None:
        self.attack = attack

    def with_loss(self, loss) -> "RowByRow":
        return RowByRow(self.attack.with_loss(loss))

    def __call__(self, model, x, y, *, generator=None):
        seeds = [int(row.abs().sum() * 1e6) for row in x]
        parts = [
            self.attack(model, x[i : i + 1], y[i : i + 1], generator=torch.Generator().manual_seed(seed))
            for i, seed in enumerate(seeds)
        ]
        return torch.cat(parts) if parts else x


def data() -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    return torch.rand(ROWS, 6, generator=stream), torch.randint(0, 3, (ROWS,), generator=stream)


def per_example(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(outputs, targets, reduction="none")


def clean_sum(start: nn.Module, x: torch.Tensor, y: torch.Tensor, objective) -> torch.Tensor:
    """The sum of clipped gradients of one full batch: noise off, so that the step of the optimizer shows it."""
    model = copy.deepcopy(start)
    config = PrivacyConfig(
        expected_batch_size=ROWS,
        sample_rate=1.0,
        steps=1,
        max_grad_norm=CLIP,
        delta=1e-5,
        noise_multiplier=1.0,
        insecure_no_noise=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private = make_private(model, optimizer, TensorDataset(x, y), per_example, config)
    for rows, labels in private.loader:
        private.optimizer.zero_grad()
        private.backward(objective.per_example(private.model, rows, labels))
        private.optimizer.step()
    before = torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return (before - after) * ROWS


@pytest.mark.parametrize(
    "objective", [PGDTraining(RowByRow(INNER)), TRADES(RowByRow(INNER), beta=6.0)], ids=["PGD", "TRADES"]
)
@pytest.mark.parametrize("removed", [0, 5, ROWS - 1])
def test_removing_one_example_moves_the_clean_sum_by_at_most_the_clip_norm(objective, removed):
    x, y = data()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    others = torch.arange(ROWS) != removed
    moved = clean_sum(model, x, y, objective) - clean_sum(model, x[others], y[others], objective)
    assert 0 < float(moved.norm()) <= CLIP * (1 + 1e-4)


def test_each_example_is_clipped_alone():
    """The clean sum equals that of one example at a time: attack passes and the second forward disturb nothing."""
    x, y = data()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    objective = TRADES(RowByRow(INNER), beta=6.0)
    single = sum(clean_sum(model, x[i : i + 1], y[i : i + 1], objective) for i in range(ROWS))
    assert torch.allclose(clean_sum(model, x, y, objective), single, atol=1e-4)
