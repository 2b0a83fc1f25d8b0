"""The loop: the update is the clipped sum of per-example gradients, and nothing else gets in."""

import copy

import pytest
import torch
from torch import nn

from aidefend import BudgetExceeded, PrivacyError
from aidefend.privacy import make_private
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
    two_forwards,
)


def assert_close(found, expected, scale=1.0):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name] * scale, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("clip", [0.05, 0.7, 1e6])
@pytest.mark.parametrize("microbatch", [None, 1, 3])
def test_update_is_the_naive_clipped_sum(clip, microbatch):
    model = small_cnn()
    private = private_run(model, images(), quiet(max_grad_norm=clip, microbatch=microbatch))
    before = copy.deepcopy(model)
    x, y = one_step(private)
    assert_close(released(private), naive_sum(before, x, y, clip), 1 / 8)
    for name, parameter in model.named_parameters():
        expected = dict(before.named_parameters())[name] - 0.5 * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected.detach())


@pytest.mark.parametrize("microbatch", [None, 3])
def test_two_forward_passes_add_up_before_the_clip(microbatch):
    model = small_cnn()
    private = private_run(model, images(), quiet(max_grad_norm=0.3, microbatch=microbatch))
    before = copy.deepcopy(model)
    x, y = one_step(private, two_forwards)
    assert_close(released(private), naive_sum(before, x, y, 0.3, two_forwards), 1 / 8)
    assert max(float(g.abs().max()) for g in naive_sum(before, x, y, 0.3).values()) > 0


def test_automatic_clipping_gives_every_example_nearly_the_same_length():
    private = private_run(config=quiet(clipping="automatic", max_grad_norm=2.0))
    before = copy.deepcopy(private.model.module)
    x, y = one_step(private)
    total = {name: torch.zeros_like(p) for name, p in before.named_parameters()}
    for i in range(len(x)):
        one = naive_sum(before, x[i : i + 1], y[i : i + 1], 1e9)
        norm = float(torch.sqrt(sum(g.square().sum() for g in one.values())))
        for name in total:
            total[name] += 2.0 * one[name] / (norm + 0.01)
    assert_close(released(private), total, 1 / 8)


@pytest.mark.parametrize("microbatch", [1, 5])
def test_microbatch_bounds_the_rows_that_keep_a_graph(microbatch):
    private = private_run(small_cnn(), images(), quiet(expected_batch_size=24, microbatch=microbatch))
    one_step(private)
    rows_with_graph = []
    private.model.module[0].register_forward_hook(
        lambda module, inputs, output: rows_with_graph.append(len(output) if output.requires_grad else 0)
    )
    one_step(private, two_forwards)
    assert max(rows_with_graph) == microbatch and sum(rows_with_graph) == 2 * 24


def pgd_without_care(model, x, y, steps=3):
    """An attack by somebody else: parameters not frozen, graph through the private model."""
    x_adv = x.clone()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(x_adv), y).sum(), x_adv)
        x_adv = x_adv + 0.05 * gradient.sign()
    return x_adv.detach()


