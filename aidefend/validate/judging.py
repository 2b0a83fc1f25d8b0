"""One batch through the specification's survivors, the model and the detectors: a verdict for each row."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, refuse
from aidefend._core.errors import AidefendError
from aidefend._core.modules import Model
from aidefend.validate.calibration import COMBINED, JointCalibration, Judged
from aidefend.validate.collaborators import Watched, failure
from aidefend.validate.decision import Verdict, refused_constant
from aidefend.validate.detector import FittedDetector, Rows, in_numpy, score_columns, score_rows
from aidefend.validate.features import Outputs, PassCapture, healthy_rows
from aidefend.validate.few_rows import MOST_ROWS
from aidefend.validate.outputs import Output, harden
from aidefend.validate.spec_result import SpecResult

Mode = Literal["enforce", "monitor", "shadow"]
_FEW = 1024  # numbers that plain Python adds up sooner than a tensor operation starts
_NO_CLASS = "detector: a predicted class without calibration rows"
Watch = Callable[[Tensor, Tensor], Watched]


class Panel(NamedTuple):
    """Everything that looks at a batch which has passed the specification."""

    model: Model
    capture: PassCapture
    detectors: tuple[FittedDetector, ...]
    calibration: JointCalibration
    output: Output | None
    mode: Mode
    blank: Tensor


class _Opinion(NamedTuple):
    """What the detectors say about n rows: numbers by name (n,), which rows they refuse (n,) bool, and why each.

    `ranks` are the p-values that a drift monitor watches; none if a detector failed.
    """

    scores: dict[str, Tensor]
    p_values: dict[str, Tensor]
    ranks: Tensor
    strange: Tensor
    remarks: list[str]


def blank_row(logits: Tensor, x: Tensor, output: Output | None, mode: Mode) -> Tensor:
    """The output of a refused row: the shape and dtype of an answer, filled with a constant that is none.

    Args:
        logits: (1, K) of any row, in the dtype of the model.
        x: (1, ...) an input as the model takes it.
        output: See `Guard.calibrate`.
        mode: Of the guard.
    Raises: ConfigurationError: `output` does not map logits (1, K) to a tensor of one row, floating point or signed.
    """
    shown: Any = logits if output is None or mode == "shadow" else _answer(logits, x, output)
    if not isinstance(shown, Tensor) or shown.ndim < 1 or len(shown) != 1:
        raise refuse("output to map logits (N, K) to N rows", "output", shown, "Return one row for each row of logits")
    if not shown.is_floating_point() and shown.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise refuse("outputs that are floating point or signed integers", "output", shown, "Return another dtype")
    return torch.full_like(shown[0], refused_constant(shown).item())


def _answer(logits: Tensor, x: Tensor, output: Output) -> Any:
    check_callable(output, "output", "Pass a callable such as LabelOnly()")
    try:
        return harden(output, logits, x)
    except AidefendError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise refuse("output to map logits (N, K) to N rows", "output", found, "Call output(logits)") from error


def judge(panel: Panel, checked: SpecResult, x: Tensor, rows: Tensor | None, watch: Watch) -> Verdict:
    """The verdict on x (N, ...) after one pass over its rows with these numbers (ascending, at least one; None = all).

    `watch` sees the rows that satisfy the specification, also those that the detectors refuse: an attacker learns from
    both. A detector that fails, and an account that is suspended, refuse every row, which the modes "monitor" and
    "shadow" do not enforce.
    """
    n = x.shape[0]
    given = x if rows is None else x[rows]
    outputs = panel.capture.run(panel.model, given)
    allowed = _unless_all(checked.accepted) if panel.mode == "shadow" else None
    healthy = _healthy(outputs)
    usable = healthy if allowed is None else allowed if healthy is None else allowed & healthy
    opinion = _opinion(panel, *_select(outputs, given, usable))
    watched = watch(_picked(given, allowed), _picked(outputs.logits, allowed))
    if rows is None and usable is None and not opinion.remarks and not watched.refusal:  # nothing speaks against a row
        keep = checked.accepted
        shown = _hardened(panel, outputs.logits, given)
        return Verdict(
            keep, keep, shown, checked.reasons, opinion.scores, opinion.p_values, watched.remark, opinion.ranks
        )
    scored = _numbers(rows, usable, x)
    remarks = _remarks(opinion, scored, _numbers(rows, None if healthy is None else ~healthy, x), checked)
    barred = (watched.refusal,) if watched.refusal else ()
    keep = _spread(~opinion.strange if not barred else torch.zeros_like(opinion.strange), scored, n, False)
    answered = _answered(panel.mode, keep, rows, scored)
    return Verdict(
        keep,
        answered,
        _shown(panel, outputs.logits, given, rows, answered),
        _reasons(checked, barred, remarks),
        {name: _spread(values, scored, n, math.nan) for name, values in opinion.scores.items()},
        {name: _spread(values, scored, n, math.nan) for name, values in opinion.p_values.items()},
        watched.remark,
        opinion.ranks,
    )


def _unless_all(mask: Tensor) -> Tensor | None:
    """The mask, or None if it holds for every row: then nothing need be picked or copied."""
    return None if bool(mask.all()) else mask


def _healthy(outputs: Outputs) -> Tensor | None:
    """Which rows have finite outputs and features; None = all. A sum is finite only if every term is."""
    if in_numpy(outputs.logits) and outputs.logits.numel() + outputs.features.numel() <= _FEW:
        total = sum(outputs.logits.flatten().tolist()) + sum(outputs.features.flatten().tolist())
    else:
        total = (outputs.logits.sum() + outputs.features.sum()).item()
    if math.isfinite(total):
        return None
    return _unless_all(healthy_rows(outputs.features, outputs.logits))


def _picked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values[mask]


def _numbers(rows: Tensor | None, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Numbers in x of the rows of the pass for which the mask holds; None = all rows of x."""
    if mask is None:
        return rows
    return mask.nonzero().flatten() if rows is None else rows[mask]


