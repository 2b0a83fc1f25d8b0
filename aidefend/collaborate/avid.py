"""Evidence as a report for the AI Vulnerability Database (AVID)."""

from typing import Any

from aidefend._core.evidence import Evidence, Finding


def to_avid(
    evidence: Evidence,
    *,
    artifact: str = "model",
    developer: str = "unknown",
    deployer: str = "unknown",
    date: str = "1970-01-01",
) -> dict[str, Any]:
    """A draft report in AVID's schema: one metric for each finding that was measured.

    Args:
        evidence: Findings. Those with another status than "measured" are listed in the description, never as results.
        artifact: Name of the model or data set.
        developer: Who made it.
        deployer: Who runs it.
        date: Day of the report, YYYY-MM-DD.
    Returns: The report as JSON types.
    Source: AVID report schema as published with avidtools 0.2 (2025).
    Example:
        >>> to_avid(Evidence([Finding("a.b", "Title", value=0.5)]))["metrics"][0]["results"]["value"]
        0.5
    """
    measured = [finding for finding in evidence.findings if finding.status == "measured"]
    others = [f"{finding.id}: {finding.status}" for finding in evidence.findings if finding.status != "measured"]
    limits = [f"{finding.id}: {finding.limits}" for finding in measured if finding.limits]
    text = "\n".join([f"Evidence digest {evidence.digest}.", *others, *limits])
    techniques = sorted({finding.mapping["atlas"] for finding in evidence.findings if "atlas" in finding.mapping})
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
        "references": [{"type": "source", "label": technique, "url": _atlas(technique)} for technique in techniques],
        "description": {"lang": "eng", "value": text},
        "impact": {
            "avid": {
                "vuln_id": None,
                "risk_domain": ["Security"],
                "sep_view": [],
                "lifecycle_view": ["L05: Evaluation"],
                "taxonomy_version": "0.2",
            }
        },
        "credit": [],
        "reported_date": date,
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


def _atlas(technique: str) -> str:
    return f"https://atlas.mitre.org/techniques/{technique}"
