"""Every kind of model that can be trained privately keeps the same conventions. A new kind is one line in PRIVATE."""

import copy

import pytest
import torch
from torch import nn

from aidefend.privacy import ScatterFeatures, add_lora, check_private_ready, fix
from tests.privacy.private_worlds import cross_entropy, naive_sum, one_step, private_run, quiet, released


class Attention(nn.Module):
    """One head of self-attention over the positions of one example."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x):
        scores = self.query(x) @ self.key(x).mT
        return x + torch.softmax(scores, 2) @ self.value(x)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class FirstPosition(nn.Module):
    def forward(self, x):
        return x[:, 0]


class ClassToken(nn.Module):
    """A module with a parameter of its own around other layers."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 6) / 3)
        self.body, self.head = Attention(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(torch.cat([self.token.expand(len(x), 1, 6), x], dim=1))[:, 0])


class Recurrent(nn.Module):
    """The replacement that the check names for nn.LSTM; its weights have two names."""

    def __init__(self):
        from opacus.layers import DPLSTM

        super().__init__()
        self.cells = DPLSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


def positive(outputs, targets):
    return nn.functional.softplus(outputs[:, 0] * (1 - 2 * targets.float()))


def squared(outputs, targets):
    return (outputs[:, 0] - targets).square()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def labels(n):
    return torch.arange(n) % 3


def words(n):
    return torch.randint(0, 9, (n, 5), generator=torch.Generator().manual_seed(1))


N = 12
PRIVATE = {  # name: (model, inputs, targets, per-example loss)
    "linear": (lambda: nn.Linear(4, 3), draw(N, 4), labels(N), cross_entropy),
    "regression": (lambda: nn.Linear(4, 1), draw(N, 4), draw(N), squared),
    "one logit": (lambda: nn.Linear(4, 1), draw(N, 4), labels(N) % 2, positive),
    "table": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        draw(N, 4),
        labels(N),
        cross_entropy,
    ),
    "image": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        draw(N, 2, 6, 6),
        labels(N),
        cross_entropy,
    ),
    "residual image": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2),
            Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding="same", groups=2), nn.ELU())),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        draw(N, 1, 8, 8),
        labels(N),
        cross_entropy,
    ),
    "signal": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)),
        draw(N, 2, 10),
        labels(N),
        cross_entropy,
    ),
    "text": (
        lambda: nn.Sequential(nn.Embedding(9, 6), Attention(6), nn.RMSNorm(6), FirstPosition(), nn.Linear(6, 3)),
        words(N),
        labels(N),
        cross_entropy,
    ),
    "class token": (ClassToken, draw(N, 4, 6), labels(N), cross_entropy),
    "low-rank corrections": (
        lambda: add_lora(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 2),
        draw(N, 4),
        labels(N),
        cross_entropy,
    ),
    "fixed batch normalisation": (
        lambda: fix(nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))).model,
        draw(N, 4),
        labels(N),
        cross_entropy,
    ),
    "scattering": (
        lambda: nn.Sequential(ScatterFeatures(1, 2), nn.Flatten(), nn.Linear(27, 3)),
        draw(N, 1, 6, 6),
        labels(N),
        cross_entropy,
    ),
    "recurrent": (Recurrent, draw(N, 5, 4), labels(N), cross_entropy),
    "double precision": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(),
        draw(N, 4).double(),
        labels(N),
        cross_entropy,
    ),
}


@pytest.fixture(params=PRIVATE)
def case(request):
    make, x, y, loss = PRIVATE[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the stream is put back on leaving
        model = make()
        model(x)
    return model, x, y, loss


def stepped(case, objective=None, **changes):
    model, x, y, loss = case
    config = quiet(**{"expected_batch_size": N, "public_size": N, "max_grad_norm": 0.2, **changes})
    private = private_run(copy.deepcopy(model), (x, y), config, loss)
    one_step(private, objective)
    return private


def assert_same(found, expected, scale=1.0):
    for name, value in expected.items():
        limit = 1e-4 * float(value.abs().max()) * scale + 1e-6
        torch.testing.assert_close(found[name], value * scale, rtol=0, atol=limit)


def test_it_is_ready(case):
    model, x, y, loss = case
    assert check_private_ready(model, loss, (x[:4], y[:4])) == []


def test_the_check_leaves_no_trace(case):
    model, x, y, loss = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    check_private_ready(model, loss, (x[:4], y[:4]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_update_is_the_naive_clipped_sum(case):
    model, x, y, loss = case
    expected = naive_sum(model, x, y, 0.2, lambda net, a, b: loss(net(a), b))
    assert_same(released(stepped(case)), expected, 1 / N)


def test_identity_without_clip_and_noise(case):
    """A clip norm that binds nobody and no noise: plain training."""
    model, x, y, loss = case
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss(model(x), y).mean(), list(trained.values()))
    expected = dict(zip(trained, gradients, strict=True))
    assert_same(released(stepped(case, max_grad_norm=1e6)), expected)


@pytest.mark.parametrize("size", [1, 5, N])
def test_microbatch_changes_nothing(case, size):
    assert_same(released(stepped(case, microbatch=size)), released(stepped(case)))


def test_two_passes_add_up_before_the_clip(case):
    model, x, y, loss = case

    def twice(net, a, b):
        return loss(net(a), b) + 0.5 * loss(net(a), b).exp()

    assert_same(released(stepped(case, twice)), naive_sum(model, x, y, 0.2, twice), 1 / N)


def test_order_of_the_rows_does_not_matter(case):
    model, x, y, loss = case
    backwards = (model, x.flip(0), y.flip(0), loss)
    assert_same(released(stepped(backwards)), released(stepped(case)))


def test_one_row_moves_the_sum_by_no_more_than_the_clip_norm(case):
    model, x, y, loss = case
    all_rows, fewer = released(stepped(case)), released(stepped((model, x[:-1], y[:-1], loss)))
    move = torch.cat([((all_rows[name] - fewer[name]) * N).flatten() for name in fewer]).norm()
    assert float(move) <= 0.2 * (1 + 1e-4)


def test_evaluation_and_copies_are_the_plain_model(case):
    model, x, y, loss = case
    private = private_run(copy.deepcopy(model), (x, y), quiet(), loss)
    with torch.no_grad():
        torch.testing.assert_close(private.model(x), model(x))
        torch.testing.assert_close(copy.deepcopy(private.model)(x), model(x))
        assert private.model(x[:0]).shape == (0, *model(x).shape[1:])
