"""TRADES: its passes counted, its value against a naive twin, its refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from aidefend import AidefendError, ConfigurationError, Threat
from aidefend.adversarial import TRADES, PGDTraining
from aidefend.adversarial.trades import kl_divergence
from aidefend.attacks.evasion import APGD, PGD

THREAT = Threat("linf", 0.1)


class Passes(nn.Module):
    """Counts forward passes, and the rows that a backward pass brings to the input or to the first weights."""

    def __init__(self, body):
        super().__init__()
        self.body, self.forwards, self.modes = body, 0, []

    def forward(self, x):
        self.forwards += 1
        self.modes.append((self.body.training, torch.is_grad_enabled()))
        return self.body(x)


def plain():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def with_batch_norm():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def rows():
    return torch.rand(7, 5, generator=torch.Generator().manual_seed(1)), torch.arange(7) % 3


@pytest.mark.parametrize("steps", [1, 4])
def test_the_clean_answer_is_computed_once(steps):
    model, (x, y) = Passes(plain()), rows()
    TRADES(PGD(THREAT, steps))(model, x, y).backward()
    assert model.forwards == steps + 2


def test_one_pass_more_where_the_modes_answer_differently():
    model, (x, y) = Passes(with_batch_norm()), rows()
    TRADES(PGD(THREAT, 4))(model, x, y).backward()
    assert model.forwards == 4 + 3
    assert model.modes == [(False, False), *[(False, True)] * 4, (True, True), (True, True)]
    given = Passes(with_batch_norm())
    TRADES(PGD(THREAT, 4), attack_mode="given")(given, x, y).backward()
    assert given.forwards == 4 + 2 and all(training for training, _ in given.modes)
    frozen = Passes(with_batch_norm())
    frozen.body[1].eval()
    TRADES(PGD(THREAT, 4))(frozen, x, y).backward()
    assert frozen.forwards == 4 + 2


def naive_trades(model, x, y, eps, step, steps, beta, generator):
    """The published procedure, written plainly for the linf cube in [0, 1]: everything recomputed, in eval mode."""
    was_training = model.training
    model.eval()
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    torch.randn(x.shape, generator=generator, dtype=x.dtype)  # the attack draws its spare directions first
    point = low + (high - low) * torch.rand(x.shape, generator=generator, dtype=x.dtype)
    for _ in range(steps):
        point = point.detach().requires_grad_()
        p, q = functional.softmax(model(x), dim=1).detach(), functional.log_softmax(model(point), dim=1)
        loss = (p * (p.log() - q)).sum()
        grad = torch.autograd.grad(loss, point)[0]
        point = torch.minimum(torch.maximum(point.detach() + step * grad.sign(), low), high)
    model.train(was_training)
    clean = model(x)
    p, q = functional.softmax(clean, dim=1), functional.log_softmax(model(point.detach()), dim=1)
    return functional.cross_entropy(clean, y) + beta * (p * (p.log() - q)).sum(dim=1).mean()


@pytest.mark.parametrize("make", [plain, with_batch_norm])
def test_equal_to_the_naive_twin_with_its_gradients(make):
    model, (x, y) = make().double(), rows()
    x = x.double()
    twin = copy.deepcopy(model)
    ours = TRADES(PGD(THREAT, 4, 0.03), beta=3.0)(model, x, y, generator=torch.Generator().manual_seed(0))
    other = torch.Generator().manual_seed(0)
    torch.testing.assert_close(ours, naive_trades(twin, x, y, 0.1, 0.03, 4, 3.0, other))
    ours.backward()
    naive_trades(twin, x, y, 0.1, 0.03, 4, 3.0, torch.Generator().manual_seed(0)).backward()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_beta_zero_is_plain_training_and_more_beta_costs_more():
    model, (x, y) = plain(), rows()
    stream = torch.Generator().manual_seed
    values = [TRADES(PGD(THREAT, 3), beta=beta)(model, x, y, generator=stream(0)) for beta in (0.0, 1.0, 6.0)]
    torch.testing.assert_close(values[0], functional.cross_entropy(model(x), y))
    assert values[0] < values[1] < values[2]


def test_the_attack_climbs_the_divergence_not_its_own_loss():
    model, (x, y) = plain(), rows()
    seen = []

    class Spy:
        loss = "cross_entropy"

        def with_loss(self, loss):
            inner = PGD(THREAT, 3).with_loss(loss)

            def attack(model, x, y):
                seen.append((loss, y))
                return inner(model, x, y)

            return attack

    TRADES(Spy())(model, x, y)
    ((loss, target),) = seen
    assert loss is kl_divergence
    torch.testing.assert_close(target, functional.log_softmax(model(x), dim=1).detach())
    assert not target.requires_grad


def test_a_start_at_x_still_moves():
    """The divergence has no gradient at x itself: a step is taken all the same."""
    model, (x, y) = plain(), rows()
    attack = PGD(THREAT, 5, random_start=False)
    gap = TRADES(attack)(model, x, y) - functional.cross_entropy(model(x), y)
    best = TRADES(PGD(THREAT, 20))(model, x, y) - functional.cross_entropy(model(x), y)
    assert gap > 0.5 * best > 0


def test_divergence_is_stable_and_zero_at_equality():
    z = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    log_p = functional.log_softmax(z, dim=1)
    assert kl_divergence(z, log_p).tolist() == [0.0, 0.0]
    opposite = kl_divergence(-z, log_p)
    assert opposite.isfinite().all() and opposite[0] > 1e4


@pytest.mark.parametrize("attack", [lambda model, x, y: x, "pgd", None])
def test_foreign_attacks_without_a_loss_are_refused(attack):
    with pytest.raises(ConfigurationError, match="with_loss"):
        TRADES(attack)


def test_bad_fields():
    attack = PGD(THREAT)
    for arguments, rule in (
        ({"beta": -1.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"criterion": "ce"}, "criterion"),
        ({"attack_mode": "train"}, "attack_mode"),
    ):
        with pytest.raises(ConfigurationError, match=rule):
            TRADES(attack, **arguments)
    with pytest.raises(ConfigurationError, match="untargeted"):
        TRADES(APGD(THREAT, targeted=True))
    with pytest.raises(AidefendError, match="logits"):
        TRADES(attack)(nn.Linear(5, 1), *rows())


@pytest.mark.parametrize(
    "y",
    [torch.full((5,), 0.5), torch.arange(5) + 7, torch.zeros(5, 2, dtype=torch.int64), torch.arange(5) - 3],
    ids=["floats", "too large", "two a row", "negative"],
)
def test_labels_that_do_not_fit_are_named(y):
    model, x = nn.Linear(4, 3), torch.rand(5, 4)
    for objective in (TRADES(PGD(Threat("linf", 0.1), 2)), PGDTraining(lambda model, x, y: x)):
        with pytest.raises(AidefendError, match="y="):
            objective(model, x, y)
