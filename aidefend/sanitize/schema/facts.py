"""What can be said of single rows: each rule of a schema as a mask over a batch, collected with row numbers."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from aidefend._core.checks import describe
from aidefend.sanitize.schema.columns import KINDS, Column
from aidefend.sanitize.schema.profile import ColumnProfile, Mask, Measure, Profile, value_names
from aidefend.sanitize.schema.ranges import Limits, far_limits

_SHOWN_ROWS = 20
_SHOWN_VALUES = 3
_SHOWN_LETTERS = 40
_SINGLES = 0.05  # share of labels that occur once, above which whole numbers are measurements


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What a person knows of a column; None where nothing is known.

    `required`: the column has to be there; of the whole table (""): no other column may be. `unchecked`: rules that a
    person wrote down elsewhere and that are not looked at here.
    """

    low: float | None = None
    high: float | None = None
    values: tuple[str, ...] | None = None
    max_missing: float | None = None
    required: bool = True
    unchecked: tuple[str, ...] = ()


@dataclasses.dataclass
class Fact:
    """Rows that break one rule: how many, the first of them, and what stood there."""

    count: int = 0
    rows: list[int] = dataclasses.field(default_factory=list)
    examples: list[str] = dataclasses.field(default_factory=list)


class Facts:
    """All that was found in single rows, by measure and column."""

    def __init__(self) -> None:
        self.found: dict[Measure, Fact] = {}

    def add(self, masks: Mapping[Measure, Mask], places: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> None:
        """Count the rows of a batch; `places` holds their numbers in the whole."""
        for measure, mask in masks.items():
            if count := int(mask.sum()):
                fact = self.found.setdefault(measure, Fact())
                fact.count += count
                fact.rows += places[mask][: _SHOWN_ROWS - len(fact.rows)].tolist()

    def show(self, measure: Measure, column: Column, mask: Mask) -> None:
        """Remember what stood in the first rows that break a rule."""
        fact = self.found.setdefault(measure, Fact())
        for row in np.flatnonzero(mask)[: _SHOWN_VALUES - len(fact.examples)].tolist():
            fact.examples.append(_shown(column, row))


def _shown(column: Column, row: int) -> str:
    if column.texts is not None and (text := column.texts[row]) is not None:
        return describe(text[:_SHOWN_LETTERS])
    if column.shapes is not None and (shape := column.shapes[row]) is not None:
        return shape
    number = float(column.numbers[row])
    return KINDS[column.kinds[row]] if np.isnan(number) else format(number, ".6g")


class Rules:
    """The rules that follow from a profile and from what a person expects.

    Args:
        profile: Of the reference data.
        expectations: By column.
    """

    def __init__(self, profile: Profile, expectations: Mapping[str, Expectation]) -> None:
        self.profile, self.expectations = profile, expectations
        self.limits = {name: limits for name in profile.columns if (limits := self._limits(name)) is not None}

    def broken(self, columns: Mapping[str, Column], facts: Facts) -> dict[Measure, Mask]:
        """Rows of a batch against each rule; examples go to `facts`."""
        found: dict[Measure, Mask] = {}
        for name, column in columns.items():
            known = self.profile.columns.get(name)
            if known is not None and not self.profile.repeats(name):
                found |= {(rule, name): mask for rule, mask in self._of_column(name, known, column).items()}
        found = {measure: mask for measure, mask in found.items() if mask.any()}
        for measure, mask in found.items():
            facts.show(measure, columns[measure[1]], mask)
        return found

    def _of_column(self, name: str, known: ColumnProfile, column: Column) -> dict[str, Mask]:
        strange = ~column.is_kind("missing", *_allowed(known))
        is_label = name == self.profile.label
        found: dict[str, Mask] = {"label_type" if is_label else "type": strange}
        if known.shapes.counts and column.shapes is not None:
            seen = known.shapes.counts
            found["shape"] = np.array([shape is not None and shape not in seen for shape in column.shapes])
        if name in self.limits:
            with np.errstate(invalid="ignore"):
                low, high = self.limits[name]
                found["range"] = ((column.numbers < low) | (column.numbers > high)) & np.isfinite(column.numbers)
        allowed = self._values(name, known)
        if allowed is not None:
            unseen = [value is not None and value not in allowed for value in value_names(column)]
            found["unseen_label" if is_label else "category"] = np.array(unseen, dtype=np.bool_) & ~strange
        return found

    def _values(self, name: str, known: ColumnProfile) -> frozenset[str] | None:
        expected = self.expectations.get(name)
        if expected is not None and expected.values is not None:
            return frozenset(expected.values)
        closed = is_class_like(known) if name == self.profile.label else known.holds("text")
        return frozenset(known.values.counts) if closed and known.values.counts else None

    def _limits(self, name: str) -> Limits | None:
        known, expected = self.profile.columns[name], self.expectations.get(name)
        classes = name == self.profile.label and is_class_like(known)
        sample = self.profile.sample.of(name)
        limits = self._of_siblings(name, known)
        if limits is None and len(sample) and not classes:
            count = sum(known.kinds[kind] for kind in ("flag", "whole", "real"))
            limits = far_limits(sample, known.low, known.high, count, whole=not known.holds("real"))
        if expected is None or (expected.low is None and expected.high is None):
            return limits
        low, high = limits or (-np.inf, np.inf)
        return Limits(low if expected.low is None else expected.low, high if expected.high is None else expected.high)

    def _of_siblings(self, name: str, known: ColumnProfile) -> Limits | None:
        """For a feature "x[3]" that never varied: the range of all features, which share a unit as pixels do."""
        parent = name.partition("[")[0]
        if not name.endswith("]") or known.low != known.high:
            return None
        family = [column for other, column in self.profile.columns.items() if other.startswith(f"{parent}[")]
        low, high = min(column.low for column in family), max(column.high for column in family)
        return Limits(low, high) if low < high else None


def _allowed(known: ColumnProfile) -> list[str]:
    kinds = [kind for kind, count in known.kinds.items() if count and kind != "missing"]
    never_varied = "whole" in kinds and known.low == known.high  # such as zeros: says nothing of what else may come
    return [*kinds, "whole", "real"] if "real" in kinds or never_varied else kinds


def is_class_like(known: ColumnProfile) -> bool:
    """Whether a label column holds classes, not measured numbers: of whole numbers, few are seen once only."""
    counts = known.values.counts
    if not counts or known.holds("real", "array", "binary", "time", "other"):
        return False
    singles = sum(count == 1 for count in counts.values())
    return known.holds("text") or singles <= _SINGLES * sum(counts.values())
