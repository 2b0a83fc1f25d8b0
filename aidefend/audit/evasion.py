"""Accuracy under attack, as a part of the audit."""

import dataclasses
from typing import Any

from aidefend._core.evidence import Evidence
from aidefend._core.modules import Model
from aidefend._core.threat import Threat
from aidefend.audit.effort import Budget
from aidefend.audit.mapping import references
from aidefend.audit.robustness import evaluate_robustness
from aidefend.audit.subject import draw, samples_of


def audit_evasion(
    model: Model,
    train: Any = None,
    test: Any = None,
    *,
    threat: Threat,
    budget: Budget = "standard",
    samples: int | None = 512,
    seed: int = 0,
) -> Evidence:
    """Measure the worst-case accuracy with `evaluate_robustness`.

    Guarantee: the robust accuracy is an upper bound of the true one on these rows; see `evaluate_robustness`.
    Args:
        model: Callable from x to logits (N, K).
        train: Not used; accepted so that every part has the same first arguments.
        test: Held-out samples inside the bounds of the threat.
        threat: What the adversary may do.
        budget: "quick", "standard" or "thorough".
        samples: At most this many test samples; None for all.
        seed: Chooses samples and starts.
    Returns: `evasion.clean_accuracy`, `evasion.robust_accuracy` (status "not shown" where a masking check failed) and
        `evasion.masking.*`.
    Cost: Of `evaluate_robustness`.

    Source: Croce, Hein 2020; Carlini et al. 2019.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([1, 0])
        >>> evidence = audit_evasion(
        ...     torch.nn.Identity(), test=(x, y), threat=Threat("linf", 0.01), budget="quick"
        ... )
        >>> evidence["evasion.clean_accuracy"].value
        1.0
    """
    chosen = draw(samples_of(test, "test"), samples, seed, "evasion")
    evidence = evaluate_robustness(model, (chosen.x, chosen.y), threat, budget, seed).to_evidence()
    mapped = [dataclasses.replace(finding, mapping=references(finding.id)) for finding in evidence.findings]
    return Evidence(mapped, {**evidence.metadata, "part": "evasion"})
