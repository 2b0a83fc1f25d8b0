"""GradAlign: keep the input gradient at x and at a random point near it in one direction."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_kind, check_number, refuse
from aidefend._core.modules import Model
from aidefend._core.random import make_generator
from aidefend._core.threat import Threat
from aidefend.adversarial.crafting import (
    AttackMode,
    PerExampleLoss,
    check_batch,
    check_fields,
    crafting,
    cross_entropy,
    losses_of,
    outputs_of,
)


@dataclasses.dataclass(frozen=True)
class GradAlign:
    """Wraps an objective: it + weight * (1 - cosine of the input gradients at x and at a random point of the threat).

    Guarantee: none about robustness. It acts against catastrophic overfitting of single-step training: a model that is
        linear inside the threat pays nothing.
    Args:
        objective: What to train with, such as `FastTraining(attack)`: callable (model, x, y, generator=) with
            `.per_example`.
        threat: Where the second gradient is taken: the threat trained for.
        weight: Weight of the regulariser, >= 0; it must grow with eps.
        criterion: (outputs, y) -> (N,), the loss whose gradients are compared.
        attack_mode: "eval": the two passes see BatchNorm and dropout in eval mode; "given": the mode of the model,
            statistics restored.
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised.
    Cost: The objective, and about 2 to 3 plain steps (two gradients that are differentiated again). The model must be
        twice differentiable: ReLU will do, a compiled model will not.
    Source: Andriushchenko, Flammarion 2020, eq. 5. Differs: a sample without a gradient counts as aligned.
    Example:
        >>> from aidefend.adversarial import FastTraining
        >>> from aidefend.attacks import PGD
        >>> threat, x, y = Threat("linf", 0.1), torch.rand(5, 4), torch.tensor([0, 1, 1, 0, 1])
        >>> objective = GradAlign(FastTraining(PGD(threat)), threat)
        >>> objective(torch.nn.Linear(4, 2), x, y).shape
        torch.Size([])
    """

    objective: Any
    threat: Threat
    weight: float = 0.2
    _: dataclasses.KW_ONLY
    criterion: PerExampleLoss = cross_entropy
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        if not callable(getattr(self.objective, "per_example", None)):
            cure = "Wrap FastTraining, PGDTraining or another objective of this room"
            raise refuse("an objective with .per_example", "objective", self.objective, cure)
        check_kind(self.threat, Threat, "threat", "Pass the threat of the attack")
        check_fields(self.objective.per_example, self.criterion, self.attack_mode)
        check_number(self.weight, "weight", 0.0)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); arguments as for the objective."""
        check_batch(x, y)
        stream = make_generator(generator)
        losses: Tensor = self.objective.per_example(model, x, y, generator=stream)
        # After the objective: its training passes write the BatchNorm statistics that these passes save for backward.
        return losses + self.weight * self.misalignment(model, x, y, generator=stream)

    def misalignment(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """1 - cosine of the two input gradients of each sample, (N,), in [0, 2]."""
        near = self.threat.random_start(self.threat.check(x).detach(), make_generator(generator))
        with crafting(model, self.attack_mode) as inner, torch.enable_grad():
            here, there = (self._gradient(inner, point, y) for point in (x, near))
        lengths = here.norm(dim=1) * there.norm(dim=1)
        usable = lengths.detach() > 0
        cosine = (here * there).sum(dim=1) / torch.where(usable, lengths, 1)
        return torch.where(usable, 1 - cosine, 0)

    def _gradient(self, model: Model, point: Tensor, y: Tensor) -> Tensor:
        """The input gradient as rows of numbers with their own graph; scaled by its peak, so that none underflows."""
        variable = point.detach().clone().requires_grad_()
        losses = losses_of(self.criterion, outputs_of(model, variable), y, len(point))
        if not losses.requires_grad:
            return torch.zeros_like(point).flatten(1)
        (gradient,) = torch.autograd.grad(losses.sum(), variable, create_graph=True, allow_unused=True)
        flat = torch.zeros_like(point).flatten(1) if gradient is None else gradient.flatten(1)
        peak = flat.detach().abs().amax(dim=1, keepdim=True)
        return flat / torch.where(peak > 0, peak, 1)
