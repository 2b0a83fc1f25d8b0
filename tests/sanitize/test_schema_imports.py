"""Rules of pandera and of Great Expectations: the same rows break them, and no rule is lost without a word."""

import json

import pytest

from aidefend import ConfigurationError
from aidefend.sanitize import DatasetSchema

PEOPLE = {
    "age": [31, 64, 18, 130, -1, 40],
    "city": ["Bonn", "Lyon", "Oslo", "Bonn", None, "Lyon"],
    "score": [0.5, 1.0, 0.0, 0.25, 0.75, 0.5],
    "code": ["a1", "b22", "c", "d4444", "e5", "f6"],
}
BROKEN = {
    ("schema.range", "age"): [3, 4],
    ("schema.category", "city"): [2],
    ("schema.missing_values", "city"): [4],
    ("schema.range", "score"): [2],
    ("schema.range", "code.length"): [2, 3],
}


def rows_of(evidence):
    return {(one.id, one.setting.get("column")): one.setting.get("rows") for one in evidence.findings}


def pandera_schema(**changes):
    pandera = pytest.importorskip("pandera.pandas")
    column, check = pandera.Column, pandera.Check
    columns = {
        "age": column(int, check.in_range(0, 120)),
        "city": column(str, check.isin(["Bonn", "Lyon"])),
        "score": column(float, [check.gt(0), check.le(1)]),
        "code": column(str, check.str_length(2, 4), required=False, nullable=True),
    }
    return pandera.DataFrameSchema(columns | changes.pop("columns", {}), **changes)


def rule(kind, **kwargs):
    return {"type": kind, "kwargs": kwargs}


SUITE = {
    "name": "people",
    "expectations": [
        rule("expect_column_values_to_be_between", column="age", min_value=0, max_value=120),
        rule("expect_column_values_to_be_of_type", column="age", type_="INTEGER"),
        rule("expect_column_values_to_be_in_set", column="city", value_set=["Bonn", "Lyon"]),
        rule("expect_column_values_to_not_be_null", column="city"),
        rule("expect_column_values_to_be_between", column="score", min_value=0, strict_min=True),
        rule("expect_column_max_to_be_between", column="score", max_value=1),
        rule("expect_column_value_lengths_to_be_between", column="code", min_value=2, max_value=4),
        rule("expect_column_to_exist", column="age"),
    ],
}
FORMS = {
    "pandera": lambda: DatasetSchema.from_pandera(pandera_schema()),
    "pandera as JSON": lambda: DatasetSchema.from_pandera(pandera_schema().to_json()),
    "suite": lambda: DatasetSchema.from_great_expectations(SUITE),
    "suite as text": lambda: DatasetSchema.from_great_expectations(json.dumps(SUITE)),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_rows_break_the_rules(name, tmp_path):
    schema = FORMS[name]()
    assert rows_of(schema.check(PEOPLE)) == BROKEN
    good = {column: [values[i] for i in (0, 1, 5)] for column, values in PEOPLE.items()}
    good["code"][2] = "ff6"
    assert schema.check(good).findings == ()
    schema.save(tmp_path / "schema.json")
    again = DatasetSchema.load(tmp_path / "schema.json")
    assert again.digest == schema.digest and rows_of(again.check(PEOPLE)) == BROKEN
    assert "no reference rows" in schema.check(good).metadata["not_tested"]["leakage"][0]


def test_pandera_judges_the_rows_as_we_do():
    """Our findings beside pandera's own, on the same table."""
    pandas, errors = pytest.importorskip("pandas"), pytest.importorskip("pandera.errors")
    frame = pandas.DataFrame(PEOPLE)
    with pytest.raises(errors.SchemaErrors) as caught:
        pandera_schema().validate(frame, lazy=True)
    cases = caught.value.failure_cases.dropna(subset=["index"])
    ours = {(name.removesuffix(".length"), row) for (_, name), rows in BROKEN.items() for row in rows}
    assert {(row["column"], int(row["index"])) for row in cases.to_dict("records")} == ours


def test_columns_that_must_may_and_must_not_be_there():
    strict = DatasetSchema.from_pandera(pandera_schema(strict=True))
    table = {"age": [1], "city": ["Bonn"], "more": [2]}
    assert set(rows_of(strict.check(table))) == {("schema.missing_column", "score"), ("schema.extra_column", "more")}
    names = {"column_set": ["age", "city"], "exact_match": True}
    suite = {"expectations": [rule("expect_table_columns_to_match_set", **names)]}
    schema = DatasetSchema.from_great_expectations(suite)
    assert set(rows_of(schema.check({"age": [1], "more": [2]}))) == {
        ("schema.missing_column", "city"),
        ("schema.extra_column", "more"),
    }


def test_types_and_shares_of_missing_entries():
    suite = {
        "expectations": [
            rule("expect_column_values_to_be_in_type_list", column="n", type_list=["int64", "IntegerType"]),
            rule("expect_column_values_to_not_be_null", column="n", mostly=0.5),
            rule("expect_column_values_to_be_of_type", column="t", type_="datetime64[ns]"),
        ]
    }
    schema = DatasetSchema.from_great_expectations(suite)
    found = rows_of(schema.check({"n": [1, "two", None, None], "t": ["now", "then", "x", "y"]}))
    assert found == {("schema.type", "n"): [1], ("schema.type", "t"): [0, 1, 2, 3]}
    assert ("schema.missing_values", "n") in rows_of(schema.check({"n": [1, None, None], "t": [None] * 3}))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (
            lambda check, column: {"columns": {"age": column(int, check(lambda x: x > 1, name="mine"))}},
            "age: check mine",
        ),
        (lambda check, column: {"columns": {"age": column(int, unique=True)}}, "age: unique"),
        (lambda check, column: {"columns": {"age": column(int, coerce=True)}}, "age: coerce"),
        (lambda check, column: {"columns": {"c.*": column(int, regex=True)}}, "regex"),
        (lambda check, column: {"columns": {"age": column(int, check.notin([1]))}}, "notin"),
        (lambda check, column: {"columns": {"age": column(int, check.gt(1, raise_warning=True))}}, "warns"),
        (lambda check, column: {"columns": {"code": column(str, check.str_matches("^a"))}}, "str_matches"),
        (lambda check, column: {"columns": {"age": column("complex128")}}, "type complex128"),
        (lambda check, column: {"unique": ["age", "city"]}, "the table: unique"),
        (lambda check, column: {"checks": check(lambda x: True, name="whole")}, "the table: checks whole"),
        (lambda check, column: {"ordered": True}, "the table: ordered"),
    ],
)
def test_no_rule_of_pandera_is_lost(make, named):
    pandera = pytest.importorskip("pandera.pandas")
    schema = pandera_schema(**make(pandera.Check, pandera.Column))
    with pytest.raises(ConfigurationError, match=named):
        DatasetSchema.from_pandera(schema)
    listed = DatasetSchema.from_pandera(schema, unsupported="list").check(PEOPLE)
    assert any(named in rule for rule in listed.metadata["not_tested"]["imported_rules"])


