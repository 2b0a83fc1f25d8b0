"""`TableSpec`: columns, kinds, ranges, categories, missing values; the same verdict in every form of a table."""

import json
import math
import sys

import jsonschema
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aidefend import ConfigurationError
from aidefend.validate import Column, InputSpec, TableSpec, TextSpec

SPEC = TableSpec(
    {
        "age": Column("integer", low=0, high=120),
        "income": Column("number", low=0.0, missing="accept", out_of_range="quarantine"),
        "plan": Column("category", categories=("free", "paid")),
        "member": Column("boolean", missing="accept"),
        "name": Column("text", max_length=5, missing="quarantine"),
    },
    max_rows=8,
)
GOOD = {"age": 30, "income": 1e3, "plan": "free", "member": True, "name": "Ada"}


def verdict(**changes):
    result = SPEC.check([GOOD, {**GOOD, **changes}, GOOD])
    assert result.fault is None, result.fault
    assert result.accepted.tolist()[::2] == [True, True] and result.reasons[::2] == ((), ())
    return result.reasons[1]


class Hostile:
    """Any look at it is a failure."""

    def __getattribute__(self, name):
        raise AssertionError(f"code of the input ran: {name}")

    def __repr__(self):
        return "Hostile()"  # names the test: the same on every worker


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"age": 121}, "input: column 'age': out of range"),
        ({"age": -1}, "input: column 'age': out of range"),
        ({"age": 2.5}, "input: column 'age': not of kind integer"),
        ({"age": True}, "input: column 'age': not of kind integer"),
        ({"age": "30"}, "input: column 'age': not of kind integer"),
        ({"age": 10**400}, "input: column 'age': not of kind integer"),
        ({"age": float("inf")}, "input: column 'age': not of kind integer"),
        ({"age": None}, "input: column 'age': missing"),
        ({"age": float("nan")}, "input: column 'age': missing"),
        ({"age": [30]}, "input: column 'age': not of kind integer"),
        ({"age": Hostile()}, "input: column 'age': not of kind integer"),
        ({"income": -1.0}, "quarantine: column 'income': out of range"),
        ({"income": float("inf")}, "input: column 'income': not finite"),
        ({"income": 10**400}, "input: column 'income': not of kind number"),
        ({"income": 1j}, "input: column 'income': not of kind number"),
        ({"plan": "gold"}, "input: column 'plan': unknown category"),
        ({"plan": 0}, "input: column 'plan': not of kind category"),
        ({"plan": None}, "input: column 'plan': missing"),
        ({"member": 1}, "input: column 'member': not of kind boolean"),
        ({"name": "Ada Lovelace"}, "input: column 'name': too long"),
        ({"name": b"Ada"}, "input: column 'name': not of kind text"),
        ({"name": None}, "quarantine: column 'name': missing"),
    ],
    ids=str,
)
def test_a_broken_rule_refuses_that_row_alone(changes, rule):
    assert verdict(**changes) == (rule,)


def test_several_broken_rules_are_all_named_and_quarantine_is_marked():
    assert verdict(age=121, plan="gold") == (
        "input: column 'age': out of range",
        "input: column 'plan': unknown category",
    )
    result = SPEC.check([GOOD, {**GOOD, "income": -1.0}, {**GOOD, "age": -1}])
    assert result.quarantined.tolist() == [False, True, False]


@pytest.mark.parametrize("changes", [{"income": None}, {"member": None}, {"age": 30.0}, {"age": np.int8(30)}, {}])
def test_what_the_rules_allow_is_accepted(changes):
    assert verdict(**changes) == ()


def forms(rows):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    frame = pandas.DataFrame(columns)
    structured = np.array(
        [tuple(row.values()) for row in rows],
        dtype=[("age", "i8"), ("income", "f8"), ("plan", "U9"), ("member", "?"), ("name", "O")],
    )
    return {
        "rows": rows,
        "columns": columns,
        "arrays": {name: np.array(values, object if name == "name" else None) for name, values in columns.items()},
        "tensors": {**columns, "age": torch.tensor(columns["age"]), "income": torch.tensor(columns["income"]).double()},
        "structured": structured,
        "frame": frame,
        "typed frame": frame.convert_dtypes().astype({"plan": "category"}),
        "arrow": pyarrow.table(columns),
        "arrow batch": pyarrow.RecordBatch.from_pydict(columns),
    }


