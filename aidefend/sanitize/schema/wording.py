"""The findings of a check: what each measure is called, how urgent it is, and what it does not show."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from aidefend._core.evidence import Finding, Severity
from aidefend._core.stats import wilson

THREAT = "Someone who can alter rows of the data, or a pipeline that breaks them; not someone who forges this schema."
_ROWWISE = "Rows that keep to every rule are not shown to be right, nor free of poison."
_MARGINAL = "One column at a time: a change in how columns depend on one another is not seen."


class Words(NamedTuple):
    """Title and severity of a measure, and what its finding does not show."""

    title: str
    severity: Severity
    limits: str = _ROWWISE


MEASURES: Mapping[str, Words] = {
    "category": Words("Values that the column does not have", Severity.MEDIUM),
    "class_balance": Words("The shares of the classes changed", Severity.MEDIUM, _MARGINAL),
    "conflicting_labels": Words("Equal inputs with different labels", Severity.MEDIUM),
    "drift": Words("The distribution of the column changed", Severity.MEDIUM, _MARGINAL),
    "duplicates": Words(
        "Rows whose input occurs again in the data", Severity.LOW, "Equal rows only, not similar ones."
    ),
    "extra_column": Words("A column that the schema does not have", Severity.MEDIUM, ""),
    "label_type": Words("Labels of another type", Severity.HIGH),
    "leakage": Words(
        "Rows whose input is also in the reference data", Severity.HIGH, "Equal rows only, not similar ones."
    ),
    "missing_column": Words("A column is missing", Severity.HIGH, ""),
    "missing_values": Words("Missing values where there were fewer", Severity.MEDIUM),
    "not_finite": Words("Infinite values, or NaN inside an array", Severity.MEDIUM),
    "outliers": Words("More far-out values than before", Severity.MEDIUM, _MARGINAL),
    "range": Words("Values outside the range of the column", Severity.MEDIUM),
    "rows": Words("Rows that were checked", Severity.INFO, "The data held no row: nothing is shown."),
    "shape": Words("Arrays of another shape or dtype", Severity.HIGH),
    "text.bidi": Words("Text that reorders what a reader sees", Severity.HIGH),
    "text.control": Words("Text with control characters", Severity.MEDIUM),
    "text.decomposed": Words("Text that is not in the normal form NFC, so that equal words differ", Severity.LOW),
    "text.homoglyph": Words("Words that mix look-alike letters of two scripts", Severity.HIGH),
    "text.invisible": Words("Text with invisible characters", Severity.HIGH),
    "text.mojibake": Words("Text that was read in a wrong encoding", Severity.MEDIUM),
    "text.replacement": Words("Text with replacement characters or non-characters", Severity.MEDIUM),
    "text.surrogate": Words("Text with lone surrogates, which no encoding can write", Severity.HIGH),
    "type": Words("Values of another type", Severity.HIGH),
    "unreadable": Words("Rows that raised when they were read", Severity.HIGH, ""),
    "unseen_label": Words("Labels that the reference data do not have", Severity.HIGH),
}


def finding(
    measure: str,
    column: str,
    count: int,
    rows: int,
    setting: Mapping[str, Any],
    *,
    value: float | None = None,
    severity: Severity | None = None,
) -> Finding:
    """One finding "schema.<measure>"; without a value it is the share of rows, with its interval."""
    words = MEASURES[measure]
    share = wilson(count, rows) if value is None else None
    return Finding(
        id=f"schema.{measure}",
        title=f"{words.title}: {column}" if column else words.title,
        severity=words.severity if severity is None else severity,
        value=value if share is None else share.value,
        low=None if share is None else share.low,
        high=None if share is None else share.high,
        n=rows,
        setting={**({"column": column} if column else {}), **setting},
        threat=THREAT,
        limits=words.limits,
    )
