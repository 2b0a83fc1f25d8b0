"""Private training of parts of a given model: last layers, low-rank corrections, versions of each row, averages."""

import copy

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError, IncompatibleModel, PrivacyError
from aidefend.privacy import add_lora, check_private_ready, make_private, merge_lora
from tests.privacy.private_worlds import (
    cross_entropy,
    images,
    naive_sum,
    one_step,
    private_run,
    quiet,
    released,
    rows,
    settings,
    small_cnn,
    small_mlp,
)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the stream is put back on leaving
        return make()


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def matches_twin(model, data, objective=None, steps=2, loss=None, **changes):
    """Each step's gradient equals the clipped sum of one backward pass for each row, at the same weights."""
    config = quiet(**changes)
    trained = [p for p in model.parameters() if p.requires_grad]
    private = make_private(model, torch.optim.SGD(trained, 0.5), data, cross_entropy, config)
    for _ in range(steps):
        before = copy.deepcopy(model)
        x, y = one_step(private, objective)
        expected = naive_sum(before, x, y, config.max_grad_norm, loss)
        for name, gradient in released(private).items():
            expect = expected[name] / config.expected_batch_size
            torch.testing.assert_close(gradient, expect, rtol=1e-3, atol=1e-6)
    return private


# Last layers behind a frozen body.


def with_frozen_body(train=False):
    body = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()))
    body.requires_grad_(False).train(train)
    return nn.Sequential(body, seeded(lambda: nn.Linear(256, 3)))


def test_a_frozen_body_stays_and_the_head_learns():
    model = with_frozen_body()
    before, head = copy.deepcopy(model[0].state_dict()), model[1].weight.detach().clone()
    private = matches_twin(model, images())
    assert all(torch.equal(value, model[0].state_dict()[name]) for name, value in before.items())
    assert not torch.equal(head, model[1].weight)
    assert all(p.grad is None for p in model[0].parameters()) and private.steps_taken == 2


def test_batch_normalisation_of_the_body_in_train_mode_is_refused_also_later():
    with pytest.raises(IncompatibleModel, match=r"0\.1"):
        private_run(with_frozen_body(train=True), images(), optimizer=None)
    model = with_frozen_body()
    private = make_private(model, torch.optim.SGD(model[1].parameters(), 0.1), images(), cross_entropy, settings())
    private.model.train()
    x, _ = next(iter(private.loader))
    with pytest.raises(IncompatibleModel, match=r"0\.1"):
        private.model(x if len(x) else images()[0])


def test_a_body_that_is_unfrozen_later_is_refused():
    model = with_frozen_body()
    private = make_private(model, torch.optim.SGD(model[1].parameters(), 0.1), images(), cross_entropy, quiet())
    model[0][0].weight.requires_grad_(True)
    with pytest.raises(PrivacyError, match="parameters"):
        one_step(private)


# Low-rank corrections.


class TwoTowers(nn.Module):
    """A layer used twice, a convolution, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.turn = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.turn(torch.tanh(self.turn(self.stem(x))))))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x).mean(1))


def warmed(model, generator=0):
    """Corrections that are no longer zero."""
    stream = torch.Generator().manual_seed(generator)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "up" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=stream)
    return model


@pytest.mark.parametrize("make", [small_mlp, lambda: seeded(TwoTowers)])
def test_lora_gradients_equal_those_of_one_row_at_a_time(make):
    model = warmed(add_lora(make(), 2, alpha=3.0))
    assert check_private_ready(model, cross_entropy, tuple(part[:4] for part in rows())) == []
    matches_twin(model, rows())


def test_lora_of_a_transformer_trains_and_merges():
    model = seeded(Encoder)
    adapted = add_lora(model, 2)
    names = {name.rsplit(".", 2)[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"block.linear1", "block.linear2", "head"}  # attention reads its weights without calling layers
    x = torch.randn(24, 5, 8, generator=torch.Generator().manual_seed(1))
    matches_twin(adapted, (x, rows()[1]), steps=3)
    with torch.no_grad():
        slow, fast, merged = adapted.train()(x), adapted.eval()(x), merge_lora(adapted)(x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, slow, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(slow, model(x), atol=1e-4)


def test_lora_weights_change_in_real_private_training():
    """Adapters that are in place but never learn have gone unnoticed elsewhere; so does a budget spent for nothing."""
    model = small_mlp()
    adapted = add_lora(model, 2)
    data = rows()
    torch.testing.assert_close(adapted(data[0]), model(data[0]), rtol=0, atol=0)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    private = make_private(adapted, torch.optim.Adam(trained, 0.05), data, cross_entropy, settings())
    for x, y in private.loader:
        private.optimizer.zero_grad()
        private.loss(private.model(x), y).backward()
        private.optimizer.step()
    merged = merge_lora(adapted)
    assert [type(layer) for layer in merged] == [nn.Linear, nn.Tanh, nn.Linear]
    assert merged.state_dict().keys() == model.state_dict().keys()
    for before, after in zip(model, merged, strict=True):
        if isinstance(before, nn.Linear):
            change = after.weight - before.weight
            assert change.abs().max() > 1e-3 and torch.linalg.matrix_rank(change, rtol=1e-4) <= 2
            assert torch.equal(after.bias, before.bias) and after.weight.requires_grad
    torch.testing.assert_close(merged(data[0]), adapted(data[0]), rtol=1e-4, atol=1e-5)


def test_lora_parameters_that_are_made_anew_after_wrapping_are_refused():
    """The root of adapters that never learned: parameters replaced after the training looked at them."""
    adapted = add_lora(small_mlp(), 2)
    private = make_private(
        adapted,
        torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1),
        rows(),
        cross_entropy,
        quiet(),
    )
    adapted[0].down.weight = nn.Parameter(adapted[0].down.weight.detach().clone())
    with pytest.raises(PrivacyError, match="parameters"):
        one_step(private)


def test_lora_leaves_the_model_alone_and_can_be_steered():
    model = small_mlp().eval()
    before = flat(model.parameters())
    stream = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = (add_lora(model, 2, layers=["0"], generator=each) for each in stream)
    assert torch.equal(flat(model.parameters()), before) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(flat(first.parameters()), flat(second.parameters()))
    assert isinstance(first[2], nn.Linear) and not first[2].weight.requires_grad and not first.training
    assert sum(p.numel() for p in first.parameters() if p.requires_grad) == 2 * (6 + 5)
    first[2].requires_grad_(True)
    matches_twin(warmed(first), rows())


def test_lora_of_a_bare_layer_of_a_shared_one_and_of_other_types():
    layer = seeded(lambda: nn.Linear(4, 4).double())
    assert torch.equal(merge_lora(add_lora(layer, 1)).weight, layer.weight)
    shared = add_lora(nn.Sequential(layer, nn.Tanh(), layer), 2)
    assert shared[0] is shared[2] and shared[0].down.weight.dtype == torch.float64
    wider = add_lora(add_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 1, layers=["0"]), 2, layers=["1"])
    assert not wider[0].up.weight.requires_grad and wider[1].up.weight.requires_grad


class Tied(nn.Module):
    """The output layer reads the table of the input."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.table(x).mean(1))


