"""Adversarial weight perturbation: the loss at the worst weights near the current ones."""

import dataclasses
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from aidefend._core.checks import check_kind, check_number, refuse
from aidefend._core.modules import Model, preserve
from aidefend.adversarial.crafting import check_batch, unwrapped


class Perturbed(nn.Module):
    """A model at other weights: calls go through it, its own weights are never written."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, *arguments: Any) -> Any:
        """The model's answer at the other weights; gradients reach whatever these were computed from."""
        return torch.func.functional_call(self.model, self.weights, arguments)


@dataclasses.dataclass(frozen=True)
class AWP:
    """Wraps an objective: the same loss, at weights moved uphill by gamma times each layer's norm.

    Guarantee: none about robustness. The weights are never written: the loss is computed at moved copies through which
        gradients reach them, so they stay bit for bit what they were, also when the model raises. The attack runs
        once. The pass that finds the direction leaves no trace; the training pass updates BatchNorm as usual.
    Args:
        objective: With methods `craft` and `losses`: PGDTraining, TRADES, MART, ... `GradAlign` goes around this one.
        gamma: Length of the move relative to the norm of each weight, >= 0. One-dimensional parameters (biases,
            BatchNorm) and those that take no gradient do not move.
    Raises: ConfigurationError: an argument is malformed, or the model is not a module.
    Cost: One more training forward and backward pass than the objective: with PGD-k (2k + 6) / 3 plain steps; one copy
        of the weights in memory. Under DistributedDataParallel one all-reduce of the direction, so that all ranks move
        to the same place. The loss of a sample depends on its batch mates: not for private training.
    Source: Wu, Xia, Wang 2020, eq. 8-10 with one step. Differs: no proxy copy of the model and no add-and-subtract,
        which drifts in 16 bits; the gradient is taken through the sum.
    Example:
        >>> from aidefend.adversarial import PGDTraining
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = PGDTraining(lambda model, x, y: (x + 0.1).clamp(0, 1))
        >>> x, y = torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> bool(AWP(objective, gamma=0.1)(model, x, y) > objective(model, x, y))
        True
    """

    objective: Any
    gamma: float = 0.005

    def __post_init__(self) -> None:
        if not callable(getattr(self.objective, "craft", None)) or not callable(
            getattr(self.objective, "losses", None)
        ):
            cure = "Wrap PGDTraining, TRADES, MART or another objective with these methods"
            raise refuse("an objective with .craft and .losses", "objective", self.objective, cure)
        check_number(self.gamma, "gamma", 0.0)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample at the moved weights, (N,); arguments as for the objective."""
        check_batch(x, y)
        return self.losses(model, x, self.craft(model, x, y, generator=generator), y)

    def craft(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The attack of the objective, at the weights as they are."""
        crafted: Tensor = self.objective.craft(model, x, y, generator=generator)
        return crafted

    def losses(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample at points that are known: the pass uphill and the training passes."""
        module = check_kind(model, nn.Module, "model", "Only the weights of a module can be moved")
        moved = self._moved(module, x, x_adv, y)
        losses: Tensor = self.objective.losses(Perturbed(module, moved), x, x_adv, y)
        return losses

    def _moved(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Each weight plus its move uphill, by its name in the model as given."""
        inner: Any = unwrapped(model)
        prefix = "" if inner is model else "module."
        weights = {name: value for name, value in inner.named_parameters() if value.requires_grad and value.ndim > 1}
        if not weights:
            return {}
        copies = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
        with torch.inference_mode(False), torch.enable_grad(), preserve(inner):
            loss = self.objective.losses(Perturbed(inner, copies), x, x_adv, y).mean()
            found = torch.autograd.grad(loss, list(copies.values()), allow_unused=True)
        uphill = [torch.zeros_like(w) if g is None else g for w, g in zip(weights.values(), found, strict=True)]
        _average(model, uphill)
        return {
            prefix + name: weight + self.gamma * _scaled(direction, weight)
            for (name, weight), direction in zip(weights.items(), uphill, strict=True)
        }


def _scaled(direction: Tensor, weight: Tensor) -> Tensor:
    """The direction with the length of the weight; none where the gradient is zero or not finite."""
    length = direction.float().norm()
    usable = length.isfinite() & (length > 0)
    factor = torch.where(usable, weight.detach().float().norm() / length.clamp(min=1e-38), 0.0)
    return torch.where(usable, direction, 0) * factor.to(weight.dtype)


def _average(model: nn.Module, gradients: list[Tensor]) -> None:
    """The mean over the ranks, so that all of them move to the same place."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        for gradient in gradients:
            distributed.all_reduce(gradient, group=model.process_group)
            gradient /= distributed.get_world_size(model.process_group)
