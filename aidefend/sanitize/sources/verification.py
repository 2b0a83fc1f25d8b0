"""Is what is read now what the manifest says? Record by record, and closed where it does not say."""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from aidefend._core.checks import check_flag, check_items, check_kind, check_path, refuse
from aidefend._core.errors import ConfigurationError, UnsafeArtifact
from aidefend._core.report import Report
from aidefend.sanitize.sources.digests import file_digest, pairs_of, record_digest, unsafe
from aidefend.sanitize.sources.source import Source
from aidefend.sanitize.sources.trusted_sources import TrustedSources, Verifier

_THREAT = (
    "Whoever controls what stands behind a file name, an id or an address after the manifest was made (split-view and "
    "front-running poisoning), or the way from there. With a verifier, whoever can write the manifest, too."
)
_LIMITS = (
    "Content that was poisoned before it was hashed verifies. What is read again after this check may be other "
    "content: verify what you use, or use TrustedSources.read."
)
_UNSIGNED = " Nobody vouches for the manifest: it is not signed."
_UNKNOWN = "unknown: the manifest has no such source"
_SHOWN = 20


def verify_sources(
    trusted: TrustedSources,
    contents: Mapping[str, Any],
    *,
    verifier: Verifier | None = None,
    licences: Collection[str] | None = None,
    complete: bool = False,
) -> Report:
    """Compare what is read now with what the manifest says, record by record.

    Guarantee: fails closed: `keep` is True only for content whose SHA-256 is the one that the manifest lists under
        this very source and id. Changed, unknown, repeated and unreadable content is not kept, with its reason; a
        manifest whose signature is not verified raises before anything is read. See `TrustedSources` for the rest.
    Args:
        trusted: The manifest.
        contents: For each source name what is read now: a path or the bytes of a file, or its records as a dict from
            ids to records or an iterable of pairs (id, record), which is read once, record by record.
        verifier: `verifier(message, signature)`, True if a trusted key made the signature; needed for signed manifests.
        licences: Licences that you accept; content of sources with another one is not kept. None accepts all.
        complete: Records that the manifest lists and `contents` lacks are an error, not a remark.
    Returns: A report with one row for each file ("source") and each record ("source/id"), in the order of reading;
        `parameters["missing"]` names records that did not come.
    Raises: UnsafeArtifact: signature missing, wrong or not checked; records missing with `complete=True`.
        ConfigurationError: contents of another form, an iterator that raises.
    Cost: one hash of the content.
    Source: Carlini et al. 2024, "Poisoning web-scale training datasets is practical" (split view; integrity by hash).
    Example:
        >>> manifest = TrustedSources([Source.of("web", {"http://a": b"cat"})])
        >>> verify_sources(manifest, {"web": [("http://a", b"dog"), ("http://b", b"cat")]}).summary()[:43]
        'verify_sources: 0 of 2 rows kept, 2 not (ch'
    """
    check_kind(trusted, TrustedSources, "trusted", "Use TrustedSources([Source.of(...), ...]) or TrustedSources.load")
    check_kind(contents, Mapping, "contents", "Pass a dict from source names to paths, bytes or records")
    check_flag(complete, "complete")
    accepted = None if licences is None else frozenset(check_items(licences, str, "licences", "Pass names of licences"))
    trusted.check_signature(verifier)
    rows, missing = _Rows(), dict[str, list[str]]()
    for name, content in contents.items():
        source = trusted.get(name)
        problem = _problem(source, accepted)
        if isinstance(content, str | bytes | os.PathLike):
            rows.add(str(name), problem or _file_problem(source, content))
        else:
            missing |= _check_records(rows, str(name), source, problem, content)
    _check_complete(trusted, contents, missing, complete=complete)
    return rows.report(trusted, missing)


class _Rows:
    """Verdicts in the order of reading, ids made unique."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._times: dict[str, int] = {}

    def add(self, row_id: str, reason: str) -> None:
        times = self._times.get(row_id, 0)
        self._times[row_id] = times + 1
        name = row_id
        while name in self.reasons:
            name, times = f"{row_id}#{times}", times + 1
        self.reasons[name] = reason

    def report(self, trusted: TrustedSources, missing: Mapping[str, list[str]]) -> Report:
        keep = torch.tensor([not reason for reason in self.reasons.values()], dtype=torch.bool)
        return Report(
            tuple(self.reasons),
            keep,
            reasons=tuple((reason,) if reason else () for reason in self.reasons.values()),
            method="verify_sources",
            parameters={
                "manifest": trusted.digest,
                "signed": trusted.signature is not None,
                "missing": {name: ids[:_SHOWN] for name, ids in missing.items()},
                "missing_count": sum(map(len, missing.values())),
            },
            threat=_THREAT,
            limits=_LIMITS + ("" if trusted.signature is not None else _UNSIGNED),
        )


def _problem(source: Source | None, accepted: frozenset[str] | None) -> str:
    """Why no content of a source is kept, or ""."""
    if source is None:
        return _UNKNOWN
    if accepted is not None and source.licence not in accepted:
        return f"licence {source.licence or 'not known'}: not among those accepted"
    return ""


def _file_problem(source: Source | None, content: Any) -> str:
    try:
        is_path = not isinstance(content, bytes)
        found = file_digest(Path(check_path(content, "contents"))) if is_path else hashlib.sha256(content).hexdigest()
    except (UnsafeArtifact, OSError) as error:
        return f"not read: {str(error)[:200]}"
    return _compared(found, source.sha256 if source else "")


def _compared(found: str, listed: str) -> str:
    if found == listed:
        return ""
    return f"changed since the manifest was made: SHA-256 {found[:16]}..., the manifest has {listed[:16]}..."


def _check_records(rows: _Rows, name: str, source: Source | None, problem: str, content: Any) -> dict[str, list[str]]:
    """Judge the records of one source; returns those that did not come."""
    if not hasattr(content, "__iter__"):
        cure = "Pass a path, bytes, a dict of records or pairs (id, record)"
        raise refuse("contents of a source that can be read", "contents", content, cure)
    listed = {} if source is None or source.records is None else dict(source.records)
    if source is not None and source.records is None and not problem:
        problem = "unknown: the manifest lists this source as a whole, without records"
    waiting = set(listed)
    for record_id, record in pairs_of(content, "contents"):
        rows.add(f"{name}/{record_id}", problem or _record_problem(record_id, record, listed, waiting))
        waiting.discard(record_id)
    return {name: sorted(waiting)} if waiting else {}


def _record_problem(record_id: str, record: Any, listed: Mapping[str, str], waiting: set[str]) -> str:
    if record_id not in listed:
        return "unknown: the manifest has no such record"
    if record_id not in waiting:
        return "repeated: the id came before"
    try:
        return _compared(record_digest(record), listed[record_id])
    except ConfigurationError as error:
        return f"not read: {str(error)[:200]}"


def _check_complete(
    trusted: TrustedSources, contents: Mapping[str, Any], missing: Mapping[str, list[str]], *, complete: bool
) -> None:
    absent = [source.name for source in trusted.sources if source.name not in contents]
    if complete and (missing or absent):
        found: Iterator[str] = (f"{name}/{record}" for name, ids in missing.items() for record in ids)
        cure = "Read all of the sources, or pass complete=False to verify a part"
        raise unsafe("everything that the manifest lists", "missing", [*absent, *found][:_SHOWN], cure)
