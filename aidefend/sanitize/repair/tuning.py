"""Further training of a copy of the model on trusted rows, and the rows that are held back to judge it."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aidefend._core.batches import gather_labelled, in_batches
from aidefend._core.checks import check_labels, check_logits, check_tensor, refuse
from aidefend._core.modules import device_of, evaluate, naming_the_model, preserve
from aidefend._core.random import derive_seed, make_generator, own_stream

BATCH = 64
_HELD_BACK = 0.25
_LEAST = 2

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Step = Callable[[nn.Module], None]


@dataclasses.dataclass(frozen=True, eq=False)
class TrustedRows:
    """Trusted rows in two parts, each with every class that has at least two rows.

    Args:
        x, y: (N, ...) and (N,), for the repair.
        held_x, held_y: (M, ...) and (M,), held back: they choose how strong the repair may be.
    """

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor


def trusted_rows(model: nn.Module, trusted: Any, seed: int) -> TrustedRows:
    """The trusted data on the model's device, three quarters of each class for the repair.

    Raises: ConfigurationError: no labels, NaN, fewer than two rows of some class, labels beyond the outputs.
    """
    x, y = gather_labelled(trusted, "trusted")
    check_tensor(x, "trusted", floating=True)
    device = device_of(model)
    x, y = x.to(device), y.to(device)
    with preserve(model), torch.no_grad():
        evaluate(model)
        with naming_the_model(x[:2]):
            logits = check_logits(model(x[:2]), min(2, len(x)))
    check_labels(y, len(x), logits.shape[1], "trusted labels")
    stream = make_generator(seed=derive_seed(seed, "held back"))
    held = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for label in y.unique().tolist():
        rows = (y == label).nonzero().flatten()
        if len(rows) < _LEAST:
            cure = "Add trusted rows of this class, or leave the class out"
            raise refuse(f"at least {_LEAST} trusted rows of each class", "trusted", f"one row of class {label}", cure)
        count = max(1, round(_HELD_BACK * len(rows)))
        held[rows[torch.randperm(len(rows), generator=stream)[:count].to(rows.device)]] = True
    return TrustedRows(x[~held], y[~held], x[held], y[held])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows that the model, in eval mode, puts into their class; a loss that is not a number counts as 0."""
    with torch.no_grad():
        evaluate(model)
        logits = in_batches(model, x)
    if not bool(torch.isfinite(logits).all()):
        return 0.0
    return float((logits.argmax(dim=1) == y).double().mean())


def plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return cross_entropy(model(x), y)


def tuned(
    model: nn.Module,
    rows: TrustedRows,
    *,
    rate: float,
    epochs: int,
    seed: int,
    loss: Loss = plain_loss,
    after_step: Step | None = None,
) -> nn.Module:
    """A copy of the model after some passes of Adam over the trusted rows; the rate falls to zero along a cosine.

    Layers that normalise by batch statistics keep those of the model: a few trusted rows would replace them by worse
    ones.

    `loss` maps (model, x, y) to a number; `after_step` is called after each step (pruned weights go back to zero
    there).
    """
    model = copied(model)
    stream = make_generator(seed=derive_seed(seed, "order"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    batches = math.ceil(len(rows.x) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * batches))
    train_with_own_statistics(model)
    with torch.enable_grad(), own_stream(derive_seed(seed, "dropout")):
        for _ in range(epochs):
            order = torch.randperm(len(rows.x), generator=stream).to(rows.x.device)
            for batch in order.split(BATCH):
                optimizer.zero_grad()
                loss(model, rows.x[batch], rows.y[batch]).backward()
                optimizer.step()
                if after_step is not None:
                    after_step(model)
                schedule.step()
    return model.eval()


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode, all of whose floating parameters may be trained, without gradients."""
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return twin


def train_with_own_statistics(model: nn.Module) -> None:
    """Train mode for everything but layers that would then normalise by the statistics of a batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()


def weighted_layers(model: nn.Module, x: Tensor) -> list[nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear]:
    """Convolutions and linear layers in the order in which they run on x, each once."""
    order: list[Any] = []
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    with preserve(model), torch.no_grad():
        evaluate(model)
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_pre_hook(lambda module, _: order.append(module))
        model(x[:1])
    return list(dict.fromkeys(order))
