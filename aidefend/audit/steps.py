"""The parts of an audit as one table: title, what each needs, and how it is called."""

import dataclasses
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from aidefend._core.checks import refuse
from aidefend._core.evidence import Evidence
from aidefend._core.random import derive_seed
from aidefend._core.threat import Threat
from aidefend.attacks.inversion import ClassInversion
from aidefend.audit.artifacts import audit_artifacts
from aidefend.audit.evasion import audit_evasion
from aidefend.audit.extraction import audit_extraction
from aidefend.audit.guard import audit_guard
from aidefend.audit.inversion import audit_inversion
from aidefend.audit.membership import audit_membership
from aidefend.audit.plan import AuditPlan, Part
from aidefend.audit.poisoning import audit_poisoning
from aidefend.audit.privacy import audit_privacy
from aidefend.audit.storage import audit_storage


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """Everything that `audit` was given; see there."""

    model: Any
    train: Any
    test: Any
    threat: Threat | None
    plan: AuditPlan
    train_fn: Any
    trigger: Any
    target: int | None
    attack: Any
    evaluator: Any
    inversion: ClassInversion | None
    student_fn: Any
    pool: Any
    claimed_epsilon: float | None
    delta: float
    canary: Any
    privacy_data: Any
    statistic: Any
    path: Any
    inspector: Any
    verifier: Any
    folder: Any
    guard: Any
    seed: int

    @property
    def place(self) -> Any:
        """The folder of the storage part."""
        whole = isinstance(self.path, str | PathLike) and Path(self.path).is_dir()
        return self.path if self.folder is None and whole else self.folder

    def seed_of(self, part: str) -> int:
        """Parts do not share random numbers."""
        return derive_seed(self.seed, "audit", part) % 2**31


class Step(NamedTuple):
    """One part."""

    title: str
    needs: Callable[[Given], Mapping[str, Any]]
    run: Callable[[Given], Evidence]


def missing(step: Step, given: Given) -> list[str]:
    """Names of the arguments that this part lacks."""
    return [name for name, value in step.needs(given).items() if value is None]


def _evasion(given: Given) -> Evidence:
    if given.threat is None:
        raise refuse("a threat", "threat", None, "Pass what the adversary may do")
    return audit_evasion(
        given.model,
        test=given.test,
        threat=given.threat,
        budget=given.plan.budget,
        samples=given.plan.samples,
        seed=given.seed_of("evasion"),
    )


def _poisoning(given: Given) -> Evidence:
    return audit_poisoning(
        given.model,
        given.train,
        given.test,
        trigger=given.trigger,
        target=given.target,
        train_fn=given.train_fn,
        attack=given.attack,
        samples=given.plan.comparisons,
        seed=given.seed_of("poisoning"),
    )


def _membership(given: Given) -> Evidence:
    return audit_membership(
        given.model,
        given.train,
        given.test,
        train_fn=given.train_fn,
        shadows=given.plan.shadows,
        samples=given.plan.comparisons,
        seed=given.seed_of("membership"),
    )


def _inversion(given: Given) -> Evidence:
    return audit_inversion(
        given.model,
        given.train,
        given.test,
        evaluator=given.evaluator,
        train_fn=given.train_fn,
        attack=given.inversion,
        steps=given.plan.inversion_steps,
        per_class=given.plan.per_class,
        samples=given.plan.comparisons,
        seed=given.seed_of("inversion"),
    )


def _extraction(given: Given) -> Evidence:
    return audit_extraction(
        given.model,
        test=given.test,
        student_fn=given.student_fn,
        queries=given.plan.queries,
        pool=given.pool,
        seed=given.seed_of("extraction"),
    )


def _privacy(given: Given) -> Evidence:
    return audit_privacy(
        train=given.train if given.privacy_data is None else given.privacy_data,
        train_fn=given.train_fn,
        claimed_epsilon=given.claimed_epsilon,
        delta=given.delta,
        canary=given.canary,
        statistic=given.statistic,
        runs=given.plan.privacy_runs,
        seed=given.seed_of("privacy"),
    )


def _artifacts(given: Given) -> Evidence:
    return audit_artifacts(path=given.path, inspector=given.inspector, verifier=given.verifier)


def _guard(given: Given) -> Evidence:
    return audit_guard(
        given.model,
        test=given.test,
        guard=given.guard,
        threat=given.threat,
        steps=given.plan.guard_steps,
        samples=given.plan.samples,
        seed=given.seed_of("guard"),
    )


STEPS: Mapping[Part, Step] = {
    "evasion": Step("Accuracy under attack", lambda g: {"test": g.test, "threat": g.threat}, _evasion),
    "poisoning": Step(
        "Backdoors",
        lambda g: {
            "test": g.test,
            "trigger or train_fn": g.trigger if g.train_fn is None else g.train_fn,
            "train": g.test if g.train_fn is None else g.train,
        },
        _poisoning,
    ),
    "membership": Step("Membership inference", lambda g: {"train": g.train, "test": g.test}, _membership),
    "inversion": Step("Model inversion", lambda g: {"train": g.train}, _inversion),
    "extraction": Step("Model extraction", lambda g: {"test": g.test}, _extraction),
    "privacy": Step(
        "Test of the claimed epsilon",
        lambda g: {
            "train_fn": g.train_fn,
            "claimed_epsilon": g.claimed_epsilon,
            "train": g.train if g.privacy_data is None else g.privacy_data,
        },
        _privacy,
    ),
    "artifacts": Step("Model files", lambda g: {"path": g.path, "inspector": g.inspector}, _artifacts),
    "storage": Step("Storage", lambda g: {"folder": g.place}, lambda g: audit_storage(g.place)),
    "guard": Step("Input guard", lambda g: {"guard": g.guard, "test": g.test}, _guard),
}
