"""Auto-PGD: steps with momentum whose size halves where progress stalls, restarted from the best point."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, refuse
from aidefend._core.modules import Model
from aidefend._core.random import make_generator
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Scored
from aidefend.attacks.evasion.apgd_l1 import climb_l1
from aidefend.attacks.evasion.checks import check_fields
from aidefend.attacks.evasion.goals import GOALS, Goal, check_rows, perturb, run
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.search import Search
from aidefend.attacks.evasion.targets import left_class, run_targets, towards

_MOMENTUM = 0.75
_ENOUGH_PROGRESS = 0.75
_FIRST_FAR, _FIRST_NEAR = 2.0, 1 / 3


@dataclasses.dataclass(frozen=True)
class APGD:
    """Auto-PGD: no step size to choose; returns the best point of the whole path.

    Guarantee: as for `PGD`.
    Args:
        threat: The set of allowed points, as for `PGD`. l1 has steps of its own: equal ones in the steepest features,
            whose number follows what the best point needs, in balls of three, two and one times eps.
        steps: Steps, >= 1.
        restarts: Random starts, >= 1; the worst point of each sample is kept.
        random_start: Start at a random point of the threat, else at x.
        loss: As for `PGD`; "margin" and "dlr" do not saturate.
        targeted: y holds the class to reach, and the loss is descended ("dlr": the negative of the untargeted ratio).
        is_success: As for `PGD`.
        targets: APGD-T: the attack runs towards each of this many likeliest wrong classes, by the targeted ratio of
            logits (`loss` is not used); at most K - 1. For class labels only.
    Raises: ConfigurationError: a field is malformed.
    Cost: For each restart `steps` forward and backward passes to the input, and one forward pass for the last point;
        with `targets` as much for each, and the clean pass where it is not given.
    Source: Croce, Hein 2020, Algorithm 1; Croce, Hein 2021 (l1). Differs: l0 in the same way, without momentum; the
        random start is uniform in cube or ball, the last iterate is scored, and a sample whose gradient is zero or not
        finite takes a random step.
    Example:
        >>> from aidefend import Threat
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> x, y = torch.tensor([[0.6, 0.5]]), torch.tensor([0])
        >>> APGD(Threat("linf", 0.1), steps=5).run(model, x, y, goal="first_success").success.item()
        True
    """

    threat: Threat
    steps: int = 100
    _: dataclasses.KW_ONLY
    restarts: int = 1
    random_start: bool = True
    loss: Loss = "cross_entropy"
    targeted: bool = False
    is_success: IsSuccess | None = None
    targets: int | None = None

    def __post_init__(self) -> None:
        flags = {"random_start": self.random_start, "targeted": self.targeted}
        check_fields(self.threat, self.steps, self.restarts, self.loss, self.is_success, **flags)
        if self.targets is None:
            return
        check_int(self.targets, "targets")
        if self.targeted or self.is_success is not None:
            cure = "Leave out targets= where the target or the meaning of success is yours"
            raise refuse("targets=None beside targeted= and is_success=", "targets", self.targets, cure)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The worst point of the path for each sample; arguments as for `PGD`."""
        if self.targets is not None:
            return self.run(model, x, y, generator=generator).x_adv
        return perturb(self, model, x, y, generator)

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        goal: Goal = "max_loss",
        generator: torch.Generator | None = None,
        logits: Tensor | None = None,
        row_seeds: Tensor | None = None,
        begin_at: Tensor | None = None,
    ) -> AttackResult:
        """Attack with a goal and count the passes; arguments as for `PGD.run`.

        From points of your own the steps begin at a third of eps, where they begin at twice eps else; not with
        `targets`.
        """
        if self.targets is None:
            return run(
                self, model, x, y, goal=goal, generator=generator, logits=logits, row_seeds=row_seeds, begin_at=begin_at
            )
        if begin_at is not None:
            raise refuse("no begin_at beside targets", "begin_at", begin_at, "Each target has a start of its own")
        check_choice(goal, GOALS, "goal")
        check_rows(self, x, y)
        one = dataclasses.replace(self, loss=towards, is_success=left_class, targets=None)
        stream = make_generator(generator) if row_seeds is None else None

        def run_one(rows: Tensor, x: Tensor, pairs: Tensor, logits: Tensor | None) -> AttackResult:
            attack = dataclasses.replace(one, threat=self.threat.rows(whole, rows))
            seeds = None if row_seeds is None else row_seeds[rows.to(row_seeds.device)]
            return run(attack, model, x, pairs, goal=goal, generator=stream, logits=logits, row_seeds=seeds)

        whole = x
        return run_targets(
            run_one, model, x.detach(), y, count=self.targets, goal=goal, logits=logits, distance=self.threat.distance
        )

    def with_loss(self, loss: Loss) -> "APGD":
        """The same attack on another loss."""
        return dataclasses.replace(self, loss=loss)

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """One start, `steps` steps; the best point of the path with its score."""
        if self.threat.norm == "l1":
            return climb_l1(search, self.steps, self.random_start)
        path = _Path.begin(search, self.random_start)
        checkpoints = _checkpoints(self.steps)
        for done in range(1, self.steps + 1):
            path.step(search, last=done == self.steps)
            if done in checkpoints:
                path.adapt(done - checkpoints[done])
            keep = search.compact(done)
            if keep is not None:
                path.take(keep)
            if search.active == 0:
                break
        return path.best, Scored(path.best_climb, path.best_hit)


