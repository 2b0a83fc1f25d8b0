"""What a guard answers: a verdict, an output and the reasons for every row."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, overload

import torch
from torch import Tensor

from aidefend._core.batches import content_ids
from aidefend._core.errors import InputRejected
from aidefend._core.report import Report
from aidefend.validate.spec_result import quarantined_rows

LIMITS = (
    "The rate of false positives holds for rows that are exchangeable with the calibration rows: drift voids it. "
    "Detectors do not stop an attacker who knows them: attack guard.attackable() to see how far they reach."
)
_THREAT = "malformed, out-of-distribution and carelessly adversarial inputs of a model in service"
_MOST_LISTED = 65_536


@dataclasses.dataclass(frozen=True, eq=False)
class GuardDecision:
    """The answer to one call, one row for each row of the input.

    `accepted`, `outputs` are for the client; everything else is for the operator and may tell an attacker how to pass.
    Args:
        accepted: (N,) bool: the row has an answer in `outputs`. After a refusal in mode "enforce", never true.
        outputs: (N, ...) of the model, hardened if the guard hardens. A row that is not accepted holds a constant that
            is no answer: NaN where outputs are floating point, -1 where they are integers.
        p_values: Name of a detector, and "combined", to (N,) float64 in (0, 1]; NaN where the row was not scored.
        reasons: For each row why the checks object; empty if they do not. In the modes "monitor" and "shadow" a row
            can be accepted and have reasons.
        mode: Mode of the guard.
        seconds: Time that the decision took.
        drifted: The guard's drift monitor has raised its alarm: the rates no longer hold.
    """

    accepted: Tensor
    outputs: Tensor
    p_values: Mapping[str, Tensor]
    reasons: Sequence[tuple[str, ...]]
    mode: str
    seconds: float = 0.0
    drifted: bool = False
    _make_report: Callable[[], Report] = dataclasses.field(kw_only=True, repr=False)

    @functools.cached_property
    def report(self) -> Report:
        """The same as a `Report`: `keep` is what the checks say in every mode; content ids; scores by detector.

        Made when it is first read: read it before you change x in place, else the rows are numbered and not named by
        content. A batch of over 65,536 rows that is refused as a whole is one row of the report, with id "batch".
        Cost: A hash of each row, once.
        """
        return self._make_report()

    @property
    def quarantined(self) -> Tensor:
        """(N,) bool: a rule with the policy "quarantine" asks to keep the row aside, for example `x[quarantined]`."""
        return quarantined_rows(self.reasons, self.accepted)


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """What was found out about a batch, before it becomes a decision.

    Args:
        keep: (N,) bool: nothing speaks against the row.
        answered: (N,) bool: the row gets its output.
        outputs: (N, ...), constants where there is no answer.
        reasons: For each row.
        scores, p_values: Name to (N,), NaN where not scored.
        remark: Of the query monitor, for the audit log.
        ranks: (n,) p-values of the rows that were scored, among all calibration rows: for a drift monitor.
        drifted: A drift monitor has raised its alarm: calibration no longer holds.
    """

    keep: Tensor
    answered: Tensor
    outputs: Tensor
    reasons: Sequence[tuple[str, ...]]
    scores: Mapping[str, Tensor]
    p_values: Mapping[str, Tensor]
    remark: str = ""
    ranks: Tensor | None = None
    drifted: bool = False


class Repeated(Sequence[tuple[str, ...]]):
    """One item shown n times: the reasons of a batch whose number of rows an attacker chose."""

    def __init__(self, item: tuple[str, ...], n: int) -> None:
        self._item, self._n = item, n

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> "Repeated": ...
    def __getitem__(self, index: int | slice) -> "tuple[str, ...] | Repeated":
        if isinstance(index, slice):
            return Repeated(self._item, len(range(self._n)[index]))
        range(self._n)[index]  # the IndexError of any sequence
        return self._item

    def __repr__(self) -> str:
        return f"Repeated({self._item!r}, {self._n})"


def refused_constant(outputs: Tensor) -> Tensor:
    """A scalar that is no answer: NaN, or -1 for integers."""
    return outputs.new_tensor(float("nan") if outputs.is_floating_point() else -1)


def refuse_whole(n: int, reason: str, blank: Tensor, names: Sequence[str]) -> Verdict:
    """The verdict where nothing was computed: constant memory, whatever n is. `blank` is one refused output row."""
    no = torch.zeros(1, dtype=torch.bool, device=blank.device).expand(n)
    unknown = torch.full((1,), torch.nan, dtype=torch.float64, device=blank.device).expand(n)
    nothing = dict.fromkeys(names, unknown)
    return Verdict(no, no, blank.expand(n, *blank.shape), Repeated((reason,), n), nothing, nothing)


def barred(verdict: Verdict, reason: str) -> Verdict:
    """The verdict with a reason against every row, and the answers as they were."""
    return dataclasses.replace(
        verdict, keep=torch.zeros_like(verdict.keep), reasons=tuple((reason, *own) for own in verdict.reasons)
    )


def decide(x: object, verdict: Verdict, mode: str, parameters: Mapping[str, Any], seconds: float) -> GuardDecision:
    """Freeze a verdict into the answer of a guard."""
    return GuardDecision(
        verdict.answered,
        verdict.outputs,
        MappingProxyType(dict(verdict.p_values)),
        verdict.reasons,
        mode,
        seconds,
        verdict.drifted,
        _make_report=functools.partial(_report, x, _version(x), verdict, {**parameters, "mode": mode}),
    )


def all_answered(decision: GuardDecision) -> Tensor:
    """The outputs, if every row has one. Raises: InputRejected."""
    if bool(decision.accepted.all()):
        return decision.outputs
    count = len(decision.accepted) - int(decision.accepted.sum())
    message = f"Expected rows that the guard accepts, got {count} of {len(decision.accepted)} refused."
    raise InputRejected(f"{message} See .report for the reasons.", decision.report)


def _version(x: object) -> int:
    """How often x was changed in place; -1 where nothing counts that."""
    if type(x) is not Tensor:  # anything else may run its own code when it is asked
        return -1
    try:
        return -1 if Tensor.is_inference(x) else x._version
    except Exception:  # inside a transformation such as vmap
        return -1


def _report(x: object, version: int, verdict: Verdict, parameters: Mapping[str, Any]) -> Report:
    ids, shown = _row_ids(x if _version(x) == version else None, verdict), slice(None)
    if len(ids) != len(verdict.reasons):
        parameters, shown = {**parameters, "rows": len(verdict.reasons)}, slice(0, 1)
    return Report(
        ids,
        verdict.keep[shown],
        {name: values[shown] for name, values in verdict.scores.items()},
        {name: values[shown] for name, values in verdict.p_values.items()},
        tuple(verdict.reasons[shown]),
        "guard",
        parameters,
        _THREAT,
        LIMITS,
    )


def _row_ids(x: object, verdict: Verdict) -> tuple[str, ...]:
    """Content ids of what was judged row by row; plain numbers for a batch that nothing may read."""
    if not isinstance(verdict.reasons, Repeated) and type(x) is Tensor:
        return content_ids(Tensor.detach(x))
    n = len(verdict.reasons)
    return tuple(f"row-{i}" for i in range(n)) if n <= _MOST_LISTED else ("batch",)
