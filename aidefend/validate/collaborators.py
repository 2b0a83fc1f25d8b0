"""What a guard takes from outside: policy, budget, monitors, audit log, metrics, and the order in which it asks."""

import dataclasses
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from aidefend._core.checks import check_kind, refuse
from aidefend._core.errors import BudgetExceeded

ACTION = "predict"
_METHODS = {
    "policy": ("authorize",),
    "budget": ("reserve", "commit", "refund"),
    "log": ("append",),
    "metrics": ("observe",),
    "queries": ("watch",),
    "drift": ("observe",),
}
_LOGGER = logging.getLogger("aidefend.validate")
_LOGGER.addHandler(logging.NullHandler())  # silent until the application configures logging


class Authorization(Protocol):
    """What a policy answers."""

    @property
    def allowed(self) -> bool:
        """Whether the request may go on."""

    @property
    def reason(self) -> str:
        """Why, in words, for the operator."""


class Policy(Protocol):
    """Decides who may do what."""

    def authorize(self, principal: str, action: str, resource: str) -> Authorization:
        """Allow or deny; the guard asks for the action "predict" on its `resource`."""


class Budget(Protocol):
    """Counts what each principal asks for, in cost units (one unit a row)."""

    def reserve(self, principal: str, cost: float) -> Any:
        """Set units aside and return a reservation, or raise `BudgetExceeded` and spend nothing."""

    def commit(self, reservation: Any) -> None:
        """The reserved units are spent."""

    def refund(self, reservation: Any) -> None:
        """The reserved units return."""


class Log(Protocol):
    """A durable record."""

    def append(self, event: Mapping[str, Any]) -> int:
        """Write one event of JSON values; returns its sequence number once it is on disk."""


class MetricsSink(Protocol):
    """Counters and histograms."""

    def observe(self, *, verdict: str, reason: str, rows: int, seconds: float, p_values: Sequence[float] = ()) -> None:
        """Record one call.

        Args:
            verdict: "accepted" (every row has an answer), "refused" or "failed".
            reason: Of the first row without an answer, "access", "budget", "specification", "detector" or "error";
                "none" if every row has one.
            rows: Rows of the call.
            seconds: Its duration.
            p_values: Combined p-values of the rows that were scored.
        """


class Standing(Protocol):
    """What a query monitor says of an account after a call."""

    @property
    def allowed(self) -> bool:
        """Whether the account gets answers."""

    @property
    def remark(self) -> str:
        """What the operator should know, empty if nothing; never for the client."""


class Queries(Protocol):
    """Remembers what each principal asked, and says whether it still gets answers."""

    def watch(self, principal: str, x: Tensor, outputs: Tensor) -> Standing:
        """Take note of rows that the model has answered.

        Args:
            principal: Who asks.
            x: (n, ...), n >= 0, as the model saw them.
            outputs: (n, K) logits before hardening; may hold NaN.
        """


class DriftAlarm(Protocol):
    """What a drift monitor says."""

    @property
    def alarm(self) -> bool:
        """Calibration no longer holds; once true, true for good."""


class Drift(Protocol):
    """Watches whether served rows are still like the calibration rows."""

    def observe(self, p_values: Tensor) -> DriftAlarm:
        """Take note of the p-values (n,), n >= 0, in (0, 1], of served rows among all calibration rows."""


class Watched(NamedTuple):
    """Why a batch gets no answers, empty if it does, and what the operator should know."""

    refusal: str
    remark: str


