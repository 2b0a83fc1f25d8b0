"""Free adversarial training: one backward pass serves the weights and the attack, each batch is replayed."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_choice, check_int, check_kind, check_number
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.adversarial.crafting import PerExampleLoss, check_batch, cross_entropy, losses_of, outputs_of

Item = TypeVar("Item")


@dataclasses.dataclass
class FreeTraining:
    """The criterion at x plus a perturbation that your own `backward()` moves uphill for the next call.

    Guarantee: none about robustness: measure it. The one objective with a state: `.perturbation` (N, ...), which each
        backward pass through the loss moves by one step; no attack, no pass of its own. It is carried from batch to
        batch by row position, as published; set it to None to start again at zero.
    Args:
        threat: Norm linf or l2; the perturbation stays inside.
        replays: How often `replayed` yields each batch, >= 1: divide your number of epochs by it.
        criterion: (outputs, y) -> (N,), the training loss of each sample.
        step: Length of a step in radii, > 0.
    Raises: ConfigurationError: an argument is malformed. AidefendError: the model raised.
    Cost: One plain step, and the input gradient of the first layer.
    Source: Shafahi et al. 2019, algorithm 1. Differs: x plus perturbation is clipped to the bounds.
    Example:
        >>> model, objective = torch.nn.Linear(4, 3), FreeTraining(Threat("linf", 0.1), replays=3)
        >>> loader = [(torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]))]
        >>> for x, y in objective.replayed(loader):
        ...     objective(model, x, y).backward()  # then your optimizer.step()
        >>> bool(objective.perturbation.abs().max() > 0.09)
        True
    """

    threat: Threat
    replays: int = 4
    criterion: PerExampleLoss = cross_entropy
    _: dataclasses.KW_ONLY
    step: float = 1.0
    perturbation: Tensor | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_kind(self.threat, Threat, "threat", "Pass Threat(norm, eps)")
        check_choice(self.threat.norm, ("linf", "l2"), "threat.norm")
        check_int(self.replays, "replays")
        check_callable(self.criterion, "criterion", 'Pass a function such as nn.CrossEntropyLoss(reduction="none")')
        check_number(self.step, "step", 0.0, open_low=True)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The mean of `per_example`: a scalar to call backward on."""
        return self.per_example(model, x, y, generator=generator).mean()

    def per_example(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each sample, (N,); `generator` is taken for the common form, nothing here is random."""
        check_batch(x, y)
        self.threat.check(x)
        point = self.threat.project(x.detach() + self._rows(x), x.detach()).detach()
        if torch.is_grad_enabled():
            point.requires_grad_().register_hook(lambda gradient: self._move(point, x.detach(), gradient))
        return losses_of(self.criterion, outputs_of(model, point), y, len(x))

    def replayed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Each batch `replays` times in a row."""
        for batch in batches:
            for _ in range(self.replays):
                yield batch

    def _rows(self, x: Tensor) -> Tensor:
        """The perturbation for these rows; zero where there is none yet, and for another shape of x."""
        kept = self.perturbation
        if kept is None or kept.shape[1:] != x.shape[1:]:
            kept = torch.zeros_like(x, requires_grad=False)
        if len(kept) < len(x):
            kept = torch.cat([kept, kept.new_zeros(len(x) - len(kept), *kept.shape[1:])])
        self.perturbation = kept.to(x)
        return self.perturbation[: len(x)]

    def _move(self, point: Tensor, x: Tensor, gradient: Tensor) -> None:
        """One step uphill from the point of the call, for the next call."""
        with torch.no_grad():
            usable = gradient.flatten(1).isfinite().all(dim=1).reshape(-1, *[1] * (x.ndim - 1))
            direction = torch.where(usable, self._steepest(torch.where(usable, gradient, 0)), 0)
            moved = self.threat.project(point + self.step * self.threat.reach(x) * direction, x) - x
            if self.perturbation is not None and self.perturbation.shape[1:] == x.shape[1:]:
                self.perturbation = torch.cat([moved, self.perturbation[len(x) :]])

    def _steepest(self, gradient: Tensor) -> Tensor:
        if self.threat.norm == "linf":
            return gradient.sign()
        flat = gradient.flatten(1)
        flat = flat / flat.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
        unit: Tensor = flat / flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
        return unit.reshape(gradient.shape)
