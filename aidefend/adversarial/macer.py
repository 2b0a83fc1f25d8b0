"""MACER: noise training that also enlarges the certified radius of the samples that are right. No attack."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_labels, check_number
from aidefend._core.modules import Model
from aidefend.adversarial.crafting import PerExampleLoss, cross_entropy, losses_of
from aidefend.adversarial.noisy_copies import check_classes, check_noise, draw_noise, log_mean_softmax, outputs_at

_LARGEST_GAMMA = 9.5


@dataclasses.dataclass(frozen=True)
class MACER:
    """The criterion of the mean answer at noisy copies, and a hinge on the soft certified radius.

    The radius of a sample is sigma / 2 * (quantile of its own mean probability - quantile of the runner-up's); samples
    whose mean answer is right pay weight * sigma / 2 * max(gamma - difference of quantiles, 0).

    Guarantee: none by itself: certify with `SmoothedModel(model, sigma, ...)`.
    Args:
        sigma: As for `Gaussian`, > 0.
        samples: Copies of each sample, >= 1.
        weight: Of the hinge, >= 0.
        gamma: Margin up to which a radius pays, in quantiles, in (0, 9.5].
        inverse_temperature: Of the softmax behind the radius, > 0: larger = nearer to counting votes.
        criterion: (log-probabilities, y) -> (N,), y class indices.
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised.
    Cost: One training pass over `samples` times the batch.
    Source: Zhai et al. 2020, section 4 and algorithm 1. Differs: probabilities are kept 1e-6 off 0 and 1, so that
        differences of quantiles end at 9.5, where the authors leave samples out.
    Example:
        >>> model, objective = torch.nn.Linear(4, 3), MACER(0.25, samples=4)
        >>> objective.per_example(model, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    sigma: float
    samples: int = 16
    weight: float = 12.0
    gamma: float = 8.0
    inverse_temperature: float = 16.0
    criterion: PerExampleLoss = cross_entropy

    def __post_init__(self) -> None:
        check_noise(self.sigma, self.samples, self.criterion)
        check_number(self.sigma, "sigma", 0.0, open_low=True)
        check_number(self.weight, "weight", 0.0)
        check_number(self.gamma, "gamma", 0.0, _LARGEST_GAMMA, open_low=True)
        check_number(self.inverse_temperature, "inverse_temperature", 0.0, open_low=True)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); arguments as for `Gaussian`, y class indices."""
        noise = draw_noise(x, y, self.sigma, self.samples, generator)
        outputs = outputs_at(model, x.detach(), noise)
        check_labels(check_classes(y), len(x), outputs.shape[2])
        natural = losses_of(self.criterion, log_mean_softmax(outputs), y, len(x))
        return natural + self.weight * self._hinge(log_mean_softmax(outputs, self.inverse_temperature), y)

    def _hinge(self, logs: Tensor, y: Tensor) -> Tensor:
        """Sigma / 2 * max(gamma - difference of quantiles, 0) where the mean answer is right, else 0: (N,)."""
        shares = logs.exp().clamp(1e-6, 1 - 1e-6)
        own = shares.gather(1, y[:, None])[:, 0]
        other = shares.scatter(1, y[:, None], 0.0).amax(dim=1).clamp(min=1e-6)
        difference = torch.special.ndtri(own) - torch.special.ndtri(other)
        right = logs.detach().argmax(dim=1) == y
        return torch.where(right, self.sigma / 2 * (self.gamma - difference).clamp(min=0), 0.0)
