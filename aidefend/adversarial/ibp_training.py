"""Training on interval bounds: the net learns to be verified by the cheapest certificate."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_kind, check_number
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.adversarial.crafting import PerExampleLoss, check_batch, cross_entropy
from aidefend.adversarial.linear_bounds import Region
from aidefend.adversarial.worst_logits import bound_losses


@dataclasses.dataclass(frozen=True)
class IBPTraining:
    """Takes the place of `criterion(model(x), y)`: kappa * that + (1 - kappa) * the criterion at the worst logits.

    Guarantee: none by itself: certify the net with `certify_bounds`. Use it with `BoundSchedule`: at the full radius
        from the first step on, a net ends at the constant answer.
    Args:
        threat: The set of inputs; norms other than linf through the box around them.
        kappa: Weight of the clean loss, in [0, 1].
        criterion: (outputs, y) -> (N,), y class labels.
    Raises: ConfigurationError: an argument is malformed. IncompatibleModel: operations without a known bound, such as
        dropout in train mode. AidefendError: the model raised.
    Cost: One clean training pass and one of about twice its cost; BatchNorm in train mode takes the statistics of the
        clean batch, which the clean pass updates.
    Source: Gowal et al. 2018, section 3; BatchNorm after Shi et al. 2021.
    Example:
        >>> model, objective = torch.nn.Linear(4, 3), IBPTraining(Threat("linf", 0.1))
        >>> objective.per_example(model, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    threat: Threat
    kappa: float = 0.5
    criterion: PerExampleLoss = cross_entropy

    def __post_init__(self) -> None:
        check_kind(self.threat, Threat, "threat", "Pass Threat(norm, eps)")
        check_number(self.kappa, "kappa", 0.0, 1.0)
        check_callable(self.criterion, "criterion", 'Pass a function such as nn.CrossEntropyLoss(reduction="none")')

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); `generator` is taken for the common form, nothing here is random."""
        check_batch(x, y)
        self.threat.check(x)
        region = Region.around(x.detach(), self.threat, clean=True)
        return bound_losses(model, x, y, region, self.criterion, self.kappa, 0.0)
