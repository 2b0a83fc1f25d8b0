"""Findings as JUnit XML, which build servers show as tests."""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend.audit.cleaning import interval, number, one_line, visible
from aidefend.audit.policy import PolicyResult


def junit_xml(evidence: Evidence, verdict: PolicyResult | None = None) -> str:
    """One test case for each finding, as a text.

    Without a verdict, HIGH and CRITICAL findings are failures. With one, exactly its problems are, and a demanded
    finding that is absent becomes a case of its own. A broken check is an error; not tested and not shown are skipped.
    """
    problems: dict[str, list[str]] = {}
    for problem in verdict.problems if verdict is not None else ():
        problems.setdefault(problem.finding_id, []).append(str(problem))
    cases = [_case(finding, problems if verdict is not None else None) for finding in evidence.findings]
    known = {finding.id for finding in evidence.findings}
    cases += [_absent(name, texts) for name, texts in problems.items() if name not in known]
    suite = ElementTree.Element("testsuite", _counts(cases))
    suite.extend(cases)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(finding: Finding, problems: Mapping[str, Sequence[str]] | None) -> ElementTree.Element:
    part, _, measure = finding.id.partition(".")
    case = ElementTree.Element("testcase", {"classname": visible(part), "name": one_line(measure or part)})
    text = visible(_text(finding))
    failures = list(problems.get(finding.id, ())) if problems is not None else _severe(finding)
    if finding.status == "failed":
        _outcome(case, "error", finding.title, text)
    elif failures:
        _outcome(case, "failure", "; ".join(failures), text)
    elif finding.status != "measured":
        _outcome(case, "skipped", f"{finding.status}: {finding.limits}", text)
    else:
        ElementTree.SubElement(case, "system-out").text = text
    return case


def _severe(finding: Finding) -> list[str]:
    severe = finding.severity >= Severity.HIGH and finding.status == "measured"
    return [f"{finding.severity.name}: {finding.title}"] if severe else []


def _absent(name: str, texts: Sequence[str]) -> ElementTree.Element:
    part, _, measure = name.partition(".")
    case = ElementTree.Element("testcase", {"classname": visible(part), "name": one_line(measure or part)})
    _outcome(case, "error", "; ".join(texts), "The policy demands a finding that the audit does not hold.")
    return case


def _outcome(case: ElementTree.Element, kind: str, message: str, text: str) -> None:
    ElementTree.SubElement(case, kind, {"message": one_line(message)}).text = visible(text)


def _text(finding: Finding) -> str:
    lines = [finding.title, f"value: {number(finding.value)} [{interval(finding.low, finding.high)}], n: {finding.n}"]
    lines += [f"severity: {finding.severity.name}, status: {finding.status}"]
    return "\n".join([*lines, *([f"limits: {finding.limits}"] if finding.limits else [])])


def _counts(cases: Sequence[ElementTree.Element]) -> dict[str, str]:
    def having(kind: str) -> str:
        return str(sum(case.find(kind) is not None for case in cases))

    counts: dict[str, Any] = {kind: having(tag) for kind, tag in _KINDS.items()}
    return {"name": "aidefend audit", "tests": str(len(cases)), **counts}


_KINDS = {"failures": "failure", "errors": "error", "skipped": "skipped"}
