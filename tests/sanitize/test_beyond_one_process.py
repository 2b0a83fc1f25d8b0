"""The same verdicts where other libraries move the rows: Hugging Face datasets, and Ray Data on a local cluster."""

import functools
import os
from pathlib import Path

import pytest
import torch

from aidefend._core.batches import gather
from aidefend.sanitize import Scan, SpectralSignature, screen, screen_batch
from aidefend.sanitize.suspect import train_suspect
from tests.worlds import poisoned_clusters


@pytest.fixture(scope="module")
def planted():
    return poisoned_clusters()


@pytest.fixture(scope="module")
def report(planted):
    return screen((planted.x, planted.y), train_suspect(planted.x, planted.y, 0), seed=0)


@pytest.fixture(scope="module")
def judge(report):
    return functools.partial(screen_batch, state=report.state())


@pytest.fixture(scope="module")
def stored(planted):
    """As a Hugging Face data set."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"x": planted.x.tolist(), "y": planted.y.tolist()})


def test_there_is_poison_to_find(planted, report):
    assert torch.equal(~report.keep, planted.is_poison)


@pytest.mark.parametrize("form", [None, "numpy", "torch", "pandas", "arrow"])
def test_hugging_face_map_in_every_format(stored, judge, report, form):
    mapped = stored.with_format(form).map(judge, batched=True, batch_size=70)
    assert mapped.with_format(None)["aidefend_keep"][:] == report.keep.tolist()
    assert mapped.column_names == ["x", "y", "aidefend_keep", "aidefend_score", "aidefend_reason"]


def test_hugging_face_hashes_the_function_by_what_it_does(report, planted):
    fingerprint = pytest.importorskip("datasets.fingerprint")
    one, same = (functools.partial(screen_batch, state=report.state()) for _ in range(2))
    row = report.ids[int(report.quarantine_indices[0])]
    other = functools.partial(screen_batch, state=report.release([row], by="R. Roe", why="looked at").state())
    hashes = [fingerprint.Hasher.hash(judge) for judge in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_hugging_face_filter_keeps_what_the_report_keeps(stored, judge, report):
    kept = stored.map(judge, batched=True).filter(lambda keep: keep, input_columns="aidefend_keep")
    assert gather(kept.select_columns(["x", "y"]).with_format("torch")).ids == tuple(
        report.ids[i] for i in report.keep_indices.tolist()
    )


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, one process, no dashboard, nothing reported to anybody."""
    ray = pytest.importorskip("ray")
    data = pytest.importorskip("ray.data")
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("PYTHONPATH", path)
        ray.init(
            num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False, configure_logging=False
        )
        data.DataContext.get_current().execution_options.preserve_order = True
        data.DataContext.get_current().enable_progress_bars = False
        yield ray
        ray.shutdown()


RAY_WARNS = ("ignore:::ray", "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def rows(cluster, planted):
    pairs = zip(planted.x.numpy(), planted.y.tolist(), strict=True)
    return cluster.data.from_items([{"x": x, "y": y} for x, y in pairs]).repartition(5)


def same_verdicts(judged, report):
    ids = gather([torch.tensor(row["x"]), int(row["y"])] for row in judged).ids
    keep = {row_id: bool(row["aidefend_keep"]) for row_id, row in zip(ids, judged, strict=True)}
    return [keep[row_id] for row_id in report.ids] == report.keep.tolist() and len(keep) == len(report)


@pytest.mark.filterwarnings(*RAY_WARNS)
def test_ray_gives_the_verdicts_of_one_process(rows, judge, report):
    assert same_verdicts(rows.map_batches(judge, batch_size=64).take_all(), report)


@pytest.mark.slow
@pytest.mark.filterwarnings(*RAY_WARNS)
def test_ray_in_every_format_and_as_data(rows, judge, report):
    assert gather(rows, 100).ids == report.ids  # a Ray data set is data, too
    for form in ("pandas", "pyarrow"):
        assert same_verdicts(rows.map_batches(judge, batch_size=64, batch_format=form).take_all(), report)


@pytest.mark.slow
@pytest.mark.filterwarnings(*RAY_WARNS)
@pytest.mark.parametrize("kind", [SpectralSignature, Scan])
def test_detectors_that_workers_fit_give_the_bits_of_one_process(cluster, planted, report, kind):
    blocks = [
        {"ids": report.ids[a : a + 60], "features": planted.x[a : a + 60], "labels": planted.y[a : a + 60]}
        for a in range(0, 600, 60)
    ]
    whole = {"ids": report.ids, "features": planted.x, "labels": planted.y}
    fit = cluster.remote(lambda block: kind().partial_fit(block))
    merged = functools.reduce(lambda a, b: a.merge(b), cluster.get([fit.remote(block) for block in blocks]))
    one = functools.reduce(lambda detector, block: detector.partial_fit(block), blocks, kind())
    assert torch.equal(merged.score(whole), one.score(whole))
