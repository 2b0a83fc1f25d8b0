"""`read_npz` against numpy's own loader on honest files, and against archives built to hurt."""

import contextlib
import io
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aidefend._core.errors import AidefendError, ConfigurationError, UnsafeArtifact
from aidefend.datasets import read_npz

KINDS = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", ">i4", ">f8", ">u2"]


def archive(path, members, packing=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", packing) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def npy(header, data=b"", version=1):
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode("latin-1") + data


def header(descr="'<u1'", shape="(4,)", fortran="False"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def peak_bytes(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0,), (4, 0, 2)], ids=str)
def test_agrees_with_numpy(tmp_path, save, shape):
    arrays = {}
    for kind in KINDS:
        array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(kind)
        arrays |= {f"{kind} C": np.asarray(array, order="C"), f"{kind} F": np.asarray(array, order="F")}
    save(tmp_path / "a.npz", **arrays)
    found, reference = read_npz(tmp_path / "a.npz"), np.load(tmp_path / "a.npz", allow_pickle=False)
    assert list(found) == list(arrays)
    for name, tensor in found.items():
        assert tensor.is_contiguous()
        assert tensor.shape == shape
        assert tensor.numpy().dtype == reference[name].dtype.newbyteorder("=")
        np.testing.assert_array_equal(tensor.numpy(), reference[name])


def test_keys_choose_and_order(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(2), b=np.array(["text"]), c=np.zeros(3))
    assert list(read_npz(tmp_path / "a.npz", ["c", "a"])) == ["c", "a"]
    assert list(read_npz(tmp_path / "a.npz", ("c", "c"))) == ["c"]
    assert read_npz(tmp_path / "a.npz", []) == {}
    with pytest.raises(UnsafeArtifact, match=r"arrays named d, e \(the file has a, b, c\)"):
        read_npz(tmp_path / "a.npz", ["a", "d", "e"])


def test_version_2_and_foreign_white_space_are_read(tmp_path):
    loose = "{'descr':'<u2','fortran_order':False,'shape':(2,2)}   \n"
    members = [
        ("v2.npy", npy(header(), b"abcd", version=2)),
        ("loose.npy", npy(loose, bytes([1, 0, 2, 0, 3, 0, 4, 0]))),
    ]
    found = read_npz(archive(tmp_path / "a.npz", members))
    assert found["v2"].tolist() == [97, 98, 99, 100]
    assert found["loose"].tolist() == [[1, 2], [3, 4]]


class Trap:
    sprung = False

    def __reduce__(self):
        return (_spring, ())


def _spring():
    Trap.sprung = True


def test_object_arrays_are_refused_and_never_unpickled(tmp_path):
    np.savez(tmp_path / "trap.npz", x=np.array([Trap()], dtype=object))
    Trap.sprung = False
    with pytest.raises(UnsafeArtifact, match="object arrays need pickle"):
        read_npz(tmp_path / "trap.npz")
    assert not Trap.sprung
    np.load(tmp_path / "trap.npz", allow_pickle=True)["x"]
    assert Trap.sprung, "the trap of this test is none"


def test_a_pickle_in_place_of_an_array_is_refused(tmp_path):
    Trap.sprung = False
    for name, data in (("a.npz", pickle.dumps(Trap())),):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnsafeArtifact, match="not a zip file"):
            read_npz(tmp_path / name)
    with pytest.raises(UnsafeArtifact, match=r"NPY format 1\.0 or 2\.0"):
        read_npz(archive(tmp_path / "b.npz", [("x.npy", pickle.dumps(Trap()))]))
    assert not Trap.sprung


