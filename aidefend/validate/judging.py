"""One batch through the specification's survivors, the model and the detectors: a verdict for each row."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from aidefend._core.checks import check_callable, refuse
from aidefend._core.errors import AidefendError
from aidefend._core.modules import Model
from aidefend.validate.calibration import COMBINED, JointCalibration
from aidefend.validate.collaborators import Watched, failure
from aidefend.validate.decision import Verdict, refused_constant
from aidefend.validate.detector import FittedDetector, Rows, score_columns
from aidefend.validate.features import Outputs, PassCapture
from aidefend.validate.outputs import Output, harden
from aidefend.validate.spec_result import SpecResult

Mode = Literal["enforce", "monitor", "shadow"]
Watch = Callable[[Tensor, Tensor], Watched]


@dataclasses.dataclass(frozen=True)
class Panel:
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


def judge(panel: Panel, checked: SpecResult, x: Tensor, rows: Tensor, watch: Watch) -> Verdict:
    """The verdict on x (N, ...) after one pass over its rows with these numbers (ascending, at least one).

    `watch` sees the rows that satisfy the specification, also those that the detectors refuse: an attacker learns from
    both. A detector that fails, and an account that is suspended, refuse every row, which the modes "monitor" and
    "shadow" do not enforce.
    """
    n = len(x)
    given = x if len(rows) == n else x[rows]
    outputs = panel.capture.run(panel.model, given)
    healthy = torch.isfinite(outputs.logits).all(dim=1) & torch.isfinite(outputs.features).all(dim=1)
    allowed = checked.accepted[rows]
    usable = allowed & healthy
    scored = rows[usable]
    opinion = _opinion(panel, *_select(outputs, given, usable))
    remarks = dict.fromkeys(rows[allowed & ~healthy].tolist(), ("model: output not finite",))
    remarks |= {i: (text,) for i, text in zip(scored[opinion.strange].tolist(), opinion.remarks, strict=True)}
    watched = watch(given[allowed], outputs.logits[allowed])
    keep = torch.zeros(n, dtype=torch.bool, device=rows.device)
    keep[scored] = ~opinion.strange if not watched.refusal else False
    barred = (watched.refusal,) if watched.refusal else ()
    answered = keep if panel.mode == "enforce" else torch.zeros_like(keep)
    answered[scored if panel.mode == "monitor" else rows[:0]] = True
    if panel.mode == "shadow":
        answered[rows] = True
    return Verdict(
        keep,
        answered,
        _shown(panel, outputs.logits[answered[rows]], x, answered),
        tuple(barred + reasons + remarks.get(i, ()) for i, reasons in enumerate(checked.reasons)),
        {name: _spread(values, scored, n) for name, values in opinion.scores.items()},
        {name: _spread(values, scored, n) for name, values in opinion.p_values.items()},
        watched.remark,
        opinion.ranks,
    )


def _opinion(panel: Panel, outputs: Outputs, x: Tensor) -> _Opinion:
    """Scores, p-values and refusals; if a detector fails, every row is refused without numbers."""
    calibration = panel.calibration
    try:
        rows = Rows(outputs.features, outputs.logits, x, panel.model)
        scores = score_columns(panel.detectors, rows).to(calibration.device)
        joined, p_values, ranks, strange = calibration.judge(scores, outputs.logits.argmax(dim=1))
    except Exception as error:
        n = len(outputs.logits)
        unknown = outputs.logits.new_full((n,), torch.nan, dtype=torch.float64)
        nothing = dict.fromkeys([*calibration.names, COMBINED], unknown)
        refused = torch.ones_like(unknown, dtype=torch.bool)
        return _Opinion(nothing, nothing, unknown[:0], refused, [failure("detectors", error)] * n)
    names = (*calibration.names, COMBINED)
    lowest = p_values[:-1, strange].argmin(dim=0).tolist()
    remarks = [f"detector: unlike the calibration data ({names[i]})" for i in lowest]
    return _Opinion(
        dict(zip(names, (*scores.T, joined), strict=True)),
        dict(zip(names, p_values, strict=True)),
        ranks,
        strange,
        remarks,
    )


def _select(outputs: Outputs, x: Tensor, keep: Tensor) -> tuple[Outputs, Tensor]:
    return (outputs, x) if bool(keep.all()) else (Outputs(outputs.logits[keep], outputs.features[keep]), x[keep])


def _spread(values: Tensor, rows: Tensor, n: int) -> Tensor:
    """Values at their rows, NaN elsewhere: (n,)."""
    if len(rows) == n:
        return values
    spread = values.new_full((n,), torch.nan)
    spread[rows] = values
    return spread


def _shown(panel: Panel, logits: Tensor, x: Tensor, answered: Tensor) -> Tensor:
    """Outputs of all rows: hardened logits where there is an answer, the constant elsewhere."""
    hardened = logits
    if panel.output is not None and panel.mode != "shadow":
        hardened = harden(panel.output, logits, x if len(logits) == len(x) else x[answered])
    if hardened.shape[1:] != panel.blank.shape or len(hardened) != len(logits):
        raise refuse(f"outputs of shape {tuple(panel.blank.shape)} a row", "output", hardened, "Keep shape and order")
    if len(logits) == len(answered):
        return hardened
    shown = panel.blank.to(hardened).expand(len(answered), *panel.blank.shape).clone()
    shown[answered] = hardened
    return shown
