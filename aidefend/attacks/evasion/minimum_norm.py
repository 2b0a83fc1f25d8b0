"""What the attacks share that shrink a perturbation: the smallest success of each row, lengths, and their goals."""

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor

from aidefend._core.checks import check_choice
from aidefend._core.modules import Model
from aidefend.attacks.evasion.access import Scored
from aidefend.attacks.evasion.goals import GOALS, Climber, Goal, open_search, run
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.search import Search
from aidefend.attacks.evasion.streams import make_stream


class Shrinker(Climber, Protocol):
    """An attack whose one climb finds small perturbations."""

    def shrink(self, search: Search, found: "Smallest") -> None:
        """One pass over all steps; every point that was scored goes to `found`."""
        ...


class Smallest:
    """The smallest success and the largest loss of each active row."""

    def __init__(self, search: Search) -> None:
        x = search.x
        self.norm = search.threat.norm
        self.point, self.length = x.clone(), torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        self.climb = torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
        self.worst, self.worst_hit = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.loss = torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)

    @property
    def hit(self) -> Tensor:
        """Rows that succeeded, (N,) bool."""
        return self.length.isfinite()

    def offer(self, point: Tensor, scored: Scored, length: Tensor) -> None:
        """Take points that are allowed; `length` (N,) in the norm of the threat."""
        smaller = scored.hit & (length < self.length)
        self.point = torch.where(as_rows(smaller, point), point, self.point)
        self.loss = torch.where(smaller, scored.climb.to(self.loss), self.loss)
        self.length = torch.where(smaller, length.double(), self.length)
        worse = scored.climb.to(self.climb) > self.climb
        self.worst = torch.where(as_rows(worse, point), point, self.worst)
        self.worst_hit = torch.where(worse, scored.hit, self.worst_hit)
        self.climb = torch.where(worse, scored.climb.to(self.climb), self.climb)

    def take(self, keep: Tensor) -> None:
        """Keep these rows only."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[keep])


def run_shrinking(
    attack: Shrinker,
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    goal: Goal,
    generator: torch.Generator | None,
    logits: Tensor | None,
    row_seeds: Tensor | None,
    begin_at: Tensor | None = None,
) -> AttackResult:
    """The goals of a shrinking attack: min_norm is its own, and may begin at points; the others are of every attack."""
    check_choice(goal, GOALS, "goal")
    if goal != "min_norm":
        return run(attack, model, x, y, goal=goal, generator=generator, logits=logits, row_seeds=row_seeds)
    stream = make_stream(len(x), generator, row_seeds)
    with open_search(attack, model, x, y, stream, logits, begin_at) as search:
        found = Smallest(search)
        if len(x):
            found.offer(search.x, search.begin(logits), torch.zeros(len(x), dtype=torch.float64, device=x.device))
            attack.shrink(search, found)
        result = search.result()
    point = torch.where(as_rows(found.hit, x), found.point, found.worst)
    loss = torch.where(found.hit, found.loss, found.climb)
    sign = -1.0 if attack.targeted else 1.0
    return dataclasses.replace(result, x_adv=point, success=found.hit, loss=loss * sign)


def climb_shrinking(attack: Shrinker, search: Search) -> tuple[Tensor, Scored | None]:
    """The point of the largest loss on the way, for the goals that ask for it."""
    found = Smallest(search)
    attack.shrink(search, found)
    return found.worst, Scored(found.climb, found.worst_hit)


def cosine(done: int, steps: int, first: float, last: float) -> float:
    """From first (done = 0) to last (done = steps) along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * done / max(1, steps))) / 2


def as_rows(flags: Tensor, like: Tensor) -> Tensor:
    """(N,) shaped to broadcast against (N, ...)."""
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def length(step: Tensor, order: float) -> Tensor:
    """The norm of each row: (N,), order 0 counts features."""
    flat = step.flatten(1)
    if flat.shape[1] == 0:
        return flat.new_zeros(len(flat))
    found: Tensor = torch.linalg.vector_norm(flat, ord=order, dim=1)
    return found


ORDERS = {"linf": math.inf, "l2": 2.0, "l1": 1.0, "l0": 0.0}
DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf, "l0": math.inf}