def frozen_attack(model, x, y):
    """An attack as in `aidefend.attacks`: parameters frozen for the time being."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        return pgd_without_care(model, x, y)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


@pytest.mark.parametrize("attack", [pgd_without_care, frozen_attack])
@pytest.mark.parametrize("microbatch", [None, 3])
def test_attack_and_evaluation_passes_do_not_disturb(attack, microbatch):
    model = small_cnn()
    private = private_run(model, images(), quiet(max_grad_norm=0.3, microbatch=microbatch))
    before = copy.deepcopy(model)

    def adversarial(net, x, y):
        clean = net(x)
        x_adv = attack(net, x, y)
        with torch.no_grad():
            net(images(5)[0])
        net(images(5)[0])
        return cross_entropy(clean, y) + cross_entropy(net(x_adv), y)

    x, y = one_step(private, adversarial)
    x_adv = attack(before, x, y)
    twin = {id(a): b for a, b in zip(x, x_adv, strict=True)}
    assert len(twin) == len(x)
    expected = {name: torch.zeros_like(p) for name, p in before.named_parameters()}
    for i in range(len(x)):

        def pair(net, a, b, i=i):
            return cross_entropy(net(a), b) + cross_entropy(net(x_adv[i : i + 1]), b)

        for name, value in naive_sum(before, x[i : i + 1], y[i : i + 1], 0.3, pair).items():
            expected[name] += value
    assert_close(released(private), expected, 1 / 8)


def test_passes_of_a_foreign_attack_are_given_back():
    private = private_run(small_cnn(), images(), quiet())
    x, y = next(iter(private.loader))
    pgd_without_care(private.model, x, y, steps=5)
    assert [len(record.taps) for record in private._recorder._passes] == [0] * 5


def test_a_pass_that_was_differentiated_cannot_train():
    private = private_run(config=quiet())
    x, y = next(iter(private.loader))
    losses = cross_entropy(private.model(x), y)
    torch.autograd.grad(losses.sum(), private.model.module[0].weight, retain_graph=True)
    with pytest.raises(PrivacyError, match="one backward pass"):
        private.backward(losses)


def test_noise_has_the_declared_size_and_covers_every_parameter():
    model = nn.Linear(100, 100)
    data = (torch.zeros(10, 100), torch.zeros(10, dtype=torch.long))
    config = settings(expected_batch_size=5, public_size=10, noise_multiplier=3.0, max_grad_norm=0.5, steps=1)
    private = private_run(model, data, config, loss=lambda out, y: 0.0 * out.sum(1))
    one_step(private)
    for gradient in released(private).values():
        spread = float(gradient.std()) / (3.0 * 0.5 / 5)
        # 100 bias numbers: the standard deviation of the estimate is 0.071; 5 of them fail once in 1.7 million runs
        assert abs(spread - 1) < 5 * (2 * gradient.numel()) ** -0.5


def test_noise_is_fresh_and_deaf_to_the_global_seed(monkeypatch):
    gradients = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(7)  # the trap: a global seed must not replay the noise
            private = private_run()
            one_step(private)
        gradients.append(released(private)["0.weight"])
    assert not torch.equal(*gradients)


def test_the_global_stream_is_not_touched():
    state = torch.get_rng_state()
    private = private_run(config=settings(microbatch=2))
    for _ in range(3):
        one_step(private)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_batch_steps_adds_noise_and_counts():
    class Flattening(nn.Module):
        """Fails on an empty batch: it must not be run on one."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            assert len(x) > 0
            return self.layer(x)

    private = private_run(Flattening(), config=settings(expected_batch_size=1e-9, steps=3))
    for count, (x, y) in enumerate(private.loader, 1):
        assert len(x) == len(y) == 0 and x.shape[1:] == (6,)
        before = private.model.module.layer.weight.detach().clone()
        private.optimizer.zero_grad()
        outputs = private.model(x)
        assert outputs.shape == (0, 3)
        private.loss(outputs, y).backward()
        private.optimizer.step()
        assert not torch.equal(private.model.module.layer.weight, before)
        assert private.steps_taken == count


def test_empty_batch_through_private_backward():
    private = private_run(config=quiet(expected_batch_size=1e-9, steps=1))
    one_step(private, lambda net, x, y: cross_entropy(net(x), y))
    assert all(not gradient.any() for gradient in released(private).values())


def test_row_with_infinity_is_masked_and_counted():
    x, y = rows()
    x[5] = torch.inf
    x[6, 0] = torch.nan
    model = small_mlp()
    private = private_run(model, (x, y), quiet(expected_batch_size=24, max_grad_norm=0.4))
    before = copy.deepcopy(model)
    one_step(private)
    good = [i for i in range(24) if i not in (5, 6)]
    assert_close(released(private), naive_sum(before, x[good], y[good], 0.4), 1 / 24)
    assert private.masked_rows == 2
    assert "masked_rows" not in private.statement().to_dict()


def test_batches_of_bad_rows_alone_leave_noise_alone():
    x, y = rows()
    private = private_run(data=(torch.full_like(x, torch.nan), y), config=quiet(expected_batch_size=24))
    one_step(private)
    assert all(not gradient.any() for gradient in released(private).values())
    assert private.masked_rows == 24


