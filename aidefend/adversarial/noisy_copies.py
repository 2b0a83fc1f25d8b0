"""Gaussian copies of a batch, in one forward pass: what the objectives for randomised smoothing share."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from aidefend._core.checks import check_callable, check_int, check_logits, check_number, check_tensor, refuse
from aidefend._core.modules import Model
from aidefend._core.random import make_generator, normal
from aidefend.adversarial.crafting import PerExampleLoss, check_batch, losses_of, outputs_of, wide


def check_noise(sigma: Any, samples: Any, criterion: Any, least: int = 1) -> None:
    """Refuse malformed fields."""
    check_number(sigma, "sigma", 0.0)
    check_int(samples, "samples", least)
    check_callable(criterion, "criterion", 'Pass a function such as nn.CrossEntropyLoss(reduction="none")')


def draw_noise(x: Tensor, y: Tensor, sigma: float, samples: int, generator: torch.Generator | None) -> Tensor:
    """N(0, sigma^2) for each copy of each sample: (samples, N, ...)."""
    check_batch(x, y)
    check_tensor(x, "x", floating=True)
    if x.ndim < 2:
        raise refuse("x of shape (N, ...) with features", "x", x, "Add the dimension of the features")
    return sigma * normal((samples, *x.shape), make_generator(generator), x)


def outputs_at(model: Model, x: Tensor, noise: Tensor) -> Tensor:
    """Logits at every copy, one forward pass: (samples, N, K). The noise is added to x as it is, and never cut."""
    copies = (x[None] + noise).flatten(0, 1)
    outputs = check_logits(outputs_of(model, copies), len(copies))
    found: Tensor = wide(outputs).reshape(*noise.shape[:2], -1)
    return found


def mean_losses(criterion: PerExampleLoss, outputs: Tensor, y: Tensor) -> Tensor:
    """The criterion of each copy, averaged: (N,)."""
    samples, n = outputs.shape[:2]
    repeated = y.repeat(samples, *[1] * (y.ndim - 1))
    return losses_of(criterion, outputs.flatten(0, 1), repeated, samples * n).reshape(samples, n).mean(dim=0)


def log_mean_softmax(outputs: Tensor, inverse_temperature: float = 1.0) -> Tensor:
    """Log of the mean probability over the copies: (N, K)."""
    logs = log_softmax(inverse_temperature * outputs, dim=2)
    return torch.logsumexp(logs, dim=0) - math.log(len(outputs))


def check_classes(y: Tensor) -> Tensor:
    """Refuse targets that are not class indices."""
    if y.ndim != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise refuse("class indices (N,)", "y", y, "Use Gaussian or Consistency for other targets")
    return y
