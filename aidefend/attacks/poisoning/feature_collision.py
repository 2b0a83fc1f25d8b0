"""Feature collision: rows of one class that a feature extractor takes for a victim of another."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_flag
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
class FeatureCollision:
    """Targeted clean-label poison: rows of the class `target` move, in features, onto inputs that shall get its label.

    A head that is trained on frozen features gives the victims the label of the rows that lie around them. There is no
    trigger: success is what the trained model says of `victims`.

    Guarantee: none about strength, it is an attack. Exactly `round(rate * N)` rows of the class `target` are poisoned
        and keep their label, each inside `threat` around the clean row.
    Args:
        features: Maps a batch (N, ...) to features (N, ...), differentiable: the frozen extractor, or a model without
            its head; a module is used in the mode in which it is given.
        victims: (V, ...) inputs of other classes that shall be taken for `target`. Poison is dealt to them in turn.
        target: Class of the poisoned rows, >= 0.
        rate: Share of the whole data set that is poisoned, in (0, 1); at most the share of the class.
        threat: How far a row may be moved.
        together: False: each row lies as near to its victim as it can. True: the mean of a victim's rows does (bullseye
            polytope), which a head of another training respects better.
        nearest: Choose the rows of the class that lie nearest to their victims in the features; False: at random.
        steps: Gradient steps, >= 1.
    Raises: ConfigurationError: arguments out of range, too few rows of the class, features without gradient.
        ThreatModelError: x or victims outside the bounds.
    Cost: The data set in memory; `steps` forward and backward passes of the poison, one forward pass of the class.
    Source: Shafahi, Huang, Najibi, Suciu, Studer, Dumitras, Goldstein 2018; Aghakhani, Meng, Wang, Kruegel, Vigna 2021
        (bullseye polytope). Differs: a hard threat in place of a penalty on the distance; steps of the gradient's sign.

    Example:
        >>> x, y = torch.full((40, 6), 0.5), torch.arange(40) % 4
        >>> victims = torch.full((1, 6), 0.9)
        >>> attack = FeatureCollision(
        ...     torch.nn.Flatten(), victims, target=1, rate=0.1, threat=Threat("linf", 0.2)
        ... )
        >>> poisoned = attack.poison((x, y), seed=0)
        >>> round(float(poisoned.dataset[int(poisoned.indices[0])][0].max()), 3)
        0.7
    """

    features: Callable[[Tensor], Tensor]
    victims: Tensor
    target: int = 0
    rate: float = 0.01
    threat: Threat = dataclasses.field(default_factory=lambda: Threat("linf", 0.1))
    together: bool = False
    nearest: bool = True
    steps: int = 100

    def __post_init__(self) -> None:
        check_callable(self.features, "features", "Pass a module or function from x to features")
        check_crafted(self.victims, self.threat, self.target, self.rate, self.steps)
        check_flag(self.together, "together")
        check_flag(self.nearest, "nearest")

    def poison(self, dataset: Any, seed: int = 0) -> Poisoned:
        """The data set with poison in it, and its ground truth. There is no trigger: judge `victims`."""
        base, x, y = read_rows(dataset, self.threat)
        count = round(self.rate * len(y))
        rows = choose(y == self.target, count, seed, "feature collision")
        with traceless(self.features):
            wanted = self._of(self.victims.to(x)).detach()
            if self.nearest and count:
                rows = self._nearest(x, (y == self.target).nonzero().flatten(), wanted, count)
            owner = torch.arange(count) % len(wanted)
            inputs = self._moved(x[rows], wanted, owner) if count else x[rows]
        return plant_inputs(base, len(y), rows, inputs, y[rows], self.target, None)

    def _of(self, x: Tensor) -> Tensor:
        return called(self.features, x, "features").flatten(1)

    def _nearest(self, x: Tensor, eligible: Tensor, wanted: Tensor, count: int) -> Tensor:
        """`count` row numbers; each in turn the nearest row to the next victim that is still free."""
        with torch.no_grad():
            points = torch.cat([self._of(x[rows]) for rows in eligible.split(512)])
        order = torch.cdist(wanted, points).argsort(dim=1).tolist()
        taken: dict[int, None] = {}
        for turn in range(count):
            taken[next(place for place in order[turn % len(order)] if place not in taken)] = None
        return eligible[list(taken)]

    def _moved(self, x: Tensor, wanted: Tensor, owner: Tensor) -> Tensor:
        """The rows at the best step for each, or, together, at the best step for all."""
        threat, point = self.threat, x.clone()
        best, best_gap = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype)
        for step in range(self.steps + 1):
            point = point.detach().requires_grad_()
            gaps = self._gaps(self._of(point), wanted, owner)
            with torch.no_grad():
                better = gaps < best_gap
                best, best_gap = _where(better, point.detach(), best), torch.where(better, gaps.detach(), best_gap)
            if step < self.steps:
                size = 0.5 * threat.reach(x) * (1 - step / self.steps) + 1e-3 * threat.reach(x)
                moved = point.detach() - size * slope(gaps.sum(), point, "features").sign()
                point = threat.project(moved, x)
        return threat.project(best, x)

    def _gaps(self, features: Tensor, wanted: Tensor, owner: Tensor) -> Tensor:
        """(P,) squared distance to the victim of each row, or of the mean of all rows of its victim."""
        if self.together:
            shares = torch.nn.functional.one_hot(owner, len(wanted)).to(features)
            means = (shares.T @ features) / shares.sum(dim=0).clamp(min=1)[:, None]
            gap: Tensor = (means - wanted).square().sum(dim=1)[owner]
            return gap
        own: Tensor = (features - wanted[owner]).square().sum(dim=1)
        return own


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
