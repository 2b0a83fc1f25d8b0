"""Schedules of the radius: an objective for each step of training, from a small eps to the full one."""

import dataclasses
import math
from typing import Any, Literal, TypeVar

from aidefend._core.checks import check_choice, check_int, check_number, refuse
from aidefend._core.threat import Threat

Objective = TypeVar("Objective")
_PARTS = ("objective", "attack", "threat", "step_size")


def with_eps_share(objective: Objective, share: float) -> Objective:
    """The same objective or attack with each radius, and each step size stated in units of x, times `share`.

    Args:
        objective: A dataclass such as TRADES, AWP or PGD, with a threat somewhere in it.
        share: In [0, 1].
    Returns: A new object of the same class.
    Raises: ConfigurationError: there is no threat to change.
    Example:
        >>> from aidefend.attacks import PGD
        >>> with_eps_share(PGD(Threat("linf", 0.2), step_size=0.1), 0.5).step_size
        0.05
    """
    check_number(share, "share", 0.0, 1.0)
    if not _has_threat(objective):
        cure = "Pass an objective on an attack with a threat, or a lambda of the step of your own"
        raise refuse("an objective with a threat in its attack", "objective", objective, cure)
    scaled: Objective = _scaled(objective, share)
    return scaled


@dataclasses.dataclass(frozen=True)
class EpsWarmup:
    """The radius grows from `start` times eps to eps over the first `steps` steps, and stays there.

    Guarantee: none. Large radii from the first step on can leave a net at the constant answer (MNIST at eps 0.3); a
        warm-up cures that.
    Args:
        steps: Steps until the full radius, >= 1.
        start: Share of eps at step 0, in [0, 1].
        shape: "linear", or "cosine" (slow at both ends).
    Raises: ConfigurationError: an argument is malformed, or the objective has no threat.
    Cost: None; the objective is made anew each step, which holds no model and no state.
    Source: Gowal et al. 2018 (ramp of eps), Pang et al. 2021 (warm-up in adversarial training).
    Example:
        >>> from aidefend.adversarial import PGDTraining
        >>> from aidefend.attacks import PGD
        >>> warmup, objective = EpsWarmup(steps=100), PGDTraining(PGD(Threat("linf", 0.3)))
        >>> [warmup.objective_at(objective, step).attack.threat.eps for step in (0, 50, 100, 500)]
        [0.0, 0.15, 0.3, 0.3]
    """

    steps: int
    start: float = 0.0
    _: dataclasses.KW_ONLY
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        check_int(self.steps, "steps")
        check_number(self.start, "start", 0.0, 1.0)
        check_choice(self.shape, ("linear", "cosine"), "shape")

    def share(self, step: int) -> float:
        """The share of eps at this step, counted from 0."""
        done = min(1.0, check_int(step, "step", 0) / self.steps)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (1 - self.start) * done

    def objective_at(self, objective: Objective, step: int) -> Objective:
        """The objective with the radius of this step; the one given once the radius is full."""
        share = self.share(step)
        return objective if share == 1.0 else with_eps_share(objective, share)


def _has_threat(value: Any) -> bool:
    if isinstance(value, Threat):
        return True
    return _is_record(value) and any(_has_threat(getattr(value, name, None)) for name in _PARTS)


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _scaled(value: Any, share: float) -> Any:
    if isinstance(value, Threat):
        return value.with_eps(value.eps * share)
    if not _is_record(value):
        return value
    changes = {f.name: _scaled(getattr(value, f.name), share) for f in dataclasses.fields(value) if f.name in _PARTS}
    if isinstance(changes.get("step_size"), int | float):
        changes["step_size"] = changes["step_size"] * share or None  # at radius 0 any step will do
    return dataclasses.replace(value, **changes)
