"""TRADES: clean loss plus the divergence between the answers at x and at the worst point near it."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_flag, check_number
from aidefend._core.modules import Model, training_layers
from aidefend.adversarial.crafting import (
    Attack,
    AttackMode,
    PerExampleLoss,
    check_batch,
    check_fields,
    cross_entropy,
    losses_of,
)
from aidefend.adversarial.divergence import (
    check_steerable,
    craft_divergence,
    kl_divergence,
    log_softmax,
    logits_of,
)


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
        reuse_clean: Give the attack the clean answer of the training pass also where it was made in another mode than
            the attack's own, which saves one forward pass.
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised.
    Cost: k attack steps (2F each) and two training forward and backward passes; the clean answer of the first serves
        the attack too. One forward pass more where BatchNorm or dropout is in train mode while the attack runs in eval
        mode: there the clean answer differs between the two, and the attack gets the one of its own mode unless
        reuse_clean.
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
    reuse_clean: bool = False

    def __post_init__(self) -> None:
        check_fields(check_steerable(self.attack, "TRADES"), self.criterion, self.attack_mode)
        check_number(self.beta, "beta", 0.0)
        check_flag(self.reuse_clean, "reuse_clean")

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); arguments as for `PGDTraining`, y as the criterion takes it."""
        check_batch(x, y)
        if self.attack_mode == "eval" and not self.reuse_clean and training_layers(model):
            return self.losses(model, x, self.craft(model, x, y, generator=generator), y)
        clean = logits_of(model, x)
        x_adv = craft_divergence(self.attack, model, x, clean.detach(), self.attack_mode, generator)
        return self._losses(model, clean, x_adv, y)

    def craft(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The attack alone: x_adv, detached; one clean forward pass more than inside `per_example`."""
        return craft_divergence(self.attack, model, x, None, self.attack_mode, generator)

    def losses(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample at points that are known: the two training forward passes."""
        return self._losses(model, logits_of(model, x), x_adv, y)

    def _losses(self, model: Model, clean: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        natural = losses_of(self.criterion, clean, y, len(x_adv))
        return natural + self.beta * kl_divergence(logits_of(model, x_adv), log_softmax(clean))
