"""The divergence between two answers of a model, and the point near x where it is largest."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from aidefend._core.checks import check_logits, refuse
from aidefend._core.modules import Model
from aidefend.adversarial.crafting import Attack, AttackMode, craft, crafting, outputs_of, wide


def kl_divergence(outputs: Tensor, clean_log_probabilities: Tensor) -> Tensor:
    """KL(clean || outputs) of each sample: logits (N, K) against log-probabilities (N, K) -> (N,)."""
    log_probabilities = functional.log_softmax(wide(outputs), dim=1)
    divergence = functional.kl_div(log_probabilities, clean_log_probabilities, reduction="none", log_target=True)
    return divergence.sum(dim=1)


def log_softmax(outputs: Tensor) -> Tensor:
    """Log-probabilities of logits (N, K), 16-bit ones widened."""
    return functional.log_softmax(wide(outputs), dim=1)


def logits_of(model: Model, x: Tensor) -> Tensor:
    """A training forward pass that must give one row of logits for each sample."""
    return check_logits(outputs_of(model, x), len(x))


def check_steerable(attack: Any, owner: str) -> Any:
    """The attack on the divergence; one whose loss cannot be replaced, or that aims at a class, is refused."""
    if not hasattr(attack, "with_loss"):
        cure = "Use PGD or APGD, or give your attack a method with_loss(loss) that returns it on another loss"
        raise refuse("an attack with .with_loss(loss)", "attack", attack, cure)
    if getattr(attack, "targeted", False):
        raise refuse("an untargeted attack", "attack", attack, f"{owner} has no target class: targeted=False")
    return attack.with_loss(kl_divergence)


def craft_divergence(
    attack: Attack,
    model: Model,
    x: Tensor,
    answer: Tensor | None,
    attack_mode: AttackMode,
    generator: torch.Generator | None,
) -> Tensor:
    """The point where the answer differs most from the clean one, which is computed here where it is not known."""
    steered = attack.with_loss(kl_divergence)  # type: ignore[attr-defined]  # checked at construction
    with crafting(model, attack_mode) as inner:
        with torch.no_grad():
            target = log_softmax(logits_of(inner, x) if answer is None else answer)
        return craft(steered, inner, x, target, generator)
