"""How faithful a copy an adversary trains from a limited number of queries."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_callable, check_int, check_items, check_not_empty, check_tensor, refuse
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.modules import Model
from aidefend._core.random import derive_seed
from aidefend._core.stats import Interval, wilson
from aidefend.attacks.extraction import Extraction, ExtractionResult, StudentFn
from aidefend.attacks.membership import ask
from aidefend.audit.subject import Samples, check_model, found, predictions, samples_of

_THREAT = "An adversary with samples of its own queries the model and trains a copy on the answers."
_LIMITS = "A lower bound for this copy and these samples: more queries, chosen queries or a better copy reach more."


@dataclasses.dataclass(frozen=True)
class DefaultStudent:
    """The copy where no `student_fn` is given: one hidden layer over the flattened input.

    Args:
        features: Numbers in one input, >= 1.
        classes: Outputs, >= 2.
        hidden: Width of the hidden layer.

    Example:
        >>> DefaultStudent(features=4, classes=2)(seed=0)(torch.zeros(1, 2, 2)).shape
        torch.Size([1, 2])
    """

    features: int
    classes: int
    hidden: int = 128

    def __post_init__(self) -> None:
        for name, low in (("features", 1), ("classes", 2), ("hidden", 1)):
            check_int(getattr(self, name), name, low)

    def __call__(self, seed: int) -> nn.Module:
        """A fresh copy; its weights come from the seed alone."""
        check_int(seed, "seed", 0)
        stream = torch.Generator().manual_seed(seed)
        sizes = (self.features, self.hidden), (self.hidden, self.classes)
        layers = [nn.utils.skip_init(nn.Linear, *size) for size in sizes]  # draws nothing from the global stream
        for layer in layers:
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=stream)
            nn.init.uniform_(layer.bias, -bound, bound, generator=stream)
        return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1])


def audit_extraction(
    model: Model,
    train: Any = None,
    test: Any = None,
    *,
    student_fn: StudentFn | None = None,
    queries: Sequence[int] = (100, 400),
    pool: Tensor | None = None,
    reference: Model | None = None,
    epochs: int = 40,
    seed: int = 0,
) -> Evidence:
    """Train copies at several query budgets and compare their answers with the model's on samples that none queried.

    Guarantee: none: a lower bound.
    Args:
        model: The victim: callable from x to logits or probabilities (N, K). A `BudgetExceeded` that it raises ends the
            queries, and the copy is trained on what was answered.
        train: Not used; accepted so that every part has the same first arguments.
        test: Held-out samples. Half are for comparison; the other half is the adversary's pool where `pool` is None.
        student_fn: `student_fn(seed) -> nn.Module`; None is a small network over the flattened input.
        queries: Query budgets, each >= 1; those beyond the pool are cut to its size.
        pool: (M, ...) samples of the adversary.
        reference: The same model without a budget, for the comparison; None asks `model` before the attack.
        epochs: Passes of the copy over its answers.
        seed: Chooses the split, the queries and the copy's start.
    Returns: `extraction.agreement_at_<q>` for each budget and `extraction.agreement` for the largest, with Wilson
        intervals, and `extraction.queries_used`. Severity by the lower end: .9 high, .75 medium.
    Raises: ConfigurationError: too few samples to split.
    Cost: The sum of the budgets plus half of `test` through the model; one training of the copy for each budget.

    Source: Tramer et al. 2016; Jagielski et al. 2020 (fidelity as the measure).

    Example:
        >>> x = torch.linspace(-1, 1, 64)[:, None]
        >>> evidence = audit_extraction(
        ...     lambda x: torch.cat([x, -x], dim=1), test=(x, (x[:, 0] < 0).long()), queries=[32]
        ... )
        >>> evidence["extraction.queries_used"].value
        32
    """
    check_model(model)
    queries = check_items(queries, int, "queries", "Pass whole numbers, such as (100, 400)")
    check_not_empty(len(queries), "queries")
    if student_fn is not None:
        check_callable(student_fn, "student_fn", "Pass student_fn(seed) -> module")
    held_out = samples_of(test, "test")
    asked, compared = _split(held_out, pool, seed)
    answers = ask(model if reference is None else check_model(reference, "reference"), compared)
    truth = answers.argmax(dim=1)
    classes = max(answers.shape[1], int(held_out.y.max()) + 1)  # labels alone may show fewer
    student = student_fn if student_fn is not None else DefaultStudent(asked[0].numel(), classes)
    constant = float(torch.bincount(truth).max()) / len(truth)
    findings: list[Finding] = []
    budgets = sorted({min(check_int(budget, "queries"), len(asked)) for budget in queries})
    for budget in budgets:
        attack = Extraction(student, budget, epochs=epochs, batch_size=min(64, max(8, budget // 8)))
        result = attack(model, asked, seed=derive_seed(seed, "extraction", budget))
        same = _agreement(result, compared, truth)
        setting = {
            "queries": budget,
            "queries_used": result.queries_used,
            "stopped": result.stopped,
            "constant_answer_agrees": constant,
            "seed": seed,
        }
        findings.append(_agreement_finding(f"extraction.agreement_at_{budget}", same, len(truth), setting))
        if budget == budgets[-1]:
            findings.append(_agreement_finding("extraction.agreement", same, len(truth), setting))
            title = "Queries that were answered at the largest budget"
            findings.append(found("extraction.queries_used", title, result.queries_used, n=budget, setting=setting))
    return Evidence(findings, {"part": "extraction", "seed": seed})


def _agreement(result: ExtractionResult, x: Tensor, truth: Tensor) -> Interval:
    same = 0 if result.student is None else int((predictions(result.student, x) == truth).sum())
    return wilson(same, len(truth))


def _agreement_finding(identity: str, same: Interval, n: int, setting: dict[str, Any]) -> Finding:
    above_constant = same.low > setting["constant_answer_agrees"]
    severity = Severity.HIGH if same.low > 0.9 else Severity.MEDIUM if same.low > 0.75 else Severity.LOW
    stopped = f" Stopped early: {setting['stopped']}" if setting["stopped"] else ""
    return found(
        identity,
        f"Agreement of a copy trained on {setting['queries_used']} answers with the model",
        interval=same,
        n=n,
        severity=severity if above_constant else Severity.INFO,
        setting=setting,
        threat=_THREAT,
        limits=_LIMITS + stopped,
    )


def _split(held_out: Samples, pool: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    if pool is not None:
        return check_tensor(pool, "pool"), held_out.x
    if len(held_out.x) < 4:
        raise refuse("at least 4 test samples", "test", held_out.x, "Pass more held-out samples, or pool=")
    order = torch.randperm(len(held_out.x), generator=torch.Generator().manual_seed(derive_seed(seed, "pool")))
    asked, compared = order.tensor_split(2)
    return held_out.x[asked], held_out.x[compared]
