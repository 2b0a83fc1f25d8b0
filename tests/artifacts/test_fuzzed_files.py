"""Damaged files: each is refused with UnsafeArtifact, or means exactly what the undamaged one means."""

import random
import struct

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from aidefend import UnsafeArtifact
from aidefend.artifacts import Limits, Manifest, safe_load
from aidefend.artifacts.loading import load_bytes
from aidefend.artifacts.safetensors_format import write_safetensors
from tests.artifacts.hostile_files import saved
from tests.artifacts.hostile_pickles import HEAD, build_zip, honest, state, tensor, text

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor([1, 2]), "flag": torch.tensor(True)}
TORCH_FILE, SAFE_FILE = saved(WEIGHTS), write_safetensors(WEIGHTS)
LIMITS = Limits(max_items=10_000)
PLAIN = (
    text("a"), b"N", b"\x88", b"\x89", b")", b"]", b"}", b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u",
    b"R", b"b", b"Q", b".", b"K\x01", b"J\xff\xff\xff\xff", b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"0", b"2", b"\x93",
    text("_metadata"), text("storage"), text("0"), text("cpu"), tensor(), b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n", b"c_codecs\nencode\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nfloat32\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"c__builtin__\nset\n", b"cposix\nmkdir\n", b"G" + struct.pack(">d", 1.5),
)  # fmt: skip


def judge(data: bytes, name: str):
    """The loaded dict or None; anything else than a refusal is a failure, and so is a disagreement with torch."""
    try:
        return load_bytes(data, name, LIMITS)
    except UnsafeArtifact as error:
        if "two parsers" in str(error) or "torch.load" in str(error):
            raise AssertionError("torch reads these bytes in another way") from error
        return None


def equal(loaded, wanted) -> bool:
    if type(loaded) is not dict or list(loaded) != list(wanted):
        return False
    return all(torch.equal(loaded[name], wanted[name]) and loaded[name].dtype == wanted[name].dtype for name in wanted)


def test_each_flipped_bit_of_a_torch_checkpoint_is_refused_or_harmless():
    flips = random.Random(0)
    survivors = 0
    for position in range(len(TORCH_FILE)):
        data = bytearray(TORCH_FILE)
        data[position] ^= 1 << flips.randrange(8)
        loaded = judge(bytes(data), "model.pt")
        assert loaded is None or equal(loaded, WEIGHTS), position
        survivors += loaded is not None
    assert survivors < 0.6 * len(TORCH_FILE)  # alignment padding, dates and versions mean nothing


def test_each_flipped_bit_of_a_safetensors_file_is_refused_or_changes_one_value():
    flips = random.Random(1)
    begin = 8 + int.from_bytes(SAFE_FILE[:8], "little")
    for position in range(len(SAFE_FILE)):
        data = bytearray(SAFE_FILE)
        data[position] ^= 1 << flips.randrange(8)
        loaded = judge(bytes(data), "model.safetensors")
        if loaded is not None and position >= begin:
            assert list(loaded) == list(WEIGHTS) and not equal(loaded, WEIGHTS)


@pytest.mark.parametrize(("name", "data"), [("model.pt", TORCH_FILE), ("model.safetensors", SAFE_FILE)])
def test_with_a_manifest_every_flipped_bit_is_refused_before_parsing(name, data, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_bytes(data)
    manifest = Manifest.of(path)
    assert equal(safe_load(path, manifest=manifest), WEIGHTS)
    monkeypatch.setattr("aidefend.artifacts.loading.load_bytes", lambda *_: pytest.fail("parsed before verified"))
    for position in range(0, len(data), 13):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        with pytest.raises(UnsafeArtifact, match="SHA-256"):
            safe_load(path, manifest=manifest)


@pytest.mark.parametrize(("name", "data"), [("model.pt", TORCH_FILE), ("model.safetensors", SAFE_FILE)])
def test_every_cut_is_refused(name, data):
    for length in range(0, len(data), 5):
        assert judge(data[:length], name) is None


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**16), st.sampled_from(["set", "insert", "delete", "copy"]), st.binary(max_size=12)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["model.pt", "model.safetensors"]),
)
def test_edited_files_never_raise_anything_else(edits, name):
    data = bytearray(TORCH_FILE if name == "model.pt" else SAFE_FILE)
    for place, kind, value in edits:
        at = place % (len(data) + 1)
        piece = data[at : at + 40] if kind == "copy" else value
        data[at : at + (len(value) if kind in ("set", "delete") else 0)] = b"" if kind == "delete" else piece
    judge(bytes(data), name)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=3)), min_size=1, max_size=3))
def test_edited_pickles_with_right_checksums_never_split_the_two_parsers(edits):
    pickle = bytearray(state(tensor((2, 2), (2, 1))))
    for place, value in edits:
        at = place % len(pickle)
        pickle[at : at + len(value)] = value
    judge(build_zip(honest(bytes(pickle))), "model.pt")


@settings(max_examples=200)
@given(st.lists(st.sampled_from(PLAIN), max_size=30))
def test_random_programs_never_split_the_two_parsers(parts):
    program = HEAD + b"}" + text("w") + tensor() + b"s" + b"".join(parts)
    for tail in (b".", b"s.", b"u."):
        judge(build_zip(honest(program + tail)), "model.pt")


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data):
    for name in ("model.pt", "model.safetensors", "model"):
        assert judge(data, name) is None
    assert judge(b"\x80\x02" + data, "model.pkl") is None
