"""Paths that cannot be seen, opened or expanded end in a refusal that names them, never in an error of the system."""

import io
from pathlib import Path

import pytest

from aidefend._core.errors import ConfigurationError, UnsafeArtifact
from aidefend.datasets import find, load, read_idx, read_npz
from aidefend.datasets.reading import check_path, damage_refused, read_exactly

IMPOSSIBLE = {"long": "x" * 5000, "null": "a\0b", "absent": "no/such/file"}
FOLDERS = {"here": "", "home": "~"}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
@pytest.mark.parametrize("read", [load, read_idx, read_npz])
def test_impossible_paths_are_refused(read, kind):
    with pytest.raises(ConfigurationError, match="path to be"):
        read(IMPOSSIBLE[kind])


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("read", [read_idx, read_npz])
def test_folders_are_not_files(read, kind):
    with pytest.raises(ConfigurationError, match="path to be a regular file"):
        read(FOLDERS[kind])


def test_impossible_roots_are_listed_as_absent():
    with pytest.raises(ConfigurationError, match="no such folder"):
        find("mnist", roots=["x" * 5000, "a\0b"])


def test_a_user_without_a_home_folder_keeps_the_tilde(monkeypatch):
    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    assert check_path("~/data") == Path("~/data")


def test_a_file_that_may_not_be_read_is_named():
    with (
        pytest.raises(ConfigurationError, match=r"path to be readable, got path='secret\.npz'"),
        damage_refused("secret.npz"),
    ):
        raise PermissionError(13, "Permission denied")


def test_errors_of_other_kinds_pass_through():
    with pytest.raises(KeyError), damage_refused("file"):
        raise KeyError("a defect of ours, not damage")


@pytest.mark.parametrize("count", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_read_exactly_over_block_borders(count):
    data = bytes(range(251)) * (count // 251 + 1)
    stream = io.BytesIO(data)
    assert read_exactly(stream, count) == data[:count]
    assert stream.tell() == count
    with pytest.raises(EOFError, match=rf"ends after {count} of {count + 1} bytes"):
        read_exactly(io.BytesIO(data[:count]), count + 1)


def test_damage_names_the_file_and_the_cause():
    with (
        pytest.raises(UnsafeArtifact, match=r"undamaged file \(EOFError\), got path='a.gz'\. Fetch"),
        damage_refused("a.gz"),
    ):
        raise EOFError
