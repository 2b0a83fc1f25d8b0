"""The guard on planted histories (a model that plays any accuracy), and its roll-back."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from aidefend import AidefendError, ConfigurationError, Threat
from aidefend.adversarial import NFGSM, FastTraining, OverfittingGuard
from aidefend.attacks.evasion import PGD

N = 100


class Played(nn.Module):
    """Right on a chosen share of rows, by what the attack wrote in the first column: 0 fast, 1 strong, 2 validation."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(1)
        self.shares = (0.9, 0.9, 0.9)

    def forward(self, x):
        share = torch.tensor(self.shares)[x[:, 0].long()]
        return torch.stack([share - x[:, 1] - 1e-4, torch.zeros(len(x))], dim=1)


def marking(kind):
    def attack(model, x, y, generator=None):
        marked = x.clone()
        marked[:, 0] = torch.where(x[:, 0] == 2, 2.0, float(kind))
        return marked

    return attack


def rows(kind):
    place = (torch.arange(N) / N + 0.001 * kind)[:, None]
    return torch.cat([torch.full((N, 1), float(kind)), place], dim=1), torch.zeros(N, dtype=torch.long)


def guard(**changes):
    settings = {"attack": marking(1), "fast_attack": marking(0)} | changes
    return OverfittingGuard(rows(0), rows(2), **settings)


def play(watch, *looks, model=None):
    model = model or Played()
    verdicts = []
    for step, shares in enumerate(looks):
        model.shares = shares
        nn.init.constant_(model.weight, float(step))
        verdicts.append(watch.look(model, step))
    return [verdict.status for verdict in verdicts], model, verdicts


def test_the_world_plays_what_it_is_told():
    _, _, (verdict,) = play(guard(), (0.9, 0.5, 0.3))
    accuracies = (verdict.fast_accuracy, verdict.strong_accuracy, verdict.validation_accuracy)
    assert accuracies == (0.9, 0.5, pytest.approx(0.3, abs=0.011))


def test_catastrophic_overfitting_is_detected_and_rolled_back():
    watch = guard(fallback="n-fgsm")
    statuses, model, verdicts = play(watch, (0.7, 0.5, 0.4), (0.75, 0.55, 0.45), (0.8, 0.3, 0.3), (0.95, 0.02, 0.02))
    assert statuses == ["healthy", "healthy", "catastrophic overfitting", "catastrophic overfitting"]
    assert verdicts[-1].best_step == 1 and "step 1" in verdicts[-1].advice
    assert watch.roll_back(model) == 1 and model.weight.item() == 1.0
    assert watch.objective("fast") == "n-fgsm" and guard().objective("fast") == "fast"


def test_a_collapse_before_the_first_look_is_seen():
    statuses, _, verdicts = play(guard(), (0.95, 0.05, 0.05), (0.6, 0.5, 0.04))
    assert statuses == ["catastrophic overfitting", "healthy"]
    assert verdicts[1].best_step == 1, "Expected a healthy state to replace a collapsed one."


def test_both_falling_together_is_not_catastrophic():
    statuses, _, _ = play(guard(), (0.7, 0.6, 0.5), (0.35, 0.3, 0.3))
    assert statuses == ["healthy", "healthy"]


def test_robust_overfitting_needs_patience_and_a_rising_train_side():
    watch = guard(patience=2)
    statuses, model, verdicts = play(watch, (0.6, 0.5, 0.5), (0.7, 0.6, 0.45), (0.8, 0.7, 0.42), (0.9, 0.8, 0.4))
    assert statuses == ["healthy", "healthy", "robust overfitting", "robust overfitting"]
    assert verdicts[-1].best_step == 0 and watch.roll_back(model) == 0
    worse_everywhere, _, _ = play(guard(patience=2), (0.6, 0.5, 0.5), (0.5, 0.4, 0.4), (0.5, 0.4, 0.4))
    noise, _, _ = play(guard(patience=2), (0.6, 0.5, 0.5), *[(0.6, 0.5, 0.49)] * 4)
    assert set(worse_everywhere) == set(noise) == {"healthy"}


def test_the_kept_state_is_a_copy_with_buffers_optimizer_and_file(tmp_path):
    watch, model = guard(path=tmp_path / "best.safetensors"), Played()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    watch.look(model, 7, optimizer)
    nn.init.constant_(model.weight, 5.0)
    model.norm.running_mean += 3
    optimizer.param_groups[0]["lr"] = 99.0
    assert load_file(tmp_path / "best.safetensors")["weight"].item() == 0.0
    assert watch.roll_back(model, optimizer) == 7
    assert (model.weight.item(), model.norm.running_mean.item(), optimizer.param_groups[0]["lr"]) == (0.0, 0.0, 0.1)
    nn.init.constant_(model.weight, 6.0)
    watch.roll_back(model)
    assert model.weight.item() == 0.0, "Expected the kept state to survive training after a roll-back."


def test_looks_repeat_and_leave_no_trace():
    x = torch.rand(120, 4, generator=torch.Generator().manual_seed(0))
    y, threat = (x[:, 0] > 0.5).long(), Threat("linf", 0.1)
    watch = OverfittingGuard((x[:60], y[:60]), (x[60:], y[60:]), attack=PGD(threat), fast_attack=PGD(threat, 1))
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    global_stream = torch.get_rng_state()
    first, second = watch.look(model, 0), watch.look(model, 0)
    assert first.strong_accuracy <= first.fast_accuracy and first == second
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), global_stream)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_refusals():
    with pytest.raises(ConfigurationError, match="no row in both"):
        OverfittingGuard(rows(0), rows(0), attack=marking(1), fast_attack=marking(0))
    with pytest.raises(ConfigurationError, match="attack"):
        guard(attack=None)
    with pytest.raises(ConfigurationError, match="drop"):
        guard(drop=1.5)
    with pytest.raises(ConfigurationError, match="patience"):
        guard(patience=0)
    with pytest.raises(AidefendError, match="look"):
        guard().roll_back(Played())
    watch, model = guard(), Played()
    watch.look(model, 0)
    with pytest.raises(ConfigurationError, match="optimizer"):
        watch.roll_back(model, torch.optim.SGD(model.parameters(), 0.1))


def test_the_switch_is_one_line_in_the_loop():
    attack = PGD(Threat("linf", 0.1))
    watch = guard(fallback=NFGSM(attack))
    play(watch, (0.9, 0.1, 0.1))
    assert isinstance(watch.objective(FastTraining(attack)), NFGSM)
