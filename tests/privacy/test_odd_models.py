"""Models and loops off the beaten track: right, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from aidefend import ConfigurationError, IncompatibleModel, PrivacyError
from aidefend.privacy import check_private_ready
from tests.privacy.private_worlds import (
    cross_entropy,
    naive_sum,
    one_step,
    private_run,
    quiet,
    released,
    rows,
    settings,
    small_mlp,
)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(input=x)


class OverwritesItsInput(nn.Module):
    """The first layer's input changes after its use; plain training would fail on it too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = x.clone()
        out = self.layer(h)
        h.mul_(2)
        return self.head(out)


class SometimesFolded(nn.Module):
    """Folds rows together only when asked to."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.fold = False

    def forward(self, x):
        if self.fold:
            return self.layer(x.reshape(2, -1, 6)).reshape(len(x), 3)
        return self.layer(x)


class TwoArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x, scale=1.0, *, shift=None):
        out = scale * self.layer(x)
        return out if shift is None else out + shift


class WithNotes(nn.Linear):
    """Keeps state that is no tensor."""

    def get_extra_state(self):
        return {"note": "text"}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("model", [ByKeyword(), OverwritesItsInput()])
def test_models_that_cannot_be_followed_are_refused(model):
    assert check_private_ready(model, cross_entropy, rows(4)) != []
    with pytest.raises(IncompatibleModel, match="privately"):
        private_run(model)


def test_rows_folded_later_are_refused():
    private = private_run(SometimesFolded(), config=quiet(expected_batch_size=24))
    one_step(private)
    private.model.module.fold = True
    x, y = next(iter(private.loader))
    with pytest.raises(PrivacyError, match="24 rows in layer layer"):
        private.loss(private.model(x), y).backward()


@pytest.mark.parametrize("microbatch", [None, 5])
def test_further_arguments_reach_the_model(microbatch):
    model = TwoArguments()
    shift = torch.linspace(0, 1, 24)[:, None]
    private = private_run(model, config=quiet(expected_batch_size=24, microbatch=microbatch))
    before = copy.deepcopy(model)
    x, y = one_step(private, lambda net, a, b: cross_entropy(net(a, 2.0, shift=shift), b))
    expected = {name: torch.zeros_like(p) for name, p in before.named_parameters()}
    for i in range(24):

        def one(net, a, b, i=i):
            return cross_entropy(net(a, 2.0, shift=shift[i : i + 1]), b)

        for name, value in naive_sum(before, x[i : i + 1], y[i : i + 1], 0.7, one).items():
            expected[name] += value / 24
    for name, value in released(private).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_a_call_without_a_tensor_is_refused():
    with pytest.raises(PrivacyError, match="tensor among the arguments"):
        private_run().model([1.0, 2.0])


def test_passes_with_and_without_a_graph_of_their_own_join():
    """With microbatch, a pass whose input asks for a gradient keeps its graph; both kinds count."""

    def mixed(net, x, y):
        return cross_entropy(net(x), y) + cross_entropy(net(x.clone().requires_grad_()), y)

    found = []
    for microbatch in (None, 5):
        private = private_run(config=quiet(expected_batch_size=24, microbatch=microbatch))
        one_step(private, mixed)
        found.append(released(private))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


def test_state_that_is_no_tensor_is_not_saved_in_silence(tmp_path):
    private = private_run(WithNotes(6, 3))
    with pytest.raises(ConfigurationError, match="state of tensors"):
        private.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_optimizer_settings_survive_as_they_were(tmp_path):
    model = small_mlp()
    private = private_run(model, optimizer=torch.optim.Adam(model.parameters(), torch.tensor(0.01), betas=(0.8, 0.9)))
    private.save(tmp_path / "run")
    twin = small_mlp()
    again = private_run(twin, optimizer=torch.optim.Adam(twin.parameters(), torch.tensor(0.5)))
    again.resume(tmp_path / "run")
    group = again.optimizer.param_groups[0]
    assert group["betas"] == (0.8, 0.9) and float(group["lr"]) == pytest.approx(0.01)
    one_step(again)


def test_nothing_runs_after_release():
    private = private_run()
    x, y = next(iter(private.loader))
    private.release()
    private.release()
    private.loss(private.model(x), y).backward()
    with pytest.raises(PrivacyError, match="not released"):
        private.optimizer.step()


def test_a_loss_that_fails_on_every_row_is_named_and_its_cause_kept():
    def fussy(outputs, targets):
        if fussy.fails:
            raise ArithmeticError("no such day")
        return cross_entropy(outputs, targets)

    fussy.fails = False
    private = private_run(loss=fussy, config=settings(expected_batch_size=24))
    fussy.fails = True
    x, y = next(iter(private.loader))
    with pytest.raises(PrivacyError, match=r"outputs=.*ArithmeticError: no such day.*Call per_example_loss"):
        private.loss(private.model(x), y)


def test_tables_of_outputs_other_than_tensors():
    """A model that returns a dict works without microbatch, empty batches included."""

    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return {"logits": self.layer(x)}

    private = private_run(
        Dict(), loss=lambda out, y: functional.cross_entropy(out["logits"], y, reduction="none"), config=quiet()
    )
    one_step(private)
    assert private.model(torch.zeros(0, 6))["logits"].shape == (0, 3)


def test_the_optimizer_looks_like_the_inner_one():
    private = private_run()
    assert "SGD" in repr(private.optimizer) and private.optimizer.state is private.optimizer.inner.state
    private.optimizer.load_state_dict(private.optimizer.state_dict())
    private.optimizer.zero_grad(set_to_none=False)
    one_step(private)


def test_a_small_model_of_16_bits_trains():
    model = small_mlp().bfloat16()
    x, y = rows()
    private = private_run(model, (x.bfloat16(), y), settings(steps=3))
    for _ in range(3):
        one_step(private)
    assert all(p.dtype == torch.bfloat16 and bool(torch.isfinite(p).all()) for p in model.parameters())


def test_autocast_around_the_forward_pass():
    private = private_run(config=quiet(expected_batch_size=24))
    x, y = next(iter(private.loader))
    with torch.autocast("cpu", torch.bfloat16):
        loss = private.loss(private.model(x), y)
    loss.backward()
    private.optimizer.step()
    exact = private_run(config=quiet(expected_batch_size=24))
    one_step(exact)
    for name, value in released(exact).items():
        torch.testing.assert_close(released(private)[name], value, rtol=0, atol=0.05 * float(value.abs().max()))


class Lookup(nn.Module):
    """A layer of its own kind, with a table that all rows share."""

    def __init__(self, width, entries):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, entries))

    def forward(self, x, table):
        return torch.tanh(x @ table.T) * self.weight


class Shared(nn.Module):
    def __init__(self, entries):
        super().__init__()
        self.register_buffer("table", torch.randn(entries, 6, generator=torch.Generator().manual_seed(1)))
        self.look, self.head = Lookup(6, entries), nn.Linear(entries, 3)

    def forward(self, x):
        return self.head(self.look(x, self.table))


@pytest.mark.parametrize("entries", [4, 23, 24])
@pytest.mark.parametrize("microbatch", [None, 5, 4])
def test_a_shared_table_as_long_as_the_batch_is_not_taken_for_rows(entries, microbatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shared(entries)
    before = copy.deepcopy(model)
    private = private_run(model, config=quiet(expected_batch_size=24, steps=1, microbatch=microbatch))
    x, y = one_step(private)
    expected = naive_sum(before, x, y, 0.7)
    for name, gradient in released(private).items():
        torch.testing.assert_close(gradient * 24, expected[name], rtol=1e-3, atol=1e-5)


class WithTable(nn.Module):
    """A table that comes with the call."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x, table=None):
        return self.head(x if table is None else torch.tanh(x @ table.T @ table))


