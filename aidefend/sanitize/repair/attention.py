"""Distillation of attention (NAD): a tuned copy teaches the model where to look."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from aidefend._core.modules import freeze
from aidefend.sanitize.repair.tuning import TrustedRows, copied, tuned, weighted_layers


def distilled(model: nn.Module, rows: TrustedRows, *, weight: float, rate: float, epochs: int, seed: int) -> nn.Module:
    """A copy of the model, tuned to answer right and to attend, layer by layer, as a tuned teacher does.

    Source: Li, Lyu, Koren, Lyu, Li, Ma 2021. Attention of a layer: mean square of its output over the channels, to unit
        length (a linear layer's own output in place of a map); the distance is summed over all hidden layers.
    """
    teacher = tuned(model, rows, rate=rate, epochs=epochs, seed=seed)
    freeze(teacher)
    hidden_of_teacher = weighted_layers(teacher, rows.x)[:-1]
    names = {module: name for name, module in teacher.named_modules()}
    wanted = [names[layer] for layer in hidden_of_teacher]

    def loss(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with _outputs(student, wanted) as mine, _outputs(teacher, wanted) as theirs:
            logits = student(x)
            with torch.no_grad():
                teacher(x)
        gaps = [(attention(a) - attention(b)).square().sum(dim=1).mean() for a, b in zip(mine, theirs, strict=True)]
        return cross_entropy(logits, y) + weight * torch.stack(gaps).sum()

    return tuned(copied(model), rows, rate=rate, epochs=epochs, seed=seed + 1, loss=loss)


def attention(output: Tensor) -> Tensor:
    """(N, cells) of unit length from (N, C, ...), or the features themselves from (N, C)."""
    flat = output.square().mean(dim=1).flatten(1) if output.ndim > 2 else output
    return normalize(flat, dim=1)


@contextmanager
def _outputs(model: nn.Module, names: list[str]) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output: found.append(output)) for name in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
