"""Extraction of a model that a copy can represent exactly, with and without a budget."""

import pytest
import torch
from torch import nn

from aidefend._core.errors import AidefendError, BudgetExceeded, ConfigurationError
from aidefend.attacks.extraction import Extraction


class Metered:
    """A victim that answers a number of rows and then refuses."""

    def __init__(self, model, rows):
        self.model, self.left = model, rows

    def __call__(self, x):
        if len(x) > self.left:
            raise BudgetExceeded("Expected rows <= the budget, got rows=64. Wait for the refill.")
        self.left -= len(x)
        return self.model(x)


def world(n=600, seed=0):
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=stream)
    weights = torch.randn(4, 3, generator=stream)
    return (lambda rows: rows @ weights), x[: n // 2], x[n // 2 :]


def student(seed):
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))
        layer.bias.zero_()
    return layer


ATTACK = Extraction(student, 300, epochs=60, batch_size=32, learning_rate=0.05)


@pytest.mark.parametrize("answers", ["logits", "probabilities", "labels"])
def test_a_linear_victim_is_copied_by_a_linear_copy(answers):
    victim, pool, held_out = world()
    forms = {"logits": victim, "probabilities": lambda x: victim(x).softmax(1), "labels": lambda x: victim(x).argmax(1)}
    result = ATTACK(forms[answers], pool, seed=1)
    agreement = result.agreement(victim, held_out)
    assert result.queries_used == 300 and not result.stopped
    assert agreement.low > 0.9 and agreement.low <= agreement.value <= agreement.high


def test_an_untrained_copy_agrees_by_chance_only():
    victim, _, held_out = world()
    result = Extraction(student, 1, epochs=1, learning_rate=1e-9)(victim, held_out[:1], seed=0)
    assert result.agreement(victim, held_out).value < 0.75


def test_the_budget_ends_the_queries_and_what_was_answered_counts():
    victim, pool, held_out = world()
    result = ATTACK(Metered(victim, 150), pool, seed=1)
    assert result.queries_used == 128 and "BudgetExceeded" in result.stopped
    assert result.agreement(victim, held_out).value > 0.7
    nothing = ATTACK(Metered(victim, 10), pool, seed=1)
    assert nothing.student is None and nothing.queries_used == 0
    assert nothing.agreement(victim, held_out).value == 0


def test_no_trace_on_victim_and_streams_and_repeatable():
    victim = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).train()
    before = {name: value.clone() for name, value in victim.state_dict().items()}
    _, pool, _ = world()
    attack = Extraction(lambda seed: nn.Sequential(nn.Dropout(0.3), student(seed)), 100, epochs=2)
    state = torch.get_rng_state()
    with torch.no_grad():
        runs = [attack(victim, pool, seed=seed).student[1].weight for seed in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert all(torch.equal(value, before[name]) for name, value in victim.state_dict().items())
    assert victim.training and all(parameter.grad is None for parameter in victim.parameters())


def test_bad_input_is_refused():
    victim, pool, _ = world()
    for call, error, match in [
        (lambda: Extraction(3, 10), ConfigurationError, "student_fn"),
        (lambda: Extraction(student, 0), ConfigurationError, "queries"),
        (lambda: Extraction(student, 10, learning_rate=0.0), ConfigurationError, "learning_rate"),
        (lambda: Extraction(student, 301)(victim, pool), ConfigurationError, "at least 301 samples"),
        (lambda: Extraction(lambda seed: nn.ReLU(), 10)(victim, pool), ConfigurationError, "can be trained"),
        (lambda: Extraction(student, 10)(lambda x: 1 / 0, pool), AidefendError, "ZeroDivisionError"),
        (lambda: Extraction(student, 10)(victim, pool * torch.nan), ConfigurationError, "finite"),
    ]:
        with pytest.raises(error, match=match):
            call()


def test_a_victim_that_answers_with_labels_alone_is_copied_whatever_classes_a_batch_shows():
    """Batches name 2, 3 or 1 classes; the copy has more outputs than the victim ever named."""
    x = torch.linspace(0, 1, 60)[torch.randperm(60, generator=torch.Generator().manual_seed(0))][:, None]
    attack = Extraction(lambda seed: torch.nn.Linear(1, 5), queries=60, query_batch=2, epochs=80, learning_rate=0.2)
    result = attack(lambda rows: (rows[:, 0] * 2.99).long(), x, seed=0)
    assert result.queries_used == 60
    assert result.agreement(lambda rows: (rows[:, 0] * 2.99).long(), x).value > 0.8


def test_a_copy_with_too_few_outputs_is_refused():
    attack = Extraction(lambda seed: torch.nn.Linear(1, 2), queries=30, epochs=1)
    with pytest.raises(ConfigurationError, match="at least 3 classes"):
        attack(lambda rows: torch.cat([rows, rows, rows], dim=1), torch.rand(30, 1))
