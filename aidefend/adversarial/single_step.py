"""One step of an attack from a noisy start: what fast adversarial training is made of."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import refuse
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.adversarial.crafting import Attack, AttackMode, PerExampleLoss, craft_for

_SETTINGS = {"steps": 1, "step_size": None, "restarts": 1, "random_start": False}


def check_recipe(attack: Any) -> None:
    """Refuse an attack that cannot be set to one step from a given point."""
    names = {field.name for field in dataclasses.fields(attack)} if dataclasses.is_dataclass(attack) else set()
    if not {"threat", "steps", "step_size", "random_start"} <= names or isinstance(attack, type):
        cure = "Use PGD(threat), or PGDTraining for an attack that is used as it is"
        raise refuse("an attack with the fields threat, steps, step_size and random_start", "attack", attack, cure)
    if getattr(attack, "targeted", False):
        raise refuse("an untargeted attack", "attack", attack, "Training has no target class: targeted=False")


def one_step(attack: Any, length: float) -> Attack:
    """The attack as a single step of `length` radii along its steepest direction, from the point where it is called."""
    threat: Threat = attack.threat
    names = {field.name for field in dataclasses.fields(attack)}
    settings = {name: value for name, value in _SETTINGS.items() if name in names}
    # A step of 2.5 radii, the default size of one step, ends on the ball around its start: its radius is the length.
    step: Attack = dataclasses.replace(attack, threat=threat.with_eps(threat.eps * length), **settings)
    return step


def craft_single(
    attack: Any,
    criterion: PerExampleLoss,
    model: Model,
    x: Tensor,
    y: Tensor,
    noisy: Threat,
    length: float,
    attack_mode: AttackMode,
    generator: torch.Generator,
) -> Tensor:
    """A step of `length` radii from a random point of `noisy`; not projected to the ball around x."""
    attack.threat.check(x)
    start = noisy.random_start(x, generator)
    return craft_for(criterion, one_step(attack, length), model, start, y, attack_mode, generator)
