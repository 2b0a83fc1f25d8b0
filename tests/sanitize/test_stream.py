"""A screen of data that do not fit into memory: one pass, a bounded sample, and the verdict on every row."""

import json
import subprocess
import sys

import pytest
import torch

from aidefend import ConfigurationError
from aidefend.sanitize import FeatureStore, screen_batch, screen_stream
from aidefend.sanitize.suspect import train_suspect
from tests.worlds import poisoned_clusters

N = 1600


@pytest.fixture(scope="module")
def planted():
    world = poisoned_clusters(poison=160, per_class=400)
    world.x[world.is_poison, :3] = 6.0  # one group, whatever the rows look like
    return world


@pytest.fixture(scope="module")
def model(planted):
    return train_suspect(planted.x, planted.y, 0)


@pytest.fixture(scope="module")
def found(planted, model, tmp_path_factory):
    samples = [(x, int(y)) for x, y in zip(planted.x, planted.y, strict=True)]
    samples += [(torch.full((20,), torch.nan), 0), (torch.zeros(3), 1)]
    folder = tmp_path_factory.mktemp("stream")
    return screen_stream(iter(samples), model, folder, rows_per_class=200, shard_rows=128, batch_size=50, seed=0)


def test_rows_outside_the_sample_are_judged_by_what_was_found_inside(planted, found):
    assert len(found) == 1602 and sum(found.parameters["sampled"].values()) == 800
    assert found.parameters["target_classes"] == [0]
    keep = found.keep[:N]
    assert float((~keep)[planted.is_poison].double().mean()) >= 0.95
    assert float((~keep)[~planted.is_poison].double().mean()) <= 0.01
    facts = found.parameters["extended"]["0"]
    assert facts["held_out_found"]["value"] >= 0.9 and facts["held_out_wrong"]["value"] <= 0.02


def test_every_row_has_a_verdict_a_reason_and_a_line(planted, found, tmp_path):
    assert not bool(found.keep[N]) and not bool(found.keep[N + 1]) and bool(found.scores[N:].isnan().all())
    assert found.parameters["bad_rows"] == 2
    found.to_jsonl(tmp_path / "rows.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["keep"] for line in lines] == found.keep.tolist() and [line["row"] for line in lines] == list(
        range(N + 2)
    )
    assert all(line["reasons"] for line in lines if not line["keep"])
    assert all(said.startswith("kept: ") for line in lines if line["keep"] for said in line["reasons"])
    assert "NaN" in lines[N]["reasons"][0] and "shape (3,)" in lines[N + 1]["reasons"][0]
    report = found.report()
    assert torch.equal(report.keep, found.keep) and report.ids == tuple(line["id"] for line in lines)
    judged = screen_batch({"x": planted.x[:300], "y": planted.y[:300]}, report.state())
    assert torch.equal(judged["aidefend_keep"], found.keep[:300])
    assert repr(found) == f"<StreamReport {found.summary()}>"
    assert "1602 rows kept" in found.summary() and len(report.sampler()) == int(found.keep.sum())


def test_the_size_of_batches_and_shards_changes_nothing(planted, model, found, tmp_path):
    again = screen_stream((planted.x, planted.y), model, tmp_path, rows_per_class=200, batch_size=N, seed=0)
    assert torch.equal(again.keep, found.keep[:N])
    assert FeatureStore.open(tmp_path).digest == again.parameters["store"]


def test_changed_rows_of_a_stream_are_named_and_another_number_of_rows_is_refused(planted, found):
    good = list(zip(planted.x, planted.y.tolist(), strict=True))
    samples = [*good, (torch.full((20,), torch.nan), 0), (torch.zeros(3), 1)]
    assert found.changed(iter(samples), batch_size=77).tolist() == []
    other = [(x.clone(), y) for x, y in samples]
    other[17][0][3] = torch.nextafter(other[17][0][3], torch.tensor(torch.inf))
    other[40] = (other[40][0], (other[40][1] + 1) % 4)
    other[300], other[1400] = other[1400], other[300]
    assert found.changed(iter(other)).tolist() == [17, 40, 300, 1400]
    for wrong in (samples[:-1], [*samples, good[0]], []):
        with pytest.raises(ConfigurationError, match="that were judged"):
            found.changed(iter(wrong))


def test_clean_data_lose_no_row(planted, model, tmp_path):
    clean = planted.x[~planted.is_poison], planted.y[~planted.is_poison]
    kept = screen_stream(clean, model, tmp_path, rows_per_class=60, seed=0)
    assert bool(kept.keep.all()) and kept.parameters["extended"] == {}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_stream():
    """Ten times the rows, the same peak but for some tens of bytes a row; each length in a process of its own."""
    runs = []
    for rows in (20_000, 200_000):
        call = [sys.executable, "-m", "benchmarks.sanitize_stream", "--one", str(rows)]
        runs.append(json.loads(subprocess.check_output(call, text=True).splitlines()[-1]))
    assert runs[1]["beyond_mib"] - runs[0]["beyond_mib"] < 40
    assert all(run["tpr"] >= 0.99 and run["fpr"] <= 0.001 for run in runs)