@pytest.mark.parametrize("entries", [5, 23, 24])
@pytest.mark.parametrize("microbatch", [None, 5])
def test_a_shared_argument_as_long_as_the_batch_is_not_cut_into_blocks(entries, microbatch):
    """Planted before: with microbatch a table with as many entries as the batch has rows was dealt out to them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WithTable()
    table = torch.randn(entries, 6, generator=torch.Generator().manual_seed(2))
    before = copy.deepcopy(model)
    private = private_run(model, config=quiet(expected_batch_size=24, steps=1, microbatch=microbatch))

    def objective(net, a, b):
        return cross_entropy(net(a, table), b)

    x, y = one_step(private, objective)
    expected = naive_sum(before, x, y, 0.7, objective)
    for name, gradient in released(private).items():
        torch.testing.assert_close(gradient * 24, expected[name], rtol=1e-3, atol=1e-5)


class Shifted(nn.Module):
    """A layer whose second input is there in some calls only."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x, shift):
        return self.weight * (x if shift is None else x + shift)


class SometimesShifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.head = Shifted(), nn.Linear(6, 3)

    def forward(self, x, by=None):
        return self.head(self.shift(x, by))


def test_an_input_that_the_probe_never_saw_is_refused():
    """Planted before: what came later was taken for shared, and the rows of all others went into each row."""
    private = private_run(SometimesShifted(), config=quiet(expected_batch_size=24))
    x, y = next(iter(private.loader))
    private.optimizer.zero_grad()
    private.loss(private.model(x), y).backward()
    private.optimizer.step()
    x, y = next(iter(private.loader))
    with pytest.raises(PrivacyError, match="seen at work"):
        private.model(x, torch.randn(24, 6))


