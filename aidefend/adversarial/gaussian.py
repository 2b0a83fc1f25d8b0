"""Training with Gaussian noise: the plain way to a net whose smoothed version can be certified."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.modules import Model
from aidefend.adversarial.crafting import PerExampleLoss, cross_entropy
from aidefend.adversarial.noisy_copies import check_noise, draw_noise, mean_losses, outputs_at


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Takes the place of `criterion(model(x), y)`: the criterion at noisy copies of x.

    Guarantee: none by itself: certify with `SmoothedModel(model, sigma, ...)`.
    Args:
        sigma: Standard deviation of the noise in the units of x, >= 0; that of the smoothed model.
        samples: Copies of each sample, >= 1.
        criterion: (outputs, y) -> (N,).
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised.
    Cost: One training pass over `samples` times the batch.
    Source: Cohen et al. 2019, section 4.
    Example:
        >>> model, objective = torch.nn.Linear(4, 3), Gaussian(0.25)
        >>> objective.per_example(model, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    sigma: float
    samples: int = 1
    criterion: PerExampleLoss = cross_entropy

    def __post_init__(self) -> None:
        check_noise(self.sigma, self.samples, self.criterion)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,).

        Args:
            model: In the mode for training.
            x: (N, ...), floating point.
            y: Targets with N rows.
            generator: Source of the noise; None = a fresh one.
        """
        noise = draw_noise(x, y, self.sigma, self.samples, generator)
        return mean_losses(self.criterion, outputs_at(model, x.detach(), noise), y)
