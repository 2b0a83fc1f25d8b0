"""Labels that are keys and no class numbers: one of them may not cost the memory of all numbers below it."""

import pandas
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from aidefend.sanitize import Beatrix, NeighbourDisagreement, Scan, screen, screen_batch, screen_stream
from tests.worlds import poisoned_clusters

KEYS = torch.tensor([7, 40_000, 10**9, 2**40])


@pytest.fixture(scope="module")
def planted():
    return poisoned_clusters(poison=30, per_class=60)


@pytest.fixture(scope="module")
def plain(planted):
    return screen((planted.x, planted.y), seed=0)


@pytest.mark.parametrize("form", ["pair", "loader", "iterator", "frame"])
def test_keys_as_labels_are_judged_as_the_classes_that_they_name(planted, plain, form):
    x, y = planted.x, KEYS[planted.y]
    columns = {f"c{cell}": x[:, cell].numpy() for cell in range(x.shape[1])}
    data = {
        "pair": lambda: (x, y),
        "loader": lambda: DataLoader(TensorDataset(x, y), batch_size=50),
        "iterator": lambda: iter(list(zip(x, y, strict=True))),
        "frame": lambda: pandas.DataFrame({**columns, "y": y.numpy()}),
    }
    report = screen(data[form](), seed=0)
    assert report.parameters["classes"] == list(map(str, KEYS.tolist()))
    assert torch.equal(report.keep, plain.keep) and not bool(report.keep.all())
    assert report.parameters["target_classes"] == plain.parameters["target_classes"]
    assert not len(report.changed(data[form]()))
    batch = {"x": x, "y": y} if form != "frame" else {**columns, "y": y.numpy()}
    found = screen_batch(batch, report.state())["aidefend_keep"]
    assert [bool(kept) for kept in found] == report.keep.tolist()
    other = screen_batch({**batch, "y": batch["y"] + 1}, report.state())["aidefend_keep"]
    assert not any(bool(kept) for kept in other)


def test_one_row_with_a_large_label_changes_no_other_verdict(planted, plain):
    """It is a class of one row; the others keep their numbers, and with them the outputs of a model."""
    y = planted.y.clone()
    row = int(plain.keep_indices[0])
    y[row] = 10**15
    report = screen((planted.x, y), seed=0)
    others = torch.arange(len(y)) != row
    assert torch.equal(report.keep[others], plain.keep[others])
    assert report.parameters["classes"] == ["0", "1", "2", "3", str(10**15)]


@pytest.mark.parametrize("key", [10**9, 10**30])
def test_texts_and_tables_with_gaps_take_keys_too(key):
    texts = [f"the {'match ended' if i % 2 else 'price rose'} on day {i % 7} in town {i}" for i in range(120)]
    labels = [key if i % 2 else 3 for i in range(120)]
    report = screen((texts, labels), seed=0)
    assert bool(report.keep.all()) and report.parameters["classes"] == ["3", str(key)]
    judged = screen_batch({"text": texts[:4], "label": labels[:4]}, report.state())
    assert list(judged["aidefend_keep"]) == [True] * 4
    frame = pandas.DataFrame({"size": [float(i % 9) if i % 11 else None for i in range(120)], "y": labels})
    report = screen(frame, seed=0)
    assert bool(report.keep.all()) and report.parameters["classes"] == ["3", str(key)]
    assert screen_batch(frame[:4], report.state())["aidefend_keep"].tolist() == [True] * 4


def test_a_stream_and_the_detectors_take_a_row_with_a_large_label(planted, tmp_path):
    x, y = planted.x[:200], planted.y[:200].clone()
    y[5] = 10**12
    block = {"ids": tuple(map(str, range(200))), "features": x, "labels": y}
    for detector in (Scan(), Beatrix(), NeighbourDisagreement()):
        scores = detector.partial_fit(block).score(block)
        assert not bool(scores[torch.arange(200) != 5].isnan().any())
    found = screen_stream(zip(x, y, strict=True), torch.nn.Linear(x.shape[1], 4), tmp_path, rows_per_class=24)
    assert not bool(found.keep[5]) and found.parameters["bad_rows"] == 1
    (reason,) = next(found.rows())["reasons"][5]
    assert reason == "the label 1000000000000 is above 32767: number the classes from 0 on"
