"""A folder of an AI system: who may write, what is secret, what is signed, what was left behind."""

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from aidefend._core.checks import check_int, check_number, check_path, refuse
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend.audit.secrets import find_secrets
from aidefend.audit.subject import found

_TEXT = {
    ".cfg", ".conf", ".env", ".ini", ".ipynb", ".json", ".md", ".properties", ".ps1", ".py", ".sh", ".toml", ".txt",
    ".xml", ".yaml", ".yml",
}  # fmt: skip
_TEXT_NAMES = {".env", ".netrc", ".npmrc", ".pypirc", "dockerfile", "credentials", "config", "makefile"}
_UNSAFE = {".pkl", ".pickle", ".joblib", ".dill", ".pt", ".pth", ".ckpt"}
_PERHAPS_TORCH = {".bin", ".model"}
_SAFE = {".safetensors", ".gguf", ".onnx"}
_LEFTOVER = (".partial", ".tmp", ".temp", ".swp", ".bak", ".orig", ".old", "~", ".crdownload", ".part")
_SIGNATURES = (".sig", ".sigstore", ".asc", ".minisig", ".manifest.json", ".sigstore.json")
_FOLDER_SIGNATURES = ("manifest.json", "model.sig", "aidefend-manifest.json")
_THREAT = "Other users of the machine, whoever receives a copy of the folder, and whoever can replace a file in it."


class _Entry(NamedTuple):
    path: Path
    name: str
    info: os.stat_result


def audit_storage(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    max_files: int = 20_000,
    max_read: int = 1_000_000,
    stale_days: float = 1.0,
) -> Evidence:
    """Walk a folder and report what endangers the models and data in it. Reads only; follows no link; runs nothing.

    Guarantee: none: it finds carelessness, not intent. Formats are judged by name and by their first bytes: use
        `audit_artifacts` with an inspector for a verdict on the content.
    Args:
        folder: An existing folder (not a link).
        seed: Not used; accepted so that every part has the same arguments.
        max_files: Stop after so many entries and say so (a finding "not shown").
        max_read: Bytes read of a text file, in search of secrets.
        stale_days: Age from which temporary files count as left behind.
    Returns: One finding for each problem, with `setting["path"]` relative to the folder: `storage.permissions` (others
        may write; HIGH), `storage.secret` (HIGH, never with the secret itself), `storage.unsafe_checkpoint` (a format
        that can run code when it is loaded; MEDIUM), `storage.unsigned_checkpoint` (no signature or manifest beside
        it; LOW), `storage.link` (LOW), `storage.leftover` (LOW), `storage.unreadable` (MEDIUM, status failed); and
        `storage.problems`, their number.
    Raises: ConfigurationError: no such folder.
    Cost: One `lstat` an entry, at most `max_read` bytes of each text file and 16 bytes of each other file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "settings.ini").write_text("token = 9f8a7b6c5d4e3f2a1b0c")
        ...     audit_storage(folder)["storage.secret"].setting["path"]
        'settings.ini'
    """
    root = check_path(folder, "folder")
    check_int(max_files, "max_files")
    check_int(max_read, "max_read")
    check_number(stale_days, "stale_days", 0.0)
    if root.is_symlink() or not root.is_dir():
        raise refuse("an existing folder that is no link", "folder", str(folder), "Pass the folder itself")
    findings: list[Finding] = []
    entries: list[_Entry] = []
    for entry in _walk(root, findings):
        if len(entries) >= max_files:
            findings.append(_cut(max_files))
            break
        entries.append(entry)
    names = {entry.name for entry in entries}
    for entry in entries:
        findings += _judge(entry, names, max_read, stale_days)
    findings.sort(key=lambda finding: (-finding.severity, finding.id, str(finding.setting.get("path"))))
    return Evidence([_summary(findings, len(entries)), *findings], {"part": "storage"})


def _walk(root: Path, findings: list[Finding]) -> Iterator[_Entry]:
    """All entries below root in a fixed order; links are reported as entries and never entered."""
    yield _entry(root, root)
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as listing:
                children = sorted(listing, key=lambda child: child.name)
            entries = [_entry(root, Path(child.path)) for child in children]
        except OSError as error:
            findings.append(_problem("unreadable", _relative(root, folder), f"{type(error).__name__}", Severity.MEDIUM))
            continue
        yield from entries
        pending += [entry.path for entry in reversed(entries) if stat.S_ISDIR(entry.info.st_mode)]


def _entry(root: Path, path: Path) -> _Entry:
    return _Entry(path, _relative(root, path), path.lstat())


