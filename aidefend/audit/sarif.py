"""Findings as SARIF 2.1.0, which code-scanning services take."""

import hashlib
from typing import Any
from urllib.parse import quote

import aidefend
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.storage import canonical_json, plain
from aidefend.audit.cleaning import interval, number, one_line, visible
from aidefend.audit.mapping import NAMES, link

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {
    Severity.INFO: "none",
    Severity.LOW: "note",
    Severity.MEDIUM: "warning",
    Severity.HIGH: "error",
    Severity.CRITICAL: "error",
}
_SCORES = {Severity.LOW: "2.0", Severity.MEDIUM: "5.0", Severity.HIGH: "8.0", Severity.CRITICAL: "9.5"}
_CATALOGUES = {"atlas": "MITRE ATLAS", "nist": "NIST AI 100-2", "owasp": "OWASP ML Top 10", "cwe": "CWE"}


def sarif_log(evidence: Evidence) -> dict[str, Any]:
    """The whole log as JSON types.

    Kinds: a measured finding above INFO is "fail" with its level; INFO is "informational"; "not tested" is
    "notApplicable"; "not shown" is "open"; a broken check is "fail" at level error and a notification of the run, which
    then counts as unsuccessful. Nothing is dropped.
    """
    groups: dict[str, list[Finding]] = {}
    for finding in evidence.findings:
        groups.setdefault(_id(finding), []).append(finding)
    rules = list(groups)
    broken = [finding for finding in evidence.findings if finding.status == "failed"]
    run = {
        "tool": {
            "driver": {
                "name": "aidefend",
                "version": aidefend.__version__,
                "semanticVersion": aidefend.__version__,
                "rules": [_rule(same[0], max(item.severity for item in same)) for same in groups.values()],
            }
        },
        "invocations": [
            {
                "executionSuccessful": not broken,
                "toolExecutionNotifications": [_notification(finding) for finding in broken],
            }
        ],
        "results": [_result(finding, rules.index(_id(finding))) for finding in evidence.findings],
        "columnKind": "unicodeCodePoints",
        "properties": {"digest": evidence.digest, "metadata": _clean(evidence.metadata)},
    }
    if taxonomies := _taxonomies(evidence):
        run["taxonomies"] = taxonomies
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(finding: Finding, worst: Severity) -> dict[str, Any]:
    entries = [(name, entry) for name, entries in finding.mapping.items() for entry in _entries(entries)]
    tags = dict.fromkeys(["security", *(one_line(entry) for _, entry in entries)])
    properties: dict[str, Any] = {"tags": list(tags)}
    if worst in _SCORES:
        properties["security-severity"] = _SCORES[worst]
    rule: dict[str, Any] = {
        "id": _id(finding),
        "name": _pascal(finding.id),
        "shortDescription": {"text": _name(finding.id)},
        "fullDescription": {"text": visible(finding.threat).strip() or _name(finding.id)},
        "defaultConfiguration": {"level": "warning"},
        "properties": properties,
    }
    if entries and entries[0][1] in NAMES:
        rule["helpUri"] = link(entries[0][1])
    known = dict.fromkeys((name, entry) for name, entry in entries if entry in NAMES and name in _CATALOGUES)
    if known:
        rule["relationships"] = [
            {"target": {"id": entry, "toolComponent": {"name": _CATALOGUES[name]}}, "kinds": ["relevant"]}
            for name, entry in known
        ]
    return rule


def _result(finding: Finding, rule: int) -> dict[str, Any]:
    kind, level = _kind(finding)
    return {
        "ruleId": _id(finding),
        "ruleIndex": rule,
        "kind": kind,
        "level": level,
        "message": {"text": _message(finding)},
        "locations": [_location(finding)],
        "partialFingerprints": {"finding/v1": _fingerprint(finding)},
        "properties": {
            "status": finding.status,
            "severity": finding.severity.name,
            "value": _clean(finding.value),
            "low": _clean(finding.low),
            "high": _clean(finding.high),
            "n": finding.n,
            "setting": _clean(finding.setting),
            "threat": visible(finding.threat),
            "limits": visible(finding.limits),
        },
    }


def _kind(finding: Finding) -> tuple[str, str]:
    if finding.status == "failed":
        return "fail", "error"
    if finding.status == "not tested":
        return "notApplicable", "none"
    if finding.status == "not shown":
        return "open", "none"
    level = _LEVELS[finding.severity]
    return ("informational", "none") if level == "none" else ("fail", level)


def _location(finding: Finding) -> dict[str, Any]:
    path = finding.setting.get("path")
    if not isinstance(path, str) or not path:
        return {"logicalLocations": [{"fullyQualifiedName": _id(finding).partition(".")[0], "kind": "module"}]}
    address = quote(visible(path), safe="/")
    place: dict[str, Any] = {"artifactLocation": {"uri": address.lstrip("/") or "."}}
    line = finding.setting.get("line")
    if isinstance(line, int) and not isinstance(line, bool) and line >= 1:
        place["region"] = {"startLine": line}
    return {"physicalLocation": place}


def _message(finding: Finding) -> str:
    parts = [visible(finding.title) or _id(finding)]
    if finding.value is not None:
        shown = interval(finding.low, finding.high)
        parts.append(f"value {number(finding.value)}{f' (95 % interval {shown})' if shown else ''}")
    if finding.status != "measured":
        parts.append(f"{finding.status}: {visible(finding.limits)}")
    elif "reason" in finding.setting:
        parts.append(visible(finding.setting["reason"]))
    return ". ".join(parts)


def _notification(finding: Finding) -> dict[str, Any]:
    reason = finding.setting.get("error") or finding.setting.get("reason") or finding.limits
    return {"level": "error", "message": {"text": f"{_id(finding)}: {visible(reason)}"}}


def _fingerprint(finding: Finding) -> str:
    """Stays while the same thing is found again: id and place, not the measured value."""
    place = {key: finding.setting.get(key) for key in ("path", "line", "target")}
    return hashlib.sha256(canonical_json([finding.id, place]).encode()).hexdigest()


def _taxonomies(evidence: Evidence) -> list[dict[str, Any]]:
    used: dict[str, set[str]] = {}
    for finding in evidence.findings:
        for name, entries in finding.mapping.items():
            if name in _CATALOGUES:
                used.setdefault(name, set()).update(entry for entry in _entries(entries) if entry in NAMES)
    return [
        {
            "name": _CATALOGUES[name],
            "taxa": [
                {"id": entry, "name": NAMES[entry], "helpUri": link(entry), "shortDescription": {"text": NAMES[entry]}}
                for entry in sorted(entries)
            ],
        }
        for name, entries in sorted(used.items())
        if entries
    ]


def _entries(text: str) -> list[str]:
    return [entry for entry in (part.strip() for part in str(text).split(",")) if entry]


def _clean(value: Any) -> Any:
    """JSON types with visible texts only."""
    value = plain(value)
    if isinstance(value, dict):
        return {visible(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return visible(value) if isinstance(value, str) else value


def _id(finding: Finding) -> str:
    return one_line(finding.id) or "finding"


def _name(finding_id: str) -> str:
    return one_line(finding_id).replace(".", ": ", 1).replace("_", " ") or "finding"


def _pascal(finding_id: str) -> str:
    words = "".join(symbol if symbol.isalnum() else " " for symbol in finding_id).split()
    return "".join(word[:1].upper() + word[1:] for word in words) or "Finding"
