"""Signs that an attack was fooled: each check passes, fails, or could not be shown."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from aidefend._core.modules import looks_like_probabilities, training_layers
from aidefend._core.threat import Threat
from aidefend.attacks.evasion import APGD, PGD
from aidefend.audit.robustness_bench import Bench

Outcome = Literal["pass", "fail", "not shown"]
_FEW = 0.05
_NOISE_LEAD = 0.002
_DRIFT = 1e-3
_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class MaskingCheck:
    """One check: its outcome, the number measured, the limit that it was held against, and one sentence."""

    name: str
    outcome: Outcome
    value: float | None
    limit: float | None
    detail: str


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


def check_single_step(bench: Bench, rows: Tensor, steps: int) -> MaskingCheck:
    """What one step broke, many steps must break."""
    name, detail = "iterative_weaker_than_single_step", "share of the rows broken by one step that many steps left"
    if len(rows) == 0:
        return MaskingCheck(name, "not shown", None, _FEW, "one step broke no row")
    result = bench.attack("single-step check", lambda threat: PGD(threat, steps=steps), rows)
    return _share(name, ~result.success, _FEW, detail)


def check_large_eps(bench: Bench, rows: Tensor, steps: int) -> MaskingCheck:
    """With the whole range of the data allowed, no row can stand."""
    name = "large_eps_leaves_accuracy"
    low, high = bench.threat.limits(bench.x)
    span = float((high - low).max())
    if not math.isfinite(span) or bench.threat.mask is not None:
        return MaskingCheck(name, "not shown", None, _FEW, "the bounds are infinite, or some features are immutable")
    whole = Threat(bench.threat.norm, _whole_radius(bench, span), bench.threat.bounds)
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


def _whole_radius(bench: Bench, span: float) -> float:
    features = bench.x[0].numel() if len(bench.x) else 1
    return span if bench.threat.norm == "linf" else span * math.sqrt(features)


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
