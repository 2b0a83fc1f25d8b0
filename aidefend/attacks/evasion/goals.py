"""The three goals an attack can have, on top of one climb: the worst point, the first success, the smallest radius."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_labels, check_same_rows, check_tensor, refuse
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.access import Access, Scored, quiet_access
from aidefend.attacks.evasion.losses import IsSuccess, Loss
from aidefend.attacks.evasion.result import AttackResult
from aidefend.attacks.evasion.search import Search
from aidefend.attacks.evasion.streams import Stream, make_stream

Goal = Literal["max_loss", "first_success", "min_norm"]
GOALS: tuple[Goal, ...] = ("max_loss", "first_success", "min_norm")
HALVINGS = 10


class Climber(Protocol):
    """What the goals need of an attack: its fields, and one climb from one start."""

    @property
    def threat(self) -> Threat:
        """The allowed points."""
        ...

    @property
    def restarts(self) -> int:
        """Number of climbs."""
        ...

    @property
    def loss(self) -> Loss:
        """What to climb."""
        ...

    @property
    def targeted(self) -> bool:
        """Whether y is the class to reach."""
        ...

    @property
    def is_success(self) -> IsSuccess | None:
        """What success is; None = about the top class."""
        ...

    def climb(self, search: Search) -> tuple[Tensor, Scored | None]:
        """One restart over the active rows: the point it returns and, if it knows it, the score there."""
        ...


Attack = TypeVar("Attack", bound=Climber)


def perturb(attack: Climber, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    """Goal max_loss without the score of the result; with restarts every end point is scored."""
    check_rows(attack, x, y)
    if len(x) == 0:
        return x.detach().clone()
    with _search(attack, model, x, y, make_stream(len(x), generator, None), judge=False) as search:
        if attack.restarts == 1:
            return _as_given(search.snap(attack.climb(search)[0]), x)
        _climb_all(attack, search)
        return _as_given(search.result().x_adv, x)


def run(
    attack: Attack,
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
    """One goal, with counts; `begin_at` is not for min_norm."""
    check_choice(goal, GOALS, "goal")
    check_rows(attack, x, y)
    begin_at = None if begin_at is None else _check_points(begin_at, x, goal)
    _check_judged(attack, y)
    if logits is not None:
        check_tensor(logits, "logits", rows=len(x), finite=False)
    stream = make_stream(len(x), generator, row_seeds)
    if goal == "min_norm":
        return _smallest(attack, model, x.detach(), y, stream, logits)
    with _search(attack, model, x, y, stream, stop=goal == "first_success", begin_at=begin_at) as search:
        if goal == "first_success" and len(x):
            search.begin(logits)
        _climb_all(attack, search)
        return search.result()


@contextmanager
def open_search(
    attack: Climber,
    model: Model,
    x: Tensor,
    y: Tensor,
    stream: Stream,
    logits: Tensor | None,
    begin_at: Tensor | None = None,
) -> Iterator[Search]:
    """Arguments checked, then the state of a run that keeps every row to its end."""
    check_rows(attack, x, y)
    _check_judged(attack, y)
    if logits is not None:
        check_tensor(logits, "logits", rows=len(x), finite=False)
    with _search(attack, model, x.detach(), y, stream, begin_at=begin_at) as search:
        yield search


def _climb_all(attack: Climber, search: Search) -> None:
    """All restarts; the best of each row stays. For first_success, only unbroken rows go on."""
    for _ in range(attack.restarts):
        search.compact(0)
        if search.active == 0:
            return
        point, scored = attack.climb(search)
        if search.active:
            search.offer(point, search.score(point) if scored is None else scored)


def _smallest(
    attack: Attack, model: Model, x: Tensor, y: Tensor, stream: Stream, logits: Tensor | None
) -> AttackResult:
    """Bisection over the radius, every probe a first_success run on the rows that are still of interest."""
    with _search(attack, model, x, y, stream, stop=True) as search:
        if len(x):
            search.begin(logits)
        clean = search.result().success.clone()
        _climb_all(attack, search)
        best = search.result()
    high = torch.where(clean, 0.0, 1.0).to(x)
    low = torch.zeros_like(high)
    for _ in range(HALVINGS):
        rows = (best.success & ~clean).nonzero()[:, 0]
        if len(rows) == 0:
            break
        middle = (low[rows] + high[rows]) / 2
        probe = _probe(attack, model, x, y, stream, rows, middle)
        _merge(best, probe, rows)
        high[rows] = torch.where(probe.success, middle, high[rows])
        low[rows] = torch.where(probe.success, low[rows], middle)
    return best


def _probe(
    attack: Attack, model: Model, x: Tensor, y: Tensor, stream: Stream, rows: Tensor, share: Tensor
) -> AttackResult:
    """Attack x[rows] at this share of their radius."""
    radius = attack.threat.rows(x, rows).radius(x[rows])
    threat = attack.threat.with_eps(radius * share.reshape(-1, *[1] * (x.ndim - 1)))
    smaller = dataclasses.replace(attack, threat=threat)  # type: ignore[type-var]  # attacks are dataclasses
    with _search(smaller, model, x[rows], y[rows], stream.rows(rows), stop=True) as search:
        _climb_all(smaller, search)
        return search.result()


def _merge(best: AttackResult, probe: AttackResult, rows: Tensor) -> None:
    """Add the cost of a probe and take its points where it succeeded."""
    best.forwards[rows] += probe.forwards
    best.backwards[rows] += probe.backwards
    closer = rows[probe.success]
    best.x_adv[closer] = probe.x_adv[probe.success]
    best.loss[closer] = probe.loss[probe.success]


@contextmanager
def _search(
    attack: Climber,
    model: Model,
    x: Tensor,
    y: Tensor,
    stream: Stream,
    *,
    stop: bool = False,
    judge: bool = True,
    begin_at: Tensor | None = None,
) -> Iterator[Search]:
    access = Access(model, attack.loss, targeted=attack.targeted, is_success=attack.is_success, judge=judge)
    with quiet_access(model):
        yield Search(access, attack.threat, _own(x), _own(y), stream, stop_at_success=stop, begin_at=begin_at)


def _own(values: Tensor) -> Tensor:
    """Detached, and a normal tensor even if it was made in inference mode."""
    return values.detach().clone() if values.is_inference() else values.detach()


def _as_given(x_adv: Tensor, x: Tensor) -> Tensor:
    """Never the caller's own memory."""
    return x_adv.clone() if x_adv.data_ptr() == x.data_ptr() else x_adv


def check_rows(attack: Climber, x: Any, y: Any) -> None:
    """Refuse malformed x and y."""
    attack.threat.check(x)
    check_tensor(y, "y")
    check_same_rows(("x", "y"), len(x), len(y))
    if not callable(attack.loss):
        check_labels(y, len(x))


def _check_points(points: Any, x: Tensor, goal: Goal) -> Tensor:
    """Points to begin at, one for each row of x."""
    if goal == "min_norm":
        raise refuse("no begin_at with min_norm", "begin_at", points, "Every radius has starts of its own")
    check_tensor(points, "begin_at", rows=len(x))
    if points.shape != x.shape:
        raise refuse(f"points of shape {tuple(x.shape)}", "begin_at", tuple(points.shape), "Pass one point a row")
    start: Tensor = points.detach().to(x)
    return start


def _check_judged(attack: Climber, y: Tensor) -> None:
    """Success needs class labels, unless the attack says otherwise."""
    if attack.is_success is None and (y.ndim != 1 or y.is_floating_point() or y.dtype == torch.bool):
        cure = "Pass is_success= a function (outputs, y) -> (N,) bool to the attack, or call attack(model, x, y)"
        raise refuse("class labels (N,), or an attack that knows what success is", "y", y, cure)
