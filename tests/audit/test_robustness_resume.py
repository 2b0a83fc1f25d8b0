"""A killed evaluation goes on where it stopped and ends as if nothing had happened."""

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError, Threat
from aidefend.audit import evaluate_robustness
from aidefend.audit.resuming import FinishedParts
from tests.worlds import linear_world

WORLD = linear_world(n=60, dtype=torch.float32)
THREAT = Threat("linf", float(WORLD.flipping_eps("linf").quantile(0.7)), (-10.0, 10.0))


class Counted(nn.Module):
    """The linear model; counts its rows, and dies after `last` passes."""

    def __init__(self, last=10**9):
        super().__init__()
        self.model, self.passes, self.last = WORLD.model, 0, last

    def forward(self, x):
        self.passes += 1
        if self.passes > self.last:
            raise KeyboardInterrupt
        return self.model(x)


def judge(model, folder, **options):
    settings = {"budget": "quick", "seed": 1, "batch_size": 16, **options}
    return evaluate_robustness(model, (WORLD.x, WORLD.y), THREAT, resume=folder, **settings)


def test_an_interrupted_evaluation_continues(tmp_path):
    whole = Counted()
    expected = judge(whole, None)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            judge(Counted(last=whole.passes // 5), tmp_path / "parts")
    last = Counted()
    resumed = judge(last, tmp_path / "parts")
    assert resumed.to_evidence().digest == expected.to_evidence().digest
    assert torch.equal(resumed.x_adv, expected.x_adv) and torch.equal(resumed.robust, expected.robust)
    assert last.passes < 0.75 * whole.passes
    assert list((tmp_path / "parts").iterdir()) == []


def test_parts_of_another_model_seed_or_budget_are_not_used(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        judge(Counted(last=120), tmp_path)
    files = set(tmp_path.iterdir())
    assert files
    weaker = Counted()
    weaker.model = nn.Linear(12, 2)
    for model, options in ((weaker, {}), (Counted(), {"seed": 2}), (Counted(), {"batch_size": 15})):
        fresh = judge(model, None, **options)
        assert judge(model, tmp_path, **options).to_evidence().digest == fresh.to_evidence().digest
        assert set(tmp_path.iterdir()) == files


def test_a_damaged_part_is_computed_anew(tmp_path):
    expected = judge(Counted(), None)
    with pytest.raises(KeyboardInterrupt):
        judge(Counted(last=200), tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert judge(Counted(), tmp_path).to_evidence().digest == expected.to_evidence().digest


def test_a_part_that_lacks_a_tensor_is_computed_anew(tmp_path):
    parts = FinishedParts(tmp_path, "evaluation")
    first = parts.get("stage", ["a"], lambda: {"x": torch.ones(2), "y": torch.zeros(1)})
    assert FinishedParts(tmp_path, "evaluation").get("stage", ["a"], dict).keys() == first.keys()
    assert FinishedParts(tmp_path, "other").get("stage", ["a"], lambda: {"z": torch.ones(1)}).keys() == {"z"}


@pytest.mark.parametrize("folder", [3, b"x"])
def test_the_folder_must_be_one(folder, tmp_path):
    with pytest.raises(ConfigurationError, match="resume="):
        judge(Counted(), folder)
    (tmp_path / "file").write_text("here")
    with pytest.raises(ConfigurationError, match="resume="):
        judge(Counted(), tmp_path / "file")