@pytest.mark.parametrize("microbatch", [None, 7])
def test_a_backward_pass_inside_of_autocast_keeps_the_bound(microbatch):
    """Planted before: sums in 16 bits moved by several bounds for one row more."""
    x, y = rows(600)
    moved = []
    for keep in (slice(0, 600), slice(0, 599)):
        config = quiet(expected_batch_size=600, public_size=600, steps=1, microbatch=microbatch, max_grad_norm=0.01)
        private = private_run(small_mlp(), (x[keep], y[keep]), config, lr=0.0)
        inputs, targets = next(iter(private.loader))
        private.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            private.loss(private.model(inputs), targets).backward()
        private.optimizer.step()
        moved.append(torch.cat([g.flatten() for g in released(private).values()]) * 600)
    assert float((moved[0] - moved[1]).norm()) <= 0.01 * (1 + 1e-3)


def test_inputs_changed_between_the_passes_of_a_microbatch_are_refused():
    private = private_run(config=quiet(microbatch=3))
    x, y = next(iter(private.loader))
    loss = private.loss(private.model(x), y)
    x.mul_(2)
    with pytest.raises(PrivacyError, match="unchanged until backward"):
        loss.backward()


class TwoPrecisions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).double())


def test_layers_of_two_precisions_train():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TwoPrecisions()
    before = copy.deepcopy(model)
    private = private_run(model, config=quiet())
    x, y = one_step(private)
    expected = naive_sum(before, x, y, 0.7)
    for name, gradient in released(private).items():
        torch.testing.assert_close(gradient * 8, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("positions", [64, 512])
def test_long_sequences_are_ready_and_clipped_at_their_true_length(positions):
    stream = torch.Generator().manual_seed(0)
    data = torch.randint(0, 30, (24, positions), generator=stream), torch.randint(0, 3, (24,), generator=stream)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.mix, self.head = nn.Embedding(30, 64), nn.Linear(64, 64), nn.Linear(64, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.mix(self.words(x))).mean(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Reads()
    before = copy.deepcopy(model)
    private = private_run(model, data, quiet(max_grad_norm=0.01))
    x, y = one_step(private)
    expected = naive_sum(before, x, y, 0.01)
    for name, gradient in released(private).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient * 8, expected[name], rtol=0, atol=3e-3 * scale)
