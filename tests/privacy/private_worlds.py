"""Small models, the naive way to private training (a backward pass for each example), and what attackers measure."""

import copy

import torch
from scipy.stats import norm
from torch import nn
from torch.nn import functional

from aidefend._core.stats import clopper_pearson
from aidefend.privacy import PrivacyConfig, make_private


def cross_entropy(outputs, targets):
    return functional.cross_entropy(outputs, targets, reduction="none")


def images(n=24, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 10, 10, generator=stream), torch.randint(0, 3, (n,), generator=stream)


def rows(n=24, width=6, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=stream), torch.randint(0, 3, (n,), generator=stream)


def small_cnn(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the stream is put back on leaving
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(54, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )


def small_mlp(seed=0, width=6):
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the stream is put back on leaving
        return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 3))


def settings(**changes):
    base = {
        "expected_batch_size": 8,
        "public_size": 24,
        "steps": 4,
        "max_grad_norm": 0.7,
        "delta": 1e-3,
        "noise_multiplier": 1.0,
    }
    return PrivacyConfig(**{**base, **changes})


def quiet(**changes):
    """Noise off and batches from a seed: insecure, for exact comparisons."""
    return settings(**{"insecure_no_noise": True, "insecure_seed": 3, **changes})


def private_run(model=None, data=None, config=None, loss=cross_entropy, lr=0.5, optimizer=None, ledger=None):
    model = small_mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr) if optimizer is None else optimizer
    return make_private(model, optimizer, rows() if data is None else data, loss, config or settings(), ledger=ledger)


def naive_sum(model, x, y, bound, objective=None):
    """Sum over the examples of each one's clipped gradient, from a batch of one each time."""
    objective = objective or (lambda net, a, b: cross_entropy(net(a), b))
    twin = copy.deepcopy(model)
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(len(x)):
        gradients = torch.autograd.grad(objective(twin, x[i : i + 1], y[i : i + 1]).sum(), list(parameters.values()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient * min(1.0, bound / float(norm))
    return total


def released(private):
    """The gradient that the last step used."""
    return {name: p.grad.clone() for name, p in private.model.module.named_parameters() if p.requires_grad}


def one_step(private, objective=None):
    """One turn of the loop; returns its batch."""
    x, y = next(iter(private.loader))
    private.optimizer.zero_grad()
    if objective is None:
        private.loss(private.model(x), y).backward()
    else:
        private.backward(objective(private.model, x, y))
    private.optimizer.step()
    return x, y


def two_forwards(model, x, y):
    """A TRADES-like loss of each example: clean loss plus the divergence at a moved input, gradient through both."""
    clean = model(x)
    moved = model(x + 0.1 * torch.sign(x))
    divergence = functional.kl_div(
        functional.log_softmax(moved, 1), functional.log_softmax(clean, 1), reduction="none", log_target=True
    )
    return cross_entropy(clean, y) + 2.0 * divergence.sum(1)


def separation(members, others):
    """Lower bound (99 % together) of the Gaussian-DP parameter mu, at a threshold fixed beforehand."""
    hits = clopper_pearson(int((members > 0.5).sum()), len(members), 0.98)
    false = clopper_pearson(int((others > 0.5).sum()), len(others), 0.98)
    return float(norm.ppf(hits.low) - norm.ppf(false.high))
