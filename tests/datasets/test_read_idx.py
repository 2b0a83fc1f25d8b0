"""`read_idx` against files written by hand: every type of the format, and every way in which a file can lie."""

import contextlib
import gzip
import io
import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aidefend._core.errors import AidefendError, ConfigurationError, UnsafeArtifact
from aidefend.datasets import read_idx
from aidefend.datasets.idx import _read
from tests.datasets.made_files import IDX_CODES, idx_bytes


def written(folder, data, name="file"):
    path = folder / name
    path.write_bytes(data)
    return path


def peak_bytes(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", IDX_CODES)
@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 1, 1, 1, 5), (0,), (0, 28, 28)], ids=str)
def test_round_trip(tmp_path, pack, kind, shape):
    values = np.arange(np.prod(shape)).reshape(shape) - (3 if kind != "u1" else 0)
    array = (values * (0.37 if kind[0] == "f" else 1)).astype(kind)
    found = read_idx(written(tmp_path, pack(idx_bytes(array))))
    assert found.dtype == torch.from_numpy(array).dtype
    assert torch.equal(found, torch.from_numpy(array))


@pytest.mark.parametrize("kind", IDX_CODES)
def test_extremes_keep_their_value(tmp_path, kind):
    limits = np.finfo(kind) if kind[0] == "f" else np.iinfo(kind)
    array = np.array([limits.min, 1, limits.max], dtype=kind)
    assert torch.equal(read_idx(written(tmp_path, idx_bytes(array))), torch.from_numpy(array))


def test_gzip_is_told_by_content_and_members_may_follow_one_another(tmp_path):
    data = idx_bytes(np.arange(100, dtype=np.uint8))
    path = written(tmp_path, gzip.compress(data[:50]) + gzip.compress(data[50:]), "no-suffix")
    assert read_idx(path).tolist() == list(range(100))


def test_result_can_be_written_to(tmp_path):
    found = read_idx(written(tmp_path, idx_bytes(np.zeros(3, dtype=np.uint8))))
    found += 1
    assert found.tolist() == [1, 1, 1]


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(4, 6))
LYING = {
    "empty": (b"", "0 of 4"),
    "magic cut": (GOOD[:3], "3 of 4"),
    "sizes cut": (GOOD[:9], "5 of 8"),
    "data cut": (GOOD[:-1], "36 bytes as its header says, where the file has 35"),
    "data added": (GOOD + b"\0", "36 bytes as its header says, where the file has 37"),
    "not zero first": (b"\x01" + GOOD[1:], "IDX magic number"),
    "little endian": (b"\x02\x08\0\0" + GOOD[4:], "IDX magic number"),
    "type 0x0a": (b"\0\0\x0a\x02" + GOOD[4:], "not 0x00000a02"),
    "type 0": (b"\0\0\0\x02" + GOOD[4:], "IDX magic number"),
    "no dimensions": (b"\0\0\x08\0", "IDX magic number"),
    "255 dimensions": (b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"x", "IDX magic number"),
    "huge rows": (b"\0\0\x08\x01\xff\xff\xff\xff" + bytes(24), "at most max_bytes"),
    "product beyond 64 bits": (b"\0\0\x0e\x03" + b"\xff" * 12, "at most max_bytes"),
    "huge behind a zero": (b"\0\0\x08\x03" + bytes(4) + b"\xff" * 8, "at most max_bytes"),
    "within the limit, not in the file": (b"\0\0\x08\x01\x0f\xff\xff\xff" + bytes(24), "where the file has 32"),
    "not IDX at all": (b"\x89PNG\r\n\x1a\n" + bytes(40), "IDX magic number"),
}


@pytest.mark.parametrize("case", LYING)
def test_lying_files_are_refused(tmp_path, case):
    data, message = LYING[case]
    path = written(tmp_path, data)
    with pytest.raises(UnsafeArtifact, match=message) as caught:
        read_idx(path)
    assert str(path)[:60] in str(caught.value)


GZIP_MESSAGES = {
    "data cut": "ends after 23 of 24",
    "data added": "to end after the 24 bytes",
    "within the limit, not in the file": "packed bytes can fulfil",
}


