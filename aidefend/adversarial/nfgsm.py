"""N-FGSM: one gradient step from a start with more noise than the threat allows, and no projection."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_number
from aidefend._core.modules import Model
from aidefend._core.random import make_generator
from aidefend.adversarial.crafting import (
    Attack,
    AttackMode,
    PerExampleLoss,
    check_batch,
    check_fields,
    cross_entropy,
    losses_of,
    outputs_of,
)
from aidefend.adversarial.single_step import check_recipe, craft_single


@dataclasses.dataclass(frozen=True)
class NFGSM:
    """The criterion after noise of `noise` radii and one step of `step` radii, clipped to the bounds only.

    Guarantee: none about robustness: measure it. The points trained on leave the ball on purpose (by up to noise + step
        radii), which is what keeps the single step honest; they stay inside bounds, mask and data types of the threat.
    Args:
        attack: PGD(threat), or another attack with the fields threat, steps, step_size and random_start: it is set to
            one step from the noisy point. Its threat is the radius trained for, its loss is climbed.
        criterion: (outputs, y) -> (N,), the training loss of each sample.
        noise: Radius of the noise in radii of the threat, >= 0.
        step: Length of the step in radii, > 0.
        attack_mode: "eval": craft with BatchNorm and dropout in eval mode; "given": in the mode of the model.
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised.
    Cost: 5 / 3 plain steps (2F for the step, 3F for training).
    Source: De Jorge et al. 2022 (k = 2, alpha = eps). Differs: the noise is uniform inside the bounds of the data too,
        where the authors clip it.
    Example:
        >>> from aidefend import Threat
        >>> from aidefend.attacks import PGD
        >>> objective = NFGSM(PGD(Threat("linf", 0.1)))
        >>> objective.per_example(torch.nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    attack: Attack
    criterion: PerExampleLoss = cross_entropy
    _: dataclasses.KW_ONLY
    noise: float = 2.0
    step: float = 1.0
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        check_fields(self.attack, self.criterion, self.attack_mode)
        check_recipe(self.attack)
        check_number(self.noise, "noise", 0.0)
        check_number(self.step, "step", 0.0, open_low=True)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); arguments as for `PGDTraining`."""
        check_batch(x, y)
        return self.losses(model, x, self.craft(model, x, y, generator=generator), y)

    def craft(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The noise and the step: x_adv, detached."""
        threat, stream = self.attack.threat, make_generator(generator)  # type: ignore[attr-defined]  # a recipe
        noisy, criterion, mode = threat.with_eps(threat.eps * self.noise), self.criterion, self.attack_mode
        return craft_single(self.attack, criterion, model, x, y, noisy, self.step, mode, stream)

    def losses(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample at points that are known: the training forward pass."""
        return losses_of(self.criterion, outputs_of(model, x_adv), y, len(x))
