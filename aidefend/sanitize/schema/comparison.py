"""New data against a schema's reference as a whole: every test there is, in one family under one Holm correction."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from aidefend.sanitize.schema.drift_tests import beyond_extremes, chi_square, kolmogorov_smirnov, rates
from aidefend.sanitize.schema.facts import Fact, is_class_like
from aidefend.sanitize.schema.profile import ColumnProfile, Measure, Profile
from aidefend.sanitize.schema.ranges import fences

_NOMINAL = 16  # different whole numbers up to which they are compared as categories, beyond as numbers


class Test(NamedTuple):
    """One test: what it looks at, its p-value (not yet corrected), and the numbers behind it."""

    measure: str
    column: str
    p_value: float
    value: float
    setting: dict[str, Any]


def compare(reference: Profile, new: Profile, facts: Mapping[Measure, Fact]) -> list[Test]:
    """All tests that the data allow."""
    found: list[Test] = []
    for name in sorted(set(reference.columns) & set(new.columns)):
        found += [] if reference.repeats(name) else _of_column(name, reference, new)
    for measure in sorted({*facts, *_excusable(reference, new)}):
        natural = natural_rate(measure, reference)
        if natural is not None and natural[0] > 0:
            count = facts[measure].count if measure in facts else 0
            found += _of_rate(measure, count, natural, reference, new)
    return found


def _excusable(reference: Profile, new: Profile) -> list[Measure]:
    """Rates that are compared even where no new row counts: tests chosen by outcome would void the correction."""
    columns = [("category", name) for name in reference.columns if name in new.columns and name != reference.label]
    return [*columns, *(measure for measure in reference.occurrences if measure[1] in new.columns), ("duplicates", "")]


def natural_rate(measure: Measure, reference: Profile) -> tuple[int, int] | None:
    """(count, rows): how often the reference itself breaks a rule; None for rules that nothing excuses.

    For equal rows and unseen values the count is of rows without which the rest would not have known theirs
    (leave-one-out): new rows of the same source meet as much.

    Source: Good 1953.
    """
    rule, name = measure
    if rule == "category":
        counts: Mapping[str, int] = reference.columns[name].values.counts or {}
        single, double = (sum(count == times for count in counts.values()) for times in (1, 2))
        return max(single, min(double, 1)), sum(counts.values())  # a value seen twice: there may be more that rare
    if rule in ("duplicates", "leakage"):
        return reference.hashes.rows - reference.hashes.singles, reference.hashes.rows
    if rule == "conflicting_labels":
        return reference.hashes.conflicting, reference.hashes.rows
    if rule in ("missing_values", "not_finite") or rule.startswith("text."):
        return reference.occurrences[measure], reference.rows
    return None


def _of_rate(
    measure: Measure, count: int, natural: tuple[int, int], reference: Profile, new: Profile
) -> Iterator[Test]:
    rule, name = measure
    if rule == "duplicates" and new.hashes.rows > natural[1]:
        return  # equal rows become commoner with the number of rows: nothing to compare with
    rows, weight = new.rows, 1.0
    if rule in ("duplicates", "leakage", "conflicting_labels"):
        rows, weight = (
            max(count, round(new.rows * new.hashes.coverage)),
            max(new.hashes.clumping, reference.hashes.clumping),
        )
    parts = [math.floor(part / weight) for part in (*natural, count, rows)]
    p_value = rates(*parts, both_sides=rule == "missing_values")
    yield Test(rule, name, p_value, count / rows, {"reference_share": natural[0] / max(1, natural[1]), "rows": rows})


def _of_column(name: str, reference: Profile, new: Profile) -> Iterator[Test]:
    mine, theirs = reference.columns[name], new.columns[name]
    is_label = name == reference.label and is_class_like(mine)
    if is_label or _is_nominal(mine):
        if mine.values.counts and theirs.values.counts:
            yield from _of_counts(name, mine.values.counts, theirs.values.counts, is_label=is_label)
    elif len(reference.sample.of(name)):
        yield from _of_numbers(name, reference, new, mine)


def _is_nominal(known: ColumnProfile) -> bool:
    counts = known.values.counts
    return bool(counts) and not known.holds("real") and (known.holds("text") or len(counts or ()) <= _NOMINAL)


def _of_counts(name: str, reference: Mapping[str, int], new: Mapping[str, int], *, is_label: bool) -> Iterator[Test]:
    result = chi_square(reference, new)
    if result is not None:
        shares = _changed_most(reference, new)
        yield Test(
            "class_balance" if is_label else "drift", name, result[1], result[0], {"test": "chi-square", **shares}
        )


def _changed_most(reference: Mapping[str, int], new: Mapping[str, int]) -> dict[str, Any]:
    n, m = sum(reference.values()), sum(new.values())
    names = sorted({*reference, *new})
    change = [abs(reference.get(value, 0) / n - new.get(value, 0) / m) for value in names]
    top = names[int(np.argmax(change))]
    return {"changed_most": top[:60], "reference_share": reference.get(top, 0) / n, "share": new.get(top, 0) / m}


def _of_numbers(name: str, reference: Profile, new: Profile, mine: ColumnProfile) -> Iterator[Test]:
    values, of_new = reference.sample.of(name), new.sample.of(name)
    result = kolmogorov_smirnov(values, of_new)
    if result is not None:
        medians = {"reference_median": float(np.median(values)), "median": float(np.median(of_new))}
        yield Test("drift", name, result[1], result[0], {"test": "Kolmogorov-Smirnov", **medians})
    outside = int(((of_new < mine.low) | (of_new > mine.high)).sum())
    seen = sum(mine.kinds[kind] for kind in ("flag", "whole", "real"))
    p_value = beyond_extremes(outside, len(of_new), seen)
    setting = {"test": "exceedances", "low": mine.low, "high": mine.high, "outside": outside}
    yield Test("range", name, p_value, outside / max(1, len(of_new)), setting)
    yield from _of_outliers(name, reference, new)


def _of_outliers(name: str, reference: Profile, new: Profile) -> Iterator[Test]:
    """Fences from one half of the reference sample, so that its other half and the new rows meet them alike."""
    half, other = reference.sample.halves(name)
    limits, of_new = fences(half), new.sample.of(name)
    if limits is None or not len(other) or not len(of_new):
        return
    before, after = (int(((part < limits.low) | (part > limits.high)).sum()) for part in (other, of_new))
    p_value = rates(before, len(other), after, len(of_new))
    shares = {"reference_share": before / len(other), "low": limits.low, "high": limits.high}
    yield Test("outliers", name, p_value, after / len(of_new), {"test": "Fisher", **shares})
