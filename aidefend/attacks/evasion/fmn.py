"""Fast minimum norm: gradient steps inside a ball that shrinks while the sample is fooled and grows while it is not."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_number
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Scored
from aidefend.attacks.evasion.checks import check_fields
from aidefend.attacks.evasion.goals import Goal, perturb
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.minimum_norm import (
    DUAL,
    ORDERS,
    Smallest,
    as_rows,
    climb_shrinking,
    cosine,
    length,
    run_shrinking,
)
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.search import Search

_FIRST_STEPS, _FEWEST_STEPS = 30, 10
_SHARE = {"linf": 1.0, "l2": 1.0, "l1": 0.2, "l0": 1.0}
_DIRECTION = {"linf": "linf", "l2": "l2", "l1": "l2", "l0": "l2"}


@dataclasses.dataclass(frozen=True)
class FMN:
    """Fast minimum-norm attack: the smallest perturbation in `steps` passes, without a search over radii.

    Guarantee: the result lies inside the threat, whose eps is the largest perturbation that is tried.
    Args:
        threat: The set of allowed points, in any norm; for goal "min_norm" give an eps as large as you care for.
        steps: Steps, >= 1.
        step_size: Length of the first step as a share of the ball's radius, > 0; it falls to a hundredth along a
            cosine. l0, whose radius is a number of features: Euclidean length in the units of x. None: 1, in l1 0.2.
        shrink_rate: Share by which the ball shrinks or grows at first, in (0, 1); it falls to `final_rate`.
        final_rate: The share at the end, in (0, 1).
        loss: As for `PGD`. With another loss than "margin" the first estimate of the radius is not used.
        targeted: y holds the class to reach.
        is_success: As for `PGD`.
    Raises: ConfigurationError: a field is malformed.
    Cost: `steps` forward and backward passes to the input for every goal, and the clean pass where it is not given (two
        of them for "min_norm" in l2 and l1).
    Source: Pintor et al. 2021. Differs: the threat caps the radius, the first estimate of the radius goes a little
        beyond the boundary, and the clean point counts as distance 0 where it is wrong already. Steps are as long as
        the ball says, linf steps follow the sign, features that stand at a bound take no part, and "min_norm" in l2
        and l1 begins where a fifth of the steps, at most 30, found a linf perturbation: on nets trained for linf the
        published steps of one Euclidean length from x end in corners of the box.
    Example:
        >>> from aidefend import Threat
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> x, y = torch.tensor([[0.7, 0.5]]), torch.tensor([0])
        >>> result = FMN(Threat("linf", 1.0), 100).run(model, x, y, goal="min_norm")
        >>> round(Threat("linf", 1.0).distance(result.x_adv, x).item(), 2)
        0.1
    """

    threat: Threat
    steps: int = 100
    step_size: float | None = None
    _: dataclasses.KW_ONLY
    shrink_rate: float = 0.15
    final_rate: float = 0.001
    loss: Loss = "margin"
    targeted: bool = False
    is_success: IsSuccess | None = None

    def __post_init__(self) -> None:
        check_fields(self.threat, self.steps, 1, self.loss, self.is_success, targeted=self.targeted)
        if self.step_size is not None:
            check_number(self.step_size, "step_size", 0.0, open_low=True)
        check_number(self.shrink_rate, "shrink_rate", 0.0, 1.0, open_low=True)
        check_number(self.final_rate, "final_rate", 0.0, 1.0, open_low=True)

    @property
    def restarts(self) -> int:
        """One: the path starts at x."""
        return 1

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The point of the largest loss on the way, for each sample; arguments as for `PGD`."""
        return perturb(self, model, x, y, generator)

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
        """Attack with a goal and count the passes; arguments as for `PGD.run`."""

        def shrunk(attack: FMN, begin_at: Tensor | None = None) -> AttackResult:
            return run_shrinking(
                attack, model, x, y, goal=goal, generator=generator, logits=logits, row_seeds=row_seeds,
                begin_at=begin_at,
            )  # fmt: skip

        cube = self._cube()
        if goal != "min_norm" or cube is None:
            return shrunk(self)
        count = min(_FIRST_STEPS, self.steps // 5)
        first = shrunk(dataclasses.replace(self, threat=cube, steps=count, step_size=None))
        begin_at = torch.where(as_rows(first.success, x), first.x_adv, x)
        found = shrunk(dataclasses.replace(self, steps=self.steps - count), begin_at)
        passes = {name: getattr(found, name) + getattr(first, name) for name in ("forwards", "backwards")}
        return dataclasses.replace(found, **passes)

    def with_loss(self, loss: Loss) -> "FMN":
        """The same attack on another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """The point of the largest loss on the way."""
        return climb_shrinking(self, search)

    def shrink(self, search: Search, found: Smallest) -> None:
        """All steps from x."""
        point = search.start(random=False)
        radius = torch.full((len(point),), torch.inf, dtype=point.dtype, device=point.device)
        for done in range(self.steps):
            scored, grad = search.gradient(point)
            snapped = search.snap(point)
            size = search.threat.distance(snapped, search.x).to(point)
            found.offer(snapped, scored, size)
            if done + 1 == self.steps:
                return
            rate = cosine(done, self.steps, self.shrink_rate, self.final_rate)
            radius = self._radius(search, found, scored, grad, size, radius, rate)
            share = _SHARE[search.threat.norm] if self.step_size is None else self.step_size
            step = cosine(done, self.steps, share, share / 100) * self._unit(search, radius)
            uphill = search.steepest(search.open_part(grad, point), _DIRECTION[search.threat.norm])
            point = search.advance(point + as_rows(step, point) * uphill, as_rows(radius, point))
            keep = search.compact(done + 1)
            if keep is not None:
                point, radius = point[keep], radius[keep]
                found.take(keep)
            if search.active == 0:
                return

    def _cube(self) -> Threat | None:
        """The whole range of the data in linf, where l2 and l1 look for their first point; None where they do not."""
        if self.threat.norm not in ("l2", "l1") or self.steps < _FEWEST_STEPS or not self.threat.bounded:
            return None
        low, high = (torch.as_tensor(bound) for bound in self.threat.bounds)
        price = 1.0 if self.threat.scale is None else float(self.threat.scale.max())
        return dataclasses.replace(self.threat, norm="linf", eps=float((high - low).max()) * price)

    def _unit(self, search: Search, radius: Tensor) -> Tensor:
        """What `step_size` is a share of, (N,): the radius; one where that is no length or has no end."""
        whole = ORDERS[search.threat.norm] == 0
        return torch.where(radius.isfinite() & (not whole), radius, 1.0)

    def _radius(
        self, search: Search, found: Smallest, scored: Scored, grad: Tensor, size: Tensor, radius: Tensor, rate: float
    ) -> Tensor:
        """The next ball: smaller where this point succeeded, larger where it did not; never beyond the threat."""
        best = found.length.to(size)
        ever = best.isfinite()
        if search.threat.mask is not None:
            grad = torch.where(search.threat.mask.to(grad.device), grad, 0)
        slope = length(search.threat.unpriced(grad), DUAL[search.threat.norm]).clamp(min=torch.finfo(size.dtype).tiny)
        whole = ORDERS[search.threat.norm] == 0
        gap = ((-scored.climb.to(size)).clamp(min=0) / slope).nan_to_num(
            nan=torch.inf
        )  # to the boundary, were the model linear
        # A little beyond, for a point on the boundary is no success; and more than before, for bounds stop features.
        first = size + (1.0 if whole else torch.maximum(gap, size * rate) * (1 + rate))
        estimate = first if self.loss == "margin" else torch.full_like(first, torch.inf)
        estimate = estimate.nan_to_num(nan=torch.inf, posinf=torch.inf)  # no slope to go by: the whole threat
        larger, smaller = radius * (1 + rate), radius * (1 - rate)
        if whole:
            larger, smaller = torch.maximum(radius + 1, larger.floor()), torch.minimum(radius - 1, smaller.floor())
        grown = torch.where(ever, larger, estimate)
        shrunk = torch.minimum(smaller, best).clamp(min=0)
        limit = search.threat.radius(search.x).expand(len(size), *[1] * (search.x.ndim - 1)).reshape(-1)
        return torch.minimum(torch.where(scored.hit, shrunk, grown), limit.to(size))
