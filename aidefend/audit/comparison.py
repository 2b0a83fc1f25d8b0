"""Two audits side by side: what got worse first, and only where the intervals say so."""

import dataclasses
from typing import Literal, Protocol

from aidefend._core.checks import check_kind
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend.audit.cleaning import interval, markdown, number
from aidefend.audit.mapping import better

Verdict = Literal["regression", "lost", "unclear", "improvement", "new", "unchanged"]
_ORDER: tuple[Verdict, ...] = ("regression", "lost", "unclear", "improvement", "new", "unchanged")


class HasEvidence(Protocol):
    """A report around evidence."""

    @property
    def evidence(self) -> Evidence:
        """Its findings."""
        ...


@dataclasses.dataclass(frozen=True)
class Change:
    """One finding in both audits; `before` or `after` is None where it was not there.

    Args:
        finding_id: Its id.
        verdict: "regression": worse beyond both intervals, or more severe. "lost": measured before and not now.
            "unclear": another value inside the intervals. "improvement", "new", "unchanged": as they say.
        before: The finding in the first audit.
        after: The finding in the second audit.
    """

    finding_id: str
    verdict: Verdict
    before: Finding | None
    after: Finding | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All changes, regressions first."""

    changes: tuple[Change, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What got worse, and what is no longer measured."""
        return tuple(change for change in self.changes if change.verdict in ("regression", "lost"))

    @property
    def ok(self) -> bool:
        """Whether nothing got worse and nothing was lost."""
        return not self.regressions

    def to_markdown(self) -> str:
        """A table, regressions first."""
        lines = ["| change | finding | before | after |", "|---|---|---|---|"]
        for change in self.changes:
            lines.append(
                f"| {change.verdict} | {markdown(change.finding_id)} | {_cell(change.before)} | {_cell(change.after)} |"
            )
        return "\n".join([*lines, ""])


def compare(before: Evidence | HasEvidence, after: Evidence | HasEvidence) -> Comparison:
    """What changed between two audits of the same kind.

    Guarantee: a change of value counts only where the two intervals do not overlap (at 95 % each, so the level of a
        single false alarm is below 5 %, and grows with the number of findings). A finding that was measured and now is
        failed, not shown, not tested or gone counts as lost, never as unchanged.
    Args:
        before: The earlier report or its evidence.
        after: The later one.
    Returns: Comparison, regressions first. Findings about files are matched by path, others that
        repeat an id in order. A file problem that is gone is an improvement, one that is new a regression.

    Example:
        >>> old = Evidence([Finding("membership.auc", "AUC", value=0.52, low=0.5, high=0.54)])
        >>> new = Evidence([Finding("membership.auc", "AUC", value=0.7, low=0.68, high=0.72)])
        >>> compare(old, new).regressions[0].finding_id
        'membership.auc'
    """
    first, second = _by_key(_evidence(before)), _by_key(_evidence(after))
    keys = [*first, *(key for key in second if key not in first)]
    looked_at = {key[0].partition(".")[0] for key, finding in second.items() if finding.status == "measured"}
    changes = []
    for key in keys:
        old, new = first.get(key), second.get(key)
        fixed = new is None and "path" in key[1] and key[0].partition(".")[0] in looked_at
        changes.append(Change(key[0], "improvement" if fixed else _verdict(old, new), old, new))
    return Comparison(tuple(sorted(changes, key=lambda change: _ORDER.index(change.verdict))))


def _evidence(source: Evidence | HasEvidence) -> Evidence:
    found = source if isinstance(source, Evidence) else getattr(source, "evidence", None)
    return check_kind(found, Evidence, "before and after", "Pass the Evidence or the AuditReport of a run")


def _by_key(evidence: Evidence) -> dict[tuple[str, str], Finding]:
    """Findings by id and place; findings without a place by id and order."""
    found: dict[tuple[str, str], Finding] = {}
    for finding in evidence.findings:
        place = f"path {finding.setting['path']}" if "path" in finding.setting else ""
        ordinal = 0
        while (finding.id, f"{place} {ordinal}") in found:
            ordinal += 1
        found[finding.id, f"{place} {ordinal}"] = finding
    return found


def _verdict(before: Finding | None, after: Finding | None) -> Verdict:
    if before is None:
        problem = after is not None and after.severity > Severity.INFO and "path" in after.setting
        return "regression" if problem else "new"
    if after is None or (after.status != "measured" and before.status == "measured"):
        return "lost" if before.status == "measured" else "unchanged"
    if before.status != "measured":
        return "unchanged" if before.status == after.status else "new"
    return _of_values(before, after)


def _of_values(before: Finding, after: Finding) -> Verdict:
    old, new = _range(before), _range(after)
    direction = better(before.id)
    if old is None or new is None or direction is None:
        return _of_severity(before, after)
    if before.value == after.value and before.severity == after.severity:
        return "unchanged"
    if old[0] <= new[1] and new[0] <= old[1]:
        return "unclear"
    return "improvement" if (new[0] > old[1]) == (direction == "high") else "regression"


def _of_severity(before: Finding, after: Finding) -> Verdict:
    if before.severity != after.severity:
        return "regression" if after.severity > before.severity else "improvement"
    return "unchanged" if before.value == after.value else "unclear"


def _range(finding: Finding) -> tuple[float, float] | None:
    if isinstance(finding.value, bool) or not isinstance(finding.value, int | float):
        return None
    low = finding.value if finding.low is None else finding.low
    high = finding.value if finding.high is None else finding.high
    return low, high


def _cell(finding: Finding | None) -> str:
    if finding is None:
        return ""
    if finding.status != "measured":
        return finding.status
    shown = interval(finding.low, finding.high)
    return markdown(f"{number(finding.value)}{f' [{shown}]' if shown else ''} {finding.severity.name}")