def test_every_form_of_a_table_gets_the_same_verdict():
    rows = [GOOD, {**GOOD, "age": 200}, {**GOOD, "plan": "gold"}, {**GOOD, "income": -5.0}, {**GOOD, "income": 7.5}]
    results = {name: SPEC.check(table) for name, table in forms(rows).items()}
    first = results.pop("rows")
    assert first.accepted.tolist() == [True, False, False, False, True]
    assert first.x["income"].tolist() == [1e3, 7.5] and first.x["age"].dtype == np.int64
    for name, result in results.items():
        assert result.fault is None and result.reasons == first.reasons, name
        assert all(result.x[column].tolist() == first.x[column].tolist() for column in SPEC.columns), name


def test_missing_values_are_known_in_every_form():
    spec = TableSpec(
        {"a": Column("integer", missing="accept"), "b": Column("category", categories=(1, 2), missing="accept")}
    )
    tables = [
        [{"a": 1, "b": None}, {"b": 2}],
        {"a": [1, None], "b": [None, 2]},
        {"a": np.array([1, np.nan]), "b": np.array([np.nan, 2.0])},
        pandas.DataFrame({"a": [1, None], "b": pandas.array([None, 2], dtype="Int64")}),
        pandas.DataFrame({"a": pandas.array([1, pandas.NA]), "b": [pandas.NA, 2]}),
        pyarrow.table({"a": [1, None], "b": [None, 2]}),
    ]
    for table in tables:
        result = spec.check(table)
        assert result.accepted.tolist() == [True, True], result
        assert result.x["a"].dtype == np.float64 and result.x["a"][0] == 1 and np.isnan(result.x["a"][1])
        assert result.x["b"].tolist() == [None, 2]
        torch.testing.assert_close(
            spec.to_tensor(result.x), torch.tensor([[1.0, -1.0], [float("nan"), 1.0]]), equal_nan=True
        )
    strict = TableSpec({"a": Column("integer"), "b": Column("category", categories=(1, 2))})
    for table in tables:
        assert strict.check(table).reasons == (("input: column 'b': missing",), ("input: column 'a': missing",))


MISSING_MEMORY = torch.zeros(3)
MISSING_MEMORY.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (None, "input: not a table"),
        (3, "input: not a table"),
        ("age", "input: not a table"),
        (np.zeros((2, 2)), "input: not a table"),
        (np.ma.array(np.zeros(2, [("age", "i8")]), mask=True), "input: not a table"),
        ([3], "input: not a table"),
        ([], "input: no rows and no columns"),
        ({}, "input: columns of different lengths"),
        ([GOOD] * 9, "input: too many rows"),
        ({"age": [1] * 9}, "input: too many rows"),
        (pandas.DataFrame({"age": [1] * 9}), "input: too many rows"),
        (pyarrow.table({"age": [1] * 9}), "input: too many rows"),
        ({"age": [1], "income": [1, 2]}, "input: columns of different lengths"),
        ({"age": [1]}, "input: no column 'income'"),
        ({name: [value] for name, value in {**GOOD, "extra": 1}.items()}, "input: columns that are not named"),
        ({3: [1]}, "input: a name of a column is no text"),
        ({"age": "123"}, "input: a column that is no list or one-dimensional array"),
        ({"age": np.zeros((1, 2))}, "input: a column that is no list or one-dimensional array"),
        ({"age": torch.zeros(2, requires_grad=True)}, "input: requires grad"),
        ({"age": torch.zeros(2).to_sparse()}, "input: not a dense tensor"),
        ({"age": torch.zeros(1).expand(8)}, "input: overlapping memory"),
        ({"age": MISSING_MEMORY}, "input: memory is missing"),
        ({"age": np.array(["2020-01-01"], "M8[D]")}, "input: a column of a kind that no rule knows"),
        ({str(i): [1] for i in range(10_001)}, "input: too many columns"),
        (pandas.DataFrame([[1, 2]], columns=["age", "age"]), "input: a column occurs twice"),
        (pyarrow.table([[1], [2]], names=["age", "age"]), "input: a column occurs twice"),
    ],
)
def test_what_is_no_table_is_one_fault(table, fault):
    result = SPEC.check(table)
    assert result.fault == fault and result.x is None and not result.accepted.any()