def _judge(entry: _Entry, names: set[str], max_read: int, stale_days: float) -> list[Finding]:
    mode = entry.info.st_mode
    if stat.S_ISLNK(mode):
        return [_problem("link", entry.name, "a link that was not followed", Severity.LOW)]
    findings = []
    if mode & stat.S_IWOTH and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
        reason = f"anybody on the machine may write (mode {stat.S_IMODE(mode):o})"
        findings.append(_problem("permissions", entry.name, reason, Severity.HIGH))
    if not stat.S_ISREG(mode):
        return findings
    findings += _leftover(entry, stale_days)
    try:
        findings += _checkpoint(entry, names)
        findings += _secrets(entry, max_read)
    except OSError as error:
        findings.append(_problem("unreadable", entry.name, type(error).__name__, Severity.MEDIUM))
    return findings


def _leftover(entry: _Entry, stale_days: float) -> list[Finding]:
    age = (time.time() - entry.info.st_mtime) / 86_400
    if not entry.name.lower().endswith(_LEFTOVER) or age < stale_days:
        return []
    return [_problem("leftover", entry.name, "a temporary or backup file that was left behind", Severity.LOW)]


def _checkpoint(entry: _Entry, names: set[str]) -> list[Finding]:
    suffix = entry.path.suffix.lower()
    reason = _can_run_code(_read(entry.path, 16), suffix)
    findings = [_problem("unsafe_checkpoint", entry.name, reason, Severity.MEDIUM)] if reason else []
    if (reason or suffix in _SAFE) and not _signed(entry.name, names):
        reason = "no signature or manifest beside it"
        findings.append(_problem("unsigned_checkpoint", entry.name, reason, Severity.LOW))
    return findings


def _can_run_code(head: bytes, suffix: str) -> str:
    """Why loading this file with its usual loader may run code; empty if nothing speaks for it."""
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return "the content is a pickle"
    if head.startswith(b"PK\x03\x04") and suffix in _UNSAFE | _PERHAPS_TORCH:
        return f"a zip archive named {suffix}: checkpoints of torch hold pickles"
    return f"files named {suffix} hold pickles as a rule" if suffix in _UNSAFE else ""


def _signed(name: str, names: set[str]) -> bool:
    place = PurePosixPath(name)
    beside = {base + ending for base in (name, str(place.with_suffix(""))) for ending in _SIGNATURES}
    shared = {str(place.parent / other) for other in _FOLDER_SIGNATURES}
    return bool(names & (beside | shared))


def _secrets(entry: _Entry, max_read: int) -> list[Finding]:
    if entry.path.suffix.lower() not in _TEXT and entry.path.name.lower() not in _TEXT_NAMES:
        return []
    text = _read(entry.path, max_read).decode("utf-8", "replace")
    seen = find_secrets(text)
    return [_problem("secret", entry.name, secret.kind, Severity.HIGH, {"line": secret.line}) for secret in seen[:20]]


def _read(path: Path, count: int) -> bytes:
    """The first bytes of a regular file; a link or a device that took its place meanwhile is an error."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("no longer a regular file")
        return file.read(count)


def _problem(kind: str, path: str, reason: str, severity: Severity, more: dict[str, Any] | None = None) -> Finding:
    titles = {
        "leftover": "Left behind",
        "link": "Link",
        "permissions": "Writable by anybody",
        "secret": "Secret in a file",
        "unreadable": "Not readable",
        "unsafe_checkpoint": "Checkpoint that may run code",
        "unsigned_checkpoint": "Checkpoint without a signature",
    }
    return found(
        f"storage.{kind}",
        f"{titles[kind]}: {path}",
        severity=severity,
        setting={"path": path, "reason": reason, **(more or {})},
        threat=_THREAT,
        status="failed" if kind == "unreadable" else "measured",
    )


def _cut(max_files: int) -> Finding:
    return found(
        "storage.complete",
        f"Only the first {max_files} entries were looked at",
        severity=Severity.MEDIUM,
        status="not shown",
        limits="Raise max_files.",
    )


def _summary(findings: list[Finding], entries: int) -> Finding:
    title = "Problems found in the folder"
    worst = max((finding.severity for finding in findings), default=Severity.INFO)
    limits = "Finds carelessness, not intent."
    return found("storage.problems", title, len(findings), n=entries, severity=worst, limits=limits)


def _relative(root: Path, path: str | os.PathLike[str]) -> str:
    """The path below root with forward slashes; undecodable bytes made visible."""
    text = Path(path).relative_to(root).as_posix()
    return text.encode("utf-8", "backslashreplace").decode()
