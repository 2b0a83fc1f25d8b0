"""HAT: TRADES, plus helper points beyond the adversarial ones that take the answer of a normally trained model."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_logits, check_number
from aidefend._core.modules import Model, evaluate, preserve, training_layers
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
from aidefend.adversarial.divergence import check_steerable, craft_divergence, kl_divergence, log_softmax, logits_of


@dataclasses.dataclass(frozen=True)
class HAT:
    """Criterion at x + beta * KL(model(x) || model(x_adv)) + gamma * criterion at x + reach * (x_adv - x).

    Guarantee: none about robustness: measure it. The helper is run in eval mode without a gradient and left as it was.
    Args:
        attack: An attack with `.with_loss(loss)`, untargeted: it climbs the divergence, as in TRADES.
        helper: A normally trained model of the same classes, on the same device: its top class at x_adv is the label
            of the helper point. It is used, never trained; an objective with a module in it is as large as that.
        beta: Weight of the divergence, >= 0.
        gamma: Weight of the helper part, >= 0.
        reach: Where the helper point lies, in perturbations; it may leave the bounds, as published.
        criterion: (outputs, y) -> (N,), for clean and helper points; the label of the latter is an index.
        attack_mode: "eval": craft with BatchNorm and dropout in eval mode; "given": in the mode of the model.
    Raises: ConfigurationError: an argument is malformed. AidefendError: a model raised.
    Cost: k attack steps (2F each), three training forward and backward passes, a forward pass of the helper; one
        forward pass more where BatchNorm or dropout trains, as in `TRADES`.
    Source: Rade, Moosavi-Dezfooli 2022, eq. 3 (beta 2.5, gamma 0.5, reach 2).
    Example:
        >>> from aidefend import Threat
        >>> from aidefend.attacks import PGD
        >>> objective = HAT(PGD(Threat("linf", 0.1)), torch.nn.Linear(4, 3))
        >>> objective.per_example(torch.nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    attack: Attack
    helper: Model
    beta: float = 2.5
    gamma: float = 0.5
    _: dataclasses.KW_ONLY
    reach: float = 2.0
    criterion: PerExampleLoss = cross_entropy
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        check_fields(check_steerable(self.attack, "HAT"), self.criterion, self.attack_mode)
        check_callable(self.helper, "helper", "Pass a normally trained model")
        for name in ("beta", "gamma", "reach"):
            check_number(getattr(self, name), name, 0.0)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); arguments as for `PGDTraining`, y as the criterion takes it."""
        check_batch(x, y)
        if self.attack_mode == "eval" and training_layers(model):
            return self.losses(model, x, self.craft(model, x, y, generator=generator), y)
        clean = logits_of(model, x)
        x_adv = craft_divergence(self.attack, model, x, clean.detach(), self.attack_mode, generator)
        return self._losses(model, clean, x, x_adv, y)

    def craft(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The attack alone: x_adv, detached; one clean forward pass more than inside `per_example`."""
        return craft_divergence(self.attack, model, x, None, self.attack_mode, generator)

    def losses(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample at points that are known: the helper and three training forward passes."""
        return self._losses(model, logits_of(model, x), x, x_adv, y)

    def _losses(self, model: Model, clean: Tensor, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        label = self._label(x_adv)
        natural = losses_of(self.criterion, clean, y, len(x))
        divergence = kl_divergence(logits_of(model, x_adv), log_softmax(clean))
        beyond = x + self.reach * (x_adv - x)
        helped = losses_of(self.criterion, logits_of(model, beyond), label, len(x))
        return natural + self.beta * divergence + self.gamma * helped

    def _label(self, x_adv: Tensor) -> Tensor:
        """The helper's top class at x_adv."""
        with preserve(self.helper), torch.no_grad():
            evaluate(self.helper)
            return check_logits(outputs_of(self.helper, x_adv), len(x_adv), "helper(x)").argmax(dim=1)
