"""An empirical lower bound on epsilon: train with and without one sample, and tell the models apart."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from aidefend._core.batches import as_dataset, gather_labelled
from aidefend._core.checks import (
    check_callable,
    check_int,
    check_not_empty,
    check_number,
    check_probability,
    check_tensor,
    refuse,
)
from aidefend._core.errors import AidefendError
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.modules import Model
from aidefend._core.progress import progress
from aidefend._core.random import derive_seed
from aidefend._core.stats import clopper_pearson
from aidefend.attacks.membership import LossThreshold, TrainFn, train_isolated
from aidefend.audit.subject import found

Statistic = Callable[[Any], float]
_THREAT = "An adversary who knows all samples but one, and sees the trained model, asks whether that one was used."
_LIMITS = (
    "A lower bound: it can refute a claimed epsilon, never confirm it. It sees this pair of data sets and this "
    "statistic only, and no more than the number of runs allows (largest_demonstrable in the setting)."
)


class EpsilonBound(NamedTuple):
    """Lower bound on epsilon with the rates behind it."""

    epsilon: float
    true_positives: int
    false_positives: int
    n: int


def epsilon_lower_bound(
    with_sample: Tensor, without_sample: Tensor, threshold: float, *, delta: float = 1e-5, confidence: float = 0.95
) -> EpsilonBound:
    """The largest epsilon that these scores refute, at a threshold that was fixed without looking at them.

    Guarantee: with probability >= `confidence` over the runs, a mechanism that is (epsilon, delta)-private for the pair
        gives a bound <= epsilon. A threshold that was chosen on the same scores voids this.
    Args:
        with_sample: (n,) scores of the runs that used the sample.
        without_sample: (m,) scores of the runs that did not.
        threshold: A score above it says "used".
        delta: Of the claim, in [0, 1).
        confidence: Level in (0, 1). Both rates get a one-sided Clopper-Pearson bound at half of the rest.

    Source: Jagielski, Ullman, Oprea 2020, section 4; Nasr et al. 2021. Both directions of the inequality are used, with
        the same two bounds.

    Example:
        >>> bound = epsilon_lower_bound(torch.ones(100), torch.zeros(100), 0.5, delta=0.0)
        >>> round(bound.epsilon, 2)
        3.28
    """
    check_number(delta, "delta", 0.0, 1.0, open_high=True)
    check_probability(confidence, "confidence")
    threshold = check_number(threshold, "threshold")
    for name, statistics in (("with_sample", with_sample), ("without_sample", without_sample)):
        check_not_empty(len(check_tensor(statistics, name, ndim=1)), name)
    hits, alarms = int((with_sample > threshold).sum()), int((without_sample > threshold).sum())
    power = clopper_pearson(hits, len(with_sample), confidence).low
    alarm = clopper_pearson(alarms, len(without_sample), confidence).high
    forward, backward = _log_ratio(power - delta, alarm), _log_ratio(1 - alarm - delta, 1 - power)
    return EpsilonBound(max(0.0, forward, backward), hits, alarms, min(len(with_sample), len(without_sample)))


def audit_privacy(
    model: Model | None = None,
    train: Any = None,
    test: Any = None,
    *,
    train_fn: TrainFn,
    claimed_epsilon: float | None = None,
    delta: float = 1e-5,
    canary: tuple[Tensor, Tensor] | None = None,
    neighbour: Any = None,
    statistic: Statistic | None = None,
    threshold: float | None = None,
    runs: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
) -> Evidence:
    """Try to refute a claimed epsilon by experiment.

    Guarantee: if the training procedure is (claimed_epsilon, delta)-private, the bound exceeds the claim with
        probability at most 1 - confidence. No conclusion follows from a low bound.
    Args:
        model: Not used (the procedure is judged, not one of its results).
        train: Data set D. Small ones show most and cost least.
        test: Not used.
        train_fn: `train_fn(dataset, seed) -> model`, the procedure whose claim is tested. The statistic may read
            anything it returns: weights for a white-box test.
        claimed_epsilon: The claim for the pair (D, D'), >= 0; None gives the bound alone.
        delta: Of the claim.
        canary: (x, y), one sample; D' is D with it. None takes the first input of D with the next class as its label.
        neighbour: Instead of a canary, the data set D' itself.
        statistic: `statistic(model) -> float`, higher = "D' was used". None: the log-probability of the canary's label.
        threshold: Fixed a priori. None chooses it on one half of the runs and tests on the other half.
        runs: Trainings on D and as many on D', >= 4.
        confidence: Of the bound.
        seed: Run i trains with a seed derived from it.
    Returns: `privacy.epsilon_lower_bound` and, with a claim, `privacy.epsilon_excess` (bound minus claim; > 0 refutes
        the claim and is CRITICAL). Marked as not deterministic if the same seed gives two statistics (secure noise).
    Raises: ConfigurationError: bad numbers; neither canary nor neighbour where a statistic is needed.
    Cost: 2 * runs + 1 trainings.

    Source: Jagielski et al. 2020; Nasr et al. 2021; Tramer et al. 2022.

    Example:
        >>> data = torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)
        >>> leaky = lambda dataset, seed: (
        ...     lambda x: torch.full((len(x), 2), float(len(dataset))) * torch.tensor([0, 1])
        ... )
        >>> evidence = audit_privacy(train=data, train_fn=leaky, claimed_epsilon=1.0, runs=40)
        >>> evidence["privacy.epsilon_excess"].severity.name
        'CRITICAL'
    """
    check_int(runs, "runs", 4)
    if claimed_epsilon is not None:
        check_number(claimed_epsilon, "claimed_epsilon", 0.0)
    base = as_dataset(train)
    other, score = _pair(base, canary, neighbour, statistic)
    outcomes = [_runs(train_fn, data, score, runs, seed, side) for side, data in enumerate((base, other))]
    repeats = _one_run(train_fn, base, score, seed, 0, 0) == float(outcomes[0][0])
    without_sample, with_sample = outcomes
    tested = slice(None)
    if threshold is None:
        tested = slice(runs // 2, None)
        threshold = _choose(with_sample[: runs // 2], without_sample[: runs // 2], delta, confidence)
    bound = epsilon_lower_bound(
        with_sample[tested], without_sample[tested], threshold, delta=delta, confidence=confidence
    )
    best = epsilon_lower_bound(torch.ones(bound.n), torch.zeros(bound.n), 0.5, delta=delta, confidence=confidence)
    setting = {
        "claimed_epsilon": claimed_epsilon,
        "delta": delta,
        "confidence": confidence,
        "threshold": threshold,
        "true_positives": bound.true_positives,
        "false_positives": bound.false_positives,
        "largest_demonstrable": best.epsilon,
        "seed": seed,
    }
    findings = _findings(bound, claimed_epsilon, setting, repeats)
    return Evidence(findings, {"part": "privacy", "seed": seed})


def _findings(
    bound: EpsilonBound, claimed: float | None, setting: dict[str, Any], deterministic: bool
) -> list[Finding]:
    broken = claimed is not None and bound.epsilon > claimed
    common: dict[str, Any] = {
        "n": 2 * bound.n,
        "setting": setting,
        "threat": _THREAT,
        "limits": _LIMITS,
        "severity": Severity.CRITICAL if broken else Severity.INFO,
        "deterministic": deterministic,
    }
    title = f"Epsilon of the training procedure is at least this, at {setting['confidence']:.4g} confidence"
    findings = [found("privacy.epsilon_lower_bound", title, bound.epsilon, **common)]
    if claimed is not None:
        verdict = "the claim is refuted" if broken else "the claim is not refuted"
        title = f"Lower bound minus the claimed epsilon of {claimed:.4g}: {verdict}"
        findings.append(found("privacy.epsilon_excess", title, bound.epsilon - claimed, **common))
    return findings


def _pair(
    base: Dataset[Any], canary: tuple[Tensor, Tensor] | None, neighbour: Any, statistic: Statistic | None
) -> tuple[Dataset[Any], Statistic]:
    if neighbour is not None:
        if statistic is None or canary is not None:
            cure = "Pass statistic= with neighbour=, or canary= alone"
            raise refuse("a statistic for a neighbour", "statistic, canary", (statistic, canary), cure)
        return as_dataset(neighbour), statistic
    if statistic is not None:
        check_callable(statistic, "statistic", "Pass statistic(model) -> float")
    if canary is not None and (not isinstance(canary, tuple | list) or len(canary) != 2):
        raise refuse("canary to be one sample (x, y)", "canary", canary, "Pass a tensor and its class")
    x, y = canary if canary is not None else _default_canary(base)
    try:
        x, y = torch.as_tensor(x), torch.as_tensor(y, dtype=torch.int64).reshape(())
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise refuse("canary to be one sample (x, y)", "canary", canary, "Pass a tensor and its class") from error
    added = TensorDataset(x[None], y[None])
    return ConcatDataset([base, added]), statistic or (lambda model: float(LossThreshold()(model, x[None], y[None])[0]))


def _default_canary(base: Dataset[Any]) -> tuple[Tensor, Tensor]:
    x, labels = gather_labelled(base, "train")
    classes = max(2, int(labels.max()) + 1)
    return x[0], (labels[0] + 1) % classes


def _runs(train_fn: TrainFn, data: Any, score: Statistic, runs: int, seed: int, side: int) -> Tensor:
    numbers = progress(range(runs), f"privacy: {'with' if side else 'without'} the sample", total=runs)
    return torch.tensor([_one_run(train_fn, data, score, seed, side, i) for i in numbers], dtype=torch.float64)


def _one_run(train_fn: TrainFn, data: Any, score: Statistic, seed: int, side: int, number: int) -> float:
    model = train_isolated(train_fn, data, derive_seed(seed, "run", side, number) % 2**31)
    value = float(score(model))
    if math.isnan(value):
        raise AidefendError("Expected a statistic that is a number, got statistic(model)=nan. Return a finite score.")
    return value


def _choose(with_sample: Tensor, without_sample: Tensor, delta: float, confidence: float) -> float:
    """The threshold with the best bound on these runs; they are not used again."""
    points = torch.cat([with_sample, without_sample]).unique()
    middles = (points[1:] + points[:-1]) / 2 if len(points) > 1 else points
    bounds = [
        epsilon_lower_bound(with_sample, without_sample, float(point), delta=delta, confidence=confidence).epsilon
        for point in middles
    ]
    best = max(bounds)
    tied = middles[torch.tensor([bound == best for bound in bounds])]
    return float(tied.median())


def _log_ratio(numerator: float, denominator: float) -> float:
    if numerator <= 0:
        return 0.0
    return math.inf if denominator <= 0 else math.log(numerator / denominator)
