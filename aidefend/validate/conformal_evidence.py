"""A calibration as evidence: rate of false alarms, alarms a day, share of strange rows found."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.stats import Interval
from aidefend.validate.decision import LIMITS


class _Calibrated(Protocol):
    """What is read of a calibration."""

    @property
    def n(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def mode(self) -> str: ...
    @property
    def delta(self) -> float: ...
    @property
    def history(self) -> tuple[Mapping[str, object], ...]: ...
    def interval(self, confidence: float = 0.95) -> Interval: ...
    def alarms_a_day(self, rows_a_day: float, confidence: float = 0.95) -> Interval: ...
    def detection(self, scores: Tensor, classes: Tensor | None = None, confidence: float = 0.95) -> Interval: ...


def conformal_evidence(
    calibration: _Calibrated, rows_a_day: float | None, strange: Mapping[str, Tensor], confidence: float
) -> Evidence:
    """See `Calibration.to_evidence`."""
    setting = {"alpha": calibration.alpha, "mode": calibration.mode, "confidence": confidence}
    if calibration.mode == "calibration-conditional":
        setting["delta"] = calibration.delta
    title = "Clean rows that are refused: the mean over calibration sets, and the range for this one"
    rate = calibration.interval(confidence)
    found = [_finding("false_positive_rate", title, rate, calibration.n, {**setting, "follows": _length(calibration)})]
    if rows_a_day is not None:
        title = "False alarms a day at this traffic"
        alarms = calibration.alarms_a_day(rows_a_day, confidence)
        found.append(_finding("alarms_a_day", title, alarms, calibration.n, {**setting, "rows_a_day": rows_a_day}))
    for name, scores in strange.items():
        title = f"Strange rows that are refused: {name}"
        share = calibration.detection(scores, confidence=confidence)
        found.append(_finding(f"true_positive_rate.{name}", title, share, len(scores), setting))
    return Evidence(found, {"method": "conformal calibration"})


def _length(calibration: _Calibrated) -> int:
    return len(calibration.history)


def _finding(name: str, title: str, value: Interval, n: int, setting: Mapping[str, object]) -> Finding:
    return Finding(
        f"calibration.{name}",
        title,
        Severity.INFO,
        *value,
        n=n,
        setting=dict(setting),
        limits=LIMITS,
        mapping={"atlas": "AML.M0015"},
    )