def test_label_that_the_loss_cannot_take_is_masked():
    x, y = rows()
    y[3] = 17
    model = small_mlp()
    private = private_run(model, (x, y), quiet(expected_batch_size=24))
    before = copy.deepcopy(model)
    one_step(private)
    good = [i for i in range(24) if i != 3]
    assert_close(released(private), naive_sum(before, x[good], y[good], 0.7), 1 / 24)
    assert private.masked_rows == 1


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_other_optimizers_see_the_private_gradient(make):
    model = small_mlp()
    private = private_run(model, config=quiet(), optimizer=make(model.parameters(), 0.01))
    twin = copy.deepcopy(model)
    plain = make(twin.parameters(), 0.01)
    for _ in range(3):
        before = copy.deepcopy(twin)
        x, y = one_step(private)
        for (_, parameter), gradient in zip(
            twin.named_parameters(), naive_sum(before, x, y, 0.7).values(), strict=True
        ):
            parameter.grad = gradient / 8
        plain.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_schedulers_take_the_private_optimizer():
    private = private_run(config=settings(steps=4))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(private.optimizer, max_lr=1.0, total_steps=4)
    rates = []
    for x, y in private.loader:
        private.optimizer.zero_grad()
        private.loss(private.model(x), y).backward()
        private.optimizer.step()
        rates.append(private.optimizer.inner.param_groups[0]["lr"])
        if len(rates) < 4:
            scheduler.step()
    assert len(set(rates)) == 4
    assert isinstance(private.optimizer, torch.optim.Optimizer)


def test_frozen_layers_stay_and_are_not_clipped_with():
    model = small_mlp()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model)
    private = private_run(model, config=quiet(), optimizer=torch.optim.SGD(model[2].parameters(), 0.5))
    x, y = one_step(private)
    assert_close(released(private), naive_sum(before, x, y, 0.7), 1 / 8)
    assert torch.equal(model[0].weight, before[0].weight)


@pytest.mark.global_random("dropout draws from the global stream: that is torch's own way")
def test_dropout_falls_alike_in_microbatch_and_its_second_run():
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    private = private_run(model, config=quiet(microbatch=10, expected_batch_size=24))
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    x, y = next(iter(private.loader))
    loss = private.loss(private.model(x), y)
    torch.rand(5)
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(hidden) for hidden in seen] == [10, 10, 4] * 2
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, second) and bool((first == 0).any())


def test_the_model_is_shared_not_copied():
    private = private_run()
    assert private.model.state_dict().keys() == private.model.module.state_dict().keys()
    twin = copy.deepcopy(private.model)
    assert type(twin) is nn.Sequential
    private.model.eval()
    assert not private.model.module.training
    private.model.load_state_dict(twin.state_dict())


def test_value_of_the_loss_is_the_mean():
    private = private_run()
    x, y = next(iter(private.loader))
    loss = private.loss(private.model(x), y)
    assert loss.item() == pytest.approx(cross_entropy(private.model.module(x), y).mean().item(), rel=1e-5)
    with torch.no_grad():
        assert not private.loss(private.model(x), y).requires_grad


def test_one_pass_is_all_remaining_steps_or_steps_per_pass():
    private = private_run(config=settings(steps=5, steps_per_pass=2))
    sizes = []
    for _ in range(3):
        sizes.append(len(private.loader))
        for x, y in private.loader:
            private.optimizer.zero_grad()
            private.loss(private.model(x), y).backward()
            private.optimizer.step()
    assert sizes == [2, 2, 1] and len(private.loader) == 0
    with pytest.raises(BudgetExceeded, match="fewer than 5 steps"):
        for _ in private.loader:
            pass


def test_dataset_length_moves_neither_scale_nor_rate_nor_steps():
    gradients, epsilons = [], []
    for n in (8, 9, 40):
        data = (torch.ones(n, 4), torch.zeros(n, dtype=torch.long))
        config = settings(expected_batch_size=8, public_size=8, steps=3, insecure_seed=1, delta=1e-3)
        model = nn.Linear(4, 2)
        torch.nn.init.zeros_(model.weight)
        private = make_private(
            model, torch.optim.SGD(model.parameters(), 1.0), data, lambda out, y: 0.0 * out.sum(1), config
        )
        one_step(private)
        gradients.append(released(private)["weight"])
        epsilons.append((len(private.loader), private.config.rate))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert len(set(epsilons)) == 1
