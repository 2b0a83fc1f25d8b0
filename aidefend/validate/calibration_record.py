"""What a calibration promises, as words and as evidence."""

import dataclasses
from typing import Any

from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.stats import wilson
from aidefend.validate.calibrating import Facts
from aidefend.validate.calibration import JointCalibration
from aidefend.validate.decision import LIMITS
from aidefend.validate.spec import InputSpec


def summarise(facts: Facts, calibration: JointCalibration, mode: str) -> str:
    """Two lines: what is refused, and how often that happens to clean rows."""
    rate = calibration.interval()
    return (
        f"guard ({mode}): refuses rows whose combined p-value is at most {facts.alpha:g}; detectors "
        f"{', '.join(calibration.names)} fitted on {facts.fit_n} rows, scaled on {facts.reference_n}, "
        f"calibrated on n={facts.calibration_n}.\n"
        f"false positives: {rate.value:.3%} on average over calibration sets; with this one, between {rate.low:.3%} "
        f"and {rate.high:.3%} (95 %); the specification refused {facts.refused_n} further calibration rows."
    )


def calibration_evidence(facts: Facts, calibration: JointCalibration, spec: InputSpec, mode: str) -> Evidence:
    """Rate of false positives with its interval, and the share of calibration rows that the specification refused."""
    setting: dict[str, Any] = {**dataclasses.asdict(facts), "detectors": list(calibration.names), "mode": mode}
    seen = facts.calibration_n + facts.refused_n
    false_positives = Finding(
        "guard.false_positive_rate",
        "Clean rows that the detectors refuse: calibrated rate, with its 95 % range for this calibration set",
        Severity.INFO,
        *calibration.interval(),
        n=facts.calibration_n,
        setting=setting,
        limits=LIMITS,
        mapping={"atlas": "AML.M0015"},
    )
    refused = Finding(
        "guard.specification_refused_share",
        "Calibration rows that the input specification refused",
        Severity.INFO,
        *wilson(facts.refused_n, seen),
        n=seen,
        setting={"spec": spec.to_dict()},
    )
    return Evidence([false_positives, refused], {"method": "guard", "seed": facts.seed})
