"""Verdicts on files, without loading them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from aidefend._core.errors import UnsafeArtifact
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend.artifacts.allowed import GLOBALS
from aidefend.artifacts.files import Content, read_entry, read_file, walk
from aidefend.artifacts.formats import (
    CHECKPOINT,
    SAFETENSORS,
    TEXT,
    UNKNOWN,
    ZIP,
    Format,
    check_extension,
    describe_unreadable,
    refuse_format,
    sniff,
)
from aidefend.artifacts.global_names import find_globals, outside, suspicious
from aidefend.artifacts.limits import Limits
from aidefend.artifacts.loading import check_arguments, check_top
from aidefend.artifacts.manifest_format import check_digests
from aidefend.artifacts.safetensors_format import read_layout
from aidefend.artifacts.tensor_checks import check_layout, check_planned
from aidefend.artifacts.torch_checkpoint import read_checkpoint

_MAPPING = {"atlas": "AML.T0011.000", "mitigation": "AML.M0014", "cwe": "CWE-502", "owasp": "ML06"}
_THREAT = "A model file from an untrusted source executes code, exhausts memory or was altered"
_LIMITS = {
    "accepted": "Structure only: values, origin and backdoors are not judged; safe_load checks values.",
    "unsafe": "Names of code are those that can be read off; there may be more.",
}


class _Verdict(NamedTuple):
    """word is the last part of the finding id."""

    word: str
    severity: Severity
    found: Format
    reason: str
    names: tuple[str, ...] = ()


def inspect_artifact(
    path: str | os.PathLike[str], *, limits: Limits | None = None, deny: Iterable[str] | None = None
) -> Evidence:
    r"""Judge a file, or every file below a folder, without loading, importing or building anything.

    Guarantee: "artifacts.accepted" means that `safe_load` with the same limits would pass every check but those on
        values and on torch itself. A file that nothing recognises, cannot be read, or that a check refuses never gets
        this verdict, and a folder without one recognised weights file is itself a failed finding.
    Args:
        path: A file or folder. Links are never entered.
        limits: Bounds; default Limits().
        deny: SHA-256 digests (lower-case hex) of files known to be bad, for example from shared indicators.
    Returns: Evidence: one finding a file, `setting` holding path, format, sha256, size, reason and the names of code.
        Ids: artifacts.accepted (INFO), .text (INFO), .unsupported (a format that is not read), .unsafe (HIGH; CRITICAL
        when it names code beyond torch's layers and numpy's values), .unreadable and .unrecognised (HIGH, status
        failed), .denied (CRITICAL). For the whole: artifacts.files counts the verdicts, and
        artifacts.nothing_recognised (HIGH, status failed) stands where no file was recognised as weights.
    Raises: ConfigurationError, UnsafeArtifact: malformed arguments, a path that does not exist, too many files.
    Cost: One pass over each file for its digest and its checks.
    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "model.pkl").write_bytes(b"cposix\nsystem\n(S'id'\ntR.")
        ...     evidence = inspect_artifact(folder)
        >>> evidence["artifacts.unsafe"].severity.name, evidence["artifacts.unsafe"].setting["globals"]
        ('CRITICAL', ['posix.system'])
    """
    limits = check_arguments(path, limits)
    denied = check_digests(() if deny is None else deny)
    place = Path(path)
    if place.is_dir():
        findings = [_inspect_entry(place, entry.path, entry.problem, limits, denied) for entry in walk(place, limits)]
    else:
        findings = [_finding(place.name, read_file(place, limits), limits, denied)]
    return Evidence([*findings, *_overall(findings)], {"artifact": place.name, "files": len(findings)})


def _inspect_entry(folder: Path, path: str, problem: str, limits: Limits, denied: frozenset[str]) -> Finding:
    if problem:
        return _unreadable(path, problem)
    try:
        content = read_entry(folder, path, limits)
    except UnsafeArtifact as error:
        return _unreadable(path, str(error))
    return _finding(path, content, limits, denied)


def _finding(path: str, content: Content, limits: Limits, denied: frozenset[str]) -> Finding:
    verdict = _judge(path, content, limits, denied)
    setting = {
        "path": path,
        "format": verdict.found.name,
        "sha256": content.sha256,
        "size": len(content.data),
        "reason": verdict.reason,
        "globals": list(verdict.names),
    }
    return Finding(
        f"artifacts.{verdict.word}",
        _title(path, verdict),
        verdict.severity,
        value=verdict.word,
        n=1,
        setting=setting,
        threat=_THREAT,
        limits=_LIMITS.get(verdict.word, ""),
        mapping=_MAPPING,
        status="failed" if verdict.word == "unrecognised" else "measured",
    )


def _title(path: str, verdict: _Verdict) -> str:
    """One line: the code that the file names, or the rule that it breaks."""
    if verdict.word == "accepted":
        return f"{path}: {verdict.found.name}, passes every structural check"
    if named := outside(verdict.names, GLOBALS):
        return f"{path}: {verdict.word}, {verdict.found.name} that names {', '.join(named[:3])}"
    return (
        f"{path}: {verdict.word}, {verdict.found.name}: {verdict.found.reason or verdict.reason.partition(', got ')[0]}"
    )


def _judge(path: str, content: Content, limits: Limits, denied: frozenset[str]) -> _Verdict:
    found = sniff(content.data)
    if content.sha256 in denied:
        reason = "its digest is on the deny-list"
        return _Verdict("denied", Severity.CRITICAL, found, reason, _names(content.data, found))
    if found.loadable:
        try:
            _check_structure(path, content.data, found, limits)
        except UnsafeArtifact as error:
            return _refused(found, str(error), content.data)
        return _Verdict("accepted", Severity.INFO, CHECKPOINT if found == ZIP else found, "")
    kind = describe_unreadable(path, found)
    reason = str(refuse_format(kind, path, content.data))
    if kind == UNKNOWN:
        return _Verdict("unrecognised", Severity.HIGH, kind, reason, _names(content.data, kind))
    if kind == TEXT:
        return _Verdict("text", Severity.INFO, kind, kind.reason)
    if kind.severity < Severity.HIGH:
        return _Verdict("unsupported", kind.severity, kind, reason)
    return _refused(kind, reason, content.data)


def _check_structure(path: str, data: bytes, found: Format, limits: Limits) -> None:
    check_extension(path, found)
    if found == SAFETENSORS:
        check_layout(read_layout(data, limits), limits)
    elif found == ZIP:
        checkpoint = read_checkpoint(data, limits, path)
        check_top(checkpoint.plan)
        check_planned(checkpoint.plan, sum(len(part) for part in checkpoint.storages.values()), limits)


def _refused(found: Format, reason: str, data: bytes) -> _Verdict:
    names = _names(data, found)
    severity = Severity.CRITICAL if suspicious(names, GLOBALS) else Severity.HIGH
    return _Verdict("unsafe", severity, found, reason, names)


def _names(data: bytes, found: Format) -> tuple[str, ...]:
    return () if found in (TEXT, SAFETENSORS) else tuple(find_globals(data))


def _unreadable(path: str, problem: str) -> Finding:
    setting: dict[str, Any] = {"path": path, "format": "unknown", "reason": problem, "globals": []}
    title = f"{path}: not read: {problem}"
    return Finding(
        "artifacts.unreadable",
        title,
        Severity.HIGH,
        value="unreadable",
        setting=setting,
        threat=_THREAT,
        mapping=_MAPPING,
        status="failed",
    )


def _overall(findings: list[Finding]) -> list[Finding]:
    counts: dict[str, int] = {}
    for finding in findings:
        counts[str(finding.value)] = counts.get(str(finding.value), 0) + 1
    n = len(findings)
    overall = [Finding("artifacts.files", "Files with a verdict", value=n, n=n, setting=counts, mapping=_MAPPING)]
    if not any(finding.value in ("accepted", "unsafe", "denied") for finding in findings):
        overall.append(_nothing_recognised(n))
    return overall


def _nothing_recognised(n: int) -> Finding:
    return Finding(
        "artifacts.nothing_recognised",
        "Nothing was recognised as weights, so nothing was shown to be safe",
        Severity.HIGH,
        value=0,
        n=n,
        limits="Pass the file or folder that holds safetensors or torch checkpoints.",
        mapping=_MAPPING,
        status="failed",
    )
