"""A schema that was written down elsewhere, without reference data: rules of columns, and rules that we lack."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from aidefend._core.checks import check_choice, refuse
from aidefend.sanitize.schema.columns import KINDS
from aidefend.sanitize.schema.facts import Expectation
from aidefend.sanitize.schema.profile import MOST_CATEGORIES, MOST_CLASSES, ColumnProfile, Profile, Sizes, Values

Unsupported = Literal["refuse", "list"]
TABLE = ""  # the place of rules about the whole table among the expectations

_KINDS_OF = {
    "whole": ("int", "uint", "bigint", "smallint", "long"),
    "real": ("float", "double", "real", "decimal", "number"),
    "flag": ("bool",),
    "text": ("str", "string", "text", "varchar", "char", "category"),
    "time": ("date", "time", "timestamp"),
    "binary": ("bytes", "binary"),
}


class Declaration:
    """Collects the rules of another library's schema, column by column; each narrows what came before."""

    def __init__(self) -> None:
        self._rules: dict[str, Expectation] = {TABLE: Expectation(required=False)}
        self._kinds: dict[str, tuple[str, ...]] = {}

    def column(self, name: str, *, required: bool = False) -> None:
        """A column that may be there, or has to be."""
        rule = self._rules.get(name, Expectation(max_missing=1.0, required=False))
        self._rules[name] = dataclasses.replace(rule, required=rule.required or required)

    def closed(self) -> None:
        """No other columns may be there."""
        self._rules[TABLE] = dataclasses.replace(self._rules[TABLE], required=True)

    def kind(self, name: str, types: Sequence[Any]) -> None:
        """The entries are of one of these types, by their usual names."""
        found = [kind for text in types if (kind := _kind_of(str(text))) is not None]
        if len(found) < len(types):
            self.lacks(name, f"type {', '.join(map(str, types))}")
            return
        self.column(name)
        self._kinds[name] = tuple(found)

    def between(self, name: str, low: Any, high: Any, *, above: bool = False, below: bool = False) -> None:
        """Numbers from low to high; `above` and `below` leave the ends out."""
        ends: list[float | None] = []
        for end, strict, away in ((low, above, math.inf), (high, below, -math.inf)):
            if end is None:
                ends.append(None)
            elif isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end):
                self.lacks(name, f"a limit that is no number: {end!r}")
                return
            else:
                ends.append(float(np.nextafter(end, away)) if strict else float(end))
        self.column(name)
        rule = self._rules[name]
        lows, highs = ([e for e in pair if e is not None] for pair in ((rule.low, ends[0]), (rule.high, ends[1])))
        self._rules[name] = dataclasses.replace(rule, low=max(lows, default=None), high=min(highs, default=None))

    def lengths(self, name: str, low: Any, high: Any) -> None:
        """Texts of low to high letters."""
        self.column(name)
        self.between(f"{name}.length", low, high)

    def among(self, name: str, values: Any) -> None:
        """One of these texts or whole numbers."""
        given = list(values) if isinstance(values, list | tuple | set | frozenset) else None
        if given is None or not all(isinstance(value, str | int) or _whole(value) for value in given):
            self.lacks(name, "values that are neither texts nor whole numbers")
            return
        names = {value if isinstance(value, str) else format(float(value), ".17g") for value in given}
        self.column(name)
        rule = self._rules[name]
        kept = names if rule.values is None else names & set(rule.values)
        self._rules[name] = dataclasses.replace(rule, values=tuple(sorted(kept)))

    def missing(self, name: str, share: float) -> None:
        """At most this share of entries is missing."""
        self.column(name)
        known = self._rules[name].max_missing
        self._rules[name] = dataclasses.replace(
            self._rules[name], max_missing=min(share, 1.0 if known is None else known)
        )

    def lacks(self, name: str, rule: str) -> None:
        """A rule that has no counterpart here."""
        if name != TABLE:
            self.column(name)
        old = self._rules[name]
        self._rules[name] = dataclasses.replace(old, unchecked=(*old.unchecked, rule))

    def finished(self, label: str | None, unsupported: Any) -> tuple[Profile, dict[str, Expectation]]:
        """The profile of no rows with these columns, and what is expected of them.

        Raises: ConfigurationError: no rule at all, or rules without counterpart and `unsupported` is "refuse".
        """
        check_choice(unsupported, ("refuse", "list"), "unsupported")
        named = [name for name in self._rules if name != TABLE]
        if not named:
            raise refuse("a schema with at least one column", "schema", "none", "Name the columns there")
        if label is not None and (not isinstance(label, str) or label not in named):
            raise refuse(f"label to be a column among {named}", "label", label, "Name the label column")
        lacking = [f"{name or 'the table'}: {rule}" for name, one in self._rules.items() for rule in one.unchecked]
        if lacking and unsupported == "refuse":
            cure = 'Check these elsewhere and pass unsupported="list": they are then named in every check'
            raise refuse("rules that have a counterpart", "schema", "; ".join(lacking), cure)
        return self._profile(named, label), dict(self._rules)

    def _profile(self, named: Sequence[str], label: str | None) -> Profile:
        profile = Profile(label, (), b"", Sizes())
        profile.inputs = ()
        for name in named:
            of = (
                name.removesuffix(".length")
                if name.endswith(".length") and name.removesuffix(".length") in named
                else ""
            )
            column = ColumnProfile(of, MOST_CLASSES if name == label else MOST_CATEGORIES)
            kinds = ("whole",) if of else self._kinds.get(name, tuple(kind for kind in KINDS if kind != "missing"))
            column.kinds = Counter(dict.fromkeys(kinds, 1))
            if f"{name}.length" in named:
                column.values = Values(MOST_CATEGORIES, open_ended=True)  # or its lengths would say nothing new
            profile.columns[name] = column
        return profile


def _kind_of(text: str) -> str | None:
    """Our word for a type of pandas, SQL, arrow or Spark: "int64", "INTEGER", "string[pyarrow]", "datetime64[ns]"."""
    plain = text.lower().removesuffix("type").split("[")[0].split("(")[0].split(".")[-1].strip()
    return next((kind for kind, words in _KINDS_OF.items() for word in words if plain.startswith(word)), None)


def _whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()
