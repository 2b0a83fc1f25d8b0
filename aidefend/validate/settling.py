"""The end of a call: audit log, settlement of the budget, metrics; what fails here refuses every row."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from aidefend.validate.calibration import COMBINED
from aidefend.validate.collaborators import Admission, Collaborators, failure
from aidefend.validate.decision import Repeated, Verdict

_CODES = {
    "access": "access",
    "budget": "budget",
    "queries": "access",
    "input": "specification",
    "quarantine": "specification",
    "model": "error",
    "detector": "detector",
    "error": "error",
}


class Call(NamedTuple):
    """What belongs to one call: who asked, what is reserved, whether the model has run, how long it took."""

    principal: str | None
    admission: Admission
    spent: bool
    seconds: float
    setting: dict[str, Any]


def settle(
    collaborators: Collaborators, call: Call, verdict: Verdict, refuse: Callable[[int, str], Verdict]
) -> Verdict:
    """Log, then commit or refund, then count; returns the verdict, or a refusal of all rows if one of these failed.

    The log comes before the answer: what is not on record is not delivered. If a later step fails, a second event
    records that the answer was withheld.
    """
    final = verdict
    for step, run in (("log", _append), ("budget", _settle_budget), ("metrics", _observe)):
        try:
            run(collaborators, call, final)
        except Exception as error:
            final = dataclasses.replace(refuse(len(verdict.reasons), failure(step, error)), drifted=verdict.drifted)
            if step != "log":
                _append_quietly(collaborators, call, final)
    return final


def count_reasons(verdict: Verdict) -> dict[str, int]:
    """How many rows carry each reason."""
    if isinstance(verdict.reasons, Repeated):
        return {verdict.reasons[0][0]: len(verdict.reasons)} if len(verdict.reasons) else {}
    found: dict[str, int] = {}
    for row in verdict.reasons:
        for reason in row:
            found[reason] = found.get(reason, 0) + 1
    return dict(sorted(found.items()))


def _append(collaborators: Collaborators, call: Call, verdict: Verdict) -> None:
    """One event of numbers and words: never an input, an output or a hash of one."""
    if collaborators.log is None:
        return
    rows, accepted = len(verdict.reasons), int(verdict.answered.sum())
    event = {
        "event": "guard.decision",
        "principal": call.principal,
        "resource": collaborators.resource,
        "rows": rows,
        "accepted": accepted,
        "refused": rows - accepted,
        "reasons": count_reasons(verdict),
        "setting": call.setting,
    }
    collaborators.log.append(event | ({"queries": verdict.remark} if verdict.remark else {}))


def _append_quietly(collaborators: Collaborators, call: Call, verdict: Verdict) -> None:
    try:
        _append(collaborators, call, verdict)
    except Exception as error:
        failure("log", error)


def _settle_budget(collaborators: Collaborators, call: Call, _: Verdict) -> None:
    collaborators.settle(call.admission, spent=call.spent)


def _observe(collaborators: Collaborators, call: Call, verdict: Verdict) -> None:
    if collaborators.metrics is None:
        return
    refused = not bool(verdict.answered.all())
    reason = _first_code(verdict) if refused else "none"
    name = ("failed" if reason == "error" else "refused") if refused else "accepted"
    p_values = verdict.p_values[COMBINED]
    known = [] if isinstance(verdict.reasons, Repeated) else p_values[~p_values.isnan()].tolist()
    collaborators.metrics.observe(
        verdict=name, reason=reason, rows=len(verdict.reasons), seconds=call.seconds, p_values=known
    )


def _first_code(verdict: Verdict) -> str:
    """The code of the first row that got no answer."""
    row = int((~verdict.answered).int().argmax())
    reasons = verdict.reasons[row]
    return _CODES.get(reasons[0].partition(":")[0], "error") if reasons else "error"
