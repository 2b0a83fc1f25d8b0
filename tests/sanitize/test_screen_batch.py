"""Verdicts in a pipeline: pure, picklable, by content, and closed to rows that nobody judged."""

import functools
import pickle

import numpy as np
import pytest
import torch

from aidefend import AidefendError
from aidefend.sanitize import Samples, screen, screen_batch
from tests.worlds import poisoned_clusters

WORDS = ["ant", "bee", "cat", "dog"]


@pytest.fixture(scope="module")
def planted():
    return poisoned_clusters()


def frame_of(planted):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(planted.x.numpy(), columns=[f"f{i}" for i in range(planted.x.shape[1])])
    return frame.assign(animal=[WORDS[label] for label in planted.y.tolist()])


@pytest.fixture(scope="module")
def state(planted):
    """Screened as a table with names; tensors of the same rows have the same ids."""
    return screen(Samples(frame_of(planted), label="animal", classes=WORDS), seed=0).state()


@pytest.fixture(scope="module")
def judge(state):
    return pickle.loads(pickle.dumps(functools.partial(screen_batch, state=state)))


@pytest.mark.parametrize("size", [1, 7, 600])
def test_any_batching_and_order_gives_the_same_verdicts(planted, judge, size):
    order = torch.randperm(600)
    parts = [judge({"x": planted.x[rows], "y": planted.y[rows]})["aidefend_keep"] for rows in order.split(size)]
    assert torch.equal(~torch.cat(parts), planted.is_poison[order])


def test_every_kind_of_column_comes_back_in_kind(planted, judge):
    x, y = planted.x[:8], planted.y[:8]
    tensors = judge({"x": x, "y": y, "extra": ["keep"] * 8})
    arrays = judge({"image": x.numpy(), "label": y.numpy()})
    lists = judge({"features": x.tolist(), "labels": y.tolist()})
    assert isinstance(tensors["aidefend_keep"], torch.Tensor) and tensors["extra"] == ["keep"] * 8
    assert arrays["aidefend_keep"].dtype == np.bool_ and arrays["aidefend_reason"].dtype == object
    assert isinstance(lists["aidefend_keep"], list)
    for found in (tensors, arrays, lists):
        assert [bool(v) for v in found["aidefend_keep"]] == (~planted.is_poison[:8]).tolist()
        assert len(found["aidefend_score"]) == len(found["aidefend_reason"]) == 8


def test_tables_come_back_as_tables(planted, judge):
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"x": list(planted.x.numpy()), "y": planted.y.numpy()}, index=range(600, 0, -1))
    table = pyarrow.table({"x": planted.x.tolist(), "y": planted.y.tolist()})
    batch = table.to_batches()[0]
    keep = (~planted.is_poison).tolist()
    judged = judge(frame)
    assert type(judged) is pandas.DataFrame and judged.index.equals(frame.index) and "aidefend_keep" not in frame
    assert judged["aidefend_keep"].tolist() == judge(dict(frame))["aidefend_keep"].tolist() == keep
    for given in (table, batch):
        judged = judge(given)
        assert type(judged) is type(given) and judged.column("aidefend_keep").to_pylist() == keep
        assert judged.schema.names == ["x", "y", "aidefend_keep", "aidefend_score", "aidefend_reason"]
    with pytest.raises(AidefendError, match="a mapping from column names"):
        judge(planted.x.numpy())


def test_named_columns_and_classes_of_a_table_are_found_again(planted, judge):
    frame = frame_of(planted)
    parts = [judge(frame[start : start + 100]) for start in range(0, 600, 100)]
    assert [kept for part in parts for kept in part["aidefend_keep"].tolist()] == (~planted.is_poison).tolist()
    odd = frame[:3].astype({"f0": object})
    odd.loc[0, "f0"], odd.loc[1, "animal"] = "seven", "eel"
    assert judge(odd)["aidefend_keep"].tolist() == [False, False, not bool(planted.is_poison[2])]


def test_what_the_screened_dtype_cannot_hold_is_another_row():
    x = torch.arange(120, dtype=torch.uint8).reshape(60, 2)
    state = screen((x, torch.arange(60) % 2), lambda rows: rows.float(), seed=0).state()
    assert screen_batch({"x": [[0.0, 1.0], [0.5, 1.0], [256.0, 1.0]], "y": [0, 0, 0]}, state)["aidefend_keep"] == [
        True,
        False,
        False,
    ]


def test_the_given_batch_is_not_changed(planted, judge):
    batch = {"x": planted.x[:3], "y": planted.y[:3]}
    kept = dict(batch)
    judge(batch)
    assert batch.keys() == kept.keys() and all(batch[key] is kept[key] for key in batch)


def test_reasons_and_scores_are_those_of_the_report(planted, judge, state):
    row = int(planted.is_poison.nonzero()[0])
    found = judge({"x": planted.x[row : row + 1], "y": planted.y[row : row + 1]})
    assert found["aidefend_reason"][0].startswith("structured poison in class 0")
    assert found["aidefend_score"][0] == state["scores"]["structured_poison"][row]


def test_rows_that_nobody_judged_are_not_kept(planted, judge):
    x = planted.x[:4].clone()
    x[0, 0] += 1e-3
    y = planted.y[:4].clone()
    y[1] = (y[1] + 1) % 4
    found = judge({"x": x, "y": y})
    assert found["aidefend_keep"].tolist() == [False, False, True, True]
    assert found["aidefend_reason"][0].startswith("not judged") and bool(found["aidefend_score"][0].isnan())


def test_rows_of_another_kind_are_not_kept_and_do_not_raise(judge):
    batch = {"x": [[1.0] * 19, "text", None, [float("nan")] * 20], "y": [0, 0, 0, 0.5]}
    assert judge(batch)["aidefend_keep"] == [False] * 4


def test_an_empty_batch(judge):
    found = judge({"x": torch.zeros(0, 20), "y": torch.zeros(0, dtype=torch.int64)})
    assert found["aidefend_keep"].shape == (0,) and found["aidefend_reason"] == []


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"x": torch.zeros(2, 20)}, "label column"),
        ({"y": torch.zeros(2)}, "input column"),
        ({"x": torch.zeros(2, 20), "y": torch.zeros(3)}, "same number of rows"),
        ([1, 2], "mapping"),
    ],
)
def test_malformed_batches_raise(judge, batch, match):
    with pytest.raises(AidefendError, match=match):
        judge(batch)


def test_a_foreign_state_is_refused():
    with pytest.raises(AidefendError, match="state"):
        screen_batch({"x": torch.zeros(1, 2), "y": torch.zeros(1)}, {"rows": {}})
