"""Unlearning of isolated rows (ABL): ascend on the loss of suspected rows, descend on that of trusted ones."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.repair.tuning import BATCH, TrustedRows, tuned

_ASCENT = 0.2
_LARGEST = 4.0  # suspected rows are not pushed beyond this loss: what is unlearned is unlearned


def isolated_unlearned(
    model: nn.Module, rows: TrustedRows, suspects: tuple[Tensor, Tensor], *, rate: float, epochs: int, seed: int
) -> nn.Module:
    """A copy of the model that no longer gives suspected rows the labels they came with.

    `suspects` are rows (P, ...) and their labels (P,), for example what a screen put into quarantine.

    Source: Li, Lyu, Koren, Lyu, Li, Ma 2021 (anti-backdoor learning, second stage). The first stage, isolation by early
        losses, is `TrainingDynamics`; the ascent is bounded here, and trusted rows take the place of the rest of the
        data.
    """
    bad_x, bad_y = suspects
    stream = make_generator(seed=derive_seed(seed, "suspects"))

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        chosen = torch.randint(len(bad_x), (BATCH // 2,), generator=stream).to(bad_x.device)
        logits = net(torch.cat([x, bad_x[chosen]]))
        wrong = cross_entropy(logits[len(x) :], bad_y[chosen], reduction="none")
        return cross_entropy(logits[: len(x)], y) - _ASCENT * wrong.clamp(max=_LARGEST).mean()

    return tuned(model, rows, rate=rate, epochs=epochs, seed=seed, loss=loss)
