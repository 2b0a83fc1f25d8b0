"""The whole audit: every part that its arguments allow, and a report that hides none of the others."""

import dataclasses
import platform
import time
from typing import Any

import torch

import aidefend
from aidefend._core.checks import check_callable, check_flag, check_int, check_kind
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.modules import Model
from aidefend._core.progress import progress
from aidefend._core.threat import Threat
from aidefend.attacks.extraction import StudentFn
from aidefend.attacks.inversion import ClassInversion
from aidefend.attacks.membership import TrainFn
from aidefend.audit.artifacts import Inspector
from aidefend.audit.plan import PARTS, AuditPlan, Part, PlanName, plan_of
from aidefend.audit.report import AuditReport
from aidefend.audit.steps import STEPS, Given, missing
from aidefend.audit.subject import data_digest, found, model_digest, samples_of


def audit(
    model: Model,
    *,
    train: Any = None,
    test: Any = None,
    threat: Threat | None = None,
    plan: PlanName | AuditPlan = "quick",
    train_fn: TrainFn | None = None,
    trigger: Any = None,
    target: int | None = None,
    attack: Any = None,
    evaluator: Model | None = None,
    inversion: ClassInversion | None = None,
    student_fn: StudentFn | None = None,
    pool: Any = None,
    claimed_epsilon: float | None = None,
    delta: float = 1e-5,
    canary: Any = None,
    privacy_data: Any = None,
    statistic: Any = None,
    path: Any = None,
    inspector: Inspector | None = None,
    verifier: Any = None,
    folder: Any = None,
    guard: Any = None,
    seed: int = 0,
    show_progress: bool | None = None,
) -> AuditReport:
    """Attack a model in every way that the arguments allow, and write down what was and what was not measured.

    Guarantee: no part is dropped in silence. A part that raises is reported as "failed" and never passes a policy; a
        part whose arguments are absent is "not tested", with what it needs. The numbers are bounds by attacks: see each
        part. The model, its gradients, buffers and modes and the global random streams are as before.
    Args:
        model: Any callable from x (N, ...) to logits (N, K); in eval mode.
        train: What it was trained on (membership, inversion, poisoning).
        test: Held-out samples (all attacks).
        threat: What an adversary may do to an input (evasion, guard).
        plan: "quick", "standard", "thorough" or an `AuditPlan`.
        train_fn: `train_fn(dataset, seed) -> model`: adds shadow models, a poisoned training and an evaluator.
        trigger: `trigger(x) -> x` to look for in this model.
        target: Its class, where known.
        attack: Poison for `train_fn`: `attack.poison(dataset, seed=0)`.
        evaluator: Independent model that judges reconstructions.
        inversion: The attack of the inversion part, with its bounds.
        student_fn: `student_fn(seed) -> module`, the copy in the extraction part.
        pool: (M, ...) samples of the adversary in the extraction part.
        claimed_epsilon: Claim of `train_fn` to test (2 * plan.privacy_runs trainings).
        delta: Of the claim.
        canary: (x, y) that makes the neighbouring data set.
        privacy_data: Data set of the privacy part; None takes `train`. Small ones show more.
        statistic: `statistic(model) -> float` of the privacy part.
        path: Model file or folder (artifacts).
        inspector: `inspector(path) -> Evidence` (artifacts).
        verifier: `verifier(path)` that raises on failure (artifacts).
        folder: Folder for the storage part; None takes `path` where it is a folder.
        guard: A guard in front of the model.
        seed: Of everything random.
        show_progress: A bar on standard error; None shows it on a terminal only.
    Returns: AuditReport; equal inputs and seed give the same digest.
    Raises: ConfigurationError: `train` or `test` without labels, an unknown plan. What a part raises is in the report.
    Cost: Of the parts; "quick" on a small network takes seconds, plus the trainings of `train_fn`.

    Example:
        >>> x, y = torch.rand(40, 3), torch.arange(40) % 2
        >>> report = audit(torch.nn.Linear(3, 2), train=(x[:20], y[:20]), test=(x[20:], y[20:]))
        >>> report.status("membership"), report.status("evasion")
        ('measured', 'not tested')
    """
    if threat is not None:
        check_kind(threat, Threat, "threat", 'Pass Threat("linf", eps=...), or None')
    check_callable(model, "model", "Pass a module or a function of x")
    work = {"train_fn": train_fn, "evaluator": evaluator, "student_fn": student_fn, "trigger": trigger, "guard": guard}
    work |= {"inspector": inspector, "verifier": verifier, "statistic": statistic, "inversion": inversion}
    for name, given_one in work.items():
        if given_one is not None:
            check_callable(given_one, name, "Pass a function, see the arguments of audit")
    if show_progress is not None:
        check_flag(show_progress, "show_progress")
    given = Given(
        model=model,
        train=None if train is None else samples_of(train, "train"),
        test=None if test is None else samples_of(test, "test"),
        threat=threat,
        plan=plan_of(plan),
        train_fn=train_fn,
        trigger=trigger,
        target=target,
        attack=attack,
        evaluator=evaluator,
        inversion=inversion,
        student_fn=student_fn,
        pool=pool,
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        canary=canary,
        privacy_data=privacy_data,
        statistic=statistic,
        path=path,
        inspector=inspector,
        verifier=verifier,
        folder=folder,
        guard=guard,
        seed=check_int(seed, "seed", 0),
    )
    started = time.time()
    evidence, seconds = Evidence(), {}
    for part in progress(given.plan.parts, "audit", len(given.plan.parts), show_progress):
        begin = time.perf_counter()
        evidence = Evidence(evidence.findings + run_part(part, given).findings)
        seconds[part] = round(time.perf_counter() - begin, 3)
    left_out = [_not_tested(part, "The plan leaves this part out.") for part in PARTS if part not in given.plan.parts]
    metadata = {**_about(given), "run": {"started": started, "seconds": seconds, **_host()}}
    return AuditReport(Evidence([*evidence.findings, *left_out], metadata))


