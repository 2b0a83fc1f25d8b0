"""The usual schedule of certified training: eps grows, the clean loss and the linear bounds fade."""

import dataclasses
from typing import TypeVar

from aidefend._core.checks import check_int, check_kind, check_number, refuse
from aidefend.adversarial.eps_warmup import EpsWarmup

Objective = TypeVar("Objective")


@dataclasses.dataclass(frozen=True)
class BoundSchedule:
    """Kappa and beta move from their first to their last value while the radius grows to eps.

    Guarantee: none.
    Args:
        warmup: How the radius grows, for example over the first half of all steps.
        kappa: First and last weight of the clean loss, each in [0, 1].
        beta: First and last share of the linear bounds, each in [0, 1]; for `CrownIBPTraining`.
    Raises: ConfigurationError: an argument is malformed, or the objective has no kappa.
    Cost: None.
    Source: Gowal et al. 2018, section 4; Zhang et al. 2020, section 4.
    Example:
        >>> from aidefend import Threat
        >>> from aidefend.adversarial import CrownIBPTraining
        >>> schedule = BoundSchedule(EpsWarmup(steps=100))
        >>> middle = schedule.objective_at(CrownIBPTraining(Threat("linf", 0.3)), 50)
        >>> middle.threat.eps, middle.kappa, middle.beta
        (0.15, 0.75, 0.5)
    """

    warmup: EpsWarmup
    kappa: tuple[float, float] = (1.0, 0.5)
    beta: tuple[float, float] = (1.0, 0.0)

    def __post_init__(self) -> None:
        check_kind(self.warmup, EpsWarmup, "warmup", "Pass EpsWarmup(steps)")
        for name, pair in (("kappa", self.kappa), ("beta", self.beta)):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise refuse(f"{name} as (first, last)", name, pair, "Pass for example (1.0, 0.5)")
            for value in pair:
                check_number(value, name, 0.0, 1.0)

    def objective_at(self, objective: Objective, step: int) -> Objective:
        """The objective of this step, counted from 0."""
        names = _fields(objective)
        if "kappa" not in names:
            cure = "Use IBPTraining, CrownIBPTraining or SABR"
            raise refuse("an objective with a kappa", "objective", objective, cure)
        done = min(1.0, check_int(step, "step", 0) / self.warmup.steps)
        changes = {"kappa": _between(self.kappa, done)}
        if "beta" in names:
            changes["beta"] = _between(self.beta, done)
        grown = self.warmup.objective_at(objective, step)
        return dataclasses.replace(grown, **changes)  # type: ignore[type-var]  # a record, as checked above


def _between(pair: tuple[float, float], done: float) -> float:
    return pair[0] + (pair[1] - pair[0]) * done


def _fields(value: object) -> set[str]:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return set()
    return {field.name for field in dataclasses.fields(value)}
