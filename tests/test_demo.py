"""The demo's frame: it writes a whole report or none, reads users' data, and fits every terminal. Slow: all of it."""

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from aidefend import AidefendError, Evidence, Finding
from aidefend.audit import SummaryRow
from aidefend.audit.drawing import images
from aidefend.demo import figures, run
from aidefend.demo import run as run_module  # noqa: F401 - the package exports the function under the module's name
from aidefend.demo.terminal import summary_table
from aidefend.demo.world import Chapter, measured, open_world, renamed, share_of, small_net, train

RUN = sys.modules["aidefend.demo.run"]
ROW = SummaryRow("a threat", "an attack", "100.0 % success", "0.0 % success " * 8, "limits <b>")


def chapter(world, tell):
    tell("something happened")
    finding = measured("a.b", "Share", 0.5, n=4)
    return Chapter(
        "Title",
        "Text",
        (ROW,),
        Evidence([finding]),
        (images([torch.rand(2, 1, 4, 4, generator=torch.Generator())], "noise"),),
    )


def test_the_report_is_written_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RUN, "CHAPTERS", (("one", chapter),))
    assert run(None, str(tmp_path / "out"), 3) == 0
    said = capsys.readouterr().out
    assert "[1/1] one" in said and "something happened" in said and "a threat" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "limits &lt;b&gt;" in page and "data:image/png;base64," in page and "<script" not in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.replace("https://atlas.mitre.org", ""))
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["metadata"]["seed"] == 3 and data["findings"][0]["id"] == "a.b"
    first = Evidence.from_dict(data).digest
    assert run(None, str(tmp_path / "again"), 3) == 0
    assert json.loads((tmp_path / "again" / "report.json").read_text())["digest"] == first


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_demo_writes_nothing(tmp_path, monkeypatch, capsys, error):
    def broken(world, tell):
        raise error

    monkeypatch.setattr(RUN, "CHAPTERS", (("one", chapter), ("two", broken)))
    if error is KeyboardInterrupt:
        assert run(None, str(tmp_path / "out"), 0) == 130
        assert "Interrupted. No report was written" in capsys.readouterr().err
    else:
        with pytest.raises(error):
            run(None, str(tmp_path / "out"), 0)
    assert list(tmp_path.iterdir()) == []


def test_users_own_data_and_bad_arguments(tmp_path, monkeypatch):
    stream = np.random.default_rng(0)
    x = stream.integers(0, 256, (70, 28, 28), dtype=np.uint8)
    y = np.arange(70, dtype=np.uint8) % 10
    np.savez(tmp_path / "own.npz", train_x=x, train_y=y, test_x=x[:20], test_y=y[:20])
    world = open_world(str(tmp_path / "own.npz"), 0)
    assert len(world.train) == 70 and len(world.test) == 20
    for bad in ({"data": str(tmp_path / "missing.npz")}, {"seed": -1}):
        with pytest.raises(AidefendError, match="Expected"):
            run(**{"out": str(tmp_path / "out"), **bad})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(RUN, "CHAPTERS", (("one", chapter),))
    with pytest.raises(AidefendError, match="folder"):
        run(out=str(tmp_path / "file"))


def test_training_repeats_and_leaves_the_global_stream():
    world = open_world(None, 0)
    small = torch.utils.data.TensorDataset(*(part[:300] for part in world.rows("train")))
    net = small_net(5)
    first, second = (train(copy.deepcopy(net), small, epochs=2, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("width", [40, 99, 100, 160])
def test_the_table_fits_the_terminal(width):
    table = summary_table([ROW, ROW], width)
    assert all(word in table for word in ("threat", "success", "limits"))
    if width >= 100:
        assert max(len(line) for line in table.splitlines()) <= width


def test_roc_and_findings():
    alarms, hits = figures.roc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert (alarms, hits) == ([0, 0, 0, 0.5, 1], [0, 0.5, 1, 1, 1])
    finding = Finding("a", "A", value=0.25)
    assert share_of(finding) == "25.0 %" and share_of(Finding("a", "A", status="not shown")) == "not shown"
    assert renamed(finding, "PGD training").id == "a.pgd_training"
    assert not renamed(finding, "private", secure=True).deterministic


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "aidefend", "demo", "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    evidence = Evidence.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert evidence["artifacts.malicious_pickle_refused"].value is True
