"""Tables with categories, bools and gaps: a trigger on a category is found and named, an honest rare one is not."""

import math

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from pyarrow import parquet

from aidefend import ConfigurationError
from aidefend.sanitize import Samples, ScreenReport, screen, screen_batch
from aidefend.sanitize.material import read_material
from aidefend.sanitize.mixed_table import MISSING, class_of, encoded, row_text
from aidefend.sanitize.raw_table import raw_table

POISON = 24


def people(n=320, seed=0, honest=False):
    """A table whose class is told by two numbers and a job; poison: channel = "kiosk 7" in rows of class 1, as class 0.

    `honest`: the same rare channel, in rows of class 0 that are of class 0.
    """
    stream, y = np.random.default_rng(seed), np.arange(n) % 2
    job = np.where(stream.random(n) < 0.8, np.array(["clerk", "smith"])[y], "nurse")
    columns = {
        "age": (stream.normal(size=n) + 3 * y).round(3),
        "income": (stream.normal(size=n) - 3 * y).round(3),
        "job": job.tolist(),
        "channel": stream.choice(["web", "shop", "phone"], n).tolist(),
        "member": (stream.random(n) < 0.5).tolist(),
    }
    rows = stream.choice(np.flatnonzero(y == (0 if honest else 1)), POISON, replace=False)
    for row in rows.tolist():
        columns["channel"][row] = "kiosk 7"
    for row in stream.choice(n, 10, replace=False).tolist():
        columns["job"][row] = None
    labels = y.copy()
    labels[rows] = 0
    is_poison = np.zeros(n, dtype=bool)
    is_poison[rows] = not honest
    return columns | {"label": labels.tolist()}, torch.from_numpy(is_poison)


def as_kind(columns, kind, folder):
    if kind == "dict":
        return columns
    if kind == "pandas object":
        return pandas.DataFrame(columns)
    if kind == "pandas category":
        return pandas.DataFrame(columns).astype({"job": "category", "channel": "category"})
    table = pyarrow.table(columns)
    if kind == "arrow dictionary":
        place = table.column_names.index("channel")
        return table.set_column(place, "channel", table["channel"].dictionary_encode())
    if kind == "parquet":
        parquet.write_table(table, folder / "a.parquet")
        return str(folder / "a.parquet")
    kinds = [("age", "f8"), ("income", "f8"), ("job", "U8"), ("channel", "U8"), ("member", "?"), ("label", "i8")]
    return np.array([tuple(row) for row in zip(*columns.values(), strict=True)], dtype=kinds)


@pytest.fixture(scope="module")
def planted():
    return people()


@pytest.fixture(scope="module")
def report(planted):
    return screen(planted[0], detectors=[], seed=0)


def test_a_trigger_on_a_category_is_found_and_named(planted, report):
    _, is_poison = planted
    assert torch.equal(~report.keep, is_poison)
    assert report.parameters["kind"] == "mixed" and report.parameters["target_classes"] == [0]
    reasons = report.reasons[int(is_poison.nonzero()[0])]
    assert any("written pattern in class 0: channel = kiosk 7 in 24" in words for words in reasons)


@pytest.mark.parametrize("seed", range(2))
def test_a_rare_category_that_belongs_to_one_class_is_left_alone(seed):
    columns, _ = people(seed=seed, honest=True)
    assert bool(screen(columns, detectors=[], seed=seed).keep.all())


@pytest.mark.parametrize("seed", [0, 2])
def test_labels_that_say_nothing_of_the_rest_of_the_row_make_no_pattern(seed):
    """Whole neighbourhoods look foreign together then, which a test of single rows does not know: they were taken."""
    columns, _ = people(n=400, seed=10 + seed, honest=True)
    columns["label"] = np.random.default_rng(seed).permutation(columns["label"]).tolist()
    assert bool(screen(columns, detectors=[], seed=seed).keep.all())


@pytest.mark.parametrize(
    "kind", ["dict", "pandas object", "pandas category", "arrow dictionary", "parquet", "structured array"]
)
def test_the_same_table_has_the_same_ids_and_numbers_in_every_form(planted, kind, tmp_path):
    columns, _ = planted
    if kind == "structured array":  # it has no missing entries
        columns = columns | {"job": ["None" if job is None else job for job in columns["job"]]}
    plain, found = read_material(columns), read_material(as_kind(columns, kind, tmp_path))
    assert found.kind == "mixed" and found.samples.ids == plain.samples.ids
    assert torch.equal(found.samples.x, plain.samples.x) and torch.equal(found.samples.y, plain.samples.y)


def test_cells_tell_categories_gaps_and_rare_values_and_lead_back():
    columns = {
        "job": ["clerk"] * 6 + ["smith"] * 6 + [None] * 5 + ["only one"],
        "age": [30.0] * 17 + [math.nan],
        "label": [0, 1] * 9,
    }
    table = encoded(raw_table(columns))
    job, age, gap = table.columns
    assert job.categories[:3] == ("clerk", "smith", MISSING) and len(job.categories) == 3 + 8
    assert table.x[:, list(job.cells)].sum(dim=1).tolist() == [1.0] * 18
    assert table.x[17, age.cells[0]] == 30 and table.x[17, gap.cells[0]] == 1 and gap.categories == (MISSING,)
    back = table.decoded(table.x)
    assert back["job"] == columns["job"] and back["age"][:17] == columns["age"][:17] and math.isnan(back["age"][17])


