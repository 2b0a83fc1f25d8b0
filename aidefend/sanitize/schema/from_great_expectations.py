"""Rules of a Great Expectations suite, read from its JSON form; Great Expectations itself is not needed."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from aidefend._core.checks import refuse
from aidefend.sanitize.schema.declared import TABLE, Declaration

_CURE = "Pass the suite as to_json_dict() gives it, or the text of its file"
_ASIDE = ("column", "mostly", "batch_id", "result_format", "catch_exceptions", "include_config", "meta", "notes")
Kwargs = Mapping[str, Any]


def declare_great_expectations(suite: Any) -> Declaration:
    """All rules of the suite, and those that have no counterpart, each by its name."""
    if isinstance(suite, str):
        try:
            suite = json.loads(suite)
        except ValueError as error:
            raise refuse("JSON", "suite", suite, _CURE) from error
    if not isinstance(suite, Mapping) and callable(getattr(suite, "to_json_dict", None)):
        suite = suite.to_json_dict()
    rules = suite.get("expectations") if isinstance(suite, Mapping) else None
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        raise refuse("a suite with its expectations", "suite", suite, _CURE)
    found = Declaration()
    for rule in rules:
        kind = str(rule.get("type") or rule.get("expectation_type"))
        kwargs = {name: value for name, value in (rule.get("kwargs") or {}).items() if value is not None}
        column = str(kwargs.get("column", TABLE))
        known = _RULES.get(kind)
        odd = [] if known is None else sorted(set(kwargs) - set(_ASIDE) - set(known[1]))
        mostly = kwargs.get("mostly", 1.0)
        if known is None or odd or (mostly != 1.0 and "mostly" not in known[1]):
            detail = f" with {', '.join(odd)}" if odd else " with mostly" if known is not None else ""
            found.lacks(column, f"{kind}{detail}")
        else:
            known[0](found, column, kwargs)
    return found


def _between(found: Declaration, column: str, kwargs: Kwargs) -> None:
    strict = {"above": bool(kwargs.get("strict_min")), "below": bool(kwargs.get("strict_max"))}
    found.between(column, kwargs.get("min_value"), kwargs.get("max_value"), **strict)


def _least(found: Declaration, column: str, kwargs: Kwargs) -> None:
    """The smallest entry lies in a range: that no entry lies below is ours, that one lies so low is not."""
    found.between(column, kwargs.get("min_value"), None, above=bool(kwargs.get("strict_min")))
    if "max_value" in kwargs:
        found.lacks(column, "expect_column_min_to_be_between with max_value")


def _most(found: Declaration, column: str, kwargs: Kwargs) -> None:
    found.between(column, None, kwargs.get("max_value"), below=bool(kwargs.get("strict_max")))
    if "min_value" in kwargs:
        found.lacks(column, "expect_column_max_to_be_between with min_value")


def _not_null(found: Declaration, column: str, kwargs: Kwargs) -> None:
    mostly = kwargs.get("mostly", 1.0)
    if isinstance(mostly, bool) or not isinstance(mostly, int | float) or not 0 <= mostly <= 1:
        raise refuse("mostly in [0, 1]", "suite", mostly, "Correct the suite")
    found.missing(column, 1.0 - mostly)


def _columns(found: Declaration, names: Any, *, exact: bool) -> None:
    if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
        raise refuse("names of columns", "suite", names, "Correct the suite")
    for name in names:
        found.column(name, required=True)
    if exact:
        found.closed()


def _ordered(found: Declaration, column: str, kwargs: Kwargs) -> None:
    _columns(found, kwargs.get("column_list"), exact=True)
    found.lacks(column, "the order of the columns")


_STRICT = ("min_value", "max_value", "strict_min", "strict_max")
_RULES: dict[str, tuple[Callable[[Declaration, str, Kwargs], None], tuple[str, ...]]] = {
    "expect_column_to_exist": (lambda found, column, kwargs: found.column(column, required=True), ()),
    "expect_table_columns_to_match_set": (
        lambda found, column, kwargs: _columns(found, kwargs.get("column_set"), exact=kwargs.get("exact_match", True)),
        ("column_set", "exact_match"),
    ),
    "expect_table_columns_to_match_ordered_list": (_ordered, ("column_list",)),
    "expect_column_values_to_not_be_null": (_not_null, ("mostly",)),
    "expect_column_values_to_be_in_set": (
        lambda found, column, kwargs: found.among(column, kwargs.get("value_set")),
        ("value_set",),
    ),
    "expect_column_values_to_be_between": (_between, _STRICT),
    "expect_column_min_to_be_between": (_least, _STRICT),
    "expect_column_max_to_be_between": (_most, _STRICT),
    "expect_column_value_lengths_to_be_between": (
        lambda found, column, kwargs: found.lengths(column, kwargs.get("min_value"), kwargs.get("max_value")),
        ("min_value", "max_value"),
    ),
    "expect_column_value_lengths_to_equal": (
        lambda found, column, kwargs: found.lengths(column, kwargs.get("value"), kwargs.get("value")),
        ("value",),
    ),
    "expect_column_values_to_be_of_type": (
        lambda found, column, kwargs: found.kind(column, [kwargs.get("type_")]),
        ("type_",),
    ),
    "expect_column_values_to_be_in_type_list": (
        lambda found, column, kwargs: found.kind(column, list(kwargs.get("type_list") or ())),
        ("type_list",),
    ),
}
