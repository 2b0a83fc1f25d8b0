"""(DataFrame, Series) and its kin, from end to end: what a data scientist has in hand goes in as it is."""

import numpy as np
import pandas
import pytest
import torch

from aidefend import ConfigurationError
from aidefend.sanitize import DatasetSchema, Samples, extract_features, screen, screen_batch, screen_stream
from aidefend.sanitize.material import read_material

N = 160
STREAM = np.random.default_rng(0)
Y = np.arange(N) % 2
X = pandas.DataFrame({"age": STREAM.normal(size=N) + 3 * Y, "height": STREAM.normal(size=N)}, index=range(N, 0, -1))
VOTE = pandas.Series(Y, name="vote", index=X.index)
WORDS = VOTE.map({0: "no", 1: "yes"})
MODEL = torch.nn.Linear(2, 2)
KINDS = {
    "frame, series": (X, VOTE),
    "frame, array": (X, Y),
    "array, series": (X.to_numpy(dtype=np.float32), VOTE),
    "array, list": (X.to_numpy(dtype=np.float32), Y.tolist()),
}


@pytest.fixture(scope="module")
def plain():
    return screen((torch.tensor(X.to_numpy(dtype=np.float32)), torch.tensor(Y)), MODEL, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_screen_judges_them_as_it_judges_tensors(kind, plain):
    report = screen(KINDS[kind], MODEL, seed=0)
    assert report.ids == plain.ids and torch.equal(report.keep, plain.keep)
    assert torch.equal(report.scores["structured_poison"], plain.scores["structured_poison"])


@pytest.mark.parametrize("kind", KINDS)
def test_views_features_streams_and_pages_take_the_same_pair(kind, plain, tmp_path):
    pair, report = KINDS[kind], screen(KINDS[kind], MODEL, seed=0)
    x, y = report.view(pair)[0]
    assert x.dtype == torch.float32 and x.tolist() == X.to_numpy(dtype=np.float32)[0].tolist() and int(y) == 0
    assert extract_features(pair, MODEL).labels.tolist() == Y.tolist()
    assert screen_stream(pair, MODEL, tmp_path / "store", rows_per_class=24).keep.all()
    held = report & report  # a report of its own kind, without the page's extras
    assert len(held.view(pair)) == int(report.keep.sum())
    report.to_html(tmp_path / "page.html", pair)
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!")


@pytest.mark.parametrize("kind", KINDS)
def test_a_schema_of_them_finds_nothing_in_them_and_a_planted_row(kind):
    x, y = KINDS[kind]
    schema = DatasetSchema.infer((x, y))
    assert schema.rows == N and schema.label in ("vote", "y")
    assert schema.check((x, y), seen=True).findings == ()
    wrong = np.where(np.arange(N) == 5, 7, Y)
    as_given = {pandas.Series: pandas.Series(wrong, name="vote", index=VOTE.index), list: wrong.tolist()}
    labels = as_given.get(type(y), wrong)
    found = {finding.id: finding.setting for finding in schema.check((x, labels), seen=True).findings}
    assert found["schema.unseen_label"]["rows"] == [5]


def test_a_schema_of_a_table_is_one_of_the_table_with_its_labels_apart():
    schema = DatasetSchema.infer(X.assign(vote=VOTE), label="vote")
    assert schema.check((X, VOTE), seen=True).findings == ()
    chunks = DatasetSchema.infer((X[i : i + 40], VOTE[i : i + 40]) for i in range(0, N, 40))
    assert chunks.rows == N and chunks.columns == DatasetSchema.infer((X, VOTE)).columns


def test_categories_and_words_go_the_way_of_mixed_tables(tmp_path):
    x = X.assign(channel=["web", "shop", None, "web"] * (N // 4))
    report = screen((x, WORDS), seed=0)
    whole = screen(Samples(x.assign(vote=WORDS), label="vote"), seed=0)
    assert report.parameters["kind"] == "mixed" and report.parameters["classes"] == ["no", "yes"]
    assert report.ids == whole.ids and torch.equal(report.keep, whole.keep)
    row, label = report.view((x, WORDS))[0]
    assert row["channel"] == "web" and label == "no"
    judged = screen_batch(x.assign(vote=WORDS), report.state())["aidefend_keep"]
    assert judged.tolist() == report.keep.tolist()
    assert screen((X.to_numpy(dtype=np.float32), WORDS), MODEL, seed=0).parameters["classes"] == ["no", "yes"]
    report.to_html(tmp_path / "page.html", (x, WORDS))


def test_a_model_of_such_a_table_is_asked_with_its_input_columns_alone():
    x, seen = X.assign(channel=["web", "shop"] * (N // 2)), set()

    def model(rows):
        seen.add((type(rows), tuple(rows.columns)))
        age = torch.tensor(rows["age"].to_numpy(dtype=np.float32))
        return torch.stack([-age, age - 3], dim=1)

    screen((x, VOTE), model, seed=0)
    assert seen == {(pandas.DataFrame, ("age", "height", "channel"))}


def test_texts_in_a_series():
    texts = pandas.Series([f"good day {i % 7}" if i % 2 else f"bad night {i % 5}" for i in range(N)], index=X.index)
    listed = read_material((texts.tolist(), Y.tolist()))
    pairs = ((texts, VOTE), (texts, Y), (texts.astype("string"), WORDS), (texts.tolist(), WORDS))
    for pair in (*pairs, (texts.to_frame("text"), VOTE)):
        found = read_material(pair)
        assert found.kind == "text" and found.texts == listed.texts and found.samples.ids == listed.samples.ids
    report = screen((texts, WORDS), seed=0)
    assert report.parameters["classes"] == ["no", "yes"] and len(report) == N
    for pair in pairs:
        assert report.view(pair)[1][0] == texts.iloc[1]


def test_two_texts_alone_do_not_end_in_an_error_of_the_linear_algebra():
    report = screen((["good day", "bad night"] * 40, [0, 1] * 40), seed=0)
    assert report.keep.all()


def test_a_mixed_up_index_is_named_before_anything_is_judged():
    for call in (lambda pair: screen(pair, MODEL), DatasetSchema.infer, lambda pair: extract_features(pair, MODEL)):
        with pytest.raises(ConfigurationError, match=r"one index.*y\.to_numpy\(\)"):
            call((X, VOTE.sort_index()))
