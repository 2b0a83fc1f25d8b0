"""The script that makes the shipped file: its choice of rows, its bytes, and its refusals."""

import io
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidefend._core.errors import ConfigurationError
from aidefend.datasets import copies, find, read_npz
from aidefend.datasets.mnist import SUBSET_FILE
from scripts import make_mnist_subset as maker
from tests.datasets.made_files import small_set, write_npz_set

DIFFERENT_DEFLATE = "ng" in getattr(zlib, "ZLIB_RUNTIME_VERSION", "")


def shipped():
    return {name: array.numpy() for name, array in read_npz(SUBSET_FILE).items()}


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=2, max_size=8).filter(any), share=st.floats(0.01, 1))
def test_shares_are_proportional_to_less_than_one_row(counts, share):
    labels = np.repeat(np.arange(len(counts)), counts)
    rows = max(1, int(share * len(labels)))
    taken = maker.shares(labels, rows)
    assert sum(taken) == rows
    for got, count in zip(taken, np.bincount(labels), strict=True):
        assert abs(got - rows * count / len(labels)) < 1
        assert got <= count


def test_chosen_rows_are_distinct_stratified_and_shuffled():
    labels = np.repeat(np.arange(4), 50)
    rows = maker.chosen_rows(labels, 80, "train")
    assert len(set(rows)) == 80
    assert np.bincount(labels[rows]).tolist() == [20] * 4
    assert rows != sorted(rows)
    assert rows == maker.chosen_rows(labels, 80, "train")
    assert rows != maker.chosen_rows(labels, 80, "test")


def test_a_row_keeps_its_place_when_rows_of_another_class_are_added():
    labels = np.repeat(np.arange(2), 50)
    longer = np.concatenate([labels, np.full(50, 2)])
    kept = [row for row in maker.chosen_rows(longer, 60, "train") if row < 100]
    assert kept == maker.chosen_rows(labels, 40, "train")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int64])
def test_numpy_reads_what_the_script_writes(kind):
    array = np.arange(60).reshape(3, 4, 5).astype(kind)
    written = maker.npy(array)
    assert written.index(b"\n") % 64 == 63
    found = np.load(io.BytesIO(written), allow_pickle=False)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_packing_depends_on_nothing_but_the_arrays():
    arrays = {"b": np.arange(50, dtype=np.uint8), "a": np.zeros((2, 2), dtype=np.uint16)}
    packed = maker.pack(arrays)
    assert packed == maker.pack({name: array.copy() for name, array in arrays.items()})
    entries = zipfile.ZipFile(io.BytesIO(packed)).infolist()
    assert [entry.filename for entry in entries] == ["b.npy", "a.npy"]
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.skipif(DIFFERENT_DEFLATE, reason="this Python packs with another deflate implementation")
def test_packing_the_shipped_arrays_gives_the_shipped_bytes():
    assert maker.pack(shipped()) == SUBSET_FILE.read_bytes()


def test_check_tells_bytes_arrays_and_neither_apart():
    arrays = shipped()
    assert maker.check(SUBSET_FILE.read_bytes(), arrays) == (True, "identical to the byte")
    same, verdict = maker.check(b"packed otherwise", arrays)
    assert same
    assert "arrays are identical" in verdict
    arrays["test_y"][7] ^= 1
    assert maker.check(b"packed otherwise", arrays) == (False, "the shipped file does not hold the rebuilt arrays")


def test_a_source_that_is_not_mnist_is_refused(tmp_path, capsys):
    write_npz_set(tmp_path / "mnist.npz", small_set())
    with pytest.raises(ConfigurationError, match="MNIST as published"):
        maker.full_mnist(tmp_path)
    output = tmp_path / "out.npz"
    assert maker.main(["--source", str(tmp_path / "mnist.npz"), "--output", str(output)]) == 2
    assert "Pass an unchanged copy" in capsys.readouterr().err
    assert not output.exists()


def test_whole_run_on_a_stand_in_for_the_full_set(tmp_path, capsys, monkeypatch):
    full = small_set(rows=100, side=28)
    write_npz_set(tmp_path / "mnist.npz", full)
    monkeypatch.setattr(copies, "identify", lambda digest: "mnist")
    monkeypatch.setattr(maker, "ROWS", {"train": 20, "test": 10})
    output = tmp_path / "out.npz"
    assert maker.main(["--source", str(tmp_path), "--output", str(output)]) == 0
    assert "Put this digest into SUBSET_SHA256" in capsys.readouterr().out
    made = {name: array.numpy() for name, array in read_npz(output).items()}
    assert np.bincount(made["train_y"]).tolist() == [2] * 10
    assert np.bincount(made["test_y"]).tolist() == [1] * 10
    for part in ("train", "test"):
        np.testing.assert_array_equal(made[f"{part}_x"], full[f"{part}_x"][made[f"{part}_index"]])
        np.testing.assert_array_equal(made[f"{part}_y"], full[f"{part}_y"][made[f"{part}_index"]])
    assert maker.main(["--source", str(tmp_path), "--check"]) == 1


@pytest.mark.slow
def test_rebuilding_from_the_published_set_gives_the_shipped_file(capsys):
    try:
        source = find("mnist").path
    except ConfigurationError:
        pytest.skip("no copy of mnist here; set AIDEFEND_DATA")
    assert maker.main(["--source", source, "--check"]) == 0
    assert "identical" in capsys.readouterr().out