def test_rules_without_a_policy_of_their_own_have_one_together(tmp_path):
    aside = {"otherwise": "quarantine"}
    spec = TableSpec(
        {"n": Column("number", **aside), "t": Column("text", max_length=2, **aside), "k": Column("number")}
    )
    good = {"n": 1.0, "t": "a", "k": 1.0}
    rows = [good | change for change in ({}, {"n": "1"}, {"n": math.inf}, {"t": "abc"}, {"t": 3}, {"k": "1"})]
    result = spec.check(rows)
    assert result.quarantined.tolist() == [False, True, True, True, True, False]
    assert result.accepted.tolist() == [True] + [False] * 5
    assert result.reasons[3] == ("quarantine: column 't': too long",)
    spec.save(tmp_path / "rules")
    assert TableSpec.load(tmp_path / "rules") == spec
    with pytest.raises(ConfigurationError, match="otherwise"):
        Column("number", otherwise="clip")


def test_hostile_objects_are_never_asked_anything():
    assert SPEC.check(Hostile()).fault == "input: not a table"
    assert SPEC.check({"age": Hostile()}).fault == "input: a column that is no list or one-dimensional array"
    assert TextSpec().check(Hostile()).fault == "input: not a list of texts"
    assert TextSpec().check([Hostile()]).reasons == (("input: not a text",),)
    assert InputSpec((1,)).check(Hostile()).fault == "input: not a plain tensor"


def test_columns_that_are_not_named_can_be_dropped():
    spec = TableSpec({"age": Column("integer")}, extra="drop")
    result = spec.check([{"age": 1, "secret": Hostile()}])
    assert list(result.x) == ["age"] and result.accepted.all()


def test_clipping_moves_finite_values_only():
    clip = "clip"
    number = Column("number", low=0.0, high=1.0, out_of_range=clip)
    spec = TableSpec({"a": number, "b": Column("integer", low=0.5, high=9.5, out_of_range=clip)})
    result = spec.check({"a": [2.0, -1.0, float("inf")], "b": [0, 2**63 - 1, 5]})
    assert result.accepted.tolist() == [True, True, False]
    assert result.x["a"].tolist() == [1.0, 0.0] and result.x["b"].tolist() == [1, 9]


def test_integers_are_compared_exactly():
    spec = TableSpec({"id": Column("integer", high=2**53)})
    for values in ([2**53, 2**53 + 1], np.array([2**53, 2**53 + 1]), np.array([2**53, 2**53 + 1], np.uint64)):
        assert spec.check({"id": values}).accepted.tolist() == [True, False]
    lossy = TableSpec({"id": Column("integer", missing="accept")})  # float64 could not hold it
    assert lossy.check({"id": [2**53, 2**53 + 1]}).accepted.tolist() == [True, False]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3), st.binary(max_size=2),
    st.sampled_from(["free", "paid", 5, 7.0, 1e300]), st.lists(st.integers(), max_size=1),
)  # fmt: skip
ROWS = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys([*SPEC.columns, "other"], VALUES)), max_size=4)


@given(ROWS)
def test_nothing_raises_and_the_json_schema_agrees(rows):
    result = SPEC.check(rows)
    accepted = result.fault is None and bool(result.accepted.all())
    try:
        text = json.dumps(rows, allow_nan=False)
    except (TypeError, ValueError):  # what JSON cannot say
        return
    assert jsonschema.Draft202012Validator(SPEC.to_json_schema()).is_valid(json.loads(text)) == accepted


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize("missing", ["accept", "reject"])
@pytest.mark.parametrize("policy", ["reject", "clip"])
def test_the_json_schema_agrees_at_the_ends_of_the_numbers(kind, missing, policy):
    largest = int(sys.float_info.max)
    ends = [2**53, 2**53 + 1, 2**60, 2**63 - 1, 2**63, 2**1023, 10**308, largest, 10**309, 0, 7]
    for limits in ({}, {"low": 0, "high": 5}, {"low": -1e300, "high": 1e300}):
        spec = TableSpec({"a": Column(kind, missing=missing, out_of_range=policy, **limits)})
        rules = jsonschema.Draft202012Validator(spec.to_json_schema())
        for value in (sign * end for end in ends for sign in (1, -1)):
            assert rules.is_valid([{"a": value}]) == bool(spec.check([{"a": value}]).accepted.all()), value


