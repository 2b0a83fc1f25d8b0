"""Archives beyond 4 GiB, whose sizes and places need 64 bits; the fields are those that torch writes."""

import os
import struct
from pathlib import Path

import pytest
import torch

from aidefend import UnsafeArtifact
from aidefend.artifacts import Limits, files, safe_load, zip_archive

FULL = 0xFFFFFFFF
BIG = 2**32 + 8


def wide(*values: int) -> bytes:
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


def test_saturated_fields_take_their_64_bit_values():
    assert zip_archive._widen(wide(BIG, BIG), FULL, FULL, 860) == (BIG, BIG, 860)
    assert zip_archive._widen(wide(BIG), 12, 12, FULL) == (12, 12, BIG)
    assert zip_archive._widen(b"", 12, 12, 0) == (12, 12, 0)


@pytest.mark.parametrize(
    ("extra", "fields"),
    [
        (b"", (FULL, 12, 0)),  # saturated without a value
        (wide(BIG), (12, 12, 0)),  # a value that nothing needs
        (wide(BIG, BIG), (FULL, 12, 0)),  # one value too many
        (wide(12), (FULL, 12, 0)),  # a value that fits 32 bits: a second truth
        (wide(BIG)[:-1], (FULL, 12, 0)),
        (b"FB\x01\x00Z", (12, 12, 0)),
    ],
)
def test_other_64_bit_values_are_refused(extra, fields):
    with pytest.raises(UnsafeArtifact, match="zip64 sizes"):
        zip_archive._widen(extra, *fields)


def test_local_64_bit_values_must_be_those_of_the_directory():
    header = zip_archive._Header("a", b"a", 8, 0, 0, BIG, BIG, 860)
    for extra in (wide(BIG, BIG), wide(BIG, 0) + b"FB\x02\x00ZZ", wide(860), b""):
        zip_archive._check_local_extra(extra, header)
    for extra in (wide(BIG + 1, 0), wide(861), wide(BIG, BIG, 860), wide(BIG, BIG)[:-1], b"FB"):
        with pytest.raises(UnsafeArtifact, match="extra"):
            zip_archive._check_local_extra(extra, header)


def test_long_descriptors_are_read():
    header = zip_archive._Header("a", b"a", 8, 0, 7, BIG, BIG, 0)
    descriptor = struct.pack("<4sL2Q", b"PK\x07\x08", 7, BIG, BIG)
    assert zip_archive._descriptor_length(descriptor, 0, header) == 24


@pytest.mark.slow
@pytest.mark.skipif(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 14 * 2**30, reason="needs 14 GiB")
def test_a_checkpoint_beyond_4_gib_loads(tmp_path):
    path = tmp_path / "big.pt"
    torch.save({"a": torch.ones(3), "big": torch.ones(BIG // 4), "b": torch.ones(3)}, path)
    loaded = safe_load(path)
    assert {name: value.numel() for name, value in loaded.items()} == {"a": 3, "big": BIG // 4, "b": 3}


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(2)}, path)
    fstat = os.fstat

    class Smaller:
        def __init__(self, found):
            self.st_mode, self.st_size = found.st_mode, found.st_size - 1

    monkeypatch.setattr(files.os, "fstat", lambda handle: Smaller(fstat(handle)))
    with pytest.raises(UnsafeArtifact, match="changed while it was read"):
        safe_load(path)


def test_a_failure_inside_torch_is_a_refusal(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(2)}, path)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UnsafeArtifact, match="RuntimeError: out of memory"):
        safe_load(path)
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UnsafeArtifact, match="RuntimeError"):
        safe_load(path)


def test_no_descriptor_is_left_open(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    (tmp_path / "link.pt").symlink_to("model.pt")
    before = {item.name for item in Path("/proc/self/fd").iterdir()}
    for name in ("model.pt", "link.pt", "absent.pt", "."):
        for limits in (Limits(), Limits(links="within"), Limits(max_file_bytes=3)):
            try:
                safe_load(tmp_path / name, limits=limits)
            except UnsafeArtifact:
                continue
    assert {item.name for item in Path("/proc/self/fd").iterdir()} == before
