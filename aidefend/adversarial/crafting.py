"""Calling the user's attack and model inside an objective: the mode for crafting, traces, errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from aidefend._core.checks import check_choice, check_not_empty, check_same_rows, check_tensor, expected, refuse
from aidefend._core.errors import AidefendError
from aidefend._core.modules import Model, evaluate, preserve

Attack = Callable[..., Tensor]
PerExampleLoss = Callable[[Any, Tensor], Tensor]
AttackMode = Literal["eval", "given"]
_NARROW = (torch.float16, torch.bfloat16)
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample: logits (N, K), class indices (N,) or class probabilities (N, K) -> (N,)."""
    return functional.cross_entropy(wide(outputs), y, reduction="none")


def wide(outputs: Tensor) -> Tensor:
    """16-bit logits as float32: losses need the digits."""
    return outputs.float() if outputs.dtype in _NARROW else outputs


def check_fields(attack: Any, criterion: Any, attack_mode: Any) -> None:
    """Refuse an objective with parts that cannot be called."""
    if not callable(attack):
        raise refuse("attack to be callable (model, x, y) -> x_adv", "attack", attack, "Pass PGD(threat) or a lambda")
    if not callable(criterion):
        cure = 'Pass a function such as nn.CrossEntropyLoss(reduction="none")'
        raise refuse("criterion to be callable (outputs, y) -> (N,)", "criterion", criterion, cure)
    check_choice(attack_mode, ("eval", "given"), "attack_mode")


def check_batch(x: Any, y: Any) -> None:
    """Refuse an empty batch and unequal rows; the attack checks the rest."""
    check_tensor(x, "x", finite=False)
    check_tensor(y, "y", finite=False)
    check_not_empty(check_same_rows(("x", "y"), len(x), len(y)), "x")


@contextmanager
def crafting(model: Model, attack_mode: AttackMode) -> Iterator[Model]:
    """The model for the attack: without its data-parallel wrapper, in eval mode or as given, every trace undone.

    A clean forward pass of an objective that waits for its backward pass stays usable.
    """
    inner = unwrapped(model)
    with preserve(inner):
        if attack_mode == "eval":
            evaluate(inner)
        yield inner


def craft(attack: Attack, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    """x_adv of any attack; a foreign one need not know `generator`."""
    x_adv: Any = attack(model, x, y) if generator is None else attack(model, x, y, generator=generator)
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
        cure = "Return a tensor of the shape of x, for example lambda model, x, y: foreign(model)(x, y)"
        raise refuse(f"attack(model, x, y) of shape {tuple(x.shape)}", "attack", x_adv, cure)
    crafted: Tensor = x_adv.detach()
    return crafted


def craft_for(
    criterion: PerExampleLoss,
    attack: Attack,
    model: Model,
    x: Tensor,
    y: Tensor,
    attack_mode: AttackMode,
    generator: torch.Generator | None,
) -> Tensor:
    """x_adv of an attack for training with this criterion, without a trace on the model."""
    with crafting(model, attack_mode) as inner:
        return craft(_climbing(attack, criterion, y), inner, x, y, generator)


def _climbing(attack: Attack, criterion: PerExampleLoss, y: Tensor) -> Attack:
    """The attack on the criterion, if it was left on its default loss and the two are not the same anyway."""
    by_default = getattr(attack, "loss", None) == "cross_entropy" and not getattr(attack, "targeted", False)
    if not by_default or (criterion is cross_entropy and not y.is_floating_point()) or not hasattr(attack, "with_loss"):
        return attack
    climbing: Attack = attack.with_loss(criterion)
    return climbing


def unwrapped(model: Model) -> Model:
    """The module inside a data-parallel wrapper."""
    inner: Model = model.module if isinstance(model, _WRAPPERS) else model
    return inner


def bare(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers, under whose own names its state is known."""
    inner: Any = unwrapped(model)
    module: nn.Module = getattr(inner, "_orig_mod", inner)
    return module


def outputs_of(model: Model, x: Tensor) -> Any:
    """The training forward pass; an error of the model is named."""
    try:
        return model(x)
    except (AidefendError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        rule = f"the model to accept x of shape {tuple(x.shape)}"
        raise AidefendError(expected(rule, "model", found, "Call model(x) to see the cause")) from error


def losses_of(criterion: PerExampleLoss, outputs: Any, y: Tensor, n: int) -> Tensor:
    """One loss for each sample: a mean would hide the samples from private training. Its errors are named."""
    try:
        losses: Any = criterion(outputs, y)
    except (AidefendError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = f"{tuple(y.shape)} {y.dtype}: {type(error).__name__}: {error}"
        raise refuse(
            "labels that the criterion takes", "y", found, "Match y to the outputs and the criterion"
        ) from error
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        raise refuse(f"criterion(outputs, y) of shape ({n},)", "criterion", losses, 'Use reduction="none"')
    return losses
