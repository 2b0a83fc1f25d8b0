"""Gradient steps that make poisoned inputs look like their class to a model: same place, same spread."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from aidefend._core.checks import refuse
from aidefend._core.modules import InputCapture, last_linear
from aidefend._core.threat import Threat
from aidefend.attacks.poisoning.crafted import called, slope, traceless


def feature_gap(model: Any, poison: Tensor, rows: Tensor) -> Tensor:
    """How differently poison and rows of its class lie in the features of a model: what most filters look at.

    The squared distance of the means and of the covariances, in units of the class's own variance, plus the mean
    squared distance beyond what the class itself shows.
    Args:
        model: Module from x to logits; its features are the input of the `nn.Linear` that runs last. For any other
            callable its outputs.
        poison: (P, ...), in which the result is differentiable.
        rows: (M, ...) rows of the class.
    Returns: A scalar.

    Example:
        >>> import torch
        >>> rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Linear(4, 2)
        >>> bool(feature_gap(model, rows, rows).detach() < feature_gap(model, rows + 3.0, rows).detach())
        True
    """
    ours, theirs = _features(model, poison), _features(model, rows).detach()
    mean, scale = theirs.mean(dim=0), theirs.var(dim=0, correction=0).mean().clamp(min=1e-12)
    gap, usual = ours - mean, theirs - mean
    shift = (ours.mean(dim=0) - mean).square().sum() / scale
    shape = (gap.T @ gap / len(gap) - usual.T @ usual / len(usual)).square().sum() / scale.square()
    far = (gap.square().sum(dim=1) - usual.square().sum(dim=1).mean()).clamp(min=0).mean() / scale
    total: Tensor = shift + shape / theirs.shape[1] + far
    return total


def _features(model: Any, x: Tensor) -> Tensor:
    if not isinstance(model, nn.Module):
        return called(model, x, "model").flatten(1)
    with InputCapture(last_linear(model, x[:1])) as capture:
        called(model, x, "model")
        return capture.take().flatten(1)


def pushed(
    model: Any,
    penalty: Callable[[Any, Tensor, Tensor], Tensor],
    point: Tensor,
    origin: Tensor,
    rows: Tensor,
    threat: Threat,
    steps: int,
) -> Tensor:
    """The poison (P, ...) after signed gradient steps down the penalty, inside the threat around `origin`."""
    with traceless(model):
        for step in range(steps):
            point = point.detach().requires_grad_()
            loss = penalty(model, point, rows)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise refuse("penalty(model, poison, rows) to be a scalar tensor", "penalty", loss, "Return one number")
            size = threat.reach(origin) * (0.25 * (1 - step / steps) + 0.01)
            point = threat.project(point.detach() - size * slope(loss.sum(), point, "penalty").sign(), origin)
    return point.detach()
