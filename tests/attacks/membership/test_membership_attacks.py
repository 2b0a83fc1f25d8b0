"""Loss threshold and likelihood ratio against closed forms, naive twins, a two-point and a memorising world."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from torch import nn

from aidefend._core.errors import AidefendError, ConfigurationError
from aidefend._core.stats import roc_auc
from aidefend.attacks.membership import (
    LiRA,
    LossThreshold,
    half_splits,
    isolated_streams,
    likelihood_ratio,
    log_probabilities,
    scaled_logit,
    train_isolated,
)
from tests.worlds import two_point_membership_world


def memorising_train_fn(dataset, seed):
    """Sure of the rows it has seen, by a margin that differs from row to row; unsure of others."""
    seen = {tuple(dataset[i][0].tolist()) for i in range(len(dataset))}

    def model(x):
        known = torch.tensor([float(tuple(row.tolist()) in seen) for row in x])
        easiness = 3 * torch.sin(37 * x[:, 0])
        return torch.stack([known + easiness, torch.zeros(len(x))], dim=1)

    return model


def test_loss_threshold_has_the_known_roc_of_the_two_point_world():
    world = two_point_membership_world(n=200, sure_in=0.8, sure_out=0.3)
    scores = [LossThreshold()(world.model, *part) for part in (world.members, world.others)]
    assert roc_auc(*scores).value == pytest.approx(world.auc, abs=1e-12)
    assert world.auc == pytest.approx(0.75)


@pytest.mark.parametrize("score", ["loss", "margin"])
def test_scores_equal_the_definition_and_leave_no_trace(score):
    stream = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    x, y = torch.randn(9, 5, generator=stream), torch.randint(0, 4, (9,), generator=stream)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    LossThreshold(score)(model, x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and model[1].training
    model.eval()
    scores = LossThreshold(score, batch_size=2)(model, x, y)
    for row in range(9):
        logits = model(x)[row].tolist()
        own = logits[int(y[row])]
        rest = [value for k, value in enumerate(logits) if k != int(y[row])]
        expected = own - max(rest) if score == "margin" else own - math.log(sum(math.exp(value) for value in logits))
        assert float(scores[row]) == pytest.approx(expected, abs=1e-5)


def test_sure_rows_keep_their_order():
    """1 - p rounds to 0 here: an implementation that computes log(p / (1 - p)) from p gives infinity."""
    logits = torch.tensor([[50.0, 0.0, 0.0], [60.0, 0.0, 0.0], [40.0, 0.0, 0.0]])
    scores = LossThreshold()(nn.Identity(), logits, torch.zeros(3, dtype=torch.int64))
    assert scores.argsort().tolist() == [2, 0, 1] and bool((scores < 0).all())
    gap = scaled_logit(log_probabilities(logits), torch.zeros(3, dtype=torch.int64))
    assert gap.tolist() == pytest.approx([50 - math.log(2), 60 - math.log(2), 40 - math.log(2)])


def test_hardened_outputs_are_read_for_what_they_are():
    y = torch.tensor([0, 1])
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    assert LossThreshold()(lambda x: probabilities, y, y).exp().tolist() == pytest.approx([0.9, 0.6])
    cut = torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.5, 0.0]])
    assert LossThreshold("margin")(lambda x: cut, y, y).tolist() == pytest.approx(
        [math.log(0.9 / 1e-12), math.log(0.5 / 1e-12)]
    )
    labels = torch.tensor([0, 0])
    right, wrong = LossThreshold()(lambda x: labels, y, y).tolist()
    assert right > -1e-6 and wrong < -20
    refused = torch.tensor([[0.9, 0.1], [torch.nan, torch.nan]])
    assert LossThreshold()(lambda x: refused, y, y)[0].exp().item() == pytest.approx(0.9)
    assert LossThreshold()(lambda x: torch.tensor([-1, 1]), y, y)[1] > -1e-6
    wide = torch.tensor([0, 1, 5])
    answers = LossThreshold(batch_size=1)(lambda x: x, wide, torch.tensor([0, 1, 0]))
    assert bool((answers[:2] > -1e-6).all()) and answers[2] < -20  # batches that name different classes


@given(st.integers(0, 10_000), st.sampled_from(["online", "offline"]), st.sampled_from(["fixed", "per_example"]))
def test_likelihood_ratio_equals_a_naive_twin(seed, mode, variance):
    stream = np.random.Generator(np.random.Philox(seed))
    n, shadows = 5, 8
    inside = half_splits(n, shadows, seed).numpy()
    while (inside.sum(0) < 2).any() or ((~inside).sum(0) < 2).any():
        inside = stream.random((shadows, n)) < 0.5
    scores, observed = stream.normal(size=(shadows, n)), stream.normal(size=n)
    ours = likelihood_ratio(*map(torch.from_numpy, (observed, scores, inside)), mode=mode, variance=variance)
    for i in range(n):
        twin = []
        for chosen in (inside, ~inside):
            mine = [scores[s, i] for s in range(shadows) if chosen[s, i]]
            mean = sum(mine) / len(mine)
            if variance == "per_example":
                spread = np.std(mine, ddof=1)
            else:
                residuals, freedom = [], 0
                for j in range(n):
                    theirs = [scores[s, j] for s in range(shadows) if chosen[s, j]]
                    residuals += [(value - sum(theirs) / len(theirs)) ** 2 for value in theirs]
                    freedom += len(theirs) - 1
                spread = math.sqrt(sum(residuals) / freedom)
            twin.append(scipy_stats.norm(mean, spread))
        if mode == "online":
            expected = twin[0].logpdf(observed[i]) - twin[1].logpdf(observed[i])
        else:
            expected = twin[1].logcdf(observed[i]) - twin[1].logsf(observed[i])
        assert float(ours[i]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_halves_are_balanced_pairs():
    inside = half_splits(11, 6, 3)
    assert inside.sum(dim=0).tolist() == [3] * 11
    assert torch.equal(inside[0], ~inside[1]) and not torch.equal(inside[0], inside[2])
    assert torch.equal(inside, half_splits(11, 6, 3))


@pytest.mark.parametrize(("mode", "least"), [("online", 0.999), ("offline", 0.97)])
def test_lira_sees_what_one_threshold_cannot(mode, least):
    """Rows differ more in how easy they are than in whether they were seen: the loss hides what LiRA finds."""
    x = torch.linspace(0, 1, 120)[:, None]
    y = torch.zeros(120, dtype=torch.int64)
    inside = torch.arange(120) % 2 == 0
    model = memorising_train_fn([(row, 0) for row in x[inside]], 0)
    loss = LossThreshold()(model, x, y)
    ratio = LiRA(shadows=4, mode=mode)(model, x, y, train_fn=memorising_train_fn, seed=1)
    assert roc_auc(loss[inside], loss[~inside]).value < 0.75
    assert roc_auc(ratio[inside], ratio[~inside]).value > least


def test_lira_finds_nothing_where_training_ignores_the_data():
    """Planted null: AUC of 200 against 200 rows has a deviation of .029; .12 is 4 of them (false failure 5e-5)."""
    x, y = torch.linspace(0, 1, 400)[:, None], torch.zeros(400, dtype=torch.int64)

    def careless(dataset, seed):
        noise = torch.randn(400, generator=torch.Generator().manual_seed(seed))
        return lambda rows: torch.stack([noise[: len(rows)], torch.zeros(len(rows))], dim=1)

    ratio = LiRA(shadows=4)(careless(None, 99), x, y, train_fn=careless, seed=0)
    assert abs(roc_auc(ratio[::2], ratio[1::2]).value - 0.5) < 0.12


def test_training_is_isolated_repeatable_and_in_eval_mode():
    def careless(dataset, seed):
        """Draws from the global streams only."""
        layer = nn.Dropout(0.5)
        layer.draw = (torch.empty(2).uniform_().tolist(), np.random.rand(), random.random())
        return layer

    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    first, second, other = (train_isolated(careless, None, seed) for seed in (5, 5, 6))
    assert first.draw == second.draw != other.draw and not first.training
    with pytest.raises(ZeroDivisionError), isolated_streams(1):
        torch.empty(3).uniform_(), np.random.rand(), random.random()
        raise ZeroDivisionError
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_seeds_decide_and_configurations_pickle():
    x, y = torch.linspace(0, 1, 8)[:, None], torch.zeros(8, dtype=torch.int64)
    attack = pickle.loads(pickle.dumps(LiRA(shadows=4)))
    model = memorising_train_fn([(x[0], 0)], 0)
    runs = [attack(model, x, y, train_fn=memorising_train_fn, seed=seed) for seed in (1, 1)]
    insides = [attack.shadow_scores(x, y, train_fn=memorising_train_fn, seed=seed)[1] for seed in (1, 2)]
    assert torch.equal(*runs) and not torch.equal(*insides)
    assert pickle.loads(pickle.dumps(LossThreshold("margin"))) == LossThreshold("margin")


def test_bad_input_is_refused_with_a_cure():
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    for call, match in [
        (lambda: LiRA(shadows=5), "even number"),
        (lambda: LiRA(shadows=2), "shadows"),
        (lambda: LossThreshold("nll"), "score"),
        (lambda: LossThreshold()(nn.Identity(), x[:0], y[:0]), "x to hold at least one sample"),
        (lambda: LossThreshold()(nn.Identity(), x, y + 2), "num_classes"),
        (lambda: LossThreshold()(nn.Identity(), x, y[:2]), "row"),
        (lambda: LossThreshold()(lambda rows: rows[:, 0], x, y), "logits"),
        (lambda: LiRA()(nn.Identity(), x, y, train_fn=lambda data, seed: nn.Identity()), "at least 4 samples"),
        (lambda: train_isolated(lambda data, seed: None, None, 0), "return a model"),
        (lambda: train_isolated(3, None, 0), "callable"),
        (lambda: likelihood_ratio(torch.zeros(2), torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)), "shadow"),
        (lambda: likelihood_ratio(torch.zeros(2), torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool)), "shape"),
    ]:
        with pytest.raises(ConfigurationError, match=match):
            call()
    with pytest.raises(AidefendError, match="ZeroDivisionError"):
        LossThreshold()(lambda rows: 1 / 0, x, y)
