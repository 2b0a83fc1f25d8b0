"""HopSkipJump: walks along the boundary by decisions alone; gradients are estimated from which side points lie on."""

import dataclasses
import math

import torch
from torch import Tensor

from aidefend._core.checks import check_int, refuse
from aidefend._core.errors import ThreatModelError
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Scored
from aidefend.attacks.evasion.checks import check_fields
from aidefend.attacks.evasion.goals import Goal
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.minimum_norm import ORDERS, as_rows, length
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.roaming import Roaming, inside_bounds, run_roaming
from aidefend.attacks.evasion.search import Search

_HALVINGS = 10
_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class HopSkipJump:
    """Decision-based minimum norm: needs the top class alone, and sees through masked gradients.

    Guarantee: the result lies inside the threat. None about strength; rows for which no start is found within `tries`
        random points (usual with `targeted`) stay at x or near it.
    Args:
        threat: The set of allowed points, norm linf or l2, finite bounds; for goal "min_norm" give a large eps.
        steps: Steps along the boundary, >= 1.
        first_queries: Points for the first estimate of a gradient, >= 2; the number grows with the square root of the
            step.
        most_queries: Points for one estimate, at most.
        tries: Random points that are tried as the start, >= 1.
        loss: Reported and compared for goal "max_loss", never followed; as for `PGD`.
        targeted: y holds the class to reach.
        is_success: As for `PGD`; with it and a loss of yours the model need not return logits.
    Raises: ConfigurationError: a field is malformed. ThreatModelError: another norm, or infinite bounds.
    Cost: Forward passes alone: at most `tries`, then for each step one estimate, 10 halvings of the step and a
        bisection of 10 to 20 passes. Rows and points of an estimate share their forward passes.
    Source: Chen, Jordan, Wainwright 2020, Algorithm 2. Differs: random starts of many contrasts and levels; at most 10
        halvings of a step; the bisection ends after 20 halvings.
    Example:
        >>> from aidefend import Threat
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> x, y = torch.tensor([[0.7, 0.5]]), torch.tensor([0])
        >>> result = HopSkipJump(Threat("l2", 1.0), 10).run(
        ...     model, x, y, generator=torch.Generator().manual_seed(0)
        ... )
        >>> Threat("l2", 1.0).distance(result.x_adv, x).item() < 0.2
        True
    """

    threat: Threat
    steps: int = 20
    _: dataclasses.KW_ONLY
    first_queries: int = 100
    most_queries: int = 10_000
    tries: int = 50
    loss: Loss = "margin"
    targeted: bool = False
    is_success: IsSuccess | None = None

    def __post_init__(self) -> None:
        check_fields(self.threat, self.steps, 1, self.loss, self.is_success, targeted=self.targeted)
        check_int(self.first_queries, "first_queries", 2)
        check_int(self.most_queries, "most_queries", 2)
        check_int(self.tries, "tries")
        if self.threat.norm not in ("linf", "l2"):
            raise refuse("norm linf or l2", "threat", self.threat, "Use FMN for l1 and l0", ThreatModelError)
        if not self.threat.bounded:
            raise refuse("finite bounds", "threat", self.threat, "State the range of x", ThreatModelError)

    @property
    def restarts(self) -> int:
        """One: the path starts at x."""
        return 1

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The allowed point of the largest loss on the way, for each sample; arguments as for `PGD`."""
        return self.run(model, x, y, goal="max_loss", generator=generator).x_adv

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        goal: Goal = "min_norm",
        generator: torch.Generator | None = None,
        logits: Tensor | None = None,
        row_seeds: Tensor | None = None,
    ) -> AttackResult:
        """Attack with a goal and count the passes; arguments as for `PGD.run`.

        "min_norm": the smallest success; where that is beyond eps, the point of the largest loss inside the threat.
        "first_success": the same, but rows leave at the checkpoints once a success inside the threat is known.
        "max_loss": the point of the largest loss inside the threat on the way.
        """
        return run_roaming(self, model, x, y, goal=goal, generator=generator, logits=logits, row_seeds=row_seeds)

    def with_loss(self, loss: Loss) -> "HopSkipJump":
        """The same attack on another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """Not how this attack goes: see `roam`."""
        return search.x, None

    def roam(self, rows: Roaming) -> None:
        """A start, pulled to the boundary; then steps along it."""
        if rows.x[0].numel() == 0:
            return
        point, found = self._start(rows)
        point = _pulled(rows, point, found)
        for done in range(1, self.steps + 1):
            keep = rows.compact(done)
            if keep is not None:
                point, found = point[keep], found[keep]
            if rows.active == 0:
                return
            distance = length(point - rows.x, ORDERS[rows.threat.norm])
            direction = self._estimate(rows, point, distance, done)
            point = _pulled(rows, _jump(rows, point, direction, distance / math.sqrt(done)), found)

    def _start(self, rows: Roaming) -> tuple[Tensor, Tensor]:
        """A random success for each row, and for which rows there is one."""
        low, high = rows.threat.limits(rows.x)
        point, found = rows.x, torch.zeros(rows.active, dtype=torch.bool, device=rows.x.device)
        # Drawn once and turned, so that the numbers of a row do not depend on when others are done.
        numbers = torch.special.ndtr(rows.stream.normal(rows.x).double()).to(rows.x).flatten(1)
        levels = torch.special.ndtr(rows.stream.normal(rows.x.new_empty(rows.active, self.tries)).double())
        for number in range(self.tries):
            contrast = (1.0, 0.5, 0.1)[number % 3]
            noise = numbers.roll(number, dims=1).reshape(rows.x.shape)
            level = as_rows(levels[:, number].to(rows.x), rows.x)
            trial = (level * (1 - contrast) + noise * contrast) * (high - low) + low
            trial = inside_bounds(trial, rows.x, rows.threat)
            fresh = rows.score(trial).hit & ~found
            point, found = torch.where(as_rows(fresh, point), trial, point), found | fresh
            if bool(found.all()):
                break
        return point, found

    def _estimate(self, rows: Roaming, point: Tensor, distance: Tensor, done: int) -> Tensor:
        """The direction in which points succeed: unit steps that do less those that do not."""
        low, high = rows.threat.limits(rows.x)
        features = rows.x[0].numel()
        queries = min(self.most_queries, round(self.first_queries * math.sqrt(done)))
        if done == 1:
            radius = torch.full_like(distance, 0.1 * float((high - low).max()))
        else:
            radius = distance * (_precision(rows) * (features if rows.threat.norm == "linf" else math.sqrt(features)))
        reach = as_rows(radius.clamp(min=torch.finfo(point.dtype).tiny ** 0.5), point)
        signed, plain, ups = torch.zeros_like(point), torch.zeros_like(point), torch.zeros_like(distance)
        for first in range(0, queries, _BLOCK):
            count = min(_BLOCK, queries - first)
            probes = []
            for _ in range(count):
                noise = rows.stream.normal(point)
                noise = noise / as_rows(length(noise, 2.0).clamp(min=1e-12), noise)
                probes.append(inside_bounds(point + reach * noise, rows.x, rows.threat))
            stack = torch.stack(probes, dim=1)
            sides = rows.hits(stack).to(point) * 2 - 1
            steps = (stack - point[:, None]) / reach[:, None]
            signed = signed + (steps * sides.reshape(*sides.shape, *[1] * (point.ndim - 1))).sum(dim=1)
            plain, ups = plain + steps.sum(dim=1), ups + sides.sum(dim=1)
        mean = ups / queries
        centre = torch.where(mean.abs() < 1, mean, 0)  # all on one side: the mean step is all there is
        slope = signed - as_rows(centre, point) * plain
        if rows.threat.norm == "linf":
            return slope.sign()
        return slope / as_rows(length(slope, 2.0).clamp(min=torch.finfo(slope.dtype).tiny), slope)


