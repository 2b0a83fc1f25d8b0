"""From per-example losses to a scalar whose `backward()` is the private one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aidefend._core.errors import PrivacyError
from aidefend.privacy.step_book import refused

PerExampleLoss = Callable[[Any, Tensor], Tensor]


class _Backward(torch.autograd.Function):
    """A scalar that hands its backward pass over."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, run: Callable[[], None]) -> Tensor:
        ctx.run = run
        return value + anchor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        if float(gradient) != 1.0:
            cure = "Call backward() on the loss itself: no GradScaler, no division for accumulation"
            raise refused("the loss of private.loss unscaled", "scale", float(gradient), cure)
        with torch.enable_grad():
            ctx.run()
        return None, None, None


def scalar_with(losses: Tensor, run: Callable[[Tensor], None]) -> Tensor:
    """The mean of the losses (0 for none), as a tensor whose backward pass is `run(losses)`."""
    value = losses.detach().mean() if len(losses) else losses.new_zeros(())
    if not torch.is_grad_enabled():
        return value
    anchor = torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True)
    result: Tensor = _Backward.apply(value, anchor, lambda: run(losses))  # type: ignore[no-untyped-call]
    return result


def example_losses(function: PerExampleLoss, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
    """One loss for each row, and how many rows the function raised on (their loss is zero)."""
    if not isinstance(targets, Tensor) or targets.ndim < 1:
        raise refused("targets to be a tensor (N, ...)", "targets", targets, "Pass the y of the loader's batch")
    n = len(targets)
    if n == 0:
        like = outputs if isinstance(outputs, Tensor) and outputs.is_floating_point() else torch.zeros(())
        return like.new_zeros(0), 0
    try:
        return checked_losses(function(outputs, targets), n), 0
    except PrivacyError:
        raise
    except Exception as error:
        return _row_by_row(function, outputs, targets, error)


def checked_losses(losses: Any, n: int | None = None) -> Tensor:
    """A floating point tensor (N,): a mean would hide the examples from clipping."""
    fits = isinstance(losses, Tensor) and losses.ndim == 1 and losses.is_floating_point()
    if not fits or (n is not None and len(losses) != n):
        rule = "losses of shape (N,), one for each example"
        raise refused(rule, "losses", losses, 'Use reduction="none", and the mean over all but the first dimension')
    result: Tensor = losses
    return result


def _row_by_row(function: PerExampleLoss, outputs: Any, targets: Tensor, error: Exception) -> tuple[Tensor, int]:
    """A row that the loss cannot take (a label out of range) is masked: an error would tell that it is there."""
    if not isinstance(outputs, Tensor) or outputs.ndim < 1 or len(outputs) != len(targets):
        cure = "Call per_example_loss(outputs, targets) to see the cause"
        raise refused("outputs that the loss takes", "outputs", f"{type(error).__name__}: {error}", cure) from error
    kept: list[Tensor] = []
    failed = 0
    for row in range(len(targets)):
        try:
            kept.append(checked_losses(function(outputs[row : row + 1], targets[row : row + 1]), 1))
        except PrivacyError:
            raise
        except Exception:
            failed += 1
            kept.append(outputs.new_zeros(1))
    if failed == len(targets) > 1:
        cure = "Call per_example_loss(outputs, targets) to see the cause"
        raise refused("outputs that the loss takes", "outputs", f"{type(error).__name__}: {error}", cure) from error
    return torch.cat(kept), failed