def test_merging_leaves_a_tied_weight_alone():
    model = seeded(Tied)
    merged = merge_lora(warmed(add_lora(model, 2)))
    assert torch.equal(merged.table.weight, model.table.weight) and not torch.equal(merged.out.weight, model.out.weight)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_lora_keeps_off_layers_whose_weight_is_not_what_it_seems():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), Doubled(5, 5), nn.Linear(5, 3))
    adapted = add_lora(model, 2)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {"2.down.weight", "2.up.weight"}
    for name in ("0", "1"):
        with pytest.raises(IncompatibleModel, match="no plain"):
            add_lora(model, 2, layers=[name])


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: add_lora(small_mlp(), 0), "rank"),
        (lambda: add_lora(small_mlp(), 4), "rank"),
        (lambda: add_lora(small_mlp(), 1, layers=["7"]), "layers"),
        (lambda: add_lora(small_mlp(), 1, layers="0"), "layers"),
        (lambda: add_lora(small_mlp(), 1, layers=[]), "linear layers"),
        (lambda: add_lora(small_mlp(), 1, layers=["1"]), "no plain"),
        (lambda: add_lora(small_mlp(), 1, alpha=0.0), "alpha"),
        (lambda: add_lora(nn.Conv2d(1, 1, 1), 1), "linear"),
        (lambda: add_lora(seeded(Encoder), 1, layers=["block.self_attn.out_proj"]), "no plain"),
        (lambda: add_lora(add_lora(small_mlp(), 1), 1, layers=["0.base"]), "without calling"),
        (lambda: add_lora("model", 1), "model"),
        (lambda: merge_lora(small_mlp()), "add_lora"),
        (lambda: merge_lora(None), "model"),
    ],
)
def test_lora_refusals(call, word):
    with pytest.raises((ConfigurationError, IncompatibleModel), match=word):
        call()


# Augmentation multiplicity in the user's loop: K versions of each row, averaged before clipping.


def three_versions(model, x, y):
    versions = (x, x.flip(3), x.roll(1, 2))
    return torch.stack([cross_entropy(model(version), y) for version in versions]).mean(0)


@pytest.mark.parametrize("microbatch", [None, 3])
def test_versions_of_each_row_are_averaged_before_clipping(microbatch):
    matches_twin(small_cnn(), images(), three_versions, steps=2, loss=three_versions, microbatch=microbatch)


def test_versions_stay_within_one_bound():
    """Three agreeing versions of a row move the sum by one clip norm, not by three."""
    x, y = images()
    private = private_run(small_cnn(), (100 * x, y), quiet(expected_batch_size=24, max_grad_norm=0.01))

    def loud(model, a, b):
        return 100 * three_versions(model, a, b)

    one_step(private, loud)
    assert flat(released(private).values()).norm() * 24 <= 24 * 0.01 * (1 + 1e-5)


def test_versions_laid_one_after_the_other_in_one_call_are_refused():
    private = private_run(small_cnn(), images(), quiet())

    def joined(model, x, y):
        return cross_entropy(model(torch.cat([x, x.flip(3)])), y.repeat(2)).reshape(2, -1).mean(0)

    with pytest.raises(PrivacyError, match="rows"):
        one_step(private, joined)


# Averages of the iterates in the user's loop: post-processing, and torch has it.


@pytest.mark.parametrize("kind", ["equal", "exponential"])
def test_averaged_model_of_torch_works_around_private_training(kind):
    function = None if kind == "equal" else torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    private = private_run(small_cnn(), images(), quiet(steps=5))
    averaged = torch.optim.swa_utils.AveragedModel(private.model, multi_avg_fn=function)
    assert type(averaged.module) is nn.Sequential  # a copy of the plain model, which no budget watches
    iterates = []
    for x, y in private.loader:
        private.optimizer.zero_grad()
        private.loss(private.model(x), y).backward()
        private.optimizer.step()
        averaged.update_parameters(private.model)
        iterates.append(flat(private.model.parameters()))
    expected = torch.stack(iterates).mean(0)
    if kind == "exponential":
        expected = iterates[0]
        for weights in iterates[1:]:
            expected = 0.5 * expected + 0.5 * weights
    torch.testing.assert_close(flat(averaged.parameters()), expected, rtol=1e-4, atol=1e-6)
    assert averaged(images()[0]).shape == (24, 3) and private.steps_taken == 5
