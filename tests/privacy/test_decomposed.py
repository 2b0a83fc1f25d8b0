"""Attention and recurrent layers taken apart: the kernel's outputs, and per-example gradients of every parameter."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from aidefend import IncompatibleModel, PrivacyError
from aidefend.privacy import check_private_ready
from aidefend.privacy.recorder import Recorder
from aidefend.privacy.step_book import Ticket
from tests.privacy.private_worlds import cross_entropy, naive_sum, one_step, private_run, quiet, released
from tests.privacy.test_layer_gradients import check, inputs, seeded

FEW = settings(max_examples=6, deadline=None)


class First(nn.Module):
    """The first output of a layer that has several."""

    def __init__(self, layer, *others, turned=False, **options):
        super().__init__()
        self.layer, self.others, self.turned, self.options = layer, others, turned, options

    def forward(self, x):
        found = self.layer(x.transpose(0, 1) if self.turned else x, *self.others, **self.options)[0]
        return found.transpose(0, 1) if self.turned else found


class ToItself(nn.Module):
    """Attention of a sequence to itself, or to a part of it with other widths."""

    def __init__(self, layer, key_width=None, turned=False, **options):
        super().__init__()
        self.layer, self.key_width, self.turned, self.options = layer, key_width, turned, options

    def forward(self, x):
        q = x.transpose(0, 1) if self.turned else x
        k = q if self.key_width is None else q[..., : self.key_width]
        padding = {"key_padding_mask": x[:, :, 0] > 0.5} if self.options.get("padded") else {}
        options = {name: value for name, value in self.options.items() if name != "padded"}
        out = self.layer(q, k, k, **options, **padding)[0]
        return out.transpose(0, 1) if self.turned else out


def same_outputs(model, x):
    """The recorded pass answers as the kernel does, and leaves no trace."""
    before = set(model.__dict__)
    recorder = Recorder(model)
    found = recorder.run(Ticket(1, len(x)), (x,), {})
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert set(model.__dict__) == before
    assert all("forward" not in module.__dict__ for module in model.modules())


@FEW
@given(
    st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
)
def test_recurrent_layers(kind, depth, bias, both, batch_first, n):
    make = {"num_layers": depth, "bias": bias, "bidirectional": both, "batch_first": batch_first}
    model = seeded(lambda: First(kind(3, 4, **make), turned=not batch_first))
    x = inputs(n, 5, 3, passes=2)
    same_outputs(model, x[0])
    check(model, x)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_recurrent_layers_of_other_forms():
    x = inputs(3, 4, 3)
    projected = seeded(lambda: First(nn.LSTM(3, 5, 2, batch_first=True, proj_size=2, bidirectional=True)))
    rectified = seeded(lambda: First(nn.RNN(3, 4, batch_first=True, nonlinearity="relu")))
    for model in (projected, rectified):
        same_outputs(model, x[0])
        check(model, x)
    half = seeded(lambda: First(nn.GRU(3, 4, batch_first=True)))
    half.layer.weight_hh_l0.requires_grad_(False)
    half.layer.bias_ih_l0.requires_grad_(False)
    check(half, x)


class FromState(nn.Module):
    """The state before the first step comes from the data, and the last state is what is used."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind(3, 4, num_layers=2, batch_first=True)

    def forward(self, x):
        start = x.mean(dim=(1, 2)).reshape(1, -1, 1).repeat(2, 1, 4)
        end = self.layer(x, (start, start) if isinstance(self.layer, nn.LSTM) else start)[1]
        return torch.cat([part.transpose(0, 1) for part in end], 2) if isinstance(end, tuple) else end.transpose(0, 1)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_states_in_and_out(kind):
    model = seeded(lambda: FromState(kind))
    same_outputs(model, inputs(3, 4, 3)[0])
    check(model, inputs(3, 4, 3))


class Unrolled(nn.Module):
    """A cell in the user's own loop."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for moment in range(x.shape[1]):
            state = self.cell(x[:, moment], state)
        return torch.cat(state, dim=1) if isinstance(state, tuple) else state


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells(kind, bias):
    model = seeded(lambda: Unrolled(kind(3, 4, bias=bias)))
    same_outputs(model, inputs(3, 4, 3)[0])
    check(model, inputs(3, 4, 3, passes=2))


ATTENTION = {
    "plain": ({}, {}),
    "without weights": ({}, {"need_weights": False}),
    "without bias": ({"bias": False}, {}),
    "other widths": ({"kdim": 3, "vdim": 3}, {"key_width": 3}),
    "weights by head": ({}, {"average_attn_weights": False}),
    "masked": ({}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}),
    "masked with numbers": ({}, {"attn_mask": torch.linspace(-2, 1, 25).reshape(5, 5), "need_weights": False}),
    "mask by head": ({}, {"attn_mask": torch.linspace(-2, 1, 150).reshape(6, 5, 5)}),
    "causal": ({}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False}),
    "padded": ({}, {"padded": True}),
}


@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention(case, batch_first):
    make, options = ATTENTION[case]
    model = seeded(
        lambda: ToItself(
            nn.MultiheadAttention(4, 2, batch_first=batch_first, **make), turned=not batch_first, **options
        )
    )
    x = inputs(3, 5, 4)[0].clamp(-2, 0.5)
    x[:, :2, 0] = -1.0  # never padding
    x[1, 4, 0] = 0.6
    same_outputs(model, x)
    if case != "mask by head":  # the twin runs one row at a time, and the mask has all rows
        check(model, [x])


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "in_proj", "out_proj"])
def test_half_frozen_attention(frozen):
    model = seeded(lambda: ToItself(nn.MultiheadAttention(4, 2, batch_first=True)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(f"layer.{frozen}"))
    check(model, inputs(3, 5, 4, passes=2))


def test_frozen_layers_run_their_own_kernel():
    model = First(nn.LSTM(3, 4, batch_first=True)).requires_grad_(False)
    assert Recorder(model)._apart == []


def test_the_weights_that_attention_returns_are_the_kernels():
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = inputs(3, 5, 4)[0]
    recorded = Recorder(model).run(Ticket(1, 3), (x, x, x), {})
    for found, expected in zip(recorded, model(x, x, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.random.fork_rng()
def test_dropout_in_attention_and_between_layers_is_at_work():
    x = inputs(200, 5, 4)[0]

    def twice(model):
        return torch.equal(*[Recorder(model).run(Ticket(1, 200), (x,), {}) for _ in range(2)])

    recurrent = First(nn.GRU(4, 4, 2, dropout=0.5, batch_first=True))
    attention = ToItself(nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True))
    assert not twice(recurrent) and not twice(attention)
    assert twice(recurrent.eval()) and twice(attention.eval())


class Encoder(nn.Module):
    """What users build: words, two encoder layers of torch, a head."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(12, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.words(x)).mean(dim=1))