BAD_ARRAYS = {
    "text": (npy(header("'<U4'"), bytes(64)), "plain numeric array, not dtype '<U4'"),
    "object": (npy(header("'|O'"), bytes(32)), "object arrays need pickle"),
    "structured": (npy(header("[('a', '<i4'), ('b', '|O')]"), bytes(32)), "plain numeric array"),
    "long double": (npy(header("'<f16'"), bytes(64)), "plain numeric array"),
    "datetime": (npy(header("'<M8[s]'"), bytes(32)), "plain numeric array"),
    "odd width": (npy(header("'<i3'"), bytes(12)), "plain numeric array"),
    "too little data": (npy(header(), b"abc"), "3 bytes of data"),
    "too much data": (npy(header(), b"abcde"), "5 bytes of data"),
    "no data": (npy(header("'<f8'", "(9,)")), "0 bytes of data"),
    "negative size": (npy(header(shape="(-4,)"), b"abcd"), "header as numpy writes it"),
    "expression": (npy(header(shape="(2*2,)"), b"abcd"), "header as numpy writes it"),
    "call": (npy(header(shape="(__import__('os').getpid(),)"), b"abcd"), "header as numpy writes it"),
    "nested parentheses": (npy("(" * 9000), "header as numpy writes it"),
    "minus signs": (npy("{'shape': " + "-" * 9000 + "1}"), "header as numpy writes it"),
    "header too long": (npy(" " * 10_001), "at most 10000 bytes, not 10001"),
    "header length lies": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "at most 10000 bytes, not 4294967295"),
    "header cut": (npy(header())[:30], "undamaged"),
    "version 3": (npy(header(), b"abcd", version=2).replace(b"NUMPY\x02", b"NUMPY\x03"), "NPY format"),
    "version 0": (npy(header(), b"abcd").replace(b"NUMPY\x01", b"NUMPY\x00"), "NPY format"),
    "empty": (b"", "undamaged"),
    "huge behind a zero": (npy(header(shape="(0, 99999999999)")), "at most max_bytes"),
    "huge number": (npy(header(shape=f"({'9' * 5000},)")), "at most max_bytes"),
    "many dimensions": (npy(header(shape="(" + "1," * 100 + ")"), b"a"), "at most 32 dimensions"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path, case):
    data, message = BAD_ARRAYS[case]
    path = archive(tmp_path / "bad.npz", [("good.npy", npy(header(), b"abcd")), ("x.npy", data)])
    with pytest.raises(UnsafeArtifact, match=message):
        read_npz(path)
    assert read_npz(path, ["good"])["good"].tolist() == [97, 98, 99, 100]


def test_zip_bomb_meets_the_limit_without_memory(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros(30_000_000, dtype=np.uint8), y=np.zeros(3))

    def attempt():
        with pytest.raises(UnsafeArtifact, match="at most max_bytes=1000000 unpacked bytes"):
            read_npz(path, max_bytes=1_000_000)

    assert peak_bytes(attempt) < 2_000_000
    assert read_npz(path, ["y"], max_bytes=1_000_000)["y"].tolist() == [0, 0, 0]
    assert len(read_npz(path)["x"]) == 30_000_000


def test_the_limit_counts_all_arrays_together(tmp_path):
    np.savez(tmp_path / "a.npz", **{f"x{i}": np.zeros(1000, dtype=np.uint8) for i in range(10)})
    with pytest.raises(UnsafeArtifact, match="max_bytes=9000"):
        read_npz(tmp_path / "a.npz", max_bytes=9000)


def edited_directory(path, **changes):
    """The archive with fields of its first directory entry overwritten: what a liar would do."""
    offsets = {"version": (6, "<H"), "flags": (8, "<H"), "method": (10, "<H"), "packed": (20, "<I")}
    offsets |= {"unpacked": (24, "<I"), "local_offset": (42, "<I"), "name": (46, "<H")}
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02")
    for field, value in changes.items():
        struct.pack_into(offsets[field][1], data, start + offsets[field][0], value)
    path.write_bytes(data)
    return path


def test_announced_size_beyond_what_deflate_can_hold_is_refused(tmp_path):
    path = archive(tmp_path / "a.npz", [("x.npy", npy(header(shape="(1000000000,)"), b"abcd"))])
    edited_directory(path, unpacked=1_000_000_000)

    def attempt():
        with pytest.raises(UnsafeArtifact, match="packed bytes can fulfil"):
            read_npz(path)

    assert peak_bytes(attempt) < 2_000_000