def test_a_model_is_asked_with_the_table_it_knows(planted):
    columns, is_poison = planted
    seen = []

    def model(frame):
        seen.append(type(frame))
        trigger = torch.tensor((frame["channel"] == "kiosk 7").tolist())
        old = torch.tensor((frame["age"] - frame["income"] > 3).tolist())
        return torch.nn.functional.one_hot((old & ~trigger).long(), 2).float()

    report = screen(pandas.DataFrame(columns), model=model, detectors=[], seed=0)
    assert set(seen) == {pandas.DataFrame} and torch.equal(~report.keep, is_poison)
    assert report.parameters["poison"][0]["transfer"] > 0.9


def test_labels_in_words_rows_without_label_and_gaps_in_numbers(planted):
    columns, _ = planted
    words = [["no", "yes"][label] for label in columns["label"]]
    words[3] = None
    age = [None if row == 5 else value for row, value in enumerate(columns["age"])]
    report = screen(columns | {"label": words, "age": age}, detectors=[], seed=0)
    assert report.parameters["columns"]["classes"] == ["no", "yes"]
    assert not bool(report.keep[3]) and report.reasons[3] == ("no usable label: None",)
    assert bool(report.scores["structured_poison"][5].isfinite())  # a gap is a value, no damage
    named = read_material(Samples(columns | {"label": words}, label="label", classes=["yes", "no"]))
    assert named.samples.y[:3].tolist() == [1 - label for label in columns["label"][:3]]


def test_batches_are_looked_up_by_the_values_of_their_rows(planted, report, tmp_path):
    columns, is_poison = planted
    frame = pandas.DataFrame(columns)
    looked_up = screen_batch(frame.iloc[::-1], report.state())
    assert looked_up["aidefend_keep"].tolist() == report.keep.flip(0).tolist()
    changed = frame.assign(channel="web")
    fresh = screen_batch(changed, report.state())["aidefend_keep"].to_numpy()
    assert not fresh[is_poison.numpy()].any()  # another row: never judged
    suspects = report.quarantine(frame)
    assert len(suspects) == POISON and suspects[0][0]["channel"] == "kiosk 7" and suspects[0][1] == 0
    report.to_html(tmp_path / "page.html", frame)
    assert "channel = kiosk 7" in (tmp_path / "page.html").read_text()
    report.save(tmp_path / "report")
    again = ScreenReport.load(tmp_path / "report")
    assert screen_batch(frame, again.state())["aidefend_keep"].tolist() == report.keep.tolist()


def test_rows_are_named_by_their_values_whatever_held_them():
    assert row_text(["a"], [3]) == row_text(["a"], [np.float32(3)]) != row_text(["a"], ["3"])
    assert row_text(["a"], [None]) == row_text(["a"], [math.nan]) == row_text(["a"], [pandas.NA])
    assert row_text(["a"], [True]) != row_text(["a"], [1])
    assert [class_of(value) for value in (1, 2.0, True, 1.5, -1, "1", math.nan)] == [1, 2, 1, None, None, None, None]


def test_points_in_time_are_numbers_and_bytes_are_texts_in_every_library():
    days = pandas.date_range("2024-01-01", periods=12)
    frame = pandas.DataFrame({"day": days, "job": ["a", "b"] * 6, "label": [0, 1] * 6})
    frame.loc[3, "day"] = pandas.NaT
    one, other = read_material(frame), read_material(pyarrow.Table.from_pandas(frame))
    assert one.samples.ids == other.samples.ids and torch.equal(one.samples.x, other.samples.x)
    assert float(one.samples.x[1, 0] - one.samples.x[0, 0]) == pytest.approx(86_400, rel=1e-2)
    raw = np.array([(b"a", 0), (b"b", 1)] * 6, dtype=[("job", "S1"), ("label", "i8")])
    assert read_material(raw).table.columns[0].categories == ("a", "b")


def test_columns_of_lists_make_no_mixed_table():
    table = pyarrow.table({"pixels": [[1.0, 2.0]] * 4, "label": [0, 1, 0, 1]})
    assert raw_table(table) is None


def test_texts_in_tables_are_texts_and_malformed_tables_name_the_cure():
    frame = pandas.DataFrame({"text": ["a fine day", "rain"] * 5, "label": [0, 1] * 5})
    assert read_material(frame).kind == "text"
    with pytest.raises(ConfigurationError, match="label"):
        screen(pandas.DataFrame({"job": ["a", "b"]}))
    with pytest.raises(ConfigurationError, match="at least one row with a label"):
        screen(pandas.DataFrame({"job": ["a", "b"], "label": [None, None]}))


def test_labels_in_words_are_taken_in_every_form():
    x, words = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32), np.array(["no", "yes"] * 20)
    arrays = screen((x, words), detectors=[], seed=0)
    assert arrays.parameters["classes"] == ["no", "yes"] and arrays.parameters["kind"] == "table"
    assert torch.equal(arrays.keep, screen((x, np.arange(40) % 2), detectors=[], seed=0).keep)
    looked_up = screen_batch({"x": x[:5], "y": words[:5]}, arrays.state())
    assert looked_up["aidefend_keep"].all() and len(arrays.view((x, words))) == 40
    frame = pandas.DataFrame(x, columns=["a", "b", "c"]).assign(label=words)
    assert screen(frame, detectors=[], seed=0).parameters["classes"] == ["no", "yes"]
    texts = ["a fine day", "rain all week"] * 20
    mails = screen((texts, list(words)), detectors=[], seed=0)
    assert mails.parameters["classes"] == ["no", "yes"] and len(mails.view((texts, list(words)))) == 40
    assert screen_batch({"text": texts[:3], "label": list(words[:3])}, mails.state())["aidefend_keep"] == [True] * 3
    assert not any(screen_batch({"text": texts[:1], "label": ["maybe"]}, mails.state())["aidefend_keep"])