class Reader(nn.Module):
    """Words, an LSTM, a head."""

    def __init__(self):
        super().__init__()
        self.words, self.lstm, self.head = nn.Embedding(12, 5), nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(self.words(x))[0][:, -1])


@pytest.mark.parametrize("microbatch", [None, 7])
@pytest.mark.parametrize("make", [Encoder, Reader])
def test_a_private_step_is_the_clipped_sum(make, microbatch):
    model = seeded(make)
    stream = torch.Generator().manual_seed(1)
    data = torch.randint(0, 12, (24, 6), generator=stream), torch.randint(0, 3, (24,), generator=stream)
    before = copy.deepcopy(model)
    private = private_run(model, data, quiet(microbatch=microbatch))
    x, y = one_step(private)
    expected = naive_sum(before, x, y, 0.7)
    for name, gradient in released(private).items():
        torch.testing.assert_close(gradient * 8, expected[name], rtol=1e-3, atol=1e-5)


class Doubling(nn.LSTM):
    """A subclass that computes something else."""

    def forward(self, x, hx=None):
        output, state = super().forward(x, hx)
        return 2 * output, state


def test_what_cannot_be_taken_apart_is_refused_by_name():
    x, y = torch.randn(4, 5, 4), torch.tensor([0, 1, 2, 0])

    def problems(layer, read=lambda found: found[0][:, -1]):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, inputs):
                return read(
                    self.layer(inputs, inputs, inputs)
                    if isinstance(layer, nn.MultiheadAttention)
                    else self.layer(inputs)
                )

        return check_private_ready(Net(), cross_entropy, (x, y))

    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        found = problems(nn.MultiheadAttention(4, 2, batch_first=True, **options))
        assert [problem.path for problem in found] == ["layer"] and "hides" in found[0].reason
    assert "LSTM" in str(problems(Doubling(4, 3, batch_first=True))) or problems(Doubling(4, 3, batch_first=True))
    assert problems(nn.LSTM(4, 3, batch_first=True)) == []
    mixed = problems(nn.LSTM(4, 3), read=lambda found: found[0][:, -1])  # batch_first forgotten: rows run into rows
    assert mixed


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), 4), batch_first=True)
        return self.lstm(packed)[1][0][0]


def test_packed_sequences_are_refused():
    with pytest.raises((PrivacyError, IncompatibleModel), match="PackedSequence"):
        private_run(Packed(), (torch.randn(24, 4, 3), torch.randint(0, 3, (24,))))


def test_an_error_in_the_middle_leaves_no_trace():
    model = nn.Sequential(First(nn.GRU(3, 4, batch_first=True)), nn.Linear(5, 2))
    with pytest.raises(RuntimeError):
        Recorder(model).run(Ticket(1, 2), (torch.zeros(2, 4, 3),), {})
    assert all("forward" not in module.__dict__ and not module._forward_hooks for module in model.modules())


def test_planted_missing_product_is_noticed(monkeypatch):
    """A form that forgets one weight's product: the probe at wrap time refuses the model."""
    honest = Recorder._multiply

    def forgetful(self, taps, path, layer, product, x):
        return honest(self, [] if product.weight.startswith("weight_hh") else taps, path, layer, product, x)

    monkeypatch.setattr(Recorder, "_multiply", forgetful)
    with pytest.raises(IncompatibleModel):
        private_run(Reader(), (torch.randint(0, 12, (24, 6)), torch.randint(0, 3, (24,))))


def test_planted_other_answer_is_noticed(monkeypatch):
    from aidefend.privacy import decomposed

    honest = functional.linear
    monkeypatch.setattr(decomposed.functional, "linear", lambda x, weight, bias=None: honest(x, weight, bias) * 1.01)
    model = First(nn.GRU(3, 3, batch_first=True))
    found = check_private_ready(model, lambda outputs, y: outputs.sum((1, 2)), (torch.randn(4, 5, 3), torch.zeros(4)))
    assert found and "otherwise" in found[0].reason
