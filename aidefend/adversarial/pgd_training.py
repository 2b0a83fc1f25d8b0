"""Adversarial training: the loss at the worst point that an attack finds."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.modules import Model
from aidefend.adversarial.crafting import (
    Attack,
    AttackMode,
    PerExampleLoss,
    check_batch,
    check_fields,
    craft_for,
    cross_entropy,
    losses_of,
    outputs_of,
)


@dataclasses.dataclass(frozen=True)
class PGDTraining:
    """Takes the place of `criterion(model(x), y)`: the criterion at attack(model, x, y).

    Guarantee: none about robustness: measure it with `audit.evaluate_robustness` and another attack than this one.
        Crafting leaves no trace on the model; only the training forward pass touches BatchNorm statistics.
    Args:
        attack: Any callable (model, x, y) -> x_adv. One of ours that is left on its default loss climbs the criterion;
            any other loss stated there, and a foreign attack's own, stays.
        criterion: (outputs, y) -> (N,), the training loss of each sample.
        attack_mode: "eval": craft with BatchNorm and dropout in eval mode, flags restored module by module; "given":
            craft in the mode of the model, statistics restored.
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised.
    Cost: The attack, and one training forward and backward pass: PGD-k costs (2k + 3) / 3 plain steps.
    Source: Madry et al. 2018.
    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = PGDTraining(lambda model, x, y: (x + 0.1).clamp(0, 1))
        >>> loss = objective(model, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> loss.shape, loss.requires_grad
        (torch.Size([]), True)
    """

    attack: Attack
    criterion: PerExampleLoss = cross_entropy
    _: dataclasses.KW_ONLY
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        check_fields(self.attack, self.criterion, self.attack_mode)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,).

        Args:
            model: In the mode for training; a data-parallel wrapper sees exactly one forward pass.
            x: (N, ...), N >= 1.
            y: Targets with N rows.
            generator: Randomness of the attack; None lets the attack choose its own.
        """
        check_batch(x, y)
        return self.losses(model, x, self.craft(model, x, y, generator=generator), y)

    def craft(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The attack alone: x_adv, detached."""
        return craft_for(self.criterion, self.attack, model, x, y, self.attack_mode, generator)

    def losses(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample at points that are known: the training forward pass."""
        return losses_of(self.criterion, outputs_of(model, x_adv), y, len(x))
