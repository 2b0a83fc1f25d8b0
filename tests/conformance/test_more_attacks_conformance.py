"""More evasion attacks: each line inherits the conventions of the first list, by running its checks on this one."""

import dataclasses
import inspect
import types

import pytest
import torch
from torch import nn

from aidefend import AidefendError, Threat
from aidefend.attacks.evasion import (
    NES,
    PGD,
    AdversarialPatch,
    CarliniWagner,
    HopSkipJump,
    SigmaZero,
    Transfer,
    UniversalPerturbation,
)
from tests.conformance import test_attacks_conformance as shared


class Surrogate(nn.Module):
    """Fits any number of features and five classes at most; labels beyond its outputs do not occur."""

    def forward(self, x):
        flat = x.flatten(1)
        weights = torch.arange(5 * flat.shape[1], device=x.device).reshape(5, -1).to(x).sin()
        return flat @ weights.T


def hop(threat, **fields):
    return HopSkipJump(threat, 2, first_queries=6, tries=4, **fields)


ATTACKS = {
    "carlini-wagner": lambda eps: CarliniWagner(Threat("l2", eps), 4, searches=2),
    "hop-skip-jump-l2": lambda eps: hop(Threat("l2", eps)),
    "hop-skip-jump-linf": lambda eps: hop(Threat("linf", eps)),
    "nes-l2": lambda eps: NES(Threat("l2", eps), 3, pairs=2),
    "nes-linf-restarts": lambda eps: NES(Threat("linf", eps), 2, pairs=2, restarts=2, random_start=True),
    "patch": lambda eps: AdversarialPatch(Threat("linf", eps), (2, 2), 4),
    "patch-random": lambda eps: AdversarialPatch(Threat("linf", eps), (2, 2), 3, place="random", places=2, restarts=2),
    "patch-shared": lambda eps: AdversarialPatch(Threat("linf", eps), (2, 2), 3, shared=True),
    "sigma-zero": lambda eps: SigmaZero(Threat("l0", min(1, eps) * 30), 5),
    "transfer": lambda eps: Transfer(Surrogate(), PGD(Threat("linf", eps), 3)),
    "universal-l2": lambda eps: UniversalPerturbation(Threat("l2", eps), 3, 8),
    "universal-linf": lambda eps: UniversalPerturbation(Threat("linf", eps), 3, 8),
    "universal-targeted": lambda eps: UniversalPerturbation(Threat("linf", eps), 3, 8, targeted=True),
}
DETERMINISTIC = {"carlini-wagner", "sigma-zero"}
APART = {  # the model alone is judged: two passes, and labels that its surrogate knows
    ("test_a_model_that_raises_is_named_and_left_as_it_was", "transfer"),
    ("test_bad_arguments", "transfer"),
}
OWN = {"test_seeds", "test_bad_fields", "test_pickle_equality_and_frozen"}


def inherited(check):
    """The check with our list in place of the one it was written for."""
    names = {**vars(shared), "ATTACKS": ATTACKS}
    clone = types.FunctionType(check.__code__, names, check.__name__, check.__defaults__, check.__closure__)
    others = [mark for mark in check.pytestmark if mark.args[0] != "name"]
    ours = [name for name in ATTACKS if (check.__name__, name) not in APART]
    clone.pytestmark = [*others, pytest.mark.parametrize("name", ours).mark]
    return clone


CHECKS = {
    name: check
    for name, check in vars(shared).items()
    if name.startswith("test_") and "name" in inspect.signature(check).parameters and name not in OWN
}
globals().update({name: inherited(check) for name, check in CHECKS.items()})


def test_checks_are_inherited():
    assert len(CHECKS) >= 10 and "test_leaves_no_trace" in CHECKS


@pytest.mark.parametrize("name", ATTACKS)
def test_seeds(name):
    model, (x, y) = shared.Mixed().eval(), shared.images()
    first = ATTACKS[name](0.1)(model, x, y, generator=shared.stream(1))
    assert torch.equal(first, ATTACKS[name](0.1)(model, x, y, generator=shared.stream(1)))
    if name not in DETERMINISTIC and not name.startswith("universal"):
        assert not torch.equal(first, ATTACKS[name](0.1)(model, x, y, generator=shared.stream(2)))


same_when_pickled = inherited(shared.test_pickle_equality_and_frozen)


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"transfer"}))  # two copies of a surrogate are not equal
def test_pickle_equality_and_frozen(name):
    same_when_pickled(name)


@pytest.mark.parametrize("name", ATTACKS)
def test_bad_fields(name):
    attack = ATTACKS[name](0.1)
    bad = {"steps": 0, "queries": 0, "restarts": 0, "epochs": 0, "pairs": 0, "searches": 0, "places": 0, "tries": 0}
    bad |= {"loss": "ce", "targeted": 1, "is_success": 3, "threat": 0.1, "step_size": -1.0, "sigma": 0.0, "rate": 1.5}
    bad |= {"random_start": "no", "size": (3,), "place": "best", "shared": 1, "attack": 3, "surrogate": None}
    known = {field.name for field in dataclasses.fields(attack) if field.init}
    assert len(known & set(bad)) >= 4
    for field in known & set(bad):
        rule = {"threat": "Threat", "queries": "queries"}.get(field, field)
        with pytest.raises(AidefendError, match=rule):
            dataclasses.replace(attack, **{field: bad[field]})


@pytest.mark.parametrize("name", ["carlini-wagner", "hop-skip-jump-l2", "nes-l2", "patch", "universal-l2"])
def test_norms_an_attack_does_not_know_are_refused(name):
    attack = ATTACKS[name](0.1)
    other = "linf" if name == "carlini-wagner" else "l2" if name == "patch" else "l1"
    with pytest.raises(AidefendError, match="norm"):
        dataclasses.replace(attack, threat=Threat(other, 0.1))
