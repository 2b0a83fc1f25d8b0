"""Evidence as a report for the AI Vulnerability Database (AVID)."""

import re
from collections.abc import Mapping
from typing import Any

from aidefend._core.checks import refuse
from aidefend._core.evidence import Evidence, Finding
from aidefend.collaborate import marking

# Entries of AVID's security view for techniques of ATLAS; a technique without one of its own has none here.
_SECURITY_VIEW: Mapping[str, str] = {
    "AML.T0010": "S0200: Supply Chain Compromise",
    "AML.T0011.000": "S0201: Model Compromise",
    "AML.T0015": "S0400: Model Bypass",
    "AML.T0018": "S0201: Model Compromise",
    "AML.T0020": "S0600: Data Poisoning",
    "AML.T0024.000": "S0301: Information Leak",
    "AML.T0024.001": "S0501: Model inversion",
    "AML.T0024.002": "S0502: Model theft",
    "AML.T0043": "S0403: Adversarial Example",
}
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def to_avid(
    evidence: Evidence,
    *,
    artifact: str = "model",
    developer: str = "unknown",
    deployer: str = "unknown",
    date: str = "1970-01-01",
) -> dict[str, Any]:
    """A draft report in AVID's schema: one metric for each finding that was measured.

    Guarantee: equal arguments give an identical report. Settings of findings are not in it.
    Args:
        evidence: Findings. Those with another status than "measured" are listed in the description, never as results.
        artifact: Name of the model or data set.
        developer: Who made it.
        deployer: Who runs it.
        date: Day of the report, YYYY-MM-DD.
    Returns: The report as JSON types.
    Raises: ConfigurationError: malformed date or names, evidence of another type.
    Source: AVID report schema as published with avidtools 0.2 (2025).
    Example:
        >>> to_avid(Evidence([Finding("a.b", "Title", value=0.5)]))["metrics"][0]["results"]["value"]
        0.5
    """
    _check(evidence, {"artifact": artifact, "developer": developer, "deployer": deployer}, date)
    measured = [finding for finding in evidence.findings if finding.status == "measured"]
    others = [f"{finding.id}: {finding.status}" for finding in evidence.findings if finding.status != "measured"]
    limits = [f"{finding.id}: {finding.limits}" for finding in measured if finding.limits]
    text = "\n".join([f"Evidence digest {evidence.digest}.", *others, *limits])
    entries = sorted({entry for finding in evidence.findings for entry in marking.techniques(finding.mapping)})
    return {
        "data_type": "AVID",
        "data_version": None,
        "metadata": None,
        "affects": {
            "developer": [developer],
            "deployer": [deployer],
            "artifacts": [{"type": "Model", "name": artifact}],
        },
        "problemtype": {
            "classof": "Undefined",
            "type": "Measurement",
            "description": {"lang": "eng", "value": f"Security measurements of {artifact}"},
        },
        "metrics": [_metric(finding) for finding in measured],
        "references": [{"type": "source", "label": entry, "url": marking.atlas_page(entry)} for entry in entries],
        "description": {"lang": "eng", "value": text},
        "impact": {"avid": _impact(entries)},
        "credit": [],
        "reported_date": date,
    }


def _impact(entries: list[str]) -> dict[str, Any]:
    return {
        "vuln_id": None,
        "risk_domain": ["Security"],
        "sep_view": sorted({_SECURITY_VIEW[entry] for entry in entries if entry in _SECURITY_VIEW}),
        "lifecycle_view": ["L05: Evaluation"],
        "taxonomy_version": "0.2",
    }


def _metric(finding: Finding) -> dict[str, Any]:
    fields = finding.to_dict()
    return {
        "name": finding.id,
        "detection_method": {
            "type": "Significance Test" if finding.low is not None else "Static Threshold",
            "name": finding.title,
        },
        "results": {name: fields[name] for name in ("value", "low", "high", "n")},
    }


def _check(evidence: Any, names: Mapping[str, str], date: str) -> None:
    if not isinstance(evidence, Evidence):
        cure = "Use to_evidence() of a report, or Evidence()"
        raise refuse("evidence", "evidence", type(evidence).__name__, cure)
    for name, value in names.items():
        if not marking.is_name(value):
            raise refuse("a printable name of 1 to 256 characters", name, value, "Shorten it")
    if not isinstance(date, str) or not _DATE.fullmatch(date) or not marking.is_time(f"{date}T00:00:00Z"):
        raise refuse("a day such as 2026-01-31", "date", date, "Use YYYY-MM-DD")
