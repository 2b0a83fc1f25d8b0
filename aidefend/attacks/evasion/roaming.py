"""Attacks whose path may leave the radius of the threat: every success steers them, only allowed points count."""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from aidefend._core.checks import check_choice
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Access, Scored
from aidefend.attacks.evasion.goals import GOALS, Climber, Goal, open_search
from aidefend.attacks.evasion.minimum_norm import Smallest, as_rows
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.search import Search
from aidefend.attacks.evasion.streams import Stream, make_stream

_ROWS_A_PASS = 2048


class Roamer(Climber, Protocol):
    """An attack that roams."""

    def roam(self, rows: "Roaming") -> None:
        """The whole path; every point goes through `rows`."""
        ...


class Roaming:
    """State of one run: the active rows, the smallest allowed success and the largest allowed loss of each row.

    A point counts where it lies inside the threat; a success beyond the radius is kept as `outer` and pulled back into
    the threat at the end. With `stop`, rows with an allowed success leave at `compact`.
    """

    def __init__(self, access: Access, search: Search, stream: Stream, *, stop: bool) -> None:
        self._access, self._stop, self.stream = access, stop, stream
        self.x, self.y, self.threat = search.x, search.y, search.threat
        self.found, self.outer = Smallest(search), Smallest(search)
        n, device = len(self.x), self.x.device
        self._index = torch.arange(n, device=device)
        none = torch.zeros(n, dtype=torch.int64, device=device)
        self._forwards, self._backwards = none, none.clone()
        self._all = AttackResult(self.x.clone(), none.bool(), self.found.loss.clone(), none.clone(), none.clone())
        self._smallest = True

    @property
    def active(self) -> int:
        """Number of rows still under attack."""
        return len(self.x)

    def clean(self, logits: Tensor | None) -> None:
        """Take x itself as the first point."""
        scored = self._access.score(self.x, self.y) if logits is None else self._access.scored(logits, self.y)
        self._forwards += int(logits is None)
        self._note(self.x, scored)

    def score(self, point: Tensor) -> Scored:
        """One forward pass, whatever the distance of the point."""
        scored = self._access.score(point, self.y)
        self._forwards += 1
        self._note(point, scored)
        return scored

    def gradient(self, point: Tensor) -> tuple[Scored, Tensor]:
        """One forward and one backward pass."""
        scored, grad = self._access.gradient(point, self.y)
        self._forwards += 1
        self._backwards += 1
        self._note(point, scored)
        return scored, grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def hits(self, points: Tensor) -> Tensor:
        """Which of k points a row succeed: (n, k) bool from (n, k, ...); as many rows a pass as memory allows."""
        n, k = points.shape[:2]
        flat, y = points.flatten(0, 1), self.y.repeat_interleave(k, dim=0)
        parts = zip(flat.split(_ROWS_A_PASS), y.split(_ROWS_A_PASS), strict=True)
        self._forwards += k
        return torch.cat([self._access.score(part, labels).hit for part, labels in parts]).reshape(n, k)

    def compact(self, done: int) -> Tensor | None:
        """Drop rows with an allowed success after `done` steps, at the checkpoints of `PGD.run`; the kept rows."""
        if not self._stop or (done % 8 and done not in (1, 2, 4)) or not bool(self.found.hit.any()):
            return None
        keep = (~self.found.hit).nonzero()[:, 0]
        self._store()
        self.threat = self.threat.rows(self.x, keep)
        self.x, self.y, self._index = self.x[keep], self.y[keep], self._index[keep]
        self._forwards, self._backwards = self._forwards[keep], self._backwards[keep]
        self.stream = self.stream.rows(keep)
        self.found.take(keep)
        self.outer.take(keep)
        return keep

    def finish(self, goal: Goal) -> AttackResult:
        """Rows without an allowed success try the nearest allowed point to their best one; then the records."""
        if self.active:
            missing = self.outer.hit & ~self.found.hit
            if bool(missing.any()):
                pulled = self.threat.project(self.outer.point, self.x)
                self._try(pulled, missing)
        self._smallest = goal != "max_loss"
        self._store()
        return self._all

    def _try(self, point: Tensor, rows: Tensor) -> None:
        """One more pass for these rows."""
        kept = rows.nonzero()[:, 0]
        part = self._access.score(point[kept], self.y[kept])
        self._forwards[kept] += 1
        climb = torch.full_like(self.found.climb, -torch.inf)
        hit = torch.zeros_like(rows)
        climb[kept], hit[kept] = part.climb.to(climb), part.hit
        self._note(torch.where(as_rows(rows, point), point, self.x), Scored(climb, hit))

    def _note(self, point: Tensor, scored: Scored) -> None:
        climb = scored.ordered
        length = self.threat.distance(point, self.x)
        room = self.threat.reach(self.x).expand_as(self.x).flatten(1).sum(dim=1) > 0
        allowed = self.threat.contains(point, self.x) & (room | (length == 0))  # no rounding where eps is 0
        self.outer.offer(point, Scored(climb, scored.hit), length)
        inside = Scored(torch.where(allowed, climb, -torch.inf), scored.hit & allowed)
        self.found.offer(point, inside, length)

    def _store(self) -> None:
        found, use = self.found, self.found.hit if self._smallest else torch.zeros_like(self.found.hit)
        self._all.x_adv[self._index] = torch.where(as_rows(use, self.x), found.point, found.worst)
        self._all.success[self._index] = torch.where(use, found.hit, found.worst_hit)
        self._all.loss[self._index] = torch.where(use, found.loss, found.climb)
        self._all.forwards[self._index] = self._forwards
        self._all.backwards[self._index] = self._backwards


def run_roaming(
    attack: Roamer,
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    goal: Goal,
    generator: torch.Generator | None,
    logits: Tensor | None,
    row_seeds: Tensor | None,
) -> AttackResult:
    """The goals: the smallest success inside the threat ("min_norm"), the first one, or the largest loss on the way."""
    check_choice(goal, GOALS, "goal")
    stream = make_stream(len(x) if isinstance(x, Tensor) else 0, generator, row_seeds)
    with open_search(attack, model, x, y, stream, logits) as search:
        access = Access(model, attack.loss, targeted=attack.targeted, is_success=attack.is_success)
        rows = Roaming(access, search, stream, stop=goal == "first_success")
        if rows.active:
            rows.clean(logits)
            rows.compact(0)
        if rows.active:
            attack.roam(rows)
        result = rows.finish(goal)
        return dataclasses.replace(result, loss=access.loss_of(result.loss))


def inside_bounds(point: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """The nearest point in the bounds that leaves fixed features as they are."""
    low, high = threat.limits(x)
    return torch.where(threat.changeable(x), torch.minimum(torch.maximum(point, low), high), x)
