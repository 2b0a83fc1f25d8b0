"""What a calibration promises, as words and as evidence."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.stats import Interval, wilson
from aidefend.validate.calibrating import Facts
from aidefend.validate.calibration import JointCalibration
from aidefend.validate.decision import LIMITS
from aidefend.validate.spec import InputSpec


def summarise(facts: Facts, calibration: JointCalibration, mode: str, rows_a_day: float | None = None) -> str:
    """What is refused, how often that happens to clean rows, and how many alarms a day that makes."""
    rate = calibration.interval()
    promise = f"{facts.promise}, 1 - delta = {1 - facts.delta:g}" if _bound(facts) else facts.promise
    text = (
        f"guard ({mode}): refuses rows whose combined p-value is at most {facts.alpha:g} ({promise}); detectors "
        f"{', '.join(calibration.names)} fitted on {facts.fit_n} rows, scaled on {facts.reference_n}, "
        f"calibrated on n={calibration.n}.\n"
        f"false positives: {rate.value:.3%} on average over calibration sets; with this one, between {rate.low:.3%} "
        f"and {rate.high:.3%} (95 %); the specification refused {facts.refused_n} further calibration rows."
    )
    if missing := _classes_without_rows(facts, calibration):
        named = f"{', '.join(map(str, missing[:20]))}{', ...' if len(missing) > 20 else ''}"
        text += f"\nno calibration rows, so that every row is refused, of {len(missing)} predicted classes: {named}."
    if rows_a_day is None:
        return text
    alarms = calibration.law.alarms_a_day(rows_a_day)
    return f"{text}\nfalse alarms a day at {rows_a_day:g} clean rows: {alarms.low:.0f} to {alarms.high:.0f} (95 %)."


def in_force(calibration: JointCalibration, drifted: bool) -> dict[str, Any]:
    """What every event and report says of the calibration by which its rows were judged."""
    setting = {"alpha": calibration.alpha, "n": calibration.n, "detectors": list(calibration.names)}
    setting |= {} if calibration.mode == "marginal" else {"promise": calibration.mode}
    return setting | ({"drift_alarm": True} if drifted else {})


def _classes_without_rows(facts: Facts, calibration: JointCalibration) -> list[int]:
    """Classes that no calibration row was predicted as, where the threshold is that of the class."""
    if calibration.mode != "class-conditional":
        return []
    return sorted({*range(facts.num_classes)} - {*calibration.classes.tolist()})


def _bound(facts: Facts) -> bool:
    return facts.promise == "calibration-conditional"


def calibration_evidence(
    facts: Facts,
    calibration: JointCalibration,
    spec: InputSpec,
    mode: str,
    rows_a_day: float | None,
    detected: Mapping[str, tuple[Interval, int]],
) -> Evidence:
    """Rate of false positives with its interval, what the specification refused, alarms a day, shares found."""
    setting: dict[str, Any] = {**dataclasses.asdict(facts), "detectors": list(calibration.names), "mode": mode}
    setting["follows"] = len(calibration.history)
    if missing := _classes_without_rows(facts, calibration):
        setting["classes_without_calibration_rows"] = missing[:100]
    seen = calibration.n + facts.refused_n
    rate = _finding(
        "guard.false_positive_rate",
        "Clean rows that the detectors refuse: calibrated rate, with its 95 % range for this calibration set",
        calibration.interval(),
        calibration.n,
        setting,
    )
    refused = Finding(
        "guard.specification_refused_share",
        "Calibration rows that the input specification refused",
        Severity.INFO,
        *wilson(facts.refused_n, seen),
        n=seen,
        setting={"spec": spec.to_dict()},
    )
    found = [rate, refused]
    if rows_a_day is not None:
        alarms = calibration.law.alarms_a_day(rows_a_day)
        traffic = {**setting, "rows_a_day": rows_a_day}
        found.append(
            _finding("guard.alarms_a_day", "False alarms a day at this traffic", alarms, calibration.n, traffic)
        )
    for name, (share, n) in detected.items():
        title = f"Strange rows that are refused at the operating point: {name}"
        found.append(_finding(f"guard.true_positive_rate.{name}", title, share, n, setting))
    return Evidence(found, {"method": "guard", "seed": facts.seed})


def _finding(name: str, title: str, value: Interval, n: int, setting: Mapping[str, Any]) -> Finding:
    mapping = {"atlas": "AML.M0015"}
    return Finding(name, title, Severity.INFO, *value, n=n, setting=dict(setting), limits=LIMITS, mapping=mapping)