def test_packed_size_that_lies_is_no_excuse(tmp_path):
    path = archive(tmp_path / "a.npz", [("x.npy", npy(header(shape="(1000000000,)"), b"abcd"))])
    edited_directory(path, unpacked=1_000_000_000, packed=500_000_000)
    with pytest.raises(UnsafeArtifact, match="packed bytes can fulfil"):
        read_npz(path)


def test_encrypted_and_exotic_members_are_refused(tmp_path):
    good = [("x.npy", npy(header(), b"abcd"))]
    with pytest.raises(UnsafeArtifact, match=r"not encrypted, where 'x.npy' is not"):
        read_npz(edited_directory(archive(tmp_path / "a.npz", good), flags=1))
    for packing in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(UnsafeArtifact, match="stored or deflated"):
            read_npz(archive(tmp_path / "b.npz", good, packing))
    with pytest.raises(UnsafeArtifact, match="stored or deflated"):
        read_npz(edited_directory(archive(tmp_path / "c.npz", good), method=99))


DIRECTORY_DAMAGE = {
    "version from the future": {"version": 231},
    "name that does not decode": {"flags": 0x800, "name": 0xFFFF},
    "offset beyond the file": {"local_offset": 0x7FFFFFFF},
    "offset inside the data": {"local_offset": 11},
    "patched data": {"flags": 0x20},
}


@pytest.mark.parametrize("case", DIRECTORY_DAMAGE)
def test_what_zipfile_says_about_a_broken_directory_is_translated(tmp_path, case):
    path = archive(tmp_path / "a.npz", [("x.npy", npy(header(), b"abcd"))])
    with pytest.raises(UnsafeArtifact, match="undamaged"):
        read_npz(edited_directory(path, **DIRECTORY_DAMAGE[case]))


def test_repeated_and_foreign_members_are_refused(tmp_path):
    one, two = npy(header(), b"abcd"), npy(header(), b"efgh")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the repeated name that this test wants
        path = archive(tmp_path / "a.npz", [("x.npy", one), ("x.npy", two)])
    with pytest.raises(UnsafeArtifact, match=r"each name once, where 'x\.npy'"):
        read_npz(path)
    with pytest.raises(UnsafeArtifact, match=r"only \.npy members.*'run\.py'"):
        read_npz(archive(tmp_path / "b.npz", [("x.npy", one), ("run.py", b"")]))


def test_damage_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(1000))
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[:-30])
    with pytest.raises(UnsafeArtifact, match="undamaged"):
        read_npz(tmp_path / "cut.npz")
    flipped = bytearray(data)
    flipped[4000] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with pytest.raises(UnsafeArtifact, match="CRC"):
        read_npz(tmp_path / "flipped.npz")


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_any_changed_number_breaks_the_checksum(tmp_path, packing):
    path = archive(tmp_path / "a.npz", [("x.npy", npy(header(shape="(200,)"), bytes(range(200))))], packing)
    data = path.read_bytes()
    start = data.index(bytes(range(100, 110))) if packing == zipfile.ZIP_STORED else 150
    for position in range(start, start + 10):
        flipped = bytearray(data)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(UnsafeArtifact, match="undamaged"):
            read_npz(path)


def test_bad_arguments_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    for wrong in ("x", [1], [b"x"]):
        with pytest.raises(ConfigurationError, match=r"Expected keys to be a .*got keys="):
            read_npz(tmp_path / "a.npz", wrong)
    with pytest.raises(ConfigurationError, match="regular file"):
        read_npz(tmp_path / "none.npz")
    with pytest.raises(ConfigurationError, match="max_bytes"):
        read_npz(tmp_path / "a.npz", max_bytes=0)


def _honest_archive():
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.arange(20, dtype="<i4").reshape(4, 5), b=np.ones(3))
    return buffer.getvalue()


HONEST = _honest_archive()


@settings(max_examples=200, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 60),
)
def test_no_edit_gets_anything_but_tensors_or_a_refusal(tmp_path_factory, edits, cut):
    data = bytearray(HONEST)
    for position, value in edits:
        data[position % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "edited.npz"
    path.write_bytes(data[: len(data) - cut])
    with contextlib.suppress(AidefendError):
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_npz(path, max_bytes=10_000_000).values())
