"""Training on linear bounds over intervals: tighter than intervals at the start, when a net has to find its way."""

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
class CrownIBPTraining:
    """As `IBPTraining`, with worst logits from beta * CROWN-IBP + (1 - beta) * IBP.

    Guarantee: none by itself: certify the net with `certify_bounds`.
    Args:
        threat: The set of inputs, in any norm.
        kappa: Weight of the clean loss, in [0, 1].
        beta: Share of the linear bounds, in [0, 1]; as published it falls from 1 to 0 while eps grows: `BoundSchedule`.
        criterion: (outputs, y) -> (N,), y class labels.
    Raises: As for `IBPTraining`.
    Cost: As `IBPTraining`, and with beta > 0 about two passes for each class.
    Source: Zhang et al. 2020, section 3. Differs: the lower slope of each bend is the better of 0 and 1.
    Example:
        >>> model, objective = torch.nn.Linear(4, 3), CrownIBPTraining(Threat("l2", 0.1), beta=1.0)
        >>> objective.per_example(model, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    threat: Threat
    kappa: float = 0.5
    beta: float = 0.5
    criterion: PerExampleLoss = cross_entropy

    def __post_init__(self) -> None:
        check_kind(self.threat, Threat, "threat", "Pass Threat(norm, eps)")
        check_number(self.kappa, "kappa", 0.0, 1.0)
        check_number(self.beta, "beta", 0.0, 1.0)
        check_callable(self.criterion, "criterion", 'Pass a function such as nn.CrossEntropyLoss(reduction="none")')

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); `generator` is taken for the common form, nothing here is random."""
        check_batch(x, y)
        self.threat.check(x)
        region = Region.around(x.detach(), self.threat, clean=True)
        return bound_losses(model, x, y, region, self.criterion, self.kappa, self.beta)
