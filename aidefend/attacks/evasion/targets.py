"""One untargeted attack out of many targeted ones: towards each of the likeliest other classes in turn."""

from collections.abc import Callable

import torch
from torch import Tensor

from aidefend._core.checks import check_labels
from aidefend._core.modules import Model
from aidefend.attacks.evasion.access import Access, quiet_access
from aidefend.attacks.evasion.goals import Goal
from aidefend.attacks.evasion.losses import misclassified
from aidefend.attacks.evasion.result import AttackResult

RunTowards = Callable[[Tensor, Tensor, Tensor, Tensor | None], AttackResult]


def towards(outputs: Tensor, pair: Tensor) -> Tensor:
    """Target logit less true one over a gap that scales with the logits: larger = nearer to the target class.

    Args:
        outputs: Logits (N, K).
        pair: (N, 2) int64, the true class and the target.
    Source: Croce, Hein 2020, eq. 6 (targeted DLR); with fewer than 4 classes the plain difference.
    """
    true, target = outputs.gather(1, pair).unbind(dim=1)
    if outputs.shape[1] < 4:
        return target - true
    top = outputs.topk(4, dim=1).values
    return (target - true) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def left_class(outputs: Tensor, pair: Tensor) -> Tensor:
    """Success is any wrong class, (N,) bool."""
    return misclassified(outputs, pair[:, 0])


def run_targets(
    run: RunTowards,
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    count: int,
    goal: Goal,
    logits: Tensor | None,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> AttackResult:
    """Runs towards the `count` likeliest wrong classes; the best of each row.

    Args:
        run: (rows, x, pairs, logits) -> result of the targeted attack on these rows.
        model: For the clean pass, where logits are not given.
        x: (N, ...).
        y: (N,) true classes.
        count: Targets a row, at most K - 1 are used.
        goal: For "first_success", broken rows leave between targets; for "min_norm", rows that are wrong at x.
        logits: Clean logits.
        distance: (x_adv, x) -> (N,), what "min_norm" compares.
    """
    paid = logits is None
    if logits is None:
        with quiet_access(model):
            logits = Access(model, "margin", targeted=False, is_success=None).outputs(x)
    check_labels(y, len(x), logits.shape[1])
    order = logits.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True)[:, : logits.shape[1] - 1]
    best = _clean(x, y, logits, paid=paid)
    clean = best.success.clone()
    for place in range(min(count, order.shape[1])):
        out = {"max_loss": torch.zeros_like(clean), "first_success": best.success, "min_norm": clean}[goal]
        rows = (~out).nonzero()[:, 0]
        if len(rows) == 0:
            break
        pairs = torch.stack([y[rows], order[rows, place]], dim=1)
        found = run(rows, x[rows], pairs, logits[rows])
        better = _better(best, found, rows)
        if goal == "min_norm":
            nearer = distance(found.x_adv, x[rows]) < distance(best.x_adv[rows], x[rows])
            better = found.success & (nearer | ~best.success[rows]) | better & ~best.success[rows]
        _merge(best, found, rows, better)
    return best


def _clean(x: Tensor, y: Tensor, logits: Tensor, *, paid: bool) -> AttackResult:
    """The rows themselves, which no run has beaten yet."""
    passes = torch.full((len(x),), int(paid), dtype=torch.int64, device=x.device)
    lowest = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    return AttackResult(x.clone(), misclassified(logits, y), lowest, passes, torch.zeros_like(passes))


def _better(best: AttackResult, found: AttackResult, rows: Tensor) -> Tensor:
    """Success first, then the larger loss."""
    before = best.success[rows]
    return (found.success & ~before) | (found.success == before) & (found.loss > best.loss[rows])


def _merge(best: AttackResult, found: AttackResult, rows: Tensor, better: Tensor) -> None:
    """Take the rows that are better; costs add up."""
    taken = rows[better]
    best.x_adv[taken], best.loss[taken] = found.x_adv[better], found.loss[better].to(best.loss)
    best.success[taken] = found.success[better]
    best.forwards[rows] += found.forwards
    best.backwards[rows] += found.backwards
