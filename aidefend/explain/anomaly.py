"""Decisions that look at unusual places: a patch trigger draws the attribution to where its class never has any."""

from typing import Literal

import torch
from torch import Tensor

from aidefend._core.batches import content_ids
from aidefend._core.checks import check_int, check_logits, check_not_empty, check_probability, check_tensor, refuse
from aidefend._core.modules import Model, evaluate, naming_the_model, preserve
from aidefend._core.random import make_generator
from aidefend._core.report import Report, reasons_by_row
from aidefend._core.stats import conformal_p_values
from aidefend.explain.attribution import attribute


def attribution_anomaly(
    model: Model,
    x: Tensor,
    reference: Tensor,
    *,
    alpha: float = 0.01,
    method: Literal["saliency", "integrated_gradients", "smoothgrad"] = "integrated_gradients",
    steps: int = 8,
    seed: int = 0,
    batch_size: int = 256,
) -> Report:
    """Compare where each decision looks with where clean inputs of the same predicted class look.

    Guarantee: for a row exchangeable with the reference rows, P(p <= alpha) <= alpha. Nothing against a trigger that
        covers what the class uses anyhow, or an attacker who trains the model to have innocent attributions.
    Args:
        model: Callable from (N, ...) to logits; run in eval mode and left as it was.
        x: (N, ...) inputs to judge. Rows that are not finite are refused with a reason.
        reference: (n, ...) clean inputs that the model was not trained on; n >= 2 (1 / alpha) and at least 20. A seeded
            half gives the usual places of each class, the other half calibrates.
        alpha: Rows with p <= alpha are not kept.
        method: How attributions are computed.
        steps: Points of the integral (or noisy copies for SmoothGrad).
        seed: Splits the reference.
        batch_size: Rows in memory at once.
    Returns: Report with scores and p_values "attribution".
    Raises: ConfigurationError: too few reference rows, shapes differ, reference not finite.
    Cost: `steps` forward and backward passes for each row of x and reference.
    Source: after SentiNet (Chou et al. 2020) and attribution-based inspection; the statistic, the mean log ratio of a
        row's attribution mass to that of its class, and its calibration are ours.
    Example:
        >>> stream = torch.Generator().manual_seed(0)
        >>> weight = torch.tensor([[1.0, 0, 0, 9], [0, 1.0, 0, 0]])
        >>> clean = torch.rand(200, 4, generator=stream) * torch.tensor([1, 1, 1, 0.01])
        >>> stamped = clean[:1] + torch.tensor([0, 0, 0, 5.0])
        >>> attribution_anomaly(lambda z: z @ weight.T, stamped, clean, alpha=0.05).keep.tolist()
        [False]
    """
    check_probability(alpha, "alpha")
    check_int(steps, "steps")
    check_int(batch_size, "batch_size")
    check_tensor(x, "x", floating=True, finite=False)
    check_tensor(reference, "reference", floating=True)
    needed = max(20, 2 * round(1 / alpha))
    if len(reference) < needed or reference.shape[1:] != x.shape[1:]:
        rule = f"at least {needed} reference rows of shape {tuple(x.shape[1:])}"
        raise refuse(rule, "reference", reference, "Pass more clean rows or raise alpha")
    order = torch.randperm(len(reference), generator=make_generator(seed=seed))
    usual, calibration = reference[order[::2]], reference[order[1::2]]
    look = _Look(model, method, steps, seed, batch_size)
    maps = _ClassMaps(*look(usual))
    good = torch.isfinite(x.flatten(1)).all(dim=1) if x[0:1].numel() else torch.ones(len(x), dtype=torch.bool)
    scores = torch.full((len(x),), torch.nan, dtype=torch.float64)
    scores[good] = maps.surprise(*look(x[good]))
    p_values = conformal_p_values(scores, maps.surprise(*look(calibration)))
    keep = good & (p_values > alpha)
    return Report(
        content_ids(x),
        keep,
        {"attribution": scores},
        {"attribution": p_values},
        reasons_by_row(len(x), _remarks(good, keep, p_values)),
        "attribution_anomaly",
        {"alpha": alpha, "method": method, "steps": steps, "seed": seed, "reference_n": len(reference)},
        "an input with a localised trigger, given to a model that reacts to it",
        "Innocent-looking attributions can be trained into a model; a trigger where the class looks anyhow is missed.",
    )


class _Look:
    """Predicted class and attribution mass of rows."""

    def __init__(self, model: Model, method: str, steps: int, seed: int, batch_size: int) -> None:
        self._model, self._method, self._steps = model, method, steps
        self._seed, self._batch_size = seed, batch_size

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        classes, mass = [], []
        for part in torch.split(x, self._batch_size):
            with preserve(self._model), torch.no_grad(), naming_the_model(part):
                evaluate(self._model)
                predicted = check_logits(self._model(part), len(part)).argmax(dim=1).cpu()
            found = attribute(
                self._model,
                part,
                predicted,
                self._method,  # type: ignore[arg-type]  # narrowed by the signature above
                steps=self._steps,
                samples=self._steps,
                batch_size=self._batch_size,
                generator=make_generator(seed=self._seed),
            )
            classes.append(predicted)
            mass.append(found.mass().flatten(1).cpu())
        return torch.cat(classes), torch.cat(mass)


class _ClassMaps:
    """Mean attribution mass of each class, blended with that of all classes where a class has few rows."""

    def __init__(self, classes: Tensor, mass: Tensor) -> None:
        check_not_empty(len(classes), "reference")
        self._all = mass.mean(dim=0)
        self._by_class: dict[int, Tensor] = {}
        for label in classes.unique().tolist():
            rows = mass[classes == label]
            self._by_class[label] = (rows.sum(dim=0) + 5 * self._all) / (len(rows) + 5)

    def surprise(self, classes: Tensor, mass: Tensor) -> Tensor:
        """Mean log ratio of a row's mass to that of its class (a relative entropy, >= 0 up to the floor)."""
        floor = 0.01 / mass.shape[1]
        expected = torch.stack([self._by_class.get(label, self._all) for label in classes.tolist()] or [self._all])
        expected = expected[: len(classes)] + floor
        return (mass * torch.log((mass + floor) / expected)).sum(dim=1)


def _remarks(good: Tensor, keep: Tensor, p_values: Tensor) -> list[tuple[int, str]]:
    found = []
    for row in (~keep).nonzero().flatten().tolist():
        if good[row]:
            found.append((row, f"the decision rests on places unusual for its class (p = {float(p_values[row]):.3g})"))
        else:
            found.append((row, "the row is not finite"))
    return found
