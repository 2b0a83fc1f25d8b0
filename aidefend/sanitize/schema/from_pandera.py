"""Rules of a pandera schema, read from its attributes or from its JSON form; pandera itself is not needed."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aidefend._core.checks import refuse
from aidefend.sanitize.schema.declared import TABLE, Declaration

_CURE = "Pass a pandera DataFrameSchema, a DataFrameModel, or what its to_json() gives"
_PLAIN = ("dtype", "nullable", "required", "checks", "name", "title", "description", "metadata", "report_duplicates")
_OFF: tuple[Any, ...] = (None, False, [], {}, "exclude_first", "all")


def declare_pandera(schema: Any) -> Declaration:
    """All rules of the schema, and those that have no counterpart, each by its name."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise refuse("JSON", "schema", schema, _CURE) from error
    convert = getattr(schema, "to_schema", None) if isinstance(schema, type) else None
    schema = convert() if callable(convert) else schema
    found = Declaration()
    read = _written if isinstance(schema, Mapping) else _attributes
    columns = read(schema, ("columns",)).get("columns")
    if not isinstance(columns, Mapping):
        raise refuse("a pandera schema of a table", "schema", schema, _CURE)
    for name, column in columns.items():
        _column(found, str(name), column)
    whole = read(schema, ("strict", "unique", "ordered", "coerce", "index", "checks", "unique_column_names", "dtype"))
    if whole.pop("strict", False):
        found.closed()
    for name, value in whole.items():
        if value not in _OFF:
            found.lacks(TABLE, _check_names(value) if name == "checks" else name)
    return found


def _written(data: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: data.get(name) for name in names}


def _attributes(thing: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(thing, name, None) for name in names}


def _column(found: Declaration, name: str, column: Any) -> None:
    """One column, as an object or as its dict (older files keep the checks under "checks")."""
    if isinstance(column, Mapping):
        given = dict(column)
        checks = given.pop("checks", None) or {name: given.pop(name) for name in list(given) if name in _CHECKS}
        pairs = _pairs(checks)
    else:
        given = _attributes(column, (*_PLAIN, "unique", "coerce", "regex", "default", "drop_invalid_rows", "parsers"))
        pairs = [_of_check(check) for check in given.pop("checks") or ()]
    required, nullable = given.get("required"), given.get("nullable")
    found.column(name, required=required is None or bool(required))
    found.missing(name, 1.0 if nullable else 0.0)
    if given.get("dtype") is not None and str(given["dtype"]) != "object":
        found.kind(name, [given["dtype"]])
    for rule, value in given.items():
        if rule not in _PLAIN and value not in _OFF:
            found.lacks(name, rule)
    for check, options in pairs:
        _CHECKS.get(check, _no_counterpart(check))(found, name, options)


def _pairs(checks: Any) -> list[tuple[str, Any]]:
    """(name, options) of written checks: a dict by name, or a list of dicts with their options."""
    if isinstance(checks, Mapping):
        return [(str(name), options) for name, options in checks.items()]
    return [_of_written(check) if isinstance(check, Mapping) else (str(check), {}) for check in checks]


def _of_written(check: Mapping[str, Any]) -> tuple[str, Any]:
    options = check.get("options")
    told = options if isinstance(options, Mapping) else check
    warns = " that warns" if told.get("raise_warning") else ""
    return f"{told.get('check_name')}{warns}", {name: value for name, value in check.items() if name != "options"}


def _of_check(check: Any) -> tuple[str, Any]:
    """A check that only warns, or looks at groups, is another rule than the plain one of its name."""
    name = str(getattr(check, "name", None) or type(check).__name__)
    plain = not getattr(check, "raise_warning", False) and getattr(check, "groupby", None) is None
    return (name if plain else f"{name} that warns or looks at groups"), dict(getattr(check, "statistics", None) or {})


def _check_names(checks: Any) -> str:
    names = [_of_check(check)[0] for check in checks] if not isinstance(checks, Mapping) else list(checks)
    return f"checks {', '.join(names)}"


def _limit(found: Declaration, name: str, check: str, value: Any) -> None:
    """One of the four comparisons; without a number in it, it is a rule that we lack."""
    if value is None:
        found.lacks(name, f"check {check} without a limit that we find")
        return
    low, high = (value, None) if check.startswith("greater") else (None, value)
    strict = not check.endswith("_or_equal_to")
    found.between(name, low, high, above=strict, below=strict)


def _comparison(check: str) -> Callable[[Declaration, str, Any], None]:
    return lambda found, name, o: _limit(found, name, check, _option(o, "min_value", "max_value", "value"))


def _option(options: Any, *names: str) -> Any:
    """An option by one of its names; written alone it is the only one."""
    if not isinstance(options, Mapping):
        return options
    return next((options[name] for name in names if name in options), None)


def _in_range(found: Declaration, name: str, options: Any) -> None:
    given = options if isinstance(options, Mapping) else {}
    if "min_value" not in given or "max_value" not in given:
        found.lacks(name, "check in_range without limits that we find")
        return
    above, below = not given.get("include_min", True), not given.get("include_max", True)
    found.between(name, given.get("min_value"), given.get("max_value"), above=above, below=below)


def _equal_to(found: Declaration, name: str, options: Any) -> None:
    value = _option(options, "value")
    if value is None:
        found.lacks(name, "check equal_to without a value that we find")
    elif isinstance(value, str):
        found.among(name, [value])
    else:
        found.between(name, value, value)


def _str_length(found: Declaration, name: str, options: Any) -> None:
    given = options if isinstance(options, Mapping) else {"exact_value": options}
    exact = given.get("exact_value")
    found.lengths(name, *((exact, exact) if exact is not None else (given.get("min_value"), given.get("max_value"))))


def _no_counterpart(check: str) -> Callable[[Declaration, str, Any], None]:
    return lambda found, name, options: found.lacks(name, f"check {check}")


_CHECKS: dict[str, Callable[[Declaration, str, Any], None]] = {
    "in_range": _in_range,
    "between": _in_range,
    "isin": lambda found, name, o: found.among(name, _option(o, "allowed_values", "value")),
    "equal_to": _equal_to,
    **{
        name: _comparison(name)
        for name in ("greater_than", "greater_than_or_equal_to", "less_than", "less_than_or_equal_to")
    },
    "str_length": _str_length,
    **{name: _no_counterpart(name) for name in ("notin", "not_equal_to", "str_matches", "str_contains")},
    **{name: _no_counterpart(name) for name in ("str_startswith", "str_endswith", "unique_values_eq")},
}