def _precision(rows: Roaming) -> float:
    """Share of the distance at which a bisection ends."""
    share: float = rows.x[0].numel() ** (-2.0 if rows.threat.norm == "linf" else -1.5)
    return max(share, 2.0**-20)


def _jump(rows: Roaming, point: Tensor, direction: Tensor, size: Tensor) -> Tensor:
    """The longest of the halved steps that still succeeds; the point itself where none does."""
    best, found = point, torch.zeros(rows.active, dtype=torch.bool, device=point.device)
    for number in range(_HALVINGS):
        trial = inside_bounds(point + as_rows(size / 2**number, point) * direction, rows.x, rows.threat)
        fresh = rows.score(trial).hit & ~found
        best, found = torch.where(as_rows(fresh, best), trial, best), found | fresh
        if bool(found.all()):
            break
    return best


def _pulled(rows: Roaming, point: Tensor, found: Tensor) -> Tensor:
    """Bisection between x and a success: the nearest success on the way."""
    whole = length(point - rows.x, ORDERS[rows.threat.norm])
    low, high = torch.zeros_like(whole), torch.ones_like(whole)
    best = point
    for _ in range(max(10, math.ceil(-math.log2(_precision(rows))))):
        middle = (low + high) / 2
        if rows.threat.norm == "linf":
            reach = as_rows(middle * whole, point)
            trial = torch.minimum(torch.maximum(point, rows.x - reach), rows.x + reach)
        else:
            trial = rows.x + as_rows(middle, point) * (point - rows.x)
        trial = inside_bounds(trial, rows.x, rows.threat)
        hit = rows.score(trial).hit & found
        best = torch.where(as_rows(hit, best), trial, best)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    return best
