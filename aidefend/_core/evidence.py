"""Findings and evidence: what was measured, with interval, setting and limits, as JSON and Markdown."""

import dataclasses
import enum
import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from aidefend._core.checks import check_choice, check_flag, check_int, check_items, check_kind, refuse
from aidefend._core.storage import canonical_json, plain, pretty_json, write_atomic

Status = Literal["measured", "not shown", "not tested", "failed"]
_STATUSES = ("measured", "not shown", "not tested", "failed")


class Severity(enum.IntEnum):
    """How urgent a finding is; comparable."""

    INFO = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4


@dataclasses.dataclass(frozen=True)
class Finding:
    """One measured statement.

    Args:
        id: Stable name of the measure, for example "evasion.robust_accuracy".
        title: One line for a reader.
        severity: How urgent.
        value: The number (or word) that was measured; None when nothing was.
        low, high: Interval of the value, where it has one.
        n: Number of samples or trials behind it.
        setting: How it was measured: attack, steps, seed, ...
        threat: The threat model in words.
        limits: What this does not show.
        mapping: References such as {"atlas": "AML.T0043"}.
        status: "measured"; "not shown" (tried, no conclusion); "not tested" (skipped); "failed" (the check broke).
        deterministic: False if it depends on secure randomness; such findings stay out of the digest.
    """

    id: str
    title: str
    severity: Severity = Severity.INFO
    value: float | int | str | bool | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    setting: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    threat: str = ""
    limits: str = ""
    mapping: Mapping[str, str] = dataclasses.field(default_factory=dict)
    status: Status = "measured"
    deterministic: bool = True

    def __post_init__(self) -> None:
        check_choice(self.status, _STATUSES, "status")
        for name in ("id", "title", "threat", "limits"):
            check_kind(getattr(self, name), str, name, "Pass words")
        for name in ("setting", "mapping"):
            check_kind(getattr(self, name), Mapping, name, "Pass a dict")
        for name in ("low", "high"):
            check_kind(getattr(self, name), (float, int, type(None)), name, "Pass a number or None")
        check_kind(self.value, (float, int, str, bool, type(None)), "value", "Pass a number, a word or None")
        if self.n is not None:
            check_int(self.n, "n", 0)
        check_flag(self.deterministic, "deterministic")
        if type(self.severity) not in (int, Severity) or self.severity not in list(Severity):
            raise refuse("severity to be a Severity", "severity", self.severity, "Pass Severity.LOW or its like")
        object.__setattr__(self, "severity", Severity(self.severity))

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        converted: dict[str, Any] = plain({**fields, "severity": self.severity.name})
        return converted

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Finding":
        """The finding back from `to_dict`; unknown keys are refused."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or not {"id", "title"} <= set(data):
            raise refuse("a finding with id and title", "data", data, "Pass what Finding.to_dict returned")
        if unknown := sorted(set(data) - names):
            raise refuse(f"keys among {sorted(names)}", "data", unknown, "Remove the unknown keys")
        severity = check_choice(data.get("severity", "INFO"), tuple(Severity.__members__), "severity")
        return cls(**{**data, "severity": Severity[severity]})


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Findings with the metadata of the run that produced them.

    Guarantee: equal findings and metadata give byte-identical JSON and the same digest. `metadata["run"]` (time, host)
        and findings with `deterministic=False` are outside the digest.
    Example:
        >>> evidence = Evidence([Finding("demo.accuracy", "Accuracy", value=0.9, n=10)])
        >>> evidence["demo.accuracy"].value, len(evidence.digest)
        (0.9, 64)
    """

    findings: tuple[Finding, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __init__(self, findings: Iterable[Finding] = (), metadata: Mapping[str, Any] | None = None) -> None:
        object.__setattr__(self, "findings", check_items(findings, Finding, "findings"))
        found = {} if metadata is None else check_kind(metadata, Mapping, "metadata", "Pass a dict")
        object.__setattr__(self, "metadata", dict(found))

    def __getitem__(self, finding_id: str) -> Finding:
        """The first finding with this id; KeyError if there is none."""
        for finding in self.findings:
            if finding.id == finding_id:
                return finding
        raise KeyError(finding_id)

    def __contains__(self, finding_id: object) -> bool:
        return any(finding.id == finding_id for finding in self.findings)

    def __add__(self, other: "Evidence") -> "Evidence":
        """Both sets of findings; metadata of the right side wins."""
        return Evidence(self.findings + other.findings, {**self.metadata, **other.metadata})

    @property
    def worst(self) -> Severity:
        """The highest severity, INFO if there is no finding."""
        return max((finding.severity for finding in self.findings), default=Severity.INFO)

    @property
    def digest(self) -> str:
        """SHA-256 over everything but the run's time and host and the findings that secure randomness touches."""
        stable = {
            "findings": [finding.to_dict() for finding in self.findings if finding.deterministic],
            "metadata": {key: value for key, value in self.metadata.items() if key != "run"},
        }
        return hashlib.sha256(canonical_json(stable).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Schema "aidefend.evidence/1": digest, metadata, findings."""
        return {
            "schema": "aidefend.evidence/1",
            "digest": self.digest,
            "metadata": plain(self.metadata),
            "findings": [finding.to_dict() for finding in self.findings],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Evidence":
        """The evidence back from `to_dict`; a digest that does not match the content is refused."""
        if not isinstance(data, Mapping) or data.get("schema") != "aidefend.evidence/1":
            raise refuse('schema "aidefend.evidence/1"', "data", data, "Pass what Evidence.to_dict returned")
        items = check_items(data.get("findings", ()), Mapping, "findings", "Pass what Evidence.to_dict returned")
        evidence = cls([Finding.from_dict(item) for item in items], data.get("metadata", {}))
        if data.get("digest") != evidence.digest:
            raise refuse(
                f"digest {evidence.digest}", "digest", data.get("digest"), "The content was changed after export"
            )
        return evidence

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The JSON text, also written to `path` (whole or not at all)."""
        text = pretty_json(self.to_dict())
        if path is not None:
            write_atomic(path, text)
        return text

    def to_markdown(self, path: str | os.PathLike[str] | None = None) -> str:
        """A table with one line for each finding and its limits below, also written to `path`."""
        lines = ["| severity | finding | value | interval | n | status |", "|---|---|---|---|---|---|"]
        lines += [_markdown_row(finding) for finding in self.findings]
        notes = [f"- `{finding.id}`: {_cell(finding.limits)}" for finding in self.findings if finding.limits]
        text = "\n".join([*lines, *(["", "Limits:", "", *notes] if notes else []), "", f"Digest: `{self.digest}`", ""])
        if path is not None:
            write_atomic(path, text)
        return text


def _markdown_row(finding: Finding) -> str:
    interval = "" if finding.low is None or finding.high is None else f"{finding.low:.4g} to {finding.high:.4g}"
    value = f"{finding.value:.4g}" if isinstance(finding.value, float) else finding.value
    shown = "" if value is None else str(value)
    cells = [
        finding.severity.name,
        f"{finding.title} (`{finding.id}`)",
        shown,
        interval,
        finding.n or "",
        finding.status,
    ]
    return "| " + " | ".join(_cell(str(cell)) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Text that cannot break out of a table cell or inject markup."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