def run_part(part: Part, given: Given) -> Evidence:
    """The findings of one part; an exception becomes a finding with status "failed"."""
    step = STEPS[part]
    if lacking := missing(step, given):
        return Evidence([_not_tested(part, f"Needs {', '.join(lacking)}.")])
    try:
        evidence = step.run(given)
    except Exception as error:
        return Evidence([_failed(part, error)])
    return evidence if evidence.findings else Evidence([_failed(part, RuntimeError("no finding came back"))])


def _failed(part: Part, error: Exception) -> Finding:
    return found(
        part,
        f"{STEPS[part].title}: the check broke",
        severity=Severity.HIGH,
        setting={"error": f"{type(error).__name__}: {error}"[:2000]},
        limits="Nothing is known about this threat. Correct the cause and run the part again.",
        status="failed",
    )


def _not_tested(part: Part, why: str) -> Finding:
    return found(part, f"{STEPS[part].title}: not tested", limits=why, status="not tested")


def _about(given: Given) -> dict[str, Any]:
    """What the findings are about; everything here is under the digest."""
    return {
        "aidefend": aidefend.__version__,
        "torch": torch.__version__,
        "plan": dataclasses.asdict(given.plan),
        "seed": given.seed,
        "threat": None if given.threat is None else given.threat.to_dict(),
        "model": {"kind": _kind(given.model), "sha256": model_digest(given.model)},
        "train": None if given.train is None else {"n": len(given.train.x), "sha256": data_digest(given.train)},
        "test": None if given.test is None else {"n": len(given.test.x), "sha256": data_digest(given.test)},
    }


def _kind(model: Any) -> str:
    kind = type(model)
    return f"{kind.__module__}.{kind.__qualname__}"


def _host() -> dict[str, str]:
    return {"python": platform.python_version(), "platform": platform.platform(terse=True)}
