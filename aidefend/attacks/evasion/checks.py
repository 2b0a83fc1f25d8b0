"""Checks that every climbing attack makes of its own fields."""

from typing import Any

from aidefend._core.checks import check_int, refuse
from aidefend._core.threat import Threat
from aidefend.attacks.evasion.losses import Loss, check_loss


def check_fields(threat: Any, steps: Any, restarts: Any, loss: Loss, is_success: Any, **flags: Any) -> None:
    """Refuse fields of the wrong type or range."""
    if not isinstance(threat, Threat):
        raise refuse("a Threat", "threat", threat, 'Pass Threat("linf", eps) first')
    check_int(steps, "steps")
    check_int(restarts, "restarts")
    check_loss(loss)
    if is_success is not None and not callable(is_success):
        raise refuse("a callable (outputs, y) -> (N,) bool", "is_success", is_success, "Pass a function or None")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise refuse(f"{name} to be True or False", name, value, "Pass a bool")
    if restarts > 1 and not flags.get("random_start", True):
        raise refuse("random_start=True where restarts > 1", "restarts", restarts, "Equal starts end at equal points")