@pytest.mark.parametrize(
    ("one", "named"),
    [
        (rule("expect_column_values_to_match_regex", column="code", regex="^a"), "match_regex"),
        (rule("expect_column_values_to_be_unique", column="age"), "age: expect_column_values_to_be_unique"),
        (rule("expect_column_values_to_be_between", column="age", min_value=0, mostly=0.9), "with mostly"),
        (rule("expect_column_values_to_be_between", column="age", min_value="2020-01-01"), "no number"),
        (rule("expect_column_values_to_be_in_set", column="age", value_set=[1], row_condition="x"), "row_condition"),
        (rule("expect_column_min_to_be_between", column="age", min_value=0, max_value=9), "max_value"),
        (rule("expect_table_row_count_to_be_between", min_value=1), "the table: expect_table_row_count"),
        (rule("expect_table_columns_to_match_ordered_list", column_list=["age"]), "order of the columns"),
    ],
)
def test_no_rule_of_a_suite_is_lost(one, named, tmp_path):
    suite = {"expectations": [*SUITE["expectations"], one]}
    with pytest.raises(ConfigurationError, match=named):
        DatasetSchema.from_great_expectations(suite)
    schema = DatasetSchema.from_great_expectations(suite, unsupported="list")
    schema.save(tmp_path / "schema.json")
    listed = DatasetSchema.load(tmp_path / "schema.json").check(PEOPLE)
    assert any(named in rule for rule in listed.metadata["not_tested"]["imported_rules"])


def test_what_is_no_schema_is_refused():
    for wrong in (3, None, "text", {}, {"columns": 3}, [], {"columns": {}}):
        with pytest.raises(ConfigurationError):
            DatasetSchema.from_pandera(wrong)
    for wrong in (3, None, "text", {}, {"expectations": 3}, {"expectations": [1]}, {"expectations": []}):
        with pytest.raises(ConfigurationError):
            DatasetSchema.from_great_expectations(wrong)
    with pytest.raises(ConfigurationError, match="label"):
        DatasetSchema.from_great_expectations(SUITE, label="none")
    assert DatasetSchema.from_great_expectations(SUITE, label="city").label == "city"