@pytest.mark.parametrize("case", LYING)
def test_lying_files_are_refused_when_packed(tmp_path, case):
    data, message = LYING[case]
    with pytest.raises(UnsafeArtifact, match=GZIP_MESSAGES.get(case, message)):
        read_idx(written(tmp_path, gzip.compress(data)))


@pytest.mark.parametrize("keep", [2, 9, 20, -9, -4, -1])
def test_truncated_gzip_is_refused(tmp_path, keep):
    with pytest.raises(UnsafeArtifact, match="undamaged"):
        read_idx(written(tmp_path, gzip.compress(GOOD)[:keep]))


def test_wrong_gzip_checksum_is_refused(tmp_path):
    packed = bytearray(gzip.compress(GOOD))
    packed[-8] ^= 1
    with pytest.raises(UnsafeArtifact, match="CRC"):
        read_idx(written(tmp_path, packed))


def test_gzip_bomb_behind_a_small_header_costs_no_memory(tmp_path):
    bomb = gzip.compress(GOOD + bytes(30_000_000))
    path = written(tmp_path, bomb)

    def attempt():
        with pytest.raises(UnsafeArtifact, match="to end after the 24 bytes"):
            read_idx(path)

    assert peak_bytes(attempt) < 2_000_000
    assert peak_bytes(lambda: gzip.decompress(bomb)) > 30_000_000, "the bomb of this test is none"


def test_gzip_bomb_behind_an_honest_header_meets_the_limit(tmp_path):
    path = written(tmp_path, gzip.compress(struct.pack(">HBBI", 0, 8, 1, 30_000_000) + bytes(30_000_000)))

    def attempt():
        with pytest.raises(UnsafeArtifact, match="at most max_bytes=1000000"):
            read_idx(path, max_bytes=1_000_000)

    assert peak_bytes(attempt) < 2_000_000
    assert read_idx(path).shape == (30_000_000,)


def test_huge_header_is_refused_before_allocation(tmp_path):
    path = written(tmp_path, gzip.compress(b"\0\0\x08\x01\x3f\xff\xff\xff"))

    def attempt():
        with pytest.raises(UnsafeArtifact, match="packed bytes can fulfil"):
            read_idx(path)

    assert peak_bytes(attempt) < 2_000_000


def test_never_reads_more_than_the_header_says_and_one_byte():
    class Counting(io.BytesIO):
        asked = 0

        def read(self, count):
            self.asked += count
            return super().read(count)

    stream = Counting(GOOD + bytes(1000))
    with pytest.raises(UnsafeArtifact, match="to end after"):
        _read(stream, "stream", 10_000, 2**30, exact=False)
    assert stream.asked == len(GOOD) + 1


def test_limit_is_inclusive(tmp_path):
    path = written(tmp_path, GOOD)
    assert read_idx(path, max_bytes=24).shape == (4, 6)
    with pytest.raises(UnsafeArtifact, match="max_bytes=23"):
        read_idx(path, max_bytes=23)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"regular file, got path=.*missing"):
        read_idx(tmp_path / "missing")
    with pytest.raises(ConfigurationError, match="regular file"):
        read_idx(tmp_path)
    for wrong in (None, 3, b"bytes"):
        with pytest.raises(ConfigurationError, match="path to be a str or a Path"):
            read_idx(wrong)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConfigurationError, match="max_bytes"):
            read_idx(written(tmp_path, GOOD), max_bytes=wrong)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="regular file"):
        read_idx(tmp_path / "pipe")


@settings(max_examples=150, deadline=None)
@given(
    packed=st.booleans(),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
def test_no_edit_gets_anything_but_a_tensor_or_a_refusal(tmp_path_factory, packed, edits, cut):
    data = bytearray(gzip.compress(GOOD, mtime=0) if packed else GOOD)
    for position, value in edits:
        data[position % len(data)] = value
    path = written(tmp_path_factory.getbasetemp(), data[: len(data) - cut], "edited-idx")
    with contextlib.suppress(AidefendError):
        assert isinstance(read_idx(path, max_bytes=10_000_000), torch.Tensor)
