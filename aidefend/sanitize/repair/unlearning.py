"""Unlearning of universal perturbations (I-BAU): what fools the model on all trusted rows is trained away."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aidefend._core.random import derive_seed, make_generator, own_stream
from aidefend.sanitize.repair.tuning import TrustedRows, copied, train_with_own_statistics

_FIXED_POINT_STEPS = 5
_INNER_RATE = 0.1  # contraction of the inner map, relative to the curvature of its penalty
_PENALTY = 1e-3


def unlearned(
    model: nn.Module, rows: TrustedRows, *, radius: float, rounds: int, steps: int, rate: float, seed: int
) -> nn.Module:
    """A copy of the model after `rounds` of: a universal perturbation by ascent, then descent with its hypergradient.

    `radius` is the l2 radius of the perturbation, as a share of the typical distance of a row from the mean row;
    `steps` of descent, three times as many of ascent, make a round; `rate` is that of the outer Adam.

    Source: Zeng, Chen, Park, Mao, Jin, Jia 2022 (implicit hypergradient by a fixed-point iteration). Here the perturbed
        rows stay inside the range of the trusted rows, and the radius is relative to their spread.
    """
    model = copied(model)
    train_with_own_statistics(model)
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    stream = make_generator(seed=derive_seed(seed, "unlearning"))
    size = radius * float((rows.x - rows.x.mean(dim=0)).flatten(1).norm(dim=1).mean())
    with torch.enable_grad(), own_stream(derive_seed(seed, "dropout")):
        for _ in range(rounds):
            delta = _ascended(model, rows, size, steps, stream)
            for _ in range(steps):
                x, y = _batch(rows, stream)
                optimizer.zero_grad()
                for parameter, gradient in zip(parameters, _hypergradient(model, parameters, delta, x, y), strict=True):
                    parameter.grad = gradient
                optimizer.step()
    return model.eval()


def _batch(rows: TrustedRows, stream: torch.Generator, count: int = 128) -> tuple[Tensor, Tensor]:
    chosen = torch.randperm(len(rows.x), generator=stream)[:count].to(rows.x.device)
    return rows.x[chosen], rows.y[chosen]


def moved(x: Tensor, delta: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Rows with the perturbation on them, inside the range of the trusted rows."""
    return torch.maximum(torch.minimum(x + delta, high), low)


def _ascended(model: nn.Module, rows: TrustedRows, size: float, steps: int, stream: torch.Generator) -> Tensor:
    """A perturbation (shape of one sample) within the l2 ball under which the loss on all rows is high."""
    low, high = rows.x.amin(), rows.x.amax()
    delta = torch.zeros_like(rows.x[0]).requires_grad_(True)
    for number in range(3 * steps):
        x, y = _batch(rows, stream)
        loss = cross_entropy(model(moved(x, delta, low, high)), y)
        (gradient,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            step = 0.3 * size * (1 - number / (3 * steps))
            delta += step * gradient / gradient.norm().clamp(min=1e-12)
            delta *= (size / delta.norm().clamp(min=1e-12)).clamp(max=1)
    return delta.detach()


def _hypergradient(
    model: nn.Module, parameters: list[Tensor], delta: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradient of the outer loss, with the answer of the perturbation to a change of the weights."""
    low, high = x.amin(), x.amax()
    delta = delta.clone().requires_grad_(True)
    clean = cross_entropy(model(x), y)
    fooled = cross_entropy(model(moved(x, delta, low, high)), y)
    direct = torch.autograd.grad(clean + fooled, [*parameters, delta], retain_graph=True, allow_unused=True)
    gradients, pull = list(direct[:-1]), direct[-1]
    inner = -fooled + _PENALTY * delta.square().sum()
    (slope,) = torch.autograd.grad(inner, delta, create_graph=True)
    mapped = delta - _INNER_RATE * slope
    total = vector = pull
    for _ in range(_FIXED_POINT_STEPS):
        (vector,) = torch.autograd.grad(mapped, delta, vector, retain_graph=True)
        total = total + vector
    answer = torch.autograd.grad(mapped, parameters, total, allow_unused=True)
    return tuple(g if g is None or a is None else g + a for g, a in zip(gradients, answer, strict=True))