def _remarks(
    opinion: _Opinion, scored: Tensor | None, sick: Tensor | None, checked: SpecResult
) -> dict[int, tuple[str, ...]]:
    """What model and detectors say against rows, by row number."""
    found: dict[int, tuple[str, ...]] = {}
    if opinion.remarks:
        strange = opinion.strange.nonzero().flatten()
        numbers = (strange if scored is None else scored[strange]).tolist()
        found = {i: (text,) for i, text in zip(numbers, opinion.remarks, strict=True)}
    if sick is not None and sick is not scored:
        passed = sick[checked.accepted[sick]].tolist()
        found |= dict.fromkeys((i for i in passed if i not in found), ("model: output not finite",))
    return found


def _reasons(
    checked: SpecResult, barred: tuple[str, ...], remarks: dict[int, tuple[str, ...]]
) -> Sequence[tuple[str, ...]]:
    if not barred and not remarks:
        return checked.reasons
    return tuple(barred + tuple(own) + remarks.get(i, ()) for i, own in enumerate(checked.reasons))


def _answered(mode: Mode, keep: Tensor, rows: Tensor | None, scored: Tensor | None) -> Tensor:
    """(N,) bool: the rows that get their output in this mode."""
    if mode == "enforce":
        return keep
    chosen = scored if mode == "monitor" else rows
    return _spread(keep.new_ones(keep.shape[0] if chosen is None else chosen.shape[0]), chosen, keep.shape[0], False)


def _opinion(panel: Panel, outputs: Outputs, x: Tensor) -> _Opinion:
    """Scores, p-values and refusals; if a detector fails, every row is refused without numbers."""
    calibration = panel.calibration
    try:
        logits = outputs.logits if panel.capture.task == "classification" else None
        rows = Rows(outputs.features, logits, x, panel.model, checked=True)
        judged = _judged(panel, rows)
    except Exception as error:
        n = len(outputs.logits)
        unknown = outputs.logits.new_full((n,), torch.nan, dtype=torch.float64)
        nothing = dict.fromkeys([*calibration.names, COMBINED], unknown)
        refused = torch.ones_like(unknown, dtype=torch.bool)
        return _Opinion(nothing, nothing, unknown[:0], refused, [failure("detectors", error)] * n)
    names = (*calibration.names, COMBINED)
    numbers, own = judged.numbers, slice(len(names), -1)
    lowest = torch.stack(numbers[own])[:, judged.refused].argmin(dim=0).tolist() if judged.some else []
    remarks = [f"detector: unlike the calibration data ({names[i]})" for i in lowest]
    if judged.some and panel.calibration.mode == "class-conditional":
        strangers = numbers[-1][judged.refused].isnan().tolist()
        remarks = [_NO_CLASS if alone else remark for alone, remark in zip(strangers, remarks, strict=True)]
    scores, p_values = (dict(zip(names, half, strict=True)) for half in (numbers[: len(names)], numbers[len(names) :]))
    return _Opinion(scores, p_values, judged.ranks, judged.refused, remarks)


def _judged(panel: Panel, rows: Rows) -> Judged:
    """The calibration's answer; in plain numbers where there are few, since each tensor operation has its price."""
    calibration, features = panel.calibration, rows.features
    if calibration.mode == "class-conditional" and rows.logits is not None:
        scores = score_columns(panel.detectors, rows).to(calibration.device)
        return calibration.judge(scores, rows.logits.argmax(dim=1))
    if features.shape[0] <= MOST_ROWS and in_numpy(features) and in_numpy(calibration.scores):
        return calibration.judge_few([*zip(*(score_rows(one, rows).tolist() for one in panel.detectors), strict=True)])
    return calibration.judge(score_columns(panel.detectors, rows).to(calibration.device))


def _select(outputs: Outputs, x: Tensor, keep: Tensor | None) -> tuple[Outputs, Tensor]:
    return (outputs, x) if keep is None else (Outputs(outputs.logits[keep], outputs.features[keep]), x[keep])


def _spread(values: Tensor, rows: Tensor | None, n: int, rest: float | bool) -> Tensor:
    """Values at their rows, `rest` elsewhere: (n,)."""
    if rows is None:
        return values
    spread = values.new_full((n,), rest)
    spread[rows] = values
    return spread


def _shown(panel: Panel, logits: Tensor, given: Tensor, rows: Tensor | None, answered: Tensor) -> Tensor:
    """Outputs of all rows: hardened logits where there is an answer, the constant elsewhere."""
    chosen = _unless_all(answered if rows is None else answered[rows])
    hardened = _hardened(panel, _picked(logits, chosen), _picked(given, chosen))
    n = answered.shape[0]
    if hardened.shape[0] == n:
        return hardened
    shown = panel.blank.to(hardened).expand(n, *panel.blank.shape).clone()
    shown[answered] = hardened
    return shown


def _hardened(panel: Panel, logits: Tensor, given: Tensor) -> Tensor:
    """What a client sees of logits (n, K) for inputs (n, ...)."""
    shown = logits if panel.output is None or panel.mode == "shadow" else harden(panel.output, logits, given)
    if shown.shape[1:] != panel.blank.shape or shown.shape[0] != logits.shape[0]:
        raise refuse(f"outputs of shape {tuple(panel.blank.shape)} a row", "output", shown, "Keep shape and order")
    return shown
