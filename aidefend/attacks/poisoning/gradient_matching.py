"""Gradient matching: rows with right labels whose training gradient is the one that teaches a victim's wrong label."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from aidefend._core.checks import (
    check_flag,
    check_int,
    check_kind,
    check_logits,
    check_not_empty,
    refuse,
)
from aidefend._core.random import derive_seed
from aidefend._core.threat import Threat
from aidefend.attacks.poisoning.crafted import (
    called,
    check_crafted,
    plant_inputs,
    read_rows,
    slope,
    traceless,
)
from aidefend.attacks.poisoning.poisoned import Poisoned, choose


@dataclasses.dataclass(frozen=True, eq=False)
class GradientMatching:
    """Targeted clean-label poison against training from scratch: a step on the poison is a step towards the goal.

    There is no trigger: success is what a model that is trained on the data says of `victims`.

    Guarantee: none about strength, it is an attack. Exactly `round(rate * N)` rows of the class `target` are poisoned
        and keep their label, each inside `threat` around the clean row.
    Args:
        surrogate: `nn.Module` from x to logits, trained on clean data, used in the mode in which it is given (eval mode
            where it has dropout); of the architecture that the victim will train, if that is known.
        victims: (V, ...) inputs of other classes that shall be taken for `target`.
        target: Class of the poisoned rows, >= 0.
        rate: Share of the whole data set that is poisoned, in (0, 1); at most the share of the class.
        threat: How far a row may be moved.
        steps: Steps of each restart, >= 1.
        restarts: Random starts, >= 1; the one with the best match is kept.
        largest: Choose the rows of the class with the longest gradients, which teach most; False: at random.
    Raises: ConfigurationError: arguments out of range, too few rows of the class, a surrogate without gradients.
        ThreatModelError: x or victims outside the bounds.
    Cost: The data set in memory; restarts * steps double backward passes of all poison at once.
    Source: Geiping, Fowl, Huang, Czaja, Taylor, Moeller, Goldstein 2021 (Witches' Brew): cosine of the gradients,
        signed Adam, restarts. Differs: no augmentation, one surrogate.

    Example:
        >>> model = torch.nn.Linear(6, 4)
        >>> x, y = torch.full((40, 6), 0.5), torch.arange(40) % 4
        >>> attack = GradientMatching(model, torch.rand(1, 6), target=1, rate=0.1, steps=3)
        >>> poisoned = attack.poison((x, y), seed=0)
        >>> gap = torch.stack([poisoned.dataset[i][0] for i in poisoned.indices.tolist()]) - 0.5
        >>> (
        ...     bool(gap.abs().max() <= 0.1 + 1e-6),
        ...     [int(poisoned.dataset[i][1]) for i in poisoned.indices.tolist()],
        ... )
        (True, [1, 1, 1, 1])
    """

    surrogate: torch.nn.Module
    victims: Tensor
    target: int = 0
    rate: float = 0.01
    threat: Threat = dataclasses.field(default_factory=lambda: Threat("linf", 0.1))
    steps: int = 100
    restarts: int = 1
    largest: bool = True

    def __post_init__(self) -> None:
        check_kind(self.surrogate, torch.nn.Module, "surrogate", "Pass a module from x to logits")
        check_crafted(self.victims, self.threat, self.target, self.rate, self.steps)
        check_int(self.restarts, "restarts")
        check_flag(self.largest, "largest")

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison in it, and its ground truth. There is no trigger: judge `victims`."""
        base, x, y = read_rows(dataset, self.threat)
        count = round(self.rate * len(y))
        rows = choose(y == self.target, count, seed, "gradient matching")
        with traceless(self.surrogate, weights=True):
            weights = self._weights()
            if self.largest and count:
                rows = self._longest(x, y, (y == self.target).nonzero().flatten(), count)
            inputs = self._matched(x[rows], y[rows], weights, seed) if count else x[rows]
        return plant_inputs(base, len(y), rows, inputs, y[rows], self.target, None)

    def match(self, x: Tensor) -> float:
        """Cosine, in [-1, 1], of the gradient of rows (P, ...) with the label `target` and that of the goal."""
        check_not_empty(len(self.threat.check(x)), "x")
        with traceless(self.surrogate, weights=True):
            weights, y = self._weights(), torch.full((len(x),), self.target)
            return 1 - float(_mismatch(self._gradient(x, y, weights), self._goal(weights, x)).detach())

    def _weights(self) -> list[Tensor]:
        """All weights, asked for a gradient; `traceless` puts their flags back."""
        weights = [weight.requires_grad_() for weight in self.surrogate.parameters() if weight.is_floating_point()]
        if not weights:
            raise refuse("a surrogate with weights", "surrogate", "none", "Pass a trained module")
        return weights

    def _loss(self, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        logits = check_logits(called(self.surrogate, x, "surrogate"), len(x), "surrogate(x)")
        if int(y.max()) >= logits.shape[1]:
            raise refuse(f"labels below {logits.shape[1]}", "dataset", int(y.max()), "Pass a surrogate of all classes")
        return cross_entropy(logits, y.to(logits.device), reduction=reduction)

    def _gradient(self, x: Tensor, y: Tensor, weights: list[Tensor], *, twice: bool = False) -> list[Tensor]:
        loss = self._loss(x, y)
        if not loss.requires_grad:
            raise refuse("a surrogate with gradients", "surrogate", "none", "Leave out detach and no_grad")
        found = torch.autograd.grad(loss, weights, create_graph=twice, allow_unused=True)
        return [torch.zeros_like(w) if part is None else part for part, w in zip(found, weights, strict=True)]

    def _goal(self, weights: list[Tensor], like: Tensor) -> list[Tensor]:
        victims = self.victims.to(like)
        return self._gradient(victims, torch.full((len(victims),), self.target), weights)

    def _longest(self, x: Tensor, y: Tensor, eligible: Tensor, count: int) -> Tensor:
        """The eligible rows whose own gradient, by the logits, is longest: those that the surrogate resists."""
        with torch.no_grad():
            parts = [self._loss(x[rows], y[rows], "none") for rows in eligible.split(512)]
        return eligible[torch.cat(parts).topk(count).indices].sort().values

    def _matched(self, x: Tensor, y: Tensor, weights: list[Tensor], seed: int) -> Tensor:
        """The best point of all restarts, inside the threat."""
        goal, best, best_loss = self._goal(weights, x), x, torch.inf
        for restart in range(self.restarts):
            stream = torch.Generator().manual_seed(derive_seed(seed, "gradient matching", restart) % 2**63)
            point = self.threat.random_start(x, stream)
            found, loss = self._descend(point, x, y, weights, goal)
            if loss < best_loss:
                best, best_loss = found, loss
        return self.threat.project(best, x)

    def _descend(
        self, point: Tensor, x: Tensor, y: Tensor, weights: list[Tensor], goal: list[Tensor]
    ) -> tuple[Tensor, float]:
        """Signed Adam with a falling step; the point of the best match and its mismatch."""
        best, best_loss = point, torch.inf
        first, second = torch.zeros_like(x), torch.zeros_like(x)
        for step in range(1, self.steps + 2):
            point = point.detach().requires_grad_()
            mismatch = _mismatch(self._gradient(point, y, weights, twice=step <= self.steps), goal)
            if float(mismatch.detach()) < best_loss:
                best, best_loss = point.detach(), float(mismatch.detach())
            if step <= self.steps:
                grad = slope(mismatch, point, "surrogate")
                first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad.square()
                size = self.threat.reach(x) * 0.2 * (1 - (step - 1) / self.steps)
                move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-12)
                point = self.threat.project(point.detach() - size * move.sign(), x)
        return best, best_loss


def _mismatch(ours: list[Tensor], goal: list[Tensor]) -> Tensor:
    """1 - cosine of two gradients."""
    inner = sum((a * b).sum() for a, b in zip(ours, goal, strict=True))
    lengths = [torch.stack([part.square().sum() for part in parts]).sum().sqrt() for parts in (ours, goal)]
    found: Tensor = 1 - inner / (lengths[0] * lengths[1] + 1e-12)
    return found
