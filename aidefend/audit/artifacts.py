"""The model's files, judged by an inspector that is passed in."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from aidefend._core.checks import check_callable, refuse
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend.audit.mapping import references
from aidefend.audit.subject import found

Inspector = Callable[[str | os.PathLike[str]], Evidence]


def audit_artifacts(
    model: Any = None,
    train: Any = None,
    test: Any = None,
    *,
    path: str | os.PathLike[str],
    inspector: Inspector,
    verifier: Callable[[str | os.PathLike[str]], Any] | None = None,
    seed: int = 0,
) -> Evidence:
    """Let an inspector judge every file, and a verifier the whole.

    Guarantee: that of the inspector and the verifier. An inspector that finds nothing is a failed check.
    Args:
        model: Not used, like train, test and seed; accepted so that every part has the same arguments.
        train: Not used.
        test: Not used.
        path: A file or folder.
        inspector: `inspector(path) -> Evidence`, such as `aidefend.artifacts.inspect_artifact`.
        verifier: `verifier(path)` that raises where the content is not what was signed, such as `Manifest.verify`.
        seed: Not used.
    Returns: The inspector's findings and `artifacts.problems`, the number of findings above INFO or not measured; with
        a verifier `artifacts.verified`.
    Raises: ConfigurationError: the inspector returns no Evidence.

    Example:
        >>> clean = lambda path: Evidence([Finding("artifacts.accepted", "model.safetensors is accepted")])
        >>> audit_artifacts(path="model.safetensors", inspector=clean)["artifacts.problems"].value
        0
    """
    check_callable(inspector, "inspector", "Pass aidefend.artifacts.inspect_artifact")
    if verifier is not None:
        check_callable(verifier, "verifier", "Pass verifier(path) that raises on failure, such as manifest.verify")
    inspected: Any = inspector(path)
    if not isinstance(inspected, Evidence):
        cure = "Pass inspector(path) -> Evidence"
        raise refuse("the inspector to return Evidence", "inspector(path)", type(inspected).__name__, cure)
    findings = [dataclasses.replace(item, mapping=item.mapping or references(item.id)) for item in inspected.findings]
    if verifier is not None:
        findings.append(_verified(verifier, path))
    return Evidence([_summary(findings), *findings], {**inspected.metadata, "part": "artifacts"})


def _summary(findings: list[Finding]) -> Finding:
    bad = [finding for finding in findings if finding.severity > Severity.INFO or finding.status != "measured"]
    worst = max((finding.severity for finding in findings), default=Severity.HIGH)
    return found(
        "artifacts.problems",
        "Problems found in the files",
        len(bad),
        n=len(findings),
        severity=worst,
        status="measured" if findings else "failed",
        limits="An accepted file can still hold a bad model." if findings else "The inspector looked at nothing.",
    )


def _verified(verifier: Callable[[str | os.PathLike[str]], Any], path: str | os.PathLike[str]) -> Finding:
    title = "The files are what was signed"
    try:
        verifier(path)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return found("artifacts.verified", title, "no", severity=Severity.CRITICAL, setting={"reason": reason})
    return found("artifacts.verified", title, "yes")
