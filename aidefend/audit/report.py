"""The result of an audit, and the forms in which others read it."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from aidefend._core.checks import check_items, check_kind
from aidefend._core.evidence import Evidence, Finding, Severity, Status
from aidefend._core.storage import plain, pretty_json, write_atomic
from aidefend.audit.cleaning import interval, markdown, number
from aidefend.audit.junit import junit_xml
from aidefend.audit.page import Figure, Section, render_page
from aidefend.audit.policy import Policy, PolicyResult
from aidefend.audit.sarif import sarif_log

PathLike = str | os.PathLike[str]
_PARTS = {
    "evasion": "Adversarial examples",
    "poisoning": "Data poisoning and backdoors",
    "membership": "Membership inference",
    "inversion": "Model inversion",
    "extraction": "Model extraction",
    "privacy": "Differential privacy, tested",
    "artifacts": "Model files",
    "storage": "Storage",
    "guard": "Input guard",
}


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """Findings of all parts, and how to hand them on.

    Args:
        evidence: The findings and what they are about.

    Example:
        >>> report = AuditReport(Evidence([Finding("membership.auc", "AUC", value=0.9, low=0.88, high=0.92)]))
        >>> report.passed({"membership.auc": {"max": 0.6}}).exit_code
        1
    """

    evidence: Evidence

    def __post_init__(self) -> None:
        check_kind(self.evidence, Evidence, "evidence", "Pass what the parts of an audit return")

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, in the order of the parts."""
        return self.evidence.findings

    @property
    def worst(self) -> Severity:
        """The highest severity."""
        return self.evidence.worst

    @property
    def digest(self) -> str:
        """Of the evidence: equal for equal findings, whatever the time and host."""
        return self.evidence.digest

    def __getitem__(self, finding_id: str) -> Finding:
        """The first finding with this id."""
        return self.evidence[finding_id]

    def __contains__(self, finding_id: object) -> bool:
        return finding_id in self.evidence

    def status(self, part: str) -> Status:
        """Of a whole part: "failed" if any finding is, else "measured" if any is, else "not shown" or "not tested"."""
        check_kind(part, str, "part", "Name a part such as 'evasion'")
        own = {finding.status for finding in self.findings if finding.id.partition(".")[0] == part}
        order: tuple[Status, ...] = ("failed", "measured", "not shown")
        return next((status for status in order if status in own), "not tested")

    def passed(self, policy: "Policy | Mapping[str, Any] | PathLike") -> PolicyResult:
        """Judge the findings by a policy: a TOML file, a dict of the same form, or a `Policy`.

        Fails closed: a broken check never passes, nor does a demanded finding that was not measured. Thresholds are
        compared with the unfavourable end of the interval unless the policy says `interval = "value"`.
        Returns: A result with `.ok`, `.problems`, `.exit_code` (0 passed, 1 violated, 2 not judged).
        Raises: ConfigurationError: unknown keys, wrong types, an unreadable or empty policy.
        """
        return Policy.read(policy).judge(self.evidence)

    def to_dict(self) -> dict[str, Any]:
        """Schema "aidefend.audit/1": the evidence and the status of each part."""
        parts = dict.fromkeys(finding.id.partition(".")[0] for finding in self.findings)
        statuses = {part: self.status(part) for part in parts}
        return {"schema": "aidefend.audit/1", "parts": statuses, "evidence": self.evidence.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AuditReport":
        """The report back from `to_dict`; a changed content is refused by its digest."""
        given = check_kind(data, Mapping, "data", "Pass what AuditReport.to_dict returned")
        return cls(Evidence.from_dict(given.get("evidence", {})))

    def to_json(self, path: PathLike | None = None) -> str:
        """The dict as JSON text; also written to `path`, whole or not at all. So for all `to_*`."""
        return _written(pretty_json(self.to_dict()).encode("utf-8", "backslashreplace").decode(), path)

    def to_markdown(self, path: PathLike | None = None) -> str:
        """A table with one line for each finding, worst first, and the limits below."""
        lines = ["| severity | finding | value | 95 % interval | n | status |", "|---|---|---|---|---|---|"]
        lines += [_row(finding) for finding in _sorted(self.findings)]
        limits = [f"- **{markdown(f.id)}**: {markdown(f.limits)}" for f in self.findings if f.limits]
        text = "\n".join(
            ["# Security audit", "", *lines, "", "## Limits", "", *limits, "", f"Digest {self.digest}", ""]
        )
        return _written(text, path)

    def to_sarif(self, path: PathLike | None = None) -> str:
        """SARIF 2.1.0."""
        return _written(pretty_json(sarif_log(self.evidence)), path)

    def to_junit(
        self, path: PathLike | None = None, policy: "Policy | Mapping[str, Any] | PathLike | None" = None
    ) -> str:
        """JUnit XML: HIGH and CRITICAL findings fail, or with a policy exactly its problems."""
        return _written(junit_xml(self.evidence, None if policy is None else self.passed(policy)), path)

    def to_html(
        self,
        path: PathLike | None = None,
        title: str = "Security audit",
        figures: Mapping[str, Sequence[Figure]] | None = None,
    ) -> str:
        """One self-contained page (extra "report"); no script, nothing from the network. `figures`: by part."""
        return _written(render_page(title, (), self.sections(figures), metadata=self._about()), path)

    def sections(self, figures: Mapping[str, Sequence[Figure]] | None = None) -> list[Section]:
        """One section of the page for each part, worst findings first, with the part's figures."""
        if figures is not None:
            check_kind(figures, Mapping, "figures", "Pass {part: [Figure(...)]}")
            for drawn in figures.values():
                check_items(drawn, Figure, "figures", "Pass {part: [Figure(...)]}")
        parts = dict.fromkeys(finding.id.partition(".")[0] for finding in self.findings)
        return [
            Section(
                _PARTS.get(part, part),
                figures=(figures or {}).get(part, ()),
                findings=_sorted([item for item in self.findings if item.id.partition(".")[0] == part]),
            )
            for part in parts
        ]

    def _about(self) -> dict[str, str]:
        metadata = plain(self.evidence.metadata)
        shown = {key: value for key, value in metadata.items() if key not in ("run", "plan")}
        plan = metadata.get("plan")
        shown["plan"] = plan.get("name") if isinstance(plan, dict) else plan
        return {"digest": self.digest, **{key: _short(value) for key, value in shown.items() if value is not None}}


def _sorted(findings: Sequence[Finding]) -> list[Finding]:
    """Broken checks first, then by severity; equal ones keep their order."""
    return sorted(findings, key=lambda finding: (finding.status != "failed", -finding.severity))


def _row(finding: Finding) -> str:
    title = f"{markdown(finding.title)} ({markdown(finding.id)})"
    cells = [finding.severity.name, title, markdown(number(finding.value)), interval(finding.low, finding.high)]
    return f"| {' | '.join([*cells, str(finding.n or ''), finding.status])} |"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items() if item is not None)
    return str(value)


def _written(text: str, path: PathLike | None) -> str:
    if path is not None:
        write_atomic(path, text)
    return text
