"""What an adversary can reconstruct of the training data from a model."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, check_int, refuse
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.modules import Model
from aidefend._core.neighbours import k_nearest
from aidefend._core.random import derive_seed
from aidefend._core.stats import Interval, wilson
from aidefend.attacks.inversion import ClassInversion, InversionResult
from aidefend.attacks.membership import TrainFn, train_isolated
from aidefend.audit.subject import Samples, check_model, draw, found, predictions, samples_of, without

_THREAT = "An adversary with the model, or its answers, searches for inputs that look like a class."
_LIMITS = (
    "A lower bound: attacks with a generator trained on similar public data reconstruct more. A class that holds many "
    "people or things has a typical member, which is no secret."
)


class Reconstructions(NamedTuple):
    """For figures: what was reconstructed, and the training sample nearest to each."""

    result: InversionResult
    nearest: Tensor


def audit_inversion(
    model: Model,
    train: Any,
    test: Any = None,
    *,
    evaluator: Model | None = None,
    train_fn: TrainFn | None = None,
    attack: ClassInversion | None = None,
    steps: int = 200,
    per_class: int = 2,
    samples: int | None = 2000,
    seed: int = 0,
) -> Evidence:
    """Reconstruct every class, then ask an independent model what it sees and how near real training samples are.

    Guarantee: none: a lower bound.
    Args:
        model: Callable from x to logits or probabilities (N, K), in eval mode; hardened outputs are attacked as they
            are (through their gradient where there is one, else by probing).
        train: The training data of the model.
        test: Held-out samples: the yardstick of nearness, and what the evaluator is trained on.
        evaluator: A model of the same classes that was trained apart, on data of its own.
        train_fn: Trains an evaluator on `test` where none is given.
        attack: The attack; None is `ClassInversion(steps)` with the range of the training inputs as bounds.
        steps: Of that attack.
        per_class: Reconstructions of each class.
        samples: At most this many training and test samples are compared.
        seed: Chooses samples and starting points.
    Returns: `inversion.evaluator_accuracy` (share of reconstructions in which the evaluator sees the class; Wilson),
        `inversion.nearest_distance_ratio` (median distance to the nearest training sample of the class, over the same
        for held-out samples; percentile bootstrap; <= 1 means as near as real samples) and
        `inversion.confidence`. "not shown" where the attack found nothing to follow, "not tested" without evaluator or
        held-out samples.
    Cost: Of the attack; one search for nearest neighbours; one training for an evaluator.

    Source: Zhang et al. 2020 (evaluator accuracy and nearest-sample distance as measures).

    Example:
        >>> x, y = torch.cat([torch.zeros(4, 2), torch.ones(4, 2)]), torch.arange(8) // 4
        >>> attack = ClassInversion(steps=20, total_variation=0.0)
        >>> model = lambda x: torch.stack([1 - x.sum(1), x.sum(1) - 1], dim=1)
        >>> audit_inversion(model, (x, y), evaluator=model, attack=attack)["inversion.evaluator_accuracy"].value
        1.0
    """
    check_model(model)
    check_int(per_class, "per_class")
    private = samples_of(train, "train")
    held_out = None if test is None else without(samples_of(test, "test"), private)
    if attack is not None:
        check_callable(attack, "attack", "Pass ClassInversion(...)")
    attack = ClassInversion(check_int(steps, "steps"), bounds=_bounds(private.x)) if attack is None else attack
    made = reconstruct(model, private, attack=attack, per_class=per_class, seed=seed)
    setting = {"attack": str(attack), "method": made.result.method, "seed": seed}
    if made.result.status == "not shown":
        return Evidence([_nothing_followed(setting)], {"part": "inversion", "seed": seed})
    judge = _evaluator(evaluator, train_fn, held_out, seed)
    findings = [
        _seen_by(judge, made.result, setting),
        _nearness(made.result, private, held_out, samples, setting, seed),
        found(
            "inversion.confidence",
            "The model's own confidence in its reconstructions (median)",
            float(made.result.confidence.median()),
            n=len(made.result.y),
            setting={**setting, "at_start": float(made.result.start_confidence.median())},
            limits="High for almost any model: adversarial noise has it too.",
        ),
    ]
    return Evidence(findings, {"part": "inversion", "seed": seed})


def reconstruct(
    model: Model, train: Any, *, attack: ClassInversion | None = None, per_class: int = 1, seed: int = 0
) -> Reconstructions:
    """Reconstructions of every class in the training labels, with the nearest training sample of that class each.

    Args:
        model: Callable from x to logits or probabilities (N, K).
        train: (x, y) tensors of the training data.
        attack: The attack; None is `ClassInversion()` with the range of the training inputs as bounds.
        per_class: Reconstructions of each class.
        seed: Of the starting points.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
        >>> made = reconstruct(lambda x: torch.cat([-x, x], dim=1), (x, y), attack=ClassInversion(steps=9))
        >>> made.nearest.tolist()
        [[0.0], [1.0]]
    """
    train = train if isinstance(train, Samples) else samples_of(train, "train")
    check_int(per_class, "per_class")
    if attack is not None:
        check_callable(attack, "attack", "Pass ClassInversion(...)")
    attack = ClassInversion(bounds=_bounds(train.x)) if attack is None else attack
    classes = train.y.unique().repeat_interleave(per_class).to(train.x.device)
    shape = tuple(train.x.shape[1:])
    result = attack(model, classes, shape=shape, seed=derive_seed(seed, "inversion"))
    nearest = torch.stack([_nearest_in_class(x, int(y), train) for x, y in zip(result.x, result.y, strict=True)])
    return Reconstructions(result, nearest)


def _nearest_in_class(x: Tensor, label: int, train: Samples) -> Tensor:
    own = train.x[train.y.to(train.x.device) == label]
    _, rows = k_nearest(_flat(x[None]), _flat(own), 1)
    return own[rows[0, 0]]


def _seen_by(judge: Model | None, result: InversionResult, setting: dict[str, Any]) -> Finding:
    title = "Reconstructions in which an independent model sees the class"
    identity = "inversion.evaluator_accuracy"
    if judge is None:
        return found(identity, title, status="not tested", limits="Pass evaluator=, or train_fn= and test=.")
    hits = predictions(judge, result.x) == result.y.cpu()
    accuracy = wilson(int(hits.sum()), len(hits))
    chance = 1 / max(1, len(result.y.unique()))
    severity = Severity.MEDIUM if accuracy.low > 0.5 else Severity.LOW if accuracy.low > chance else Severity.INFO
    return found(
        identity,
        title,
        interval=accuracy,
        n=len(hits),
        severity=severity,
        setting={**setting, "chance": chance},
        threat=_THREAT,
        limits=_LIMITS,
    )


def _nearness(
    result: InversionResult,
    train: Samples,
    held_out: Samples | None,
    samples: int | None,
    setting: dict[str, Any],
    seed: int,
) -> Finding:
    title = "Distance of reconstructions to the training data, in units of that of real held-out samples"
    identity = "inversion.nearest_distance_ratio"
    if held_out is None or not len(held_out.x):
        return found(identity, title, status="not tested", limits="Pass test= with samples that are not in train.")
    bank, yardstick = draw(train, samples, seed, "bank"), draw(held_out, samples, seed, "yardstick")
    made, real = _distances(Samples(result.x, result.y), bank), _distances(yardstick, bank)
    if not len(made) or not len(real) or float(real.median()) == 0:
        return found(identity, title, status="not shown", limits="No class has both training and held-out samples.")
    ratio = _median_ratio(made, real, seed)
    return found(
        identity,
        title,
        interval=ratio,
        n=len(made),
        severity=Severity.HIGH if ratio.high <= 1 else Severity.MEDIUM if ratio.low <= 1 else Severity.INFO,
        setting={**setting, "held_out": len(real)},
        threat=_THREAT,
        limits=_LIMITS + " Euclidean distance misses likenesses that a person sees.",
    )


def _distances(of: Samples, bank: Samples) -> Tensor:
    """Distance of each sample to the nearest bank sample of its class (rows of classes that are not in it left out)."""
    parts = []
    for label in of.y.unique().tolist():
        own, near = of.x[of.y.to(of.x.device) == label], bank.x[bank.y.to(bank.x.device) == label]
        if len(near):
            parts.append(k_nearest(_flat(own), _flat(near), 1)[0][:, 0])
    return torch.cat(parts) if parts else torch.zeros(0)


def _median_ratio(made: Tensor, real: Tensor, seed: int) -> Interval:
    stream = torch.Generator().manual_seed(derive_seed(seed, "bootstrap"))
    ratios = torch.stack([_resampled(made, stream) / _resampled(real, stream) for _ in range(500)])
    low, high = torch.quantile(ratios.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value = float(made.median() / real.median())
    return Interval(value, min(low, value), max(high, value))


def _resampled(values: Tensor, stream: torch.Generator) -> Tensor:
    return values[torch.randint(len(values), (len(values),), generator=stream)].median()


def _evaluator(evaluator: Model | None, train_fn: TrainFn | None, data: Samples | None, seed: int) -> Model | None:
    if evaluator is not None:
        return check_model(evaluator, "evaluator")
    if train_fn is None or data is None or not len(data.x):
        return None
    dataset = torch.utils.data.TensorDataset(data.x, data.y)
    return check_model(train_isolated(train_fn, dataset, derive_seed(seed, "evaluator") % 2**31), "evaluator")


def _bounds(x: Tensor) -> tuple[float, float]:
    low, high = float(x.min()), float(x.max())
    if not low < high:
        raise refuse("inputs that differ", "train", f"all equal to {low}", "Pass attack=ClassInversion(bounds=...)")
    return low, high


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1).float()


def _nothing_followed(setting: dict[str, Any]) -> Finding:
    return found(
        "inversion.evaluator_accuracy",
        "Reconstructions in which an independent model sees the class",
        status="not shown",
        setting=setting,
        threat=_THREAT,
        limits="The outputs did not move with the input, so this attack had nothing to follow. No evidence of safety.",
    )
