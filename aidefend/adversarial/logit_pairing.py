"""Adversarial logit pairing: clean and adversarial loss, and the squared distance between their logits."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_number, refuse
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
    wide,
)


@dataclasses.dataclass(frozen=True)
class LogitPairing:
    """clean_share * criterion(x) + (1 - clean_share) * criterion(x_adv) + weight * mean_k (z_k(x) - z_k(x_adv))^2.

    Guarantee: none about robustness, and a known trap: pairing makes the loss surface rough, so that weak attacks fail
        on it (Engstrom et al. 2018 broke the published model). Measure it with many steps and restarts.
    Args:
        attack: Any callable (model, x, y) -> x_adv; one of ours on its default loss climbs the criterion.
        weight: Weight of the pairing, >= 0.
        clean_share: Share of the clean loss, in [0, 1].
        criterion: (outputs, y) -> (N,), the training loss of each sample.
        attack_mode: "eval": craft with BatchNorm and dropout in eval mode; "given": in the mode of the model.
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised.
    Cost: The attack, and two training forward and backward passes.
    Source: Kannan, Kurakin, Goodfellow 2018, section 3 (both losses over the whole batch).
    Example:
        >>> objective = LogitPairing(lambda model, x, y: (x + 0.1).clamp(0, 1))
        >>> objective.per_example(torch.nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    attack: Attack
    weight: float = 0.5
    _: dataclasses.KW_ONLY
    clean_share: float = 0.5
    criterion: PerExampleLoss = cross_entropy
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        check_fields(self.attack, self.criterion, self.attack_mode)
        check_number(self.weight, "weight", 0.0)
        check_number(self.clean_share, "clean_share", 0.0, 1.0)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); arguments as for `PGDTraining`."""
        check_batch(x, y)
        return self.losses(model, x, self.craft(model, x, y, generator=generator), y)

    def craft(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The attack alone: x_adv, detached."""
        return craft_for(self.criterion, self.attack, model, x, y, self.attack_mode, generator)

    def losses(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample at points that are known: the two training forward passes."""
        clean, worst = outputs_of(model, x), outputs_of(model, x_adv)
        natural, adversarial = (losses_of(self.criterion, outputs, y, len(x)) for outputs in (clean, worst))
        distance = (_rows(clean, len(x)) - _rows(worst, len(x))).square().mean(dim=1)
        return self.clean_share * natural + (1 - self.clean_share) * adversarial + self.weight * distance


def _rows(outputs: Any, n: int) -> Tensor:
    """Outputs as one row of numbers for each sample."""
    if not isinstance(outputs, Tensor) or outputs.ndim < 1 or len(outputs) != n:
        cure = "Wrap the model so that it returns one tensor"
        raise refuse(f"model(x) to be a tensor with {n} rows", "model(x)", outputs, cure)
    return wide(outputs).reshape(n, -1)
