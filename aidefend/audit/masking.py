"""Signs that an attack was fooled: each check passes, fails, or could not be shown."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aidefend._core.modules import looks_like_probabilities, training_layers
from aidefend.attacks.evasion import APGD, PGD
from aidefend.audit.robustness_bench import Bench
from aidefend.audit.robustness_result import CurvePoint, MaskingCheck, Outcome

_FEW = 0.05
_NOISE_LEAD = 0.002
_BLACK_BOX_LEAD, _DEEPER_LEAD = 0.002, 0.005
_DRIFT = 1e-3
_ROUNDING = 1e-5


def check_logits_kind(bench: Bench) -> MaskingCheck:
    """Probabilities in the place of logits: their gradient vanishes where the model is sure."""
    found = looks_like_probabilities(bench.logits)
    detail = "the model returns probabilities: return the logits" if found else "outputs are logits"
    return MaskingCheck("probability_outputs", "fail" if found else "pass", None, None, detail)


def check_modes(bench: Bench) -> MaskingCheck:
    """Layers in train mode: chance and batch mates enter the answer."""
    layers = training_layers(bench.model)
    names = ", ".join(layer.path or "(model)" for layer in layers[:5])
    detail = f"in train mode: {names}: call model.eval()" if layers else "no layer is in train mode"
    return MaskingCheck("train_mode_layers", "fail" if layers else "pass", float(len(layers)), 0.0, detail)


def check_repeatable(bench: Bench, rows: Tensor) -> MaskingCheck:
    """Two passes over the same batch agree."""
    drift = _drift(*bench.passes(bench.x[rows], 2))
    detail = "largest change of a logit between two passes, as a share of their range"
    outcome: Outcome = "fail" if drift > _DRIFT else "pass"
    return MaskingCheck("randomised_outputs", outcome, drift, _DRIFT, detail)


def check_batch_mates(bench: Bench, rows: Tensor, repeatable: MaskingCheck) -> MaskingCheck:
    """A row's answer is the same in another order and in small batches."""
    name, detail = "batch_mates", "largest change of a logit in another order and batch size, as a share of their range"
    if repeatable.outcome == "fail":
        return MaskingCheck(name, "not shown", None, _DRIFT, "outputs are random, so this cannot be told apart")
    x = bench.x[rows]
    mixed = bench.outputs(x.flip(0), batch_size=max(1, min(7, len(x) // 2))).flip(0)
    drift = _drift(bench.outputs(x), mixed)
    return MaskingCheck(name, "fail" if drift > _DRIFT else "pass", drift, _DRIFT, detail)


def check_gradients(bench: Bench, rows: Tensor) -> tuple[MaskingCheck, MaskingCheck]:
    """Rows without any input gradient (margin loss), and rows where cross-entropy alone has none (saturation)."""
    dead = _dead(bench.gradients(rows, "margin"))
    starved = _dead(bench.gradients(rows, "cross_entropy")) & ~dead
    zero = _share("zero_gradients", dead, _FEW, "share of rows whose margin has no usable input gradient")
    saturated = _share("saturated_loss", starved, _FEW, "share of rows whose cross-entropy gradient underflows to zero")
    return zero, saturated


def check_noise(by_noise: Tensor, by_gradient: Tensor) -> MaskingCheck:
    """Random points of the threat must not do what the gradient attacks did not do."""
    name, n = "noise_beats_gradient", max(1, len(by_noise))
    alone, noise, gradient = (int(part.sum()) for part in (by_noise & ~by_gradient, by_noise, by_gradient))
    detail = f"of {len(by_noise)} rows, noise broke {noise}, the gradient attacks {gradient}, noise alone {alone}"
    if not noise and not gradient:
        return MaskingCheck(name, "not shown", 0.0, _NOISE_LEAD, detail)
    failed = alone > max(1.0, _NOISE_LEAD * n) or noise >= gradient
    return MaskingCheck(name, "fail" if failed else "pass", alone / n, _NOISE_LEAD, detail)


def black_box_leads(broken: int, n: int) -> bool:
    """Whether queries broke more than 0.2 points (and more than one row) that the gradient attacks before left."""
    return broken > max(1.0, _BLACK_BOX_LEAD * n)


def check_black_box(broken: int | None, n: int, deeper: int = 0) -> MaskingCheck:
    """Attacks without gradients must not do what attacks with gradients did not do; None: there were none.

    Broken: rows that the first search broke, `deeper`: those that a search with many more queries added. More effort
    may find a little more: both together have the half point of the check of doubled steps.
    """
    if broken is None:
        detail = "no attack without gradients is run in this norm"
        return MaskingCheck("black_box_beats_white_box", "not shown", None, _BLACK_BOX_LEAD, detail)
    name = "black_box_beats_white_box"
    detail = "share of all rows that attacks without gradients broke where those with gradients before them failed"
    failed = black_box_leads(broken, n) or broken + deeper > max(1.0, _DEEPER_LEAD * n)
    return MaskingCheck(name, "fail" if failed else "pass", (broken + deeper) / max(1, n), _BLACK_BOX_LEAD, detail)


def check_flat_curve(points: Sequence[CurvePoint]) -> MaskingCheck:
    """Accuracy must go on falling as eps grows: a plateau well below the clean accuracy is a sign of dead gradients.

    A plateau: less than a point is lost while eps grows fourfold or more, at an accuracy between 10 % and 10 points
    below that of the smallest radius. The measure is the loss over the flattest such stretch.
    """
    name, limit = "flat_curve", 0.01
    clean = points[0].accuracy if points else 0.0
    losses = [
        near.accuracy - far.accuracy
        for near in points
        for far in points
        if near.eps > 0 and far.eps >= 4 * near.eps and far.accuracy > 0.1 and near.accuracy < clean - 0.1
    ]
    if not losses:
        return MaskingCheck(name, "not shown", None, limit, "the curve has no middle part that spans a factor of four")
    detail = "smallest loss of accuracy over a fourfold growth of eps, in the middle part of the curve"
    outcome: Outcome = "fail" if min(losses) < limit else "pass"
    return MaskingCheck(name, outcome, min(losses), limit, detail)


def check_single_step(bench: Bench, rows: Tensor, steps: int) -> MaskingCheck:
    """What one step broke, many steps must break."""
    name, detail = "iterative_weaker_than_single_step", "share of the rows broken by one step that many steps left"
    if len(rows) == 0:
        return MaskingCheck(name, "not shown", None, _FEW, "one step broke no row")
    result = bench.attack("single-step check", lambda threat: PGD(threat, steps=steps), rows)
    return _share(name, ~result.success, _FEW, detail)


def nothing_stands() -> list[MaskingCheck]:
    """The checks of the strength of the attacks where every row broke: nothing can have been missed."""
    names = (
        "noise_beats_gradient",
        "iterative_weaker_than_single_step",
        "more_steps_break_more",
        "large_eps_leaves_accuracy",
    )
    return [MaskingCheck(name, "pass", None, None, "every row is broken: no attack was too weak") for name in names]


def check_large_eps(bench: Bench, rows: Tensor, steps: int) -> MaskingCheck:
    """With the whole range of the data allowed, no row can stand."""
    name = "large_eps_leaves_accuracy"
    radius = whole_radius(bench)
    if radius is None or bench.threat.mask is not None:
        return MaskingCheck(name, "not shown", None, _FEW, "the bounds are infinite, or some features are immutable")
    in_l2 = bench.threat.norm == "l2"
    whole = dataclasses.replace(
        bench.threat, norm="l2" if in_l2 else "linf", eps=radius if in_l2 else _span(bench), scale=None
    )
    first = bench.attack("large eps", lambda t: APGD(t, steps, loss="margin", random_start=False), rows, whole)
    left = rows[~first.success]
    second = bench.attack("large eps 2", lambda t: APGD(t, steps, loss="margin", restarts=2), left, whole)
    standing = torch.zeros(len(rows), dtype=torch.bool)
    standing[: int((~second.success).sum())] = True
    return _share(name, standing, _FEW, "share of rows that stand when every point of the data range is allowed")


def check_steps(accuracy: float, low: float, tested: int, broken: int) -> MaskingCheck:
    """Twice the steps must not change the accuracy by more than half a point and out of its interval."""
    name, detail = "more_steps_break_more", f"accuracy lost with twice the steps, from {tested} standing rows"
    if tested == 0:
        return MaskingCheck(name, "pass", 0.0, 0.005, "no row stands")
    lost = accuracy * broken / tested
    failed = lost > 0.005 and accuracy - lost < low
    return MaskingCheck(name, "fail" if failed else "pass", lost, 0.005, detail)


def whole_radius(bench: Bench) -> float | None:
    """The radius that allows the whole range of the data; None where the range is infinite."""
    span = _span(bench)
    if bench.threat.scale is not None:
        span *= float(bench.threat.scale.max())
    features = max(1, bench.x[0].numel())
    radius = {"linf": span, "l2": span * math.sqrt(features), "l1": span * features, "l0": float(features)}
    return radius[bench.threat.norm] if math.isfinite(span) else None


def _span(bench: Bench) -> float:
    low, high = bench.threat.limits(bench.x)
    return float((high - low).max())


def _share(name: str, flags: Tensor, limit: float, detail: str) -> MaskingCheck:
    if len(flags) == 0:
        return MaskingCheck(name, "not shown", None, limit, "no row is right without an attack")
    value = float(flags.double().mean())
    return MaskingCheck(name, "fail" if value > limit else "pass", value, limit, detail)


def _dead(gradients: Tensor) -> Tensor:
    flat = gradients.flatten(1)
    return ~flat.isfinite().all(dim=1) | (flat == 0).all(dim=1)


def _drift(first: Tensor, second: Tensor) -> float:
    """Largest difference as a share of the range; what rounding alone explains is 0."""
    a, b = (part.double().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30) for part in (first, second))
    if a.numel() == 0:
        return 0.0
    drift = float((a - b).abs().max() / (a.max() - a.min()).clamp(min=1e-12))
    return drift if drift > _ROUNDING else 0.0
