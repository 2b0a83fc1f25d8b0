"""Hard checks on tables: columns, kinds, ranges, categories and missing values."""

import dataclasses
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_number, refuse
from aidefend._core.storage import plain
from aidefend.validate.no_table import NoTable
from aidefend.validate.spec_file import read_spec, spec_fields, write_spec
from aidefend.validate.spec_header import MOST_ROWS
from aidefend.validate.spec_result import SpecResult, refused_batch
from aidefend.validate.table_columns import Column, judge_column
from aidefend.validate.table_forms import Columns, columns_of
from aidefend.validate.table_inference import infer_column
from aidefend.validate.table_schema import table_schema

_SCHEMA = "aidefend.table-spec/1"
_MOST_COLUMNS = 10_000


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """The rules that every table must satisfy: which columns there are, and what each may hold.

    Guarantee: `check` never raises, and asks for the numbers of rows, columns and bytes (256 MiB) before it converts
        anything; a column that is not named is never converted. A row that breaks a rule changes no verdict on another.
        Values are judged as they are: "5" is no number, True is no integer, and an object of an unknown class is never
        asked anything.
    Args:
        columns: Name to `Column`, in the order in which `to_tensor` puts them.
        extra: Policy for columns that are not named: "reject" the table, or "drop" them.
        max_rows: Largest N.
    Forms that `check` takes: dict of lists, numpy arrays or tensors; structured numpy array; list of dict rows;
        pandas.DataFrame; pyarrow.Table and RecordBatch.
    Raises: ConfigurationError: a rule contradicts itself.
    Cost: A few vectorised passes over numeric arrays; one Python step for each value of lists and objects.
    Example:
        >>> spec = TableSpec(
        ...     {"age": Column("integer", low=0, high=120), "plan": Column("category", categories=("a", "b"))}
        ... )
        >>> result = spec.check([{"age": 30, "plan": "a"}, {"age": 999, "plan": "a"}, {"age": 5, "plan": "c"}])
        >>> result.reasons[1:]
        (("input: column 'age': out of range",), ("input: column 'plan': unknown category",))
        >>> spec.to_tensor(result.x)
        tensor([[30., 0.]])
    """

    columns: Mapping[str, Column]
    extra: Literal["reject", "drop"] = "reject"
    max_rows: int = 16_384

    def __post_init__(self) -> None:
        kinds = isinstance(self.columns, Mapping) and all(
            isinstance(name, str) and isinstance(column, Column) for name, column in self.columns.items()
        )
        if not kinds or not self.columns or len(self.columns) > _MOST_COLUMNS:
            raise refuse("columns as {name: Column(...)}", "columns", self.columns, "Name at least one column")
        object.__setattr__(self, "columns", MappingProxyType(dict(self.columns)))
        check_choice(self.extra, ("reject", "drop"), "extra")
        check_int(self.max_rows, "max_rows", 1, MOST_ROWS)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self.columns), self.extra, self.max_rows)

    @classmethod
    def infer(
        cls,
        table: Any,
        *,
        margin: float = 0.25,
        most_categories: int = 50,
        extra: Literal["reject", "drop"] = "reject",
        max_rows: int = 16_384,
    ) -> "TableSpec":
        """The rules that a trusted table satisfies, with room at the ends of ranges.

        Numbers get the range that was seen, widened by `margin` of its width; integers the same, but not under 0 where
        none was. Texts with at most `most_categories` values, of which each occurs twice on average, are a category;
        other texts get their largest length with the same room. Missing values are accepted where there were some.
        Args:
            table: In any of the forms of `check`; trusted, not empty.
            margin: Room as a share of the width, >= 0.
            most_categories: Largest number of values of a category, >= 1.
            extra: As in `TableSpec`.
            max_rows: As in `TableSpec`.
        Raises: ConfigurationError: no table, no rows, or a column that mixes kinds or holds infinity.
        """
        check_number(margin, "margin", 0.0)
        check_int(most_categories, "most_categories")
        try:
            found, n = columns_of(table, MOST_ROWS, _MOST_COLUMNS)
        except Exception as error:
            found_text = str(error) if isinstance(error, NoTable) else f"{type(error).__name__}: {error}"
            raise refuse("a table", "table", found_text, "Pass a dict of columns, a DataFrame or rows") from error
        if not n:
            raise refuse("a table with at least one row", "table", "0 rows", "Pass trusted rows")
        columns = {name: infer_column(name, values, margin, most_categories) for name, values in found.items()}
        return cls(columns, extra, max_rows)

    def check(self, table: object) -> SpecResult:
        """Judge a table. Any object may be passed; nothing raises.

        Returns: Verdicts; `x` is a dict of the named columns, numpy arrays of the accepted rows: float64, int64, or
            object for booleans, categories and texts.
        """
        try:
            found, n = columns_of(table, self.max_rows, _MOST_COLUMNS, self.columns)
            return self._check_rows(found, n)
        except NoTable as error:
            return refused_batch(str(error))
        except Exception:
            return refused_batch("input: cannot be inspected")

    def _check_rows(self, found: Columns, n: int) -> SpecResult:
        if missing := [name for name in self.columns if name not in found]:
            raise NoTable(f"input: no column {missing[0][:40]!r}")
        if self.extra == "reject" and len(found) > len(self.columns):
            raise NoTable("input: columns that are not named")
        judged = {name: judge_column(column, name, found[name]) for name, column in self.columns.items()}
        broken = {rule: mask for one in judged.values() for rule, mask in one.broken.items()}
        refused = np.zeros(n, bool)
        reasons: list[tuple[str, ...]] = [()] * n
        for rule, mask in broken.items():
            refused |= mask
            for row in np.flatnonzero(mask).tolist():
                reasons[row] += (rule,)
        x = {name: one.values[~refused] for name, one in judged.items()}
        return SpecResult(None, torch.from_numpy(~refused), tuple(reasons), x)

    def to_tensor(self, x: Mapping[str, Any]) -> Tensor:
        """The accepted rows `result.x` as float32 (N, columns), ready for a guard or a model.

        Numbers as they are, booleans as 0 and 1, categories as their place in the list; missing numbers as NaN, other
        missing values as -1.
        Raises: ConfigurationError: a column of texts, which has no number.
        """
        arrays = list(x.values()) if isinstance(x, Mapping) and set(x) == set(self.columns) else [None]
        shapes = {one.shape if type(one) is np.ndarray else () for one in arrays}
        if len(shapes) != 1 or len(shapes.pop()) != 1:
            raise refuse("the columns that check returned", "x", x, "Pass result.x")
        if texts := [name for name, column in self.columns.items() if column.kind == "text"]:
            raise refuse("columns that are numbers", "columns", texts, "Embed the texts yourself; use result.x")
        try:
            parts = [_numbers(column, x[name]) for name, column in self.columns.items()]
        except (KeyError, TypeError) as error:
            raise refuse("values that check accepted", "x", error, "Pass result.x") from error
        return torch.from_numpy(np.stack(parts, axis=1).astype(np.float32))

    def to_dict(self) -> dict[str, Any]:
        """The rules as JSON types, the columns as a list in their order."""
        columns = [[name, dataclasses.asdict(column)] for name, column in self.columns.items()]
        return {"schema": _SCHEMA, "columns": plain(columns), "extra": self.extra, "max_rows": self.max_rows}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TableSpec":
        """The rules back from `to_dict`."""
        found = spec_fields(data, cls, _SCHEMA)
        try:
            columns = {name: Column(**described) for name, described in found["columns"]}
            if len(columns) != len(found["columns"]):
                raise ValueError("a column occurs twice")
        except (TypeError, ValueError) as error:
            raise refuse("columns as TableSpec.to_dict writes them", "data", data, str(error)) from error
        return cls(columns, found["extra"], found["max_rows"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rules as JSON, whole or not at all."""
        write_spec(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TableSpec":
        """The rules back from `save`."""
        return cls.from_dict(read_spec(path, cls.__name__))

    def to_json_schema(self) -> dict[str, Any]:
        """A JSON Schema (draft 2020-12) of a table as a list of dict rows: accepts what `check` accepts, but for N = 0.

        Quarantine is a refusal here. A row may leave out a column that accepts missing values.
        """
        return table_schema(self.columns, self.extra, self.max_rows)


def _numbers(column: Column, values: Any) -> Any:
    if column.kind in ("number", "integer"):
        if values.dtype not in (np.float64, np.int64):
            raise refuse("the columns that check returned", "x", values, "Pass result.x")
        return values.astype(np.float64)
    places = {value: float(i) for i, value in enumerate(column.categories or (False, True))}
    return np.array([-1.0 if value is None else places[value] for value in values.tolist()], np.float64)
