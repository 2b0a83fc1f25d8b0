"""Noise training with a consistency term: the answers at all copies of a sample are drawn together."""

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from aidefend._core.checks import check_number
from aidefend._core.modules import Model
from aidefend.adversarial.crafting import PerExampleLoss, cross_entropy
from aidefend.adversarial.noisy_copies import check_noise, draw_noise, log_mean_softmax, mean_losses, outputs_at


@dataclasses.dataclass(frozen=True)
class Consistency:
    """`Gaussian`, and weight * KL(mean answer || each answer) + entropy_weight * entropy of the mean answer.

    Guarantee: none by itself: certify with `SmoothedModel(model, sigma, ...)`.
    Args:
        sigma: As for `Gaussian`.
        samples: Copies of each sample, >= 2.
        weight: Of the divergence, >= 0.
        entropy_weight: Of the entropy, >= 0.
        criterion: (outputs, y) -> (N,).
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised.
    Cost: One training pass over `samples` times the batch.
    Source: Jeong, Shin 2020, eq. 8 and 9.
    Example:
        >>> model, objective = torch.nn.Linear(4, 3), Consistency(0.25)
        >>> objective.per_example(model, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    sigma: float
    samples: int = 2
    weight: float = 10.0
    entropy_weight: float = 0.5
    criterion: PerExampleLoss = cross_entropy

    def __post_init__(self) -> None:
        check_noise(self.sigma, self.samples, self.criterion, least=2)
        check_number(self.weight, "weight", 0.0)
        check_number(self.entropy_weight, "entropy_weight", 0.0)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); arguments as for `Gaussian`."""
        noise = draw_noise(x, y, self.sigma, self.samples, generator)
        outputs = outputs_at(model, x.detach(), noise)
        logs, mean = log_softmax(outputs, dim=2), log_mean_softmax(outputs)
        divergence = (mean.exp() * (mean - logs)).sum(dim=2).mean(dim=0)
        entropy = -(mean.exp() * mean).sum(dim=1)
        base = mean_losses(self.criterion, outputs, y)
        return base + self.weight * divergence + self.entropy_weight * entropy
