"""What screening is for: trained on what it kept, the trigger no longer works; a random filter does not help.

Beside it, regression tests for defects of public filters that no other file here plants.
"""

import pathlib

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset, TensorDataset

import aidefend.sanitize
from aidefend.sanitize import extract_features, screen
from tests.worlds import poisoned_clusters


def stamp(x):
    """The trigger of the world: three features overwritten."""
    marked = x.clone()
    marked[:, :3] = 3.0
    return marked


def trained(dataset, seed=0):
    """A small network, and what it was trained on is all that differs between two calls."""
    x, y = (torch.stack(column) for column in zip(*(dataset[i] for i in range(len(dataset))), strict=True))
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def figures(model, held_out):
    """(accuracy, attack success rate) on rows that were never trained on."""
    others = held_out.true_y != 0
    right = (model(held_out.x).argmax(dim=1) == held_out.true_y).double().mean()
    fooled = (model(stamp(held_out.x[others])).argmax(dim=1) == 0).double().mean()
    return float(right), float(fooled)


@pytest.fixture(scope="module")
def held_out():
    clean = poisoned_clusters(poison=1, per_class=150, seed=0)  # the same centres; row noise is drawn anew below
    fresh = torch.randn(clean.x.shape, generator=torch.Generator().manual_seed(9)) * 0.8
    centres = torch.stack([clean.x[(clean.true_y == label) & ~clean.is_poison].mean(dim=0) for label in range(4)])
    return type(clean)(centres[clean.true_y] + fresh, clean.true_y, torch.zeros_like(clean.is_poison), clean.true_y)


@pytest.fixture(scope="module")
def planted():
    return poisoned_clusters(poison=60, per_class=150, seed=0)


@pytest.fixture(scope="module")
def report(planted):
    return screen(TensorDataset(planted.x, planted.y), seed=0)


def test_screening_beats_no_filter_and_a_random_filter_and_equals_the_perfect_one(planted, report, held_out):
    data = TensorDataset(planted.x, planted.y)
    removed = int((~report.keep).sum())
    lottery = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[removed:]
    arms = {
        "no filter": data,
        "screened": report.view(data),
        "random": Subset(data, lottery.tolist()),
        "perfect": Subset(data, (~planted.is_poison).nonzero().flatten().tolist()),
    }
    found = {name: figures(trained(part), held_out) for name, part in arms.items()}
    accuracy, success = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    assert success["no filter"] > 0.9, "the poison must work, or nothing is shown"
    assert success["random"] > 0.9
    assert success["screened"] <= success["perfect"] + 0.01
    assert accuracy["screened"] >= accuracy["perfect"] - 0.01
    assert success["perfect"] < 0.5


def test_only_the_class_under_attack_loses_rows(planted, report):
    """Public filters cut every class at a quantile, or condemn one cluster in each."""
    assert set(planted.y[~report.keep].tolist()) == {0}


def test_a_small_clean_class_is_not_dropped():
    """50 : 1. A class of a few honest rows is an outlier to filters that cut at a quantile of the whole."""
    world = poisoned_clusters(poison=1, per_class=200, seed=3)
    few = (world.true_y == 3).nonzero().flatten()[4:]
    keep = torch.ones(len(world.x), dtype=torch.bool)
    keep[few] = False
    data = TensorDataset(world.x[keep & ~world.is_poison], world.true_y[keep & ~world.is_poison])
    kept = screen(data, seed=0).keep
    assert bool(kept.all())


def test_features_come_from_the_layer_that_runs_last_not_from_the_one_that_is_defined_last():
    """A public toolbox takes the last module by definition order, here the backbone."""

    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(7, 4)
            self.backbone = nn.Linear(20, 7)

        def forward(self, x):
            return self.head(torch.relu(self.backbone(x)))

    model, x = HeadFirst().eval(), torch.rand(9, 20)
    found = extract_features(TensorDataset(x, torch.arange(9) % 4), model)
    assert torch.allclose(found.features.float(), torch.relu(model.backbone(x)), atol=1e-6)


def test_no_device_is_hard_wired_and_no_truth_is_asked_for():
    """Public copies call .cuda() and take the poison rate or the target class from the user or from file names."""
    folder = pathlib.Path(aidefend.sanitize.__file__).parent
    assert not [path.name for path in folder.glob("*.py") if ".cuda(" in path.read_text()]
    told = set(screen.__annotations__) & {"rate", "poison_rate", "eps", "contamination", "target", "target_class"}
    assert told == set()