@dataclasses.dataclass(frozen=True)
class Collaborators:
    """The six, each optional, and the name of what they protect."""

    policy: Policy | None = None
    budget: Budget | None = None
    log: Log | None = None
    metrics: MetricsSink | None = None
    resource: str = "model"
    queries: Queries | None = None
    drift: Drift | None = None

    def __post_init__(self) -> None:
        """A collaborator that cannot do its work is found when the guard is made, not at its first call."""
        check_kind(self.resource, str, "resource", "Name what the guard protects")
        for name, methods in _METHODS.items():
            given = getattr(self, name)
            if given is not None and not all(callable(getattr(given, method, None)) for method in methods):
                rule = f"{name} with {', '.join(f'.{method}()' for method in methods)}"
                raise refuse(rule, name, given, "Pass one of aidefend.monitor, or your own with these methods")
            for method in methods if given is not None else ():
                _check_runs_at_once(name, method, given)

    def present(self) -> tuple[str, ...]:
        """Names of those that are there."""
        return tuple(name for name in _METHODS if getattr(self, name) is not None)

    def admit(self, principal: str | None, rows: int) -> "Admission":
        """Authorize, then reserve. Every exception is a refusal."""
        if not principal:
            needed = any(part is not None for part in (self.policy, self.budget, self.queries))
            return Admission("access: no principal" if needed else None)
        step = "policy"
        try:
            if self.policy is not None:
                answer = self.policy.authorize(principal, ACTION, self.resource)
                if answer.allowed is not True:
                    return Admission(f"access: {answer.reason}")
            step = "budget"
            if self.budget is not None:
                return Admission(None, self.budget.reserve(principal, float(rows)), True)
        except BudgetExceeded:
            return Admission("budget: exceeded")
        except Exception as error:
            return Admission(failure(step, error))
        return Admission(None)

    def watch(self, principal: str | None, x: Tensor, outputs: Tensor) -> Watched:
        """Show the monitor what the model has answered. Every exception is a refusal."""
        if self.queries is None or principal is None:
            return Watched("", "")
        try:
            standing = self.queries.watch(principal, x, outputs)
            return Watched("" if standing.allowed is True else "queries: suspended", str(standing.remark))
        except Exception as error:
            return Watched(failure("queries", error), "")

    def drifted(self, ranks: Tensor | None) -> bool:
        """Show the drift monitor the p-values of scored rows; whether it has raised its alarm."""
        if self.drift is None:
            return False
        nothing = torch.zeros(0, dtype=torch.float64)
        return self.drift.observe(nothing if ranks is None else ranks).alarm is not False

    def watched_anew(self, drift: Drift | None) -> "Collaborators":
        """The same for another calibration: the old drift monitor watched the old one."""
        if (drift is None) != (self.drift is None):
            rule = "a new drift monitor if and only if the guard has one"
            raise refuse(rule, "drift", drift, "Pass drift=DriftMonitor(calibration_n=...), or call follow first")
        return dataclasses.replace(self, drift=drift)

    def settle(self, admission: "Admission", *, spent: bool) -> None:
        """Commit or refund what was reserved."""
        if self.budget is not None and admission.reserved:
            (self.budget.commit if spent else self.budget.refund)(admission.reservation)


def _check_runs_at_once(name: str, method: str, given: Any) -> None:
    """Refuse a coroutine function: nobody would wait for it, so that a budget never counts and a log never writes."""
    own = getattr(given, method)
    if inspect.iscoroutinefunction(own) or inspect.iscoroutinefunction(getattr(own, "__call__", None)):  # noqa: B004
        cure = "Wrap it in a function that returns the result, and call the guard in a thread"
        raise refuse(f"{name}.{method}() that is no coroutine function", name, given, cure)


def check_band(drift: Drift | None, n: int) -> None:
    """Refuse a drift monitor whose rate of false alarms does not hold for p-values among n calibration rows.

    One that does not say for how many rows it was made is its owner's affair.
    """
    if drift is None or not hasattr(drift, "calibration_n"):
        return
    known = drift.calibration_n
    if known is None or known > n:
        rule = f"a drift monitor made for these {n} calibration rows, or for fewer"
        cure = (
            f"Pass DriftMonitor(calibration_n={n}): the p-values deviate from uniform by what so many rows leave open"
        )
        raise refuse(rule, "drift", f"calibration_n={known}", cure)


@dataclasses.dataclass(frozen=True)
class Admission:
    """Whether a call may go on: a refusal in words, or a reservation to settle."""

    refusal: str | None
    reservation: Any = None
    reserved: bool = False


def plain_principal(principal: object) -> str | None:
    """The name as a plain str, without the methods of a subclass; None for anything else, which is nobody."""
    return str.__str__(principal) if issubclass(type(principal), str) else None


def failure(step: str, error: Exception) -> str:
    """The reason of a row that was refused because a part failed; the details go to the operator's logger."""
    _LOGGER.error("the guard refused a call because its %s failed", step, exc_info=error)
    return f"error: {step} failed ({type(error).__name__})"
