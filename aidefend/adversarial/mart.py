"""MART: a boosted cross-entropy at the worst point, and more consistency where the model is unsure."""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from aidefend._core.checks import check_labels, check_number, refuse
from aidefend._core.modules import Model
from aidefend.adversarial.crafting import (
    Attack,
    AttackMode,
    check_batch,
    check_fields,
    craft_for,
    cross_entropy,
)
from aidefend.adversarial.divergence import kl_divergence, log_softmax, logits_of


def class_weights(y: Tensor, like: Tensor) -> Tensor:
    """Labels as rows of class probabilities (N, K): soft ones as they are, indices as one-hot rows."""
    if y.is_floating_point():
        if y.shape != like.shape:
            raise refuse(f"class probabilities of shape {tuple(like.shape)}", "y", y, "Pass one row for each sample")
        return y.to(like.dtype)
    return functional.one_hot(check_labels(y, len(like), like.shape[1]).long(), like.shape[1]).to(like.dtype)


def boosted_cross_entropy(log_probabilities: Tensor, weights: Tensor) -> Tensor:
    """-log p_y - log(1 - max_{k != y} p_k), averaged over the classes by `weights`: two (N, K) -> (N,)."""
    top = log_probabilities.detach().topk(2, dim=1).indices
    first, second = (_log_of_the_others(log_probabilities, top[:, k]) for k in (0, 1))
    is_first = functional.one_hot(top[:, 0], weights.shape[1]).bool()
    beside = torch.where(is_first, second[:, None], first[:, None])
    return -(weights * (log_probabilities + beside)).sum(dim=1)


def _log_of_the_others(log_probabilities: Tensor, column: Tensor) -> Tensor:
    """log(1 - p_column) without the cancellation: the sum of the others, in logs."""
    return log_probabilities.scatter(1, column[:, None], -torch.inf).logsumexp(dim=1)


@dataclasses.dataclass(frozen=True)
class MART:
    """Boosted cross-entropy at x_adv + weight * KL(model(x) || model(x_adv)) * (1 - p_y(x)).

    Guarantee: none about robustness. It is known to look better under PGD than under stronger attacks: measure it with
        `audit.evaluate_robustness`.
    Args:
        attack: Any callable (model, x, y) -> x_adv, on cross-entropy as published.
        weight: Weight of the second part, >= 0.
        attack_mode: "eval": craft with BatchNorm and dropout in eval mode, flags restored module by module; "given":
            craft in the mode of the model, statistics restored.
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised, or its outputs are no logits.
    Cost: The attack, and two training forward and backward passes.
    Source: Wang et al. 2020, eq. 11. Differs: 1 - p is computed in logs, exactly (the authors add 1e-4); soft labels
        (mixup, smoothing) take the expectation over the class.
    Example:
        >>> objective = MART(lambda model, x, y: (x + 0.1).clamp(0, 1))
        >>> objective.per_example(torch.nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    attack: Attack
    weight: float = 6.0
    _: dataclasses.KW_ONLY
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        check_fields(self.attack, cross_entropy, self.attack_mode)
        check_number(self.weight, "weight", 0.0)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); arguments as for `PGDTraining`, y as class indices or probabilities."""
        check_batch(x, y)
        return self.losses(model, x, self.craft(model, x, y, generator=generator), y)

    def craft(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The attack alone: x_adv, detached."""
        return craft_for(cross_entropy, self.attack, model, x, y, self.attack_mode, generator)

    def losses(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample at points that are known: the two training forward passes."""
        clean, worst = log_softmax(logits_of(model, x)), logits_of(model, x_adv)
        weights = class_weights(y, clean)
        unsure = 1 - (weights * clean.exp()).sum(dim=1)
        boosted = boosted_cross_entropy(log_softmax(worst), weights)
        return boosted + self.weight * kl_divergence(worst, clean) * unsure
