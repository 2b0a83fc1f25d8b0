"""Whether a trigger decides what a model says, and whether training lets such a trigger in."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from aidefend._core.batches import as_dataset
from aidefend._core.checks import check_callable, check_int, check_tensor, refuse
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.modules import Model
from aidefend._core.random import derive_seed
from aidefend._core.stats import Interval
from aidefend.attacks.membership import TrainFn, train_isolated
from aidefend.attacks.poisoning import Patch
from aidefend.audit.subject import Samples, check_model, draw, found, predictions, samples_of, share

_LIMITS = "Shows this trigger only: other triggers, clean-label and triggerless poison are not tested by it."


def audit_poisoning(
    model: Model | None = None,
    train: Any = None,
    test: Any = None,
    *,
    trigger: Any = None,
    target: int | None = None,
    train_fn: TrainFn | None = None,
    attack: Any = None,
    samples: int | None = 2000,
    seed: int = 0,
) -> Evidence:
    """Measure a backdoor: in the given model by its trigger, or in the training procedure by poisoning its data.

    Guarantee: none: one trigger shows presence, never absence.
    Args:
        model: Judged directly when `trigger` is given.
        train: Training data that `attack` poisons.
        test: Held-out clean samples.
        trigger: `trigger(x) -> x` in the shape of x. Adds the model's findings.
        target: Class the trigger asks for; None reads it off `attack.target`, else it is the class that the trigger
            raises most on half of the samples (the other half then gives the numbers).
        train_fn: `train_fn(dataset, seed) -> model`. Trains on the poisoned data, and the result is judged.
        attack: `attack.poison(dataset, seed=0)` with `.dataset` and `.trigger(x)`; None: `Patch(target=0, rate=0.05)`.
        samples: At most this many test samples.
        seed: Chooses samples, poison and the training seed.
    Returns: `poisoning.clean_accuracy` and `poisoning.attack_success_rate` (share of samples of other classes that the
        trigger turns into the target), with Wilson intervals. With both a trigger and a train_fn the second model's are
        named `poisoning.retrained_*`. Severity: by the lower end, .1 medium, .5 high, above what x without the trigger
        gives.
    Raises: ConfigurationError: neither trigger nor train_fn; no sample of another class than the target.
    Cost: Two forward passes; with `train_fn` one training.

    Source: Gu, Dolan-Gavitt, Garg 2017 (the measures).

    Example:
        >>> x, y = torch.rand(8, 1), torch.zeros(8, dtype=torch.int64)
        >>> evidence = audit_poisoning(
        ...     lambda x: torch.cat([1 - x, x - 1], dim=1), test=(x, y), trigger=lambda x: x + 2, target=1
        ... )
        >>> evidence["poisoning.attack_success_rate"].value
        1.0
    """
    if trigger is None and train_fn is None:
        cure = "Pass the trigger to look for, or train_fn= to poison a training run"
        raise refuse("trigger or train_fn", "trigger, train_fn", None, cure)
    if target is not None:
        check_int(target, "target", 0)
    if trigger is not None:
        check_callable(trigger, "trigger", "Pass trigger(x) -> x")
    if attack is not None and not callable(getattr(attack, "poison", None)):
        raise refuse("an attack with .poison(dataset, seed)", "attack", attack, "Pass Patch(...) or its like")
    held_out = draw(samples_of(test, "test"), samples, seed, "poisoning")
    findings: list[Finding] = []
    if trigger is not None:
        wanted = target if target is not None else getattr(attack, "target", None)
        findings += _judge(check_model(model), held_out, trigger, wanted, "poisoning.", "the given model", seed)
    if train_fn is not None:
        attack = Patch(target=0, rate=0.05) if attack is None else attack
        dataset = as_dataset(train)
        poisoned = attack.poison(dataset, seed=derive_seed(seed, "poison") % 2**31)
        victim = check_model(train_isolated(train_fn, poisoned.dataset, derive_seed(seed, "victim") % 2**31))
        known = (getattr(source, "target", None) for source in (poisoned, attack))
        wanted = next((value for value in known if value is not None), target)
        prefix = "poisoning.retrained_" if findings else "poisoning."
        about = f"a model trained on data poisoned by {type(attack).__name__}"
        judged = _judge(victim, held_out, poisoned.trigger, wanted, prefix, about, seed)
        findings += [dataclasses.replace(item, setting={**item.setting, "attack": _name(attack)}) for item in judged]
    return Evidence(findings, {"part": "poisoning", "seed": seed})


def _judge(
    model: Model, data: Samples, trigger: Any, target: int | None, prefix: str, about: str, seed: int
) -> list[Finding]:
    clean = predictions(model, data.x)
    accuracy = share(clean == data.y.cpu())
    shown = _triggered(trigger, data.x)
    if torch.equal(shown, data.x):
        return [_clean_finding(prefix, accuracy, len(data.x), {"model": about}, about), _no_trigger(prefix, about)]
    marked = predictions(model, shown)
    rows = torch.arange(len(data.x))
    guessed = target is None
    if target is None:
        stream = torch.Generator().manual_seed(derive_seed(seed, "target"))
        first, rows = torch.randperm(len(rows), generator=stream).tensor_split(2)
        target = _raised_most(clean[first], marked[first])
    check_int(target, "target", 0)
    rows = rows[data.y.cpu()[rows] != target]
    if not len(rows):
        raise refuse(f"test samples of other classes than {target}", "test", data.y, "Pass samples of all classes")
    success, before = share(marked[rows] == target), share(clean[rows] == target)
    setting = {
        "model": about,
        "target": target,
        "target_guessed": guessed,
        "without_trigger": before.value,
        "seed": seed,
    }
    return [
        _clean_finding(prefix, accuracy, len(data.x), setting, about),
        found(
            f"{prefix}attack_success_rate",
            f"Samples that the trigger turns into class {target}, {about}",
            interval=success,
            n=len(rows),
            severity=_severity(success, before),
            setting=setting,
            threat="An adversary plants samples with a trigger in the training data, and shows the trigger in service.",
            limits=_LIMITS,
        ),
    ]


def _clean_finding(prefix: str, accuracy: Interval, n: int, setting: dict[str, Any], about: str) -> Finding:
    title = f"Accuracy on clean samples of {about}"
    return found(f"{prefix}clean_accuracy", title, interval=accuracy, n=n, setting=setting)


def _no_trigger(prefix: str, about: str) -> Finding:
    title = f"Samples that the trigger turns into the target class, {about}"
    limits = "The trigger changes no sample, as for poison that works by labels alone: see the clean accuracy."
    return found(f"{prefix}attack_success_rate", title, status="not shown", limits=limits)


def _severity(success: Interval, before: Interval) -> Severity:
    if success.low <= before.high:
        return Severity.INFO
    return Severity.HIGH if success.low > 0.5 else Severity.MEDIUM if success.low > 0.1 else Severity.LOW


def _raised_most(clean: Tensor, marked: Tensor) -> int:
    classes = int(torch.cat([clean, marked]).max()) + 1
    gain = torch.bincount(marked, minlength=classes) - torch.bincount(clean, minlength=classes)
    return int(gain.argmax())


def _triggered(trigger: Any, x: Tensor) -> Tensor:
    marked = check_tensor(trigger(x.clone()), "trigger(x)")
    if marked.shape != x.shape:
        raise refuse(f"trigger(x) of shape {tuple(x.shape)}", "trigger", marked, "Return x with the trigger on it")
    return marked.to(x)


def _name(attack: Any) -> str:
    shown = repr(attack)
    return type(attack).__name__ if " at 0x" in shown else shown
