"""The FLOP counter on known products, and the target of the benchmark on its nets."""

import pytest
import torch
from torch import nn

from benchmarks.adversarial_flops import TARGET, flops, measure, parts


def test_products_are_counted_as_two_flops_each():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert flops(lambda: a @ b) == 2 * 3 * 4 * 5
    assert flops(lambda: a + 1) == 0


def test_parts_of_a_linear_net():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False))
    costs = parts(model, torch.ones(3, 4), torch.zeros(3, dtype=torch.long))
    first, second = 2 * 3 * 4 * 5, 2 * 3 * 5 * 2
    assert costs.forward == first + second
    assert costs.attack_step == 2 * (first + second)
    assert costs.plain == 2 * first + 3 * second


def test_wasted_weight_gradients_are_seen():
    """The usual loop, with a full backward pass in the attack, misses the floor."""
    model, x, y = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), torch.rand(2, 8), torch.tensor([0, 1])

    def usual():
        point = x.clone().requires_grad_()
        nn.functional.cross_entropy(model(point), y).backward()

    assert flops(usual) > 1.2 * parts(model, x, y).attack_step


def test_every_method_is_at_its_floor():
    rows = measure(1, 3)
    assert len({row["net"] for row in rows}) == 2 and {row["judged"] for row in rows} == {True, False}
    assert [(row["method"], row["over_floor"]) for row in rows if row["judged"] and row["over_floor"] > TARGET] == []
    exact = [row["over_floor"] for row in rows if row["net"] == "SmallCNN" and not row["judged"]]
    assert exact == [pytest.approx(1.11, abs=0.05)]
