"""SmoothAdv: noise training at points that are adversarial for the smoothed net, not for the net."""

import dataclasses

import torch
from torch import Tensor, nn

from aidefend._core.modules import Model
from aidefend.adversarial.crafting import (
    Attack,
    AttackMode,
    PerExampleLoss,
    check_fields,
    craft,
    crafting,
    cross_entropy,
    losses_of,
)
from aidefend.adversarial.divergence import check_steerable
from aidefend.adversarial.noisy_copies import check_noise, draw_noise, log_mean_softmax, mean_losses, outputs_at


@dataclasses.dataclass(frozen=True)
class SmoothAdv:
    """The criterion at noisy copies of x_adv, which climbs the criterion of the mean answer over the same noise.

    Guarantee: none by itself: certify with `SmoothedModel(model, sigma, ...)`.
    Args:
        attack: An attack whose loss can be set, with `.with_loss(loss)`: ours, untargeted; with an l2 threat, as the
            certificate is about that norm.
        sigma: As for `Gaussian`.
        samples: Copies of each sample, >= 1.
        criterion: (outputs, y) -> (N,); the attack gets it on the log of the mean probability.
        attack_mode: As for `PGDTraining`.
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised.
    Cost: k attack steps (2F each) and a training pass, each over `samples` times the batch.
    Source: Salman et al. 2019, section 2.3 (first-order attack on the soft smoothed classifier).
    Example:
        >>> from aidefend import Threat
        >>> from aidefend.attacks import PGD
        >>> model, objective = torch.nn.Linear(4, 3), SmoothAdv(PGD(Threat("l2", 0.25), 2), 0.25, samples=2)
        >>> objective.per_example(model, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    attack: Attack
    sigma: float
    samples: int = 2
    criterion: PerExampleLoss = cross_entropy
    _: dataclasses.KW_ONLY
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        check_fields(check_steerable(self.attack, "SmoothAdv"), self.criterion, self.attack_mode)
        check_noise(self.sigma, self.samples, self.criterion)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); arguments as for `Gaussian`; the noise serves attack and training alike."""
        noise = draw_noise(x, y, self.sigma, self.samples, generator)
        x_adv = self.craft(model, x, y, noise, generator=generator)
        return mean_losses(self.criterion, outputs_at(model, x_adv, noise), y)

    def craft(
        self, model: Model, x: Tensor, y: Tensor, noise: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The attack alone: x_adv for this noise (samples, N, ...), detached."""
        steered: Attack = self.attack.with_loss(self._climbed)  # type: ignore[attr-defined]  # checked above
        with crafting(model, self.attack_mode) as inner:
            return craft(steered, _MeanAnswer(inner, noise), x, y, generator)

    def _climbed(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The criterion, with its errors named."""
        return losses_of(self.criterion, outputs, y, len(outputs))


class _MeanAnswer(nn.Module):
    """From x to the log of the mean probability over copies with fixed noise."""

    def __init__(self, model: Model, noise: Tensor) -> None:
        super().__init__()
        self.model, self.noise = model, noise

    def forward(self, x: Tensor) -> Tensor:
        """(N, K)."""
        return log_mean_softmax(outputs_at(self.model, x, self.noise))