@given(st.lists(VALUES, min_size=1, max_size=4), st.sampled_from(["number", "integer", "boolean", "text"]))
def test_a_list_and_an_array_of_objects_get_the_same_verdict(values, kind):
    spec = TableSpec({"a": Column(kind, missing="accept")})
    array = np.empty(len(values), object)
    array[:] = values
    one, other = spec.check({"a": values}), spec.check({"a": array})
    assert one.reasons == other.reasons and one.fault == other.fault is None


def test_infer_accepts_what_it_saw_and_names_kinds():
    table = pandas.DataFrame(
        {
            "age": [20, 30, 40, 60],
            "income": [1.5, None, 3.5, 2.0],
            "plan": ["a", "b", "a", "b"],
            "note": ["x", "yy", "zzz", "w"],
            "member": [True, False, True, True],
            "delta": [-4, 0, 4, 2],
        }
    )
    spec = TableSpec.infer(table)
    assert spec.check(table).accepted.all()
    assert [column.kind for column in spec.columns.values()] == [
        *("integer", "number", "category", "text", "boolean", "integer")
    ]
    assert (spec.columns["age"].low, spec.columns["age"].high) == (10, 70)
    assert (spec.columns["delta"].low, spec.columns["income"].missing) == (-6, "accept")
    assert spec.columns["note"].max_length == 4
    for bad in (None, [], {"a": []}, {"a": [1, "x"]}, {"a": [None]}, {"a": [float("inf"), 1.0]}, {"a": [b"x"]}):
        with pytest.raises(ConfigurationError):
            TableSpec.infer(bad)


def test_to_tensor_feeds_a_model():
    spec = TableSpec({"a": Column("number"), "b": Column("boolean"), "c": Column("category", categories=("x", "y"))})
    x = spec.check([{"a": 0.5, "b": True, "c": "y"}]).x
    assert spec.to_tensor(x).tolist() == [[0.5, 1.0, 1.0]] and spec.to_tensor(x).dtype == torch.float32
    with pytest.raises(ConfigurationError, match="columns that are numbers"):
        SPEC.to_tensor(SPEC.check([GOOD]).x)
    with pytest.raises(ConfigurationError, match="Pass result"):
        spec.to_tensor({"a": [1]})


def test_rules_survive_a_file(tmp_path):
    SPEC.save(tmp_path / "spec.json")
    loaded = TableSpec.load(tmp_path / "spec.json")
    assert loaded == SPEC and list(loaded.columns) == list(SPEC.columns)
    good = SPEC.to_dict()
    changes = [
        {"extra_key": 1},
        {"columns": [["a", {"kind": "number", "more": 1}]]},
        {"columns": 3},
        {"columns": []},
        {"columns": good["columns"] + good["columns"]},
        {"columns": [[["a"], {"kind": "number"}]]},
    ]
    for change in changes:
        with pytest.raises(ConfigurationError):
            TableSpec.from_dict({**good, **change})


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "float"},
        {"kind": "number", "low": 2, "high": 1},
        {"kind": "number", "categories": ("a",)},
        {"kind": "category"},
        {"kind": "category", "categories": ("a", 1)},
        {"kind": "category", "categories": ("a", "a")},
        {"kind": "category", "categories": (True, False)},
        {"kind": "text", "low": 1},
        {"kind": "text", "max_length": 0},
        {"kind": "number", "missing": "clip"},
        {"kind": "number", "out_of_range": "drop"},
        {"kind": "number", "low": float("nan")},
    ],
)
def test_contradictory_rules_are_refused(arguments):
    with pytest.raises(ConfigurationError):
        Column(**arguments)
