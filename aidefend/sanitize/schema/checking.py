"""One pass over new data against a schema: rules row by row, a profile of the whole, then the tests."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from aidefend._core.checks import describe
from aidefend._core.evidence import Evidence, Finding
from aidefend.sanitize.schema.columns import Column
from aidefend.sanitize.schema.comparison import Test, compare, natural_rate
from aidefend.sanitize.schema.declared import TABLE
from aidefend.sanitize.schema.drift_tests import holm
from aidefend.sanitize.schema.facts import Expectation, Fact, Facts, Rules
from aidefend.sanitize.schema.profile import Mask, Measure, Profile, occurrences
from aidefend.sanitize.schema.tables import Table, tables
from aidefend.sanitize.schema.wording import MEASURES, finding

_SHOWN_ERRORS = 3


def check_data(
    reference: Profile,
    expectations: Mapping[str, Expectation],
    alpha: float,
    data: Any,
    *,
    seen: bool,
    digest: str,
) -> Evidence:
    """All findings of one check, those about single rows first."""
    new = Profile(reference.label, reference.ignored, reference.key, reference.sizes)
    new.inputs = reference.inputs
    rules, facts, errors = Rules(reference, expectations), Facts(), dict[int, str]()
    for table in tables(data):
        _look_at(table, new, rules, facts, reference, seen=seen)
        errors |= table.unreadable
    tests = compare(reference, new.finish(), facts.found) if new.rows else []
    findings = [*_about_columns(reference, expectations, new), *_about_errors(errors, new)]
    findings += _about_facts(facts, reference, expectations, new)
    findings += _about_missing(expectations, facts, new)
    findings += _about_tests(tests, alpha, {(one.id, one.setting.get("column")) for one in findings}, new)
    if not new.rows and not errors:
        findings = [
            Finding("schema.rows", MEASURES["rows"].title, n=0, status="not tested", limits=MEASURES["rows"].limits)
        ]
    return Evidence(findings, _metadata(reference, expectations, new, tests, alpha, digest, seen=seen))


def _look_at(table: Table, new: Profile, rules: Rules, facts: Facts, reference: Profile, *, seen: bool) -> None:
    """Judge the rows of one table, then count them."""
    columns, rows = new.read(table), len(table.places)
    own = occurrences(columns)
    masks: dict[Measure, Mask] = {**own, **rules.broken(columns, facts)}
    before = (
        None
        if not reference.rows or _lacks_inputs(columns, reference)
        else _met_before(columns, rows, new, reference, seen=seen)
    )
    known = new.add(columns, own, rows, len(table.unreadable))
    if before is not None:
        masks[("duplicates", "")] = (known.ordinals > 0) & (new.hashes.coverage == 1.0)
        masks[("conflicting_labels", "")] = before[1] | (known.conflicts & (reference.hashes.conflicting == 0))
        masks[("leakage", "")] = before[0]
    facts.add(masks, table.places)


def _lacks_inputs(columns: Mapping[str, Column], reference: Profile) -> bool:
    """Rows without one of their columns are other rows: nothing is said of equal ones then."""
    return not set(reference.inputs or ()) <= set(columns)


def _met_before(
    columns: Mapping[str, Column], rows: int, new: Profile, reference: Profile, *, seen: bool
) -> tuple[Mask, Mask]:
    """(in the reference, in the reference with another label) for each row."""
    known, other = reference.hashes.lookup(new.row_hashes(columns, rows), new.label_hashes(columns))
    return (np.zeros_like(known) if seen else known), other


def _about_columns(reference: Profile, expectations: Mapping[str, Expectation], new: Profile) -> list[Finding]:
    if not new.rows:
        return []
    optional = {name for name, expected in expectations.items() if not expected.required}
    absent = [name for name, column in reference.columns.items() if not column.of and name not in new.columns]
    missing = [name for name in absent if name not in optional]
    extra = [name for name, column in new.columns.items() if not column.of and name not in reference.columns]
    extra = [] if TABLE in optional else extra
    named = [("missing_column", name) for name in missing] + [("extra_column", name) for name in extra]
    return [finding(measure, name, new.rows, new.rows, {}) for measure, name in named]


def _about_errors(errors: Mapping[int, str], new: Profile) -> list[Finding]:
    if not errors:
        return []
    first = sorted(errors)
    setting = {"rows": first[:20], "errors": [describe(errors[row]) for row in first[:_SHOWN_ERRORS]]}
    return [finding("unreadable", "", len(errors), new.rows + len(errors), setting)]


def _about_facts(
    facts: Facts, reference: Profile, expectations: Mapping[str, Expectation], new: Profile
) -> list[Finding]:
    """Rules that nothing excuses; where the reference breaks a rule itself, its rate is tested instead."""
    found = []
    for (measure, column), fact in facts.found.items():
        expected = expectations.get(column)
        natural = natural_rate((measure, column), reference)
        closed = measure == "category" and expected is not None and expected.values is not None
        allowed = measure == "missing_values" and expected is not None and expected.max_missing is not None
        if allowed or (natural is not None and natural[0] > 0 and not closed):
            continue
        found.append(finding(measure, column, fact.count, new.rows, _setting(fact)))
    return sorted(found, key=lambda one: (-one.severity, one.id))


def _setting(fact: Fact) -> dict[str, Any]:
    examples = {"examples": fact.examples} if fact.examples else {}
    return {"rows": fact.rows, "count": fact.count, **examples}


def _about_missing(expectations: Mapping[str, Expectation], facts: Facts, new: Profile) -> list[Finding]:
    found = []
    for column, expected in expectations.items():
        fact = facts.found.get(("missing_values", column))
        if expected.max_missing is not None and fact is not None and fact.count > expected.max_missing * new.rows:
            setting = {**_setting(fact), "max_missing": expected.max_missing}
            found.append(finding("missing_values", column, fact.count, new.rows, setting))
    return found


def _about_tests(tests: list[Test], alpha: float, told: set[tuple[str, Any]], new: Profile) -> list[Finding]:
    """Tests that hold after correction, but for what a fact has told already."""
    found = []
    adjusted = holm([test.p_value for test in tests]) if tests else []
    for test, p_value in zip(tests, adjusted, strict=True):
        if p_value <= alpha and (f"schema.{test.measure}", test.column or None) not in told:
            setting = {**test.setting, "p_value": test.p_value, "adjusted_p_value": p_value, "alpha": alpha}
            found.append(finding(test.measure, test.column, 0, new.rows, setting, value=test.value))
    return found


def _metadata(
    reference: Profile,
    expectations: Mapping[str, Expectation],
    new: Profile,
    tests: list[Test],
    alpha: float,
    digest: str,
    *,
    seen: bool,
) -> dict[str, Any]:
    tested = {test.column for test in tests if test.measure in ("drift", "class_balance")}
    silent = sorted(
        name for name in reference.columns if name in new.columns and name not in tested and not reference.repeats(name)
    )
    not_tested = {"drift": silent} if silent else {}
    if seen or _lacks_inputs(dict.fromkeys(new.columns), reference):  # type: ignore[arg-type]  # names suffice
        not_tested["leakage"] = ["the rows are said to be seen" if seen else "columns are missing"]
    if not reference.rows:
        not_tested |= {name: ["there are no reference rows"] for name in ("leakage", "duplicates")}
    unchecked = {name or "the table": list(one.unchecked) for name, one in expectations.items() if one.unchecked}
    if unchecked:
        not_tested["imported_rules"] = [f"{name}: {rule}" for name, rules in unchecked.items() for rule in rules]
    return {
        "method": "DatasetSchema.check",
        "schema": digest,
        "rows": new.rows,
        "reference_rows": reference.rows,
        "row_coverage": reference.hashes.coverage,
        "tests": len(tests),
        "alpha": alpha,
        "not_tested": not_tested,
    }
