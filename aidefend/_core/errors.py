"""The errors of aidefend.

    AidefendError
    |-- ConfigurationError  (also a ValueError)   a call's own arguments are wrong
    |-- ThreatModelError    (also a ValueError)   data and threat model contradict each other
    |-- IncompatibleModel   (also a ValueError)   the model cannot be used; .offenders lists every cause
    |-- PrivacyError                              a set-up would make the stated epsilon false
    |-- BudgetExceeded                            a privacy or query budget has nothing left
    |-- InputRejected                             a guard refused rows; .report says which and why
    |-- UnsafeArtifact                            a file was refused; nothing of it was executed
    `-- MissingExtra        (also an ImportError) an optional library is not installed

Messages have the form `Expected <rule>, got <name>=<value>. <what to do>.`
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aidefend._core.report import Report


class AidefendError(Exception):
    """Base of every error that aidefend raises on purpose."""


class ConfigurationError(AidefendError, ValueError):
    """An argument of the call itself is malformed (shape, dtype, range, combination)."""


class ThreatModelError(AidefendError, ValueError):
    """The data or the model contradicts the threat model, for example x outside its bounds."""


class Offender(NamedTuple):
    """One part of a model that cannot be used: its module path, the reason, and what to put in its place."""

    path: str
    reason: str
    replacement: str


class IncompatibleModel(AidefendError, ValueError):
    """A model cannot be used; `offenders` lists every cause at once, so that one round of fixes suffices."""

    def __init__(self, what: str, offenders: Sequence[Offender] = ()) -> None:
        self.what = what
        self.offenders = tuple(offenders)
        lines = [f"  {o.path or '(model)'}: {o.reason}. {o.replacement}." for o in self.offenders]
        super().__init__("\n".join([what, *lines]))

    def __reduce__(self) -> tuple[type["IncompatibleModel"], tuple[str, tuple[Offender, ...]]]:
        return type(self), (self.what, self.offenders)


class PrivacyError(AidefendError):
    """A set-up or a step would make the stated privacy guarantee false."""


class BudgetExceeded(AidefendError):
    """A privacy or query budget does not cover what was asked for. Nothing was spent."""


class InputRejected(AidefendError):
    """At least one row of a batch was refused; `report` holds the verdict and the reasons of every row."""

    def __init__(self, message: str, report: "Report | None" = None) -> None:
        self.report = report
        super().__init__(message)

    def __reduce__(self) -> tuple[type["InputRejected"], tuple[str, "Report | None"]]:
        return type(self), (str(self), self.report)


class UnsafeArtifact(AidefendError):
    """A model or data file was refused. Nothing of it was executed."""


class MissingExtra(AidefendError, ImportError):
    """An optional library is missing; the message names the extra that brings it."""

    def __init__(self, library: str, extra: str) -> None:
        self.library, self.extra = library, extra
        super().__init__(f'Expected {library} to be installed. Run: pip install "aidefend[{extra}]".')

    def __reduce__(self) -> tuple[type["MissingExtra"], tuple[str, str]]:
        return type(self), (self.library, self.extra)
