"""The adversary's access to a model: outputs, losses and input gradients, without a trace and with clear errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_labels, check_logits, expected, refuse
from aidefend._core.errors import AidefendError
from aidefend._core.modules import Model, freeze, preserve
from aidefend.attacks.evasion.losses import IsSuccess, Loss, hits_target, misclassified, resolve

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


class Scored(NamedTuple):
    """Loss (as the attack climbs it: negated for a target) and success of each row of one batch."""

    climb: Tensor
    hit: Tensor

    @property
    def ordered(self) -> Tensor:
        """Comparable losses: a model that answers NaN is as wrong as can be."""
        return self.climb.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


class Access:
    """One model as an attack sees it. `judge=False` leaves success out, for models whose outputs are not logits."""

    def __init__(
        self, model: Model, loss: Loss, *, targeted: bool, is_success: IsSuccess | None, judge: bool = True
    ) -> None:
        self._model = unwrapped(model)
        self._loss = resolve(loss)
        self._logits = not callable(loss) or (judge and is_success is None)
        self._sign = -1.0 if targeted else 1.0
        self._judge = judge
        self._is_success = is_success or (hits_target if targeted else misclassified)
        self._checked_classes = False

    def score(self, point: Tensor, y: Tensor) -> Scored:
        """One forward pass."""
        with torch.no_grad():
            return self._scored(self._outputs(point, y), y)

    def gradient(self, point: Tensor, y: Tensor) -> tuple[Scored, Tensor]:
        """One forward pass and one backward pass to the input; a model without a gradient gives zeros."""
        with torch.enable_grad():
            variable = point.detach().requires_grad_()
            scored = self._scored(self._outputs(variable, y), y)
            total = scored.climb.sum()
            if not total.requires_grad:
                return scored, torch.zeros_like(point)
            with _naming("the backward pass of the model", point):
                grad: Tensor | None = torch.autograd.grad(total, variable, allow_unused=True)[0]
        return Scored(scored.climb.detach(), scored.hit), torch.zeros_like(point) if grad is None else grad

    def outputs(self, point: Tensor) -> Any:
        """One forward pass without a gradient, logits checked."""
        with torch.no_grad(), _naming("the model", point):
            outputs = self._model(point)
        return check_logits(outputs, len(point)) if self._logits else outputs

    def scored(self, outputs: Any, y: Tensor) -> Scored:
        """Loss and success of rows whose outputs are known."""
        with torch.no_grad():
            return self._scored(self._checked(outputs, y, "logits"), y)

    def loss_of(self, climb: Tensor) -> Tensor:
        """The attack's loss as the user stated it."""
        return climb * self._sign

    def _outputs(self, point: Tensor, y: Tensor) -> Any:
        with _naming("the model", point):
            outputs = self._model(point)
        return self._checked(outputs, y)

    def _checked(self, outputs: Any, y: Tensor, name: str = "model(x)") -> Any:
        if self._logits:
            check_logits(outputs, len(y), name)
            if not self._checked_classes:
                check_labels(y, len(y), outputs.shape[1])
                self._checked_classes = True
        return outputs

    def _scored(self, outputs: Any, y: Tensor) -> Scored:
        losses = self._losses(outputs, y)
        if not isinstance(losses, Tensor) or losses.shape != (len(y),):
            cure = 'Return one loss for each sample: reduction="none", then the mean over all but the first dimension'
            raise refuse(f"loss(outputs, y) of shape ({len(y)},)", "loss", losses, cure)
        with torch.no_grad():
            hit = self._is_success(outputs, y) if self._judge else torch.zeros_like(losses, dtype=torch.bool)
        return Scored(losses * self._sign, hit)

    def _losses(self, outputs: Any, y: Tensor) -> Any:
        """The loss of each row; what a loss raises on its labels is named."""
        try:
            return self._loss(outputs, y)
        except (AidefendError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            found = f"{tuple(y.shape)} {y.dtype}: {type(error).__name__}: {error}"
            raise refuse("labels that the loss takes", "y", found, "Match y to the outputs and the loss") from error


@contextmanager
def quiet_access(model: Model) -> Iterator[None]:
    """The model as given, frozen, every trace undone at the end; works inside `no_grad` and `inference_mode` too.

    A graph of the caller's that is still waiting for its backward pass (a loss on the clean batch) stays usable.
    """
    inner = unwrapped(model)
    with torch.inference_mode(False), preserve(inner):
        freeze(inner)
        yield


def unwrapped(model: Model) -> Model:
    """The module inside a data-parallel wrapper: attack passes must not trigger its gradient or buffer exchange."""
    inner: Model = model.module if isinstance(model, _WRAPPERS) else model
    return inner


@contextmanager
def _naming(part: str, point: Tensor) -> Iterator[None]:
    """Name the model in an error that it raised; running out of memory and our own errors pass as they are."""
    try:
        yield
    except (AidefendError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        shape = tuple(point.shape)
        found = f"{type(error).__name__}: {error}"
        cure = "Call the model with such an x to see the cause, or wrap it so that it takes x as it comes"
        raise AidefendError(expected(f"{part} to accept x of shape {shape}", "model", found, cure)) from error
