"""TRADES: clean loss plus the divergence between the answers at x and at the worst point near it."""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from aidefend._core.checks import check_logits, check_number, refuse
from aidefend._core.modules import Model, training_layers
from aidefend.adversarial.crafting import (
    Attack,
    AttackMode,
    PerExampleLoss,
    check_batch,
    check_fields,
    check_losses,
    craft,
    crafting,
    cross_entropy,
    outputs_of,
    wide,
)


def kl_divergence(outputs: Tensor, clean_log_probabilities: Tensor) -> Tensor:
    """KL(clean || outputs) of each sample: logits (N, K) against log-probabilities (N, K) -> (N,)."""
    log_probabilities = functional.log_softmax(wide(outputs), dim=1)
    divergence = functional.kl_div(log_probabilities, clean_log_probabilities, reduction="none", log_target=True)
    return divergence.sum(dim=1)


@dataclasses.dataclass(frozen=True)
class TRADES:
    """Takes the place of `criterion(model(x), y)`: criterion at x + beta * KL(model(x) || model(x_adv)).

    Guarantee: none about robustness: measure it with `audit.evaluate_robustness`. Crafting leaves no trace on the
        model; only the two training forward passes touch BatchNorm statistics (x first, then x_adv, as published).
    Args:
        attack: An attack whose loss can be set, with `.with_loss(loss)`: ours, untargeted. Its own loss is replaced by
            the divergence from the clean answer, which it gets in the place of y, row by row.
        beta: Weight of the divergence, >= 0: higher = more robust, less accurate.
        criterion: (outputs, y) -> (N,), the loss at x.
        attack_mode: "eval": craft with BatchNorm and dropout in eval mode, flags restored module by module; "given":
            craft in the mode of the model, statistics restored.
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised.
    Cost: k attack steps (2F each) and two training forward and backward passes; the clean answer of the first serves
        the attack too. One forward pass more where BatchNorm or dropout is in train mode while the attack runs in eval
        mode: there the clean answer differs between the two, and the attack needs the one of its own mode.
    Source: Zhang et al. 2019, eq. 5. Differs: the attack starts where the given one starts (the authors: x plus
        Gaussian noise of size 0.001).
    Example:
        >>> class Corner:
        ...     def with_loss(self, loss):
        ...         return lambda model, x, y: (x + 0.1).clamp(0, 1)
        >>> objective = TRADES(Corner(), beta=6.0)
        >>> objective.per_example(torch.nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    attack: Attack
    beta: float = 6.0
    _: dataclasses.KW_ONLY
    criterion: PerExampleLoss = cross_entropy
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        if not hasattr(self.attack, "with_loss"):
            cure = "Use PGD or APGD, or give your attack a method with_loss(loss) that returns it on another loss"
            raise refuse("an attack with .with_loss(loss)", "attack", self.attack, cure)
        if getattr(self.attack, "targeted", False):
            raise refuse("an untargeted attack", "attack", self.attack, "TRADES has no target class: targeted=False")
        check_fields(self.attack.with_loss(kl_divergence), self.criterion, self.attack_mode)
        check_number(self.beta, "beta", 0.0)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); arguments as for `PGDTraining`, y as the criterion takes it."""
        check_batch(x, y)
        if self.attack_mode == "eval" and training_layers(model):
            x_adv = self._craft(model, x, None, generator)
            clean = _logits(model, x)
        else:
            clean = _logits(model, x)
            x_adv = self._craft(model, x, clean.detach(), generator)
        natural = check_losses(self.criterion(clean, y), len(x))
        divergence = kl_divergence(_logits(model, x_adv), functional.log_softmax(wide(clean), dim=1))
        return natural + self.beta * divergence

    def _craft(self, model: Model, x: Tensor, answer: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """The point where the answer differs most from the clean one, which is computed here where it is not known."""
        attack = self.attack.with_loss(kl_divergence)  # type: ignore[attr-defined]  # checked at construction
        with crafting(model, self.attack_mode) as inner:
            with torch.no_grad():
                target = functional.log_softmax(wide(_logits(inner, x) if answer is None else answer), dim=1)
            return craft(attack, inner, x, target, generator)


def _logits(model: Model, x: Tensor) -> Tensor:
    return check_logits(outputs_of(model, x), len(x))
