"""Losses for the user's own loop that limit what a few bad rows can do: trimmed, or with clipped row gradients."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from aidefend._core.checks import (
    check_callable,
    check_choice,
    check_kind,
    check_labels,
    check_number,
    check_same_rows,
    check_tensor,
    refuse,
)
from aidefend._core.errors import IncompatibleModel, Offender
from aidefend._core.modules import naming_the_model

RobustMethod = Literal["trimmed", "clipped"]
PerExampleLoss = Callable[[Tensor, Tensor], Tensor]


def robust_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    method: RobustMethod = "trimmed",
    share: float = 0.1,
    max_grad_norm: float = 1.0,
    per_example_loss: PerExampleLoss | None = None,
) -> Tensor:
    """One number for `.backward()` in place of the mean loss of a batch.

    "trimmed" is the mean of the batch without its `share` of highest losses: rows that contradict what most rows teach
    have no say. "clipped" has the value of the mean loss, but its gradient is
    the mean of the rows' gradients after each was shortened to `max_grad_norm`: no row moves the weights by more than
    others may.

    Guarantee: "clipped": replacing one row changes the gradient by at most 2 max_grad_norm / N in l2 (to rounding), the
        reach of differentially private training without its noise: an upper bound on a row's influence in a step, not
        privacy and not a proof against a backdoor. "trimmed": none; poison that is learned early and easily, as a
        trigger is, has *low* losses and is not trimmed (use `screen`), and hard honest rows (rare styles, small
        classes) are. It helps against wrong labels up to about `share`.
    Args:
        model: Takes x, returns what the loss takes. For "clipped" no layer in train mode may mix rows (BatchNorm).
        x: (N, ...), N >= 1.
        y: (N, ...) targets.
        method: "trimmed" or "clipped".
        share: Of the batch that "trimmed" leaves out, in [0, 1); floor(share N) rows.
        max_grad_norm: Of one row's gradient over all trainable parameters, > 0.
        per_example_loss: (outputs, y) -> (N,); None: cross-entropy of logits and class indices.
    Returns: Scalar with a graph.
    Raises: ConfigurationError: arguments out of range, losses not of shape (N,). IncompatibleModel: "clipped" with
        layers that mix rows.
    Cost: "trimmed": none beyond the pass. "clipped": the passes themselves, row by row in one batched call, and the
        memory of N gradients.
    Source: "trimmed": Shen, Sanghavi 2019 (iterative trimmed loss, a batch at a time); "clipped": Hong, Chandrasekaran,
        Kaya, Dumitras, Papernot 2020 (gradient shaping), after Abadi et al. 2016.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 2
        >>> robust_loss(model, x, y, method="trimmed", share=0.25).backward()
    """
    check_kind(model, nn.Module, "model")
    check_choice(method, get_args(RobustMethod), "method")
    check_number(share, "share", 0, 1, open_high=True)
    check_number(max_grad_norm, "max_grad_norm", 0, open_low=True)
    loss = (
        _plain if per_example_loss is None else check_callable(per_example_loss, "per_example_loss", "Pass a function")
    )
    check_tensor(x, "x", finite=False)
    check_tensor(y, "y", finite=False)
    check_same_rows(("x", "y"), len(x) if x.ndim else 0, len(y) if y.ndim else 0)
    if not len(x):
        raise refuse("at least one row", "x", x, "Skip empty batches")
    if per_example_loss is None:
        y = check_labels(y, len(x))
    with naming_the_model(x):
        return _robust(model, x, y, method, share, max_grad_norm, loss)


def _robust(
    model: nn.Module, x: Tensor, y: Tensor, method: str, share: float, max_grad_norm: float, loss: PerExampleLoss
) -> Tensor:
    if method == "clipped":
        return _clipped(model, x, y, loss, max_grad_norm)
    losses = check_tensor(loss(model(x), y), "per_example_loss(...)", ndim=1, floating=True, finite=False, rows=len(x))
    order = torch.where(losses.isnan(), torch.inf, losses.detach()).argsort(stable=True)
    return losses[order[: len(losses) - int(share * len(losses))]].mean()


def _plain(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y, reduction="none")


def _clipped(model: nn.Module, x: Tensor, y: Tensor, loss: PerExampleLoss, bound: float) -> Tensor:
    """The mean loss as value; as gradient the mean of the rows' shortened gradients, which are computed here."""
    _refuse_mixing(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def one(values: dict[str, Tensor], row: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses = loss(functional_call(model, values, (row.unsqueeze(0),)), target.unsqueeze(0))
        mine = check_tensor(losses, "per_example_loss(...)", ndim=1, finite=False, rows=1)[0]
        return mine, mine.detach()

    frozen = {name: p.detach() for name, p in parameters.items()}
    rows = vmap(grad(one, has_aux=True), in_dims=(None, 0, 0), randomness="different")
    gradients, losses = rows(frozen, x.detach(), y)
    norms = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()
    weights = torch.where(norms.isfinite(), (bound / norms.clamp(min=1e-12)).clamp(max=1), 0) / len(x)
    terms = [
        (p * torch.tensordot(weights, gradients[name].nan_to_num(), dims=1)).sum() for name, p in parameters.items()
    ]
    slope = torch.stack(terms).sum()
    value: Tensor = losses.mean() + (slope - slope.detach())
    return value


def _refuse_mixing(model: nn.Module) -> None:
    kinds = nn.modules.batchnorm._BatchNorm
    found = [
        Offender(name, f"{type(module).__name__} mixes the rows of a batch", "Use GroupNorm, or module.eval()")
        for name, module in model.named_modules()
        if isinstance(module, kinds) and (module.training or not module.track_running_stats)
    ]
    if found:
        raise IncompatibleModel("Expected a model in which a row's gradient is its own.", found)
