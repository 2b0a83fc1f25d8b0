"""How well an adversary tells training samples from others."""

from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_probability, refuse
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.modules import Model
from aidefend._core.random import derive_seed
from aidefend._core.stats import Interval, roc_auc, tpr_at_fpr
from aidefend.attacks.membership import LiRA, LossThreshold, TrainFn
from aidefend.audit.subject import Samples, check_model, draw, found, samples_of, without

_THREAT = "An adversary with samples of interest asks the model about them (score access)."
_LIMITS = "A lower bound: a stronger attack may tell more apart. Averages over samples hide the most exposed ones."


def audit_membership(
    model: Model,
    train: Any,
    test: Any,
    *,
    train_fn: TrainFn | None = None,
    shadows: int = 8,
    samples: int | None = 2000,
    fpr: float = 0.01,
    seed: int = 0,
) -> Evidence:
    """Measure membership inference by loss and, with `train_fn`, by likelihood ratio over shadow models.

    Guarantee: none: a lower bound on what an adversary can infer from the model.
    Args:
        model: Callable from x to logits or probabilities (N, K); in eval mode.
        train: What the model was trained on, or a random part of it: the members.
        test: Samples of the same distribution that it has never seen: the non-members. Inputs that occur in `train`
            are left out and counted.
        train_fn: `train_fn(dataset, seed) -> model`; adds the findings `membership.lira.*`.
        shadows: Shadow models, even, >= 4.
        samples: At most this many members and as many non-members; None for all.
        fpr: False-positive rate at which the true-positive rate is read, in (0, 1).
        seed: Chooses samples and shadow models.
    Returns: `membership.auc`, `membership.tpr_at_fpr_<fpr>`, each with interval and n; with `train_fn` the same under
        `membership.lira`. Severity: by the lower end of the AUC's interval, .52 medium, .6 high; or of the
        true-positive rate, 3 and 10 times the false-positive rate.
    Raises: ConfigurationError: no member or no non-member is left. IncompatibleModel: a model in train mode.
    Cost: One forward pass of at most 2 * samples rows; with `train_fn` `shadows` trainings on `samples` rows.

    Source: Yeom et al. 2018; Carlini et al. 2022. AUC interval by DeLong; the interval of the true-positive rate covers
        the members' sampling only.

    Example:
        >>> x, y = torch.arange(8.0)[:, None], torch.zeros(8, dtype=torch.int64)
        >>> evidence = audit_membership(lambda x: torch.cat([-x, x], dim=1), (x[:4], y[:4]), (x[4:], y[4:]))
        >>> evidence["membership.auc"].value
        1.0
    """
    check_model(model)
    check_probability(fpr, "fpr")
    members, others, setting = _parties(train, test, samples, seed)
    joined = Samples(torch.cat([members.x, others.x]), torch.cat([members.y, others.y]))
    scores = LossThreshold()(model, joined.x, joined.y)
    findings = _findings("membership", "loss threshold", scores, len(members.x), fpr, setting)
    if train_fn is not None:
        attack = LiRA(shadows=check_int(shadows, "shadows", 4))
        order = torch.randperm(len(joined.x), generator=torch.Generator().manual_seed(derive_seed(seed, "shuffle")))
        mixed = joined.rows(order)
        ratios = torch.empty(len(order), dtype=torch.float64)
        ratios[order] = attack(model, mixed.x, mixed.y, train_fn=train_fn, seed=seed)
        title = f"likelihood ratio, {shadows} shadow models"
        findings += _findings("membership.lira", title, ratios, len(members.x), fpr, {**setting, "shadows": shadows})
    return Evidence(findings, {"part": "membership", "seed": seed})


def _parties(train: Any, test: Any, samples: int | None, seed: int) -> tuple[Samples, Samples, dict[str, Any]]:
    inside, outside = samples_of(train, "train"), samples_of(test, "test")
    if inside.x.shape[1:] != outside.x.shape[1:]:
        found = f"train {tuple(inside.x.shape[1:])}, test {tuple(outside.x.shape[1:])}"
        raise refuse("inputs of one shape in train and test", "shapes", found, "Pass data of the same model")
    if samples is not None:
        check_int(samples, "samples")
    apart = without(outside, inside)
    if not len(apart.x):
        cure = "Hold samples back from training and pass them as test="
        raise refuse("test samples that are not in train", "test", f"{len(outside.x)} samples, all in train", cure)
    count = min(len(inside.x), len(apart.x), samples if samples is not None else len(inside.x))
    members, others = draw(inside, count, seed, "members"), draw(apart, count, seed, "others")
    shared = len(outside.x) - len(apart.x)
    return members, others, {"members": count, "non_members": count, "test_inputs_in_train": shared, "seed": seed}


def _findings(
    prefix: str, attack: str, scores: Tensor, members: int, fpr: float, setting: dict[str, Any]
) -> list[Finding]:
    inside, outside = scores[:members], scores[members:]
    area, rate = roc_auc(inside, outside), tpr_at_fpr(inside, outside, fpr)
    common: dict[str, Any] = {
        "setting": {**setting, "attack": attack},
        "threat": _THREAT,
        "n": len(scores),
    }
    coarse = "" if len(outside) >= 1 / fpr else f" Read at 0 of {len(outside)} false positives."
    return [
        found(
            f"{prefix}.auc",
            f"Membership inference ({attack}): area under the ROC curve",
            interval=area,
            severity=_of_area(area),
            limits=_LIMITS,
            **common,
        ),
        found(
            f"{prefix}.tpr_at_fpr_{fpr:g}",
            f"Membership inference ({attack}): true positives at {fpr:.4g} false positives",
            interval=rate,
            severity=_of_rate(rate, fpr),
            limits=_LIMITS + coarse,
            **common,
        ),
    ]


def _of_area(area: Interval) -> Severity:
    return Severity.HIGH if area.low > 0.6 else Severity.MEDIUM if area.low > 0.52 else Severity.INFO


def _of_rate(rate: Interval, fpr: float) -> Severity:
    return Severity.HIGH if rate.low > 10 * fpr else Severity.MEDIUM if rate.low > 3 * fpr else Severity.INFO
