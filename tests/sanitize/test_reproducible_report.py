"""Equal input and seed give equal bytes wherever they run, and what was changed afterwards is noticed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from aidefend import AidefendError, Report
from aidefend.monitor import AuditLog
from aidefend.sanitize import ScreenReport, screen
from tests.worlds import poisoned_clusters

JUDGE = """
import hashlib, pathlib, sys
import torch
from torch.utils.data import TensorDataset
from aidefend.sanitize import screen
from tests.worlds import poisoned_clusters

form, folder, world = sys.argv[1], pathlib.Path(sys.argv[2]), poisoned_clusters(poison=30, per_class=60)
torch.rand(7)  # the global stream stands elsewhere, which must not matter
data = {"tensors": (world.x, world.y), "dataset": TensorDataset(world.x, world.y)}[form]
report = screen(data, seed=3)
row = report.quarantine_indices[:1].tolist()
report = report.release([report.ids[row[0]]], by="R. Roe", why="checked by eye")
report.to_jsonl(folder / "rows.jsonl")
report.to_html(folder / "page.html", (world.x, world.y))
report.save(folder / "report")
for name in ("rows.jsonl", "page.html", "report"):
    print(name, hashlib.sha256((folder / name).read_bytes()).hexdigest())
print("digest", report.digest())
"""


@pytest.fixture(scope="module")
def planted():
    return poisoned_clusters(poison=30, per_class=60)


@pytest.fixture(scope="module")
def report(planted):
    return screen((planted.x, planted.y), seed=3)


def judged(folder, form, hash_seed, threads):
    folder.mkdir()
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    call = [sys.executable, "-c", JUDGE, form, str(folder)]
    return subprocess.check_output(call, env=environment, text=True, cwd=Path.cwd())


def test_other_processes_hash_seeds_threads_and_forms_of_the_data_give_the_same_bytes(tmp_path):
    """A page, lines of JSON and a file each; the same again from a process that shares nothing but the machine."""
    settings = {"tensors": ("0", "1"), "dataset": ("1", "2")}
    found = {form: judged(tmp_path / form, form, *setting) for form, setting in settings.items()}
    assert len(set(found.values())) == 1, found


def test_batches_give_the_same_digest_and_another_seed_or_value_another(planted, report):
    assert screen(DataLoader(TensorDataset(planted.x, planted.y), batch_size=17), seed=3).digest() == report.digest()
    assert screen((planted.x, planted.y), seed=4).digest() != report.digest()
    assert dataclasses.replace(report, limits=f"{report.limits} ").digest() != report.digest()
    other = {name: values.clone() for name, values in report.scores.items()}
    next(iter(other.values()))[0] = 0.125
    assert dataclasses.replace(report, scores=other).digest() != report.digest()


@pytest.mark.parametrize("where", ["one pixel", "one label", "two rows change places", "another dtype"])
def test_changed_data_are_noticed_row_by_row(planted, report, where):
    x, y = planted.x.clone(), planted.y.clone()
    expected = [17]
    if where == "one pixel":
        x[17, 3] = torch.nextafter(x[17, 3], torch.tensor(torch.inf))
    elif where == "one label":
        y[17] = (y[17] + 1) % 4
    elif where == "two rows change places":
        x[[17, 40]], y[[17, 40]], expected = x[[40, 17]], y[[40, 17]], [17, 40]
    else:
        x, expected = x.double(), list(range(len(x)))
    assert report.changed((planted.x, planted.y)).tolist() == []
    assert report.changed((x, y)).tolist() == report.changed(TensorDataset(x, y)).tolist() == expected


def test_other_forms_of_the_same_data_are_no_change_and_fewer_rows_are_refused(planted, report):
    loader = DataLoader(TensorDataset(planted.x, planted.y), batch_size=11)
    assert not len(report.changed(loader))
    with pytest.raises(AidefendError, match="that were judged"):
        report.changed((planted.x[1:], planted.y[1:]))


def test_a_changed_row_does_not_accuse_its_former_copies(planted):
    x, y = planted.x.clone(), planted.y.clone()
    x[5], y[5] = x[2], y[2]
    report = screen((x, y), seed=0)
    x[2, 0] += 1
    assert report.changed((x, y)).tolist() == [2]


def test_changed_texts_and_labels_in_words_are_noticed():
    texts = [f"the {'match ended' if i % 2 else 'price rose'} on day {i % 7} in town {i}" for i in range(120)]
    labels = ["sport" if i % 2 else "trade" for i in range(120)]
    report = screen((texts, labels), seed=0)
    assert not len(report.changed((texts, labels)))
    assert report.changed(([*texts[:50], f"{texts[50]}.", *texts[51:]], labels)).tolist() == [50]
    assert report.changed((texts, [*labels[:50], "sport", *labels[51:]])).tolist() == [50]
    with pytest.raises(AidefendError, match="classes"):  # the numbers of the other classes would move
        report.changed((texts, [*labels[:50], "art", *labels[51:]]))


def test_a_changed_cell_of_a_table_with_categories_is_noticed_and_a_new_category_moves_no_other_row(planted):
    words = ["u" if value > 0 else "v" for value in planted.x[:, 1].tolist()]
    table = {"a": planted.x[:, 0].tolist(), "b": words, "label": planted.y.tolist()}
    report = screen(pandas.DataFrame(table), seed=0)
    assert not len(report.changed(pandas.DataFrame(table)))
    words[5] = "a word that sorts before all others"
    assert report.changed(pandas.DataFrame(table)).tolist() == [5]


def test_a_flipped_bit_anywhere_in_the_file_is_refused(tmp_path):
    path = tmp_path / "report"
    small = Report(["a", "b"], torch.tensor([True, False]), {"s": torch.tensor([0.5, 1e-5])}, parameters={"a": 1e-5})
    small.save(path)
    content = path.read_bytes()
    assert Report.load(path).digest() == small.digest()
    for place in range(len(content)):
        for bit in (1, 32):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with pytest.raises(AidefendError):
                Report.load(path)
    path.write_bytes(content[:-1])
    with pytest.raises(AidefendError):
        Report.load(path)


def test_a_changed_byte_of_the_release_log_is_noticed_and_the_log_names_the_report(report, tmp_path):
    row, path, key = int(report.quarantine_indices[0]), tmp_path / "log", b"a secret key of 16 bytes or more"
    log = AuditLog(path, key)
    released = report.release([report.ids[row]], "R. Roe", "own camera", log=log.append)
    log.append({"report": released.digest()})
    log.close()
    assert log.verify(key=key).ok
    content = path.read_bytes()
    assert released.digest().encode() in content and b"R. Roe" in content
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not log.verify(key=key).ok, place


def test_a_saved_report_writes_the_same_lines_and_page_as_the_one_it_was(planted, report, tmp_path):
    """So a copy of either that was changed shows beside one that is made anew."""
    report.save(tmp_path / "report")
    again = ScreenReport.load(tmp_path / "report")
    for number, one in enumerate((report, again)):
        one.to_jsonl(tmp_path / f"{number}.jsonl")
        one.to_html(tmp_path / f"{number}.html", (planted.x, planted.y))
    for form in ("jsonl", "html"):
        assert (tmp_path / f"0.{form}").read_bytes() == (tmp_path / f"1.{form}").read_bytes()