@dataclasses.dataclass
class _Path:
    """State of one restart, one row each: the current and the previous point, the best point with its gradient."""

    point: Tensor
    previous: Tensor
    climb: Tensor
    grad: Tensor
    best: Tensor
    best_climb: Tensor
    best_hit: Tensor
    best_grad: Tensor
    size: Tensor
    improved: Tensor
    mark_climb: Tensor
    mark_size: Tensor
    first: bool = True

    @classmethod
    def begin(cls, search: Search, random_start: bool) -> "_Path":
        first = _FIRST_NEAR if search.has_points else _FIRST_FAR
        point = search.start(random_start)
        scored, grad = search.gradient(point)
        climb = scored.ordered
        size = torch.full((len(point), *[1] * (point.ndim - 1)), first, dtype=point.dtype, device=point.device)
        improved = torch.zeros(len(point), dtype=torch.int64, device=point.device)
        return cls(point, point, climb, grad, point, climb, scored.hit, grad, size, improved, climb, size)

    def step(self, search: Search, *, last: bool) -> None:
        """One step with momentum, scored; the last one needs no gradient."""
        ahead = search.advance(self.point + self.size * search.unit() * search.direction(self.grad, self.point))
        if not self.first and search.threat.norm != "l0":  # a mean of two sparse steps is not sparse
            blend = _MOMENTUM * (ahead - self.point) + (1 - _MOMENTUM) * (self.point - self.previous)
            ahead = search.advance(self.point + blend)
        self.previous, self.point, self.first = self.point, ahead, False
        if last:
            scored, grad = search.score(ahead), self.grad
        else:
            scored, grad = search.gradient(ahead)
        self._note(scored.ordered, scored.hit, grad)

    def _note(self, climb: Tensor, hit: Tensor, grad: Tensor) -> None:
        self.improved = self.improved + (climb > self.climb)
        self.climb, self.grad = climb, grad
        better = climb > self.best_climb
        wide = better.reshape(self.size.shape)
        self.best = torch.where(wide, self.point, self.best)
        self.best_grad = torch.where(wide, grad, self.best_grad)
        self.best_climb = torch.where(better, climb, self.best_climb)
        self.best_hit = torch.where(better, hit, self.best_hit)

    def adapt(self, window: int) -> None:
        """At a checkpoint: where progress stalled since the last one, halve the step and go back to the best point."""
        too_few = self.improved < _ENOUGH_PROGRESS * window
        no_gain = (self.mark_size == self.size).reshape(-1) & (self.mark_climb >= self.best_climb)
        stalled = too_few | no_gain
        wide = stalled.reshape(self.size.shape)
        self.mark_size, self.mark_climb = self.size, self.best_climb
        self.size = torch.where(wide, self.size / 2, self.size)
        self.point = torch.where(wide, self.best, self.point)
        self.grad = torch.where(wide, self.best_grad, self.grad)
        self.climb = torch.where(stalled, self.best_climb, self.climb)
        self.improved = torch.zeros_like(self.improved)

    def take(self, keep: Tensor) -> None:
        """Keep these rows only."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value[keep])


def _checkpoints(steps: int) -> dict[int, int]:
    """Step of each checkpoint -> step of the one before: 0.22 of the steps, then gaps that shrink from .19 to .06."""
    marks, share, gap, before = {}, 22, 22, 0
    while share <= 100:
        mark = -(-share * steps // 100)
        if mark > before:
            marks[mark] = before
            before = mark
        gap = max(gap - 3, 6)
        share += gap
    return marks
