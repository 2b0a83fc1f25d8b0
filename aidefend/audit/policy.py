"""A release gate: thresholds on findings, judged on the unfavourable end of their intervals; failing closed."""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from aidefend._core.checks import check_choice, check_flag, check_kind, check_number, check_path, refuse
from aidefend._core.errors import ConfigurationError, MissingExtra
from aidefend._core.evidence import Evidence, Finding, Severity

_RULE_KEYS = ("min", "max", "required", "max_severity", "interval")
_TOP_KEYS = ("max_severity", "interval", "findings")
_EXIT = {"violated": 1, "missing": 2, "failed": 2}
Ends = Literal["conservative", "value"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a policy demands of the findings with one id."""

    min: float | None = None
    max: float | None = None
    required: bool = True
    max_severity: Severity | None = None
    interval: Ends = "conservative"

    def __post_init__(self) -> None:
        """A bound that is no number (NaN above all) would hold for everything."""
        for name in ("min", "max"):
            if getattr(self, name) is not None:
                check_number(getattr(self, name), name)
        check_flag(self.required, "required")
        check_kind(self.max_severity, (Severity, type(None)), "max_severity", "Pass Severity.MEDIUM or its like")
        check_choice(self.interval, ("conservative", "value"), "interval")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One reason not to pass: the finding, what was demanded, what was found, and of which kind it is."""

    finding_id: str
    demanded: str
    found: str
    kind: Literal["violated", "missing", "failed"]

    def __str__(self) -> str:
        return f"{self.finding_id}: expected {self.demanded}, got {self.found}"


@dataclasses.dataclass(frozen=True)
class PolicyResult:
    """The verdict. `exit_code`: 0 passed, 1 a threshold is violated, 2 something demanded could not be judged."""

    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything demanded was measured and holds."""
        return not self.problems

    @property
    def exit_code(self) -> int:
        """0, 1 or 2; 2 wins."""
        return max((_EXIT[problem.kind] for problem in self.problems), default=0)

    def __bool__(self) -> bool:
        return self.ok


@dataclasses.dataclass(frozen=True)
class Policy:
    """Thresholds by finding id.

    As TOML:

        max_severity = "MEDIUM"                     # no finding above it
        [findings."evasion.robust_accuracy"]
        min = 0.4                                   # the lower end of the interval must reach it
        [findings."membership.auc"]
        max = 0.6                                   # the upper end must stay below
        [findings."membership.lira.auc"]
        max = 0.6
        required = false                            # may be absent; judged where it was measured

    Args:
        rules: Finding id to rule.
        max_severity: Highest severity that any finding may have; None for no limit.

    Example:
        >>> policy = Policy.read({"membership.auc": {"max": 0.6}})
        >>> evidence = Evidence([Finding("membership.auc", "AUC", value=0.58, low=0.55, high=0.61)])
        >>> [str(problem) for problem in policy.judge(evidence).problems]
        ['membership.auc: expected <= 0.6, got 0.61 (the unfavourable end of the interval)']
    """

    rules: Mapping[str, Rule]
    max_severity: Severity | None = None

    def __post_init__(self) -> None:
        """A policy that demands nothing would pass everything."""
        check_kind(self.rules, Mapping, "rules", "Pass {finding id: Rule(...)}")
        for rule in self.rules.values():
            check_kind(rule, Rule, "rules", "Pass {finding id: Rule(...)}")
        check_kind(self.max_severity, (Severity, type(None)), "max_severity", "Pass Severity.MEDIUM or its like")
        if not self.rules and self.max_severity is None:
            cure = "Name a finding with min or max, or a max_severity"
            raise refuse("a policy that demands something", "policy", dict(self.rules), cure)

    @classmethod
    def read(cls, source: "Policy | Mapping[str, Any] | str | os.PathLike[str]") -> "Policy":
        """From a TOML file or a dict of the same form; unknown keys, wrong types and empty policies are refused."""
        if isinstance(source, Policy):
            return source
        table = source if isinstance(source, Mapping) else _read_toml(check_path(source, "policy"))
        tables = {**table.get("findings", {}), **{key: table[key] for key in table if key not in _TOP_KEYS}}
        default = check_choice(table.get("interval", "conservative"), ("conservative", "value"), "interval")
        rules = {name: _rule(name, item, default) for name, item in _flatten(tables)}
        top = table.get("max_severity")
        return cls(rules, None if top is None else _severity(top, "max_severity"))

    def judge(self, evidence: Evidence) -> PolicyResult:
        """Every demand against every finding. Broken checks never pass, nor does an audit that measured nothing."""
        check_kind(evidence, Evidence, "evidence", "Pass the evidence of an audit")
        problems = [_broken(finding) for finding in evidence.findings if finding.status == "failed"]
        if not any(finding.status == "measured" for finding in evidence.findings):
            problems.append(Problem("audit", "at least one measured finding", "none", "missing"))
        for finding in evidence.findings:
            if self.max_severity is not None and finding.severity > self.max_severity:
                demanded = f"severity <= {self.max_severity.name}"
                problems.append(Problem(finding.id, demanded, finding.severity.name, "violated"))
        for name, rule in self.rules.items():
            problems += _judge(name, rule, [item for item in evidence.findings if item.id == name])
        return PolicyResult(tuple(dict.fromkeys(problems)))


def _judge(name: str, rule: Rule, findings: list[Finding]) -> list[Problem]:
    measured = [finding for finding in findings if finding.status == "measured"]
    if rule.required and (not measured or len(measured) < len(findings)):
        status = next((finding.status for finding in findings if finding.status != "measured"), "no such finding")
        return [Problem(name, "a measured finding", status, "missing")]
    return [problem for finding in measured for problem in _violations(rule, finding)]


def _violations(rule: Rule, finding: Finding) -> list[Problem]:
    problems = []
    if rule.max_severity is not None and finding.severity > rule.max_severity:
        demanded = f"severity <= {rule.max_severity.name}"
        problems.append(Problem(finding.id, demanded, finding.severity.name, "violated"))
    for sign, bound, end in (("min", rule.min, finding.low), ("max", rule.max, finding.high)):
        if bound is None:
            continue
        value = finding.value if rule.interval == "value" or end is None else end
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            problems.append(Problem(finding.id, f"a number with {sign} {bound:g}", repr(value), "missing"))
        elif (value < bound) if sign == "min" else (value > bound):
            about = "" if value is finding.value else " (the unfavourable end of the interval)"
            demanded = f"{'>=' if sign == 'min' else '<='} {bound:g}"
            problems.append(Problem(finding.id, demanded, f"{value:.4g}{about}", "violated"))
    return problems


def _broken(finding: Finding) -> Problem:
    return Problem(finding.id, "a check that runs", f"status failed: {finding.title}", "failed")


def _flatten(tables: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """Rules by full id; `[membership] auc = {max = 0.6}` and `["membership.auc"] max = 0.6` say the same."""
    rules = []
    for key, item in tables.items():
        name = f"{prefix}{key}"
        if not isinstance(item, Mapping):
            raise refuse(f"keys among {_TOP_KEYS + _RULE_KEYS}", "policy", {name: item}, "Remove the unknown key")
        if any(isinstance(value, Mapping) for value in item.values()):
            rules += _flatten(item, f"{name}.")
        else:
            rules.append((name, item))
    return rules


def _rule(name: str, item: Mapping[str, Any], default: Ends) -> Rule:
    if unknown := sorted(set(item) - set(_RULE_KEYS)):
        raise refuse(f"keys among {_RULE_KEYS}", f"policy[{name!r}]", unknown, "Remove the unknown keys")
    bounds = {key: _number(item[key], f"{name}.{key}") for key in ("min", "max") if key in item}
    required = item.get("required", True)
    if not isinstance(required, bool):
        raise refuse("true or false", f"{name}.required", required, "Write true or false")
    severity = _severity(item["max_severity"], f"{name}.max_severity") if "max_severity" in item else None
    ends = check_choice(item.get("interval", default), ("conservative", "value"), f"{name}.interval")
    return Rule(bounds.get("min"), bounds.get("max"), required, severity, ends)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refuse("a finite number", name, value, "Write a number")
    return float(value)


def _severity(value: Any, name: str) -> Severity:
    if isinstance(value, Severity):
        return value
    return Severity[check_choice(str(value).upper(), tuple(Severity.__members__), name)]


def _read_toml(path: Path) -> dict[str, Any]:
    reader = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        toml = import_module(reader)
    except ImportError as error:
        raise MissingExtra(reader, "report") from error
    try:
        with path.open("rb") as file:
            content: dict[str, Any] = toml.load(file)
    except (OSError, ValueError) as error:  # malformed TOML and UTF-8 are both ValueErrors
        message = f"Expected a TOML file, got policy={str(path)!r}: {error}. Correct the file or its path."
        raise ConfigurationError(message) from error
    return content
