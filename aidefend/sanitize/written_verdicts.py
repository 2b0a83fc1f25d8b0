"""Written patterns in the decision of a screen, and what the same search takes where labels are permuted."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aidefend._core.random import derive_seed, make_generator
from aidefend._core.stats import wilson
from aidefend.sanitize.decide import Decision
from aidefend.sanitize.items import Items
from aidefend.sanitize.written import WrittenSearch


def with_written(decision: Decision, items: Items, labels: Tensor, alpha: float, seed: int) -> Decision:
    """The decision with the patterns that stand, and the smallest number of rows that would."""
    search = WrittenSearch(items, labels, alpha, seed)
    found = search.verdicts()
    return dataclasses.replace(decision, written=found, written_detectable=search.detectable())


def control_of_written(
    control: Mapping[str, Any], decision: Decision, items: Items, labels: Tensor, alpha: float, seed: int
) -> dict[str, Any]:
    """The control with what the same search takes, of the rows that it kept, when all labels are permuted."""
    kept = torch.ones(len(labels), dtype=torch.bool)
    for verdict in decision.written:
        kept[verdict.group.rows[verdict.group.inside]] = False
    stream = make_generator(seed=derive_seed(seed, "written control") % 2**63)
    permuted = labels[torch.randperm(len(labels), generator=stream)]
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for verdict in WrittenSearch(items, permuted, alpha, seed).verdicts():
        taken[verdict.group.rows[verdict.group.inside]] = True
    return share_of(int(control["quarantined"]) + int((taken & kept).sum()), max(int(kept.sum()), int(control["n"])))


def share_of(removed: int, n: int) -> dict[str, Any]:
    """A count as a share with its interval."""
    if not n:
        return {"quarantined": 0, "n": 0}
    share = wilson(min(removed, n), n)
    return {"quarantined": removed, "n": n, "share": share.value, "low": share.low, "high": share.high}
