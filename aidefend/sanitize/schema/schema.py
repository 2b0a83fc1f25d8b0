"""What data of a source look like, inferred from a stream of batches, and what is wrong with new data from there."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from aidefend._core.checks import (
    check_flag,
    check_int,
    check_items,
    check_kind,
    check_number,
    check_probability,
    refuse,
)
from aidefend._core.evidence import Evidence
from aidefend._core.naming import paired
from aidefend._core.samples import LABEL_KEYS, Samples
from aidefend.sanitize.schema.checking import check_data
from aidefend.sanitize.schema.columns import MOST_FEATURES
from aidefend.sanitize.schema.description import describe_profile
from aidefend.sanitize.schema.facts import Expectation
from aidefend.sanitize.schema.from_great_expectations import declare_great_expectations
from aidefend.sanitize.schema.from_pandera import declare_pandera
from aidefend.sanitize.schema.profile import Profile, Sizes, occurrences
from aidefend.sanitize.schema.schema_file import load_schema, save_schema, schema_digest
from aidefend.sanitize.schema.tables import tables

_LONGEST_KEY = 64


class DatasetSchema:
    """What data of a source look like: made by `infer`, kept in a file, asked by `check`.

    Remembered is, in memory that does not grow with the data: for each column the types, the range, different values
    with their counts (texts up to 64, labels up to 10,000), shapes and text traps; the numbers of a uniform sample of
    rows; and the hashes of the input rows with their counts: all of them, an exact set, up to `rows` different
    ones, and the `rows` smallest hashes beyond, which then speak for that share of all rows (`row_coverage`).
    The file holds those numbers, labels and short texts as they stand in the data: guard it like the data.

    Guarantee: on rows drawn independently from the source of the reference rows, all tests of one `check` together
        (drift, class balance, outliers, exceedances, rates of what the reference knows) report anything with
        probability at most alpha (Holm, under every dependence of the columns; the chi-square and rate tests hold
        that asymptotically). Facts are not part of it: a value far outside the range (measured: in at most 1 of 100
        checks a column, for 300 reference rows or more and no more new ones), the first missing entry, the first text
        trap, an unseen label, an equal row. Not shown: that rows which pass are right, or free of poison; changes in
        how columns depend on one another; similar rows.
    Args:
        profile: The statistics; `infer` and `load` make them.
        alpha: Level of all tests of one check together.
        expectations: What a person knows beside them, see `expect`.
    Cost: one pass; some microseconds for each row and column, and one hash a row.
    Source: bottom-k sketches, Cohen, Kaplan 2007; tests of Kolmogorov-Smirnov, Pearson, Fisher, Wilks; Holm 1979.
    Example:
        >>> import numpy as np
        >>> stream = np.random.default_rng(0)
        >>> def people(n):
        ...     return {"age": stream.integers(18, 91, n), "city": stream.choice(["Bonn", "Lyon"], n)}
        >>> schema = DatasetSchema.infer(people(1000) for _ in range(3))
        >>> schema.check(people(500)).findings
        ()
        >>> broken = people(500)
        >>> broken["age"][7], broken["city"][8] = 999, "Atlantis"
        >>> [(finding.id, finding.setting["rows"]) for finding in schema.check(broken).findings]
        [('schema.category', [8]), ('schema.range', [7])]
    """

    def __init__(
        self, profile: Profile, alpha: float = 0.01, expectations: dict[str, Expectation] | None = None
    ) -> None:
        self._profile = check_kind(profile, Profile, "profile", "Use DatasetSchema.infer(batches)")
        self.alpha = check_probability(alpha, "alpha")
        self._expectations = dict(expectations or {})

    @classmethod
    def infer(
        cls,
        batches: Any,
        *,
        label: str | None = None,
        ignore: Sequence[str] = (),
        alpha: float = 0.01,
        key: bytes = b"",
        sample: int = 4096,
        rows: int = 1_000_000,
    ) -> "DatasetSchema":
        """Learn from data that you trust to be as data of this source should be.

        Args:
            batches: A table (dict of columns, DataFrame, arrow, Parquet), tensors (N, ...), (x, y), a Dataset, a
                DataLoader, `Samples`, or an iterable of batches in these forms, read once. Of (DataFrame, labels) the
                label column is called as the Series is, else "y". Columns hold
                numbers, flags, texts, bytes, times or arrays; None and NaN are missing. A column of vectors (N, d) with
                d <= 64 counts as d columns "x[0]", ...; of larger arrays four numbers a row are followed.
            label: Column of the labels; the first of "y", "label", "labels", "target", "targets" where it is None.
            ignore: Columns to pass over: row numbers, time stamps and all else that differs in every row by its nature.
            alpha: Level of all tests of one check together, in (0, 1).
            key: Secret of the row hashes, at most 64 bytes, which is not saved; with it, nobody who lacks it can
                choose rows that the sample will hold, or look rows up in the file.
            sample: Rows whose numbers are kept, >= 100.
            rows: Row hashes that are kept, >= 100.
        Raises: ConfigurationError: no readable row; data in no known form; columns of unequal length; unknown label.
        """
        sizes = Sizes(check_int(sample, "sample", 100), check_int(rows, "rows", 100))
        ignored = check_items(ignore, str, "ignore", "Pass a list of column names")
        profile: Profile | None = None
        check_probability(alpha, "alpha")
        batches = paired(batches)
        label = batches.label if label is None and isinstance(batches, Samples) else label
        for table in tables(batches):
            if profile is None:
                profile = Profile(_label_of(label, table.columns), ignored, _checked_key(key), sizes)
            columns = profile.read(table)
            profile.add(columns, occurrences(columns), len(table.places), len(table.unreadable))
        if profile is None or not profile.rows or not profile.columns:
            raise refuse("at least one row that can be read", "batches", "no such row", "Pass data that is not empty")
        return cls(profile.finish(), alpha)

    @classmethod
    def from_pandera(
        cls, schema: Any, *, label: str | None = None, unsupported: Literal["refuse", "list"] = "refuse"
    ) -> "DatasetSchema":
        """The rules of a pandera schema; there are no reference rows, so that only rules are checked and no drift.

        Taken over: columns (required, strict), dtype, nullable, in_range, isin, equal_to, greater_than, less_than and
        the two with _or_equal_to, str_length. Beside them infinite numbers and text traps are reported, as always.

        Args:
            schema: A DataFrameSchema or DataFrameModel, or what `to_json()` gives, as text or dict.
            label: Column of the labels.
            unsupported: "refuse" a schema with a rule that has no counterpart here; or "list" these rules under
                `metadata["not_tested"]["imported_rules"]` of every check, and check the others.
        Raises: ConfigurationError: no pandera schema of a table; a rule without counterpart, each is named.
        Example:
            >>> rules = {"columns": {"age": {"dtype": "int64", "in_range": {"min_value": 0, "max_value": 120}}}}
            >>> schema = DatasetSchema.from_pandera(rules)
            >>> [(one.id, one.setting["rows"]) for one in schema.check({"age": [31, 130]}).findings]
            [('schema.range', [1])]
        """
        profile, expectations = declare_pandera(schema).finished(label, unsupported)
        return cls(profile, expectations=expectations)

    @classmethod
    def from_great_expectations(
        cls, suite: Any, *, label: str | None = None, unsupported: Literal["refuse", "list"] = "refuse"
    ) -> "DatasetSchema":
        """The rules of a Great Expectations suite; there are no reference rows, so that only rules are checked.

        Taken over: that columns exist (also as a set or list), are not null (with mostly), lie between limits or in a
        set, have texts of some length, are of a type, and the outer limit of their minimum and maximum.

        Args:
            suite: Its JSON form, as text or dict, or an object with `to_json_dict()`.
            label: Column of the labels.
            unsupported: See `from_pandera`; rules with a condition, or with `mostly` where it is not named above, have
                no counterpart.
        Raises: ConfigurationError: no suite; a rule without counterpart, each is named.
        Example:
            >>> rule = {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "c", "value_set": ["a"]}}
            >>> schema = DatasetSchema.from_great_expectations({"name": "s", "expectations": [rule]})
            >>> [(one.id, one.setting["rows"]) for one in schema.check({"c": ["a", "b"]}).findings]
            [('schema.category', [1])]
        """
        profile, expectations = declare_great_expectations(suite).finished(label, unsupported)
        return cls(profile, expectations=expectations)

    def merge(self, other: "DatasetSchema") -> "DatasetSchema":
        """The schema of both parts of the data, inferred with the same arguments; neither is changed.

        Counts, ranges, values and row hashes are those of one pass over all rows; so is the sample, where no input row
        is in both parts and `row_coverage` is 1. Level and expectations are those of the left side.
        """
        check_kind(other, DatasetSchema, "other", "Pass another schema")
        return DatasetSchema(self._profile.merged(other._profile), self.alpha, self._expectations)

    def expect(
        self,
        column: str,
        *,
        low: float | None = None,
        high: float | None = None,
        values: Iterable[Any] | None = None,
        max_missing: float | None = None,
    ) -> "DatasetSchema":
        """This schema with what you know of a column, in place of what was inferred for it.

        Args:
            column: A column of the schema, such as "age" or "x[3]".
            low: Smallest allowed number; None leaves the inferred limit.
            high: Largest allowed number; None leaves the inferred limit.
            values: All values that are allowed, texts or whole numbers.
            max_missing: Largest allowed share of missing entries, in [0, 1].
        Raises: ConfigurationError: no such column, low above high.
        """
        if not isinstance(column, str) or column not in self._profile.columns:
            raise refuse(
                f"a column among {sorted(self._profile.columns)[:MOST_FEATURES]}", "column", column, "Name one"
            )
        ends = [None if end is None else check_number(end, name) for name, end in (("low", low), ("high", high))]
        if ends[0] is not None and ends[1] is not None and ends[0] > ends[1]:
            raise refuse("low <= high", "low", low, "Swap the two")
        named = None if values is None else check_items(values, (str, int), "values", "Pass texts or whole numbers")
        texts = None if named is None else tuple(sorted({_value_name(value) for value in named}))
        share = None if max_missing is None else check_number(max_missing, "max_missing", 0.0, 1.0)
        expectation = Expectation(ends[0], ends[1], texts, share)
        return DatasetSchema(self._profile, self.alpha, {**self._expectations, column: expectation})

    def check(self, batch: Any, *, seen: bool = False) -> Evidence:
        """What is wrong with new data from the source; no findings where nothing is.

        Each finding "schema.<measure>" is about one column and names the rows (their numbers, the first 20), or the
        test with its corrected p-value: missing_column, extra_column, type, shape, range, category, missing_values,
        not_finite, text.<trap>, unseen_label, label_type, conflicting_labels, class_balance, duplicates (inside the
        new data), leakage (rows that the reference has, too), outliers, drift, unreadable. What was not tested is in
        `metadata["not_tested"]`.

        Args:
            batch: New data in any of the forms that `infer` takes, a whole stream of batches, too.
            seen: The rows are part of the data that the schema was inferred from: do not report them as leakage.
        Returns: Evidence; data without a row gives "schema.rows" as not tested.
        Raises: ConfigurationError: data in no known form, columns of unequal length. Bad rows are reported.
        """
        return check_data(
            self._profile, self._expectations, self.alpha, batch, seen=check_flag(seen, "seen"), digest=self.digest
        )

    def to_evidence(self) -> Evidence:
        """What the reference data themselves hold: counts, traps, repeated rows, conflicting labels, class balance."""
        return describe_profile(self._profile, self.digest)

    @property
    def rows(self) -> int:
        """Number of reference rows."""
        return self._profile.rows

    @property
    def label(self) -> str | None:
        """Column of the labels."""
        return self._profile.label

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, derived ones such as "text.length" and "x.mean" among them."""
        return tuple(self._profile.columns)

    @property
    def row_coverage(self) -> float:
        """Share of rows for which the schema knows whether it has seen them: 1 while the set of hashes is exact."""
        return self._profile.hashes.coverage

    @property
    def digest(self) -> str:
        """SHA-256 of all that the schema holds."""
        return schema_digest(self._profile, self.alpha, self._expectations)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schema as JSON, whole or not at all. The key of the row hashes is not in it."""
        save_schema(path, self._profile, self.alpha, self._expectations)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, key: bytes = b"") -> "DatasetSchema":
        """The schema back from `save`, with the key that it was inferred with.

        Raises: ConfigurationError: a file of another kind, changed or damaged; another key.
        """
        return cls(*load_schema(path, _checked_key(key)))


def _label_of(label: Any, columns: Iterable[str]) -> str | None:
    names = list(columns)
    if label is None:
        return next((name for name in LABEL_KEYS if name in names), None)
    if not isinstance(label, str) or label not in names:
        raise refuse(f"label to be a column among {names[:MOST_FEATURES]}", "label", label, "Name the label column")
    return label


def _checked_key(key: Any) -> bytes:
    if not isinstance(key, bytes) or len(key) > _LONGEST_KEY:
        rule = f"key to be at most {_LONGEST_KEY} bytes"
        raise refuse(rule, "key", "bytes" if isinstance(key, bytes) else key, "Pass secrets.token_bytes(32)")
    return key


def _value_name(value: Any) -> str:
    return value if isinstance(value, str) else format(float(check_number(value, "values")), ".17g")
