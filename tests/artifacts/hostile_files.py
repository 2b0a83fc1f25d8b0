"""Hostile archives and files of other formats."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import warnings
import zlib
from typing import Any

import numpy as np
import torch

from tests.artifacts.hostile_pickles import HEAD, Entry, build_zip, checkpoint, honest, mkdir, state, tensor

GOOD = state(tensor())


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def swap(index: int, **fields: Any) -> bytes:
    """An honest checkpoint in which one member lies."""
    entries = honest(GOOD)
    entries[index] = entries[index]._replace(**fields)
    return build_zip(entries)


def plus(*entries: Entry, **end: Any) -> bytes:
    return build_zip([*honest(GOOD), *entries], **end)


def zip64(count: int, start_shift: int = 0) -> bytes:
    """An honest checkpoint with a 64-bit end record that tells another story."""
    plain = plus()
    size, start = struct.unpack_from("<4s4H2LH", plain, len(plain) - 22)[5:7]
    at = len(plain) - 22
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start + start_shift)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    return plain[:at] + record + locator + plain[at:]


def deflate(data: bytes) -> bytes:
    machine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return machine.compress(data) + machine.flush()


def zip_cases(marker: str) -> dict[str, tuple[str, bytes, str]]:
    """name -> (file name, content, words of the refusal)."""
    run = HEAD + mkdir(marker) + b"."
    zeros = bytes(2**20)
    inner = plus()
    cases = {
        "local name differs": (swap(0, local_name=b"model/data.pk_"), "local header"),
        "payload behind a second name": (plus(Entry(b"model/data.pkl", run)), "one member a name"),
        "names that differ in case": (plus(Entry(b"model/DATA.PKL", run)), "one member a name"),
        "encrypted flag": (swap(0, flags=0x1), "encrypted"),
        "patch flag": (swap(0, flags=0x20), "encrypted"),
        "strong encryption flag": (swap(0, flags=0x40), "encrypted"),
        "masked header flag": (swap(0, flags=0x2000), "encrypted"),
        "bad checksum": (swap(2, crc=1), "CRC-32"),
        "wrong size": (swap(2, size=12), "stored member"),
        "local size differs": (swap(2, local_size=12), "local sizes"),
        "size past the end": (swap(3, size=10**6), "stored member"),
        "unknown compression": (swap(0, method=14), "encrypted"),
        "deflate bomb": (swap(2, data=zeros, packed=deflate(zeros), method=8), "grow by at most"),
        "deflate hides a payload": (swap(0, data=run, packed=deflate(run), method=8), "grow by at most|posix"),
        "deflated size lies": (swap(0, data=GOOD, packed=deflate(GOOD), method=8, size=10), "stated size|grow"),
        "deflate of junk": (swap(0, packed=b"\xff" * len(GOOD), method=8), "deflated"),
        "descriptor lies": (swap(2, flags=8, descriptor=struct.pack("<4s3L", b"PK\x07\x08", 0, 16, 16)), "descriptor"),
        "descriptor missing": (swap(2, flags=8), "descriptor"),
        "symlink member": (swap(2, mode=0o120777 << 16), "regular files"),
        "member marked as a folder": (swap(2, mode=0x10), "regular files"),
        "directory comment": (swap(0, comment=b"hidden"), "without comments"),
        "hidden local extra": (swap(0, extra=b"\x99\x99\x02\x00ab"), "padding"),
        "cut local extra": (swap(0, extra=b"FB\x40\x00ab"), "padding|whole extra"),
        "gap between members": (swap(1, gap=run), "without gaps"),
        "overlapping members": (swap(3, offset=0), "without gaps"),
        "members out of order": (build_zip([*honest(GOOD)[:3], honest(GOOD)[3]._replace(offset=5)]), "without gaps"),
        "absolute name": (plus(Entry(b"/etc/passwd", b"x")), "relative member names"),
        "name that climbs": (plus(Entry(b"model/../../x", b"x")), "relative member names"),
        "name with a backslash": (plus(Entry(b"model\\..\\x", b"x")), "relative member names"),
        "name with NUL": (plus(Entry(b"model/data.pkl\x00.txt", run)), "relative member names"),
        "name of a drive": (plus(Entry(b"C:/x", b"x")), "relative member names"),
        "name that is no UTF-8": (plus(Entry(b"model/\xff", b"x")), "UTF-8"),
        "name of a folder": (plus(Entry(b"model/data/", b"")), "relative member names"),
        "right-to-left name": (plus(Entry("model/\u202elkp.atad".encode(), run)), "relative member names"),
        "unexpected member": (plus(Entry(b"model/notes.txt", b"x")), "members that torch.save writes"),
        "second pickle": (plus(Entry(b"model/other.pkl", run)), "members that torch.save writes"),
        "storage 00": (plus(Entry(b"model/data/00", bytes(4))), "members that torch.save writes"),
        "storage that nothing uses": (plus(Entry(b"model/data/9", run)), "data that the checkpoint uses"),
        "second folder": (plus(Entry(b"other/data.pkl", run)), "one folder"),
        "member outside the folder": (plus(Entry(b"data.pkl", run)), "one folder"),
        "nested zip": (plus(Entry(b"model/inner.zip", inner)), "archive in an archive"),
        "zip of a checkpoint": (build_zip([Entry(b"model.pt", checkpoint(run))]), "archive in an archive"),
        "TorchScript members": (plus(Entry(b"model/constants.pkl", run)), "torchscript"),
        "TorchScript code": (plus(Entry(b"model/code/__torch__.py", b"x")), "torchscript"),
        "package members": (plus(Entry(b"model/.data/extern_modules", b"os")), "torch.package"),
        "big-endian": (swap(1, data=b"big"), "byteorder"),
        "byteorder of junk": (swap(1, data=b"little\x00"), "byteorder"),
        "version of junk": (swap(3, data=run), "version"),
        "no data.pkl": (build_zip(honest(GOOD)[1:]), "no data.pkl"),
        "no members": (build_zip([]), "no members"),
        "prepended program": (plus(prefix=b"\x7fELF" + bytes(60)), "program"),
        "prepended member": (plus(prefix=b"PK\x03\x04" + bytes(26)), "without gaps"),
        "prepended pickle": (plus(prefix=run), "pickle"),
        "trailing bytes": (plus(suffix=b"x"), "ends with its directory"),
        "trailing pickle": (plus(suffix=run), "ends with its directory"),
        "archive comment": (plus(comment=b"PK" * 40), "ends with its directory"),
        "archive in the comment": (plus(comment=inner), "fills the space|ends with"),
        "second archive behind": (inner + plus(Entry(b"model/x", b"")), "without gaps|directory"),
        "too many entries stated": (plus(count=9), "stated size|without comments"),
        "too few entries stated": (plus(count=2), "stated size"),
        "many disks": (plus(disk=1), "ends with its directory"),
        "directory elsewhere": (plus(shift=-4), "fills the space"),
        "zip64 with another count": (zip64(2), "agree"),
        "zip64 with another place": (zip64(4, start_shift=8), "agree"),
        "zip64 locator alone": (plus(record=struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)), "zip64"),
        "bytes before the end record": (plus(record=run), "fills the space"),
        "cut in the middle": (inner[: len(inner) // 2], "ends with its directory"),
        "cut by one byte": (inner[:-1], "ends with its directory"),
        "four bytes": (b"PK\x03\x04", "complete zip"),
    }
    return {name: ("model.pt", data, words) for name, (data, words) in cases.items()}


class Magic:
    """Delivers the magic number of legacy torch files through a call."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("0x1950a86a20f9469cfc6c",)


def legacy(value: Any) -> bytes:
    return saved(value, _use_new_zipfile_serialization=False)


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


def package() -> bytes:
    from torch.package import PackageExporter

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with PackageExporter(buffer) as exporter:
            exporter.save_text("resources", "note.txt", "hello")
    return buffer.getvalue()


def array(value: Any, archive: bool = False) -> bytes:
    buffer = io.BytesIO()
    if archive:
        np.savez(buffer, weight=value)
    else:
        np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


def tar(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("pickle")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def file_cases(marker: str) -> dict[str, tuple[str, bytes, str]]:
    """Files of other formats, or with other names than their content."""
    run = HEAD + mkdir(marker) + b"."
    old = f"cposix\nmkdir\n(S'{marker}'\ntR.".encode()
    weights = {"weight": torch.ones(2)}
    raw = {
        f"raw pickle of protocol {n}": ("model.pkl", pickle.dumps({"a": 1.0}, protocol=n), "pickle") for n in range(6)
    }
    return {
        **raw,
        "raw payload as .pt": ("model.pt", run, "pickle"),
        "raw payload as .bin": ("pytorch_model.bin", run, "pickle"),
        "raw payload without extension": ("model", run, "pickle"),
        "raw payload as .safetensors": ("model.safetensors", run, "pickle"),
        "raw payload as .npy": ("model.npy", run, "pickle"),
        "raw payload as .txt": ("notes.txt", old, "pickle"),
        "text payload of protocol 0": ("model.pkl", old, "pickle"),
        "payload behind junk": ("model.pkl", b"\xff\xff" + run, "pickle|unknown"),
        "legacy checkpoint": ("model.pt", legacy(weights), "legacy torch pickle"),
        "legacy magic through a call": ("model.pt", pickle.dumps(Magic(), protocol=2) + run, "pickle"),
        "legacy with a payload": ("model.pt", legacy(weights)[:14] + b"." + run, "legacy torch pickle"),
        "tar checkpoint": ("model.pt", tar(run), "tar archive"),
        "TorchScript": ("model.pt", torchscript(), "torchscript|archive"),
        "torch.package": ("model.pt", package(), "torch.package|archive"),
        "object array": ("model.npy", array(np.array([{"a": 1}], dtype=object)), "numpy object array"),
        "number array": ("model.npy", array(np.ones(2)), "numpy"),
        "numpy archive": ("model.npz", array(np.ones(2), archive=True), "directory|numpy archive|header"),
        "gzip": ("model.pt.gz", gzip.compress(plus()), "gzip"),
        "gzip as .pt": ("model.pt", gzip.compress(run), "gzip"),
        "bzip2": ("model.pt", bz2.compress(run), "bzip2"),
        "xz": ("model.pt", lzma.compress(run), "xz"),
        "7z": ("model.pt", b"7z\xbc\xaf\x27\x1c" + run, "7z archive"),
        "rar": ("model.pt", b"Rar!\x1a\x07" + run, "rar archive"),
        "hdf5": ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "hdf5"),
        "gguf": ("model.gguf", b"GGUF" + bytes(64), "gguf"),
        "program": ("model.pt", b"\x7fELF" + bytes(64), "program"),
        "script": ("model.pt", f"#!/bin/sh\nmkdir {marker}\n".encode(), "script"),
        "empty": ("model.pt", b"", "empty"),
        "one byte": ("model.pt", b"\x80", "unknown"),
        "text as .pt": ("model.pt", b"see the release page\n", "unknown"),
        "random bytes": ("model.pt", np.random.default_rng(0).bytes(512), "unknown"),
        "zip as .safetensors": ("model.safetensors", plus(), "content that"),
        "safetensors as .pt": ("model.pt", header_file({}, b""), "content that"),
        "quantised tensor": ("model.pt", _quantised(), "global|each element"),
        "sparse tensor": ("model.pt", saved({"w": torch.eye(2).to_sparse()}), "to_dense"),
        "whole module": ("model.pt", saved({"m": torch.nn.Linear(1, 1)}), "state_dict"),
        "numpy scalar": ("model.pt", saved({"loss": np.float64(1.0)}), "float\\(value\\)"),
        "tensor with attributes": ("model.pt", _with_attribute(), "detach"),
        "NaN": ("model.pt", saved({"w": torch.tensor([1.0, float("nan")])}), "finite values"),
        "infinity": ("model.pt", saved({"w": torch.tensor([1.0, -float("inf")])}), "finite values"),
        "complex NaN": ("model.pt", saved({"w": torch.tensor([complex(0, float("nan"))])}), "finite values"),
        "float8 NaN": ("model.pt", saved({"w": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}), "finite values"),
        "expanded giant of torch": ("model.pt", saved({"w": torch.zeros(1).expand(10**12)}), "each element once"),
        **{name: ("model.safetensors", *case) for name, case in header_cases().items()},
    }


def _quantised() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saved({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)})


def _with_attribute() -> bytes:
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.note = "x"
    return saved({"w": parameter})


def header_file(header: Any, data: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: Any = (2,), dtype: Any = "F32", offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header_cases() -> dict[str, tuple[bytes, str]]:
    """safetensors whose header lies."""
    two = bytes(8)
    one = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    pair = b"{" + one + b"," + one + b"}"
    twice = b"{" + one.replace(b'"shape"', b'"dtype":"F64","shape"') + b"}"
    nan = struct.pack("<2f", 1.0, float("nan"))
    return {
        "header past the end": (header_file({"a": entry()}, two, length=2**40), "unknown"),
        "header of 2^63": (header_file({"a": entry()}, two, length=2**63), "unknown"),
        "header that is no JSON": (header_file(b"{'a': 1}", b""), "JSON"),
        "header nested 100,000 deep": (header_file(b'{"a":' * 100_000, b""), "JSON"),
        "header with NaN": (header_file(b'{"a":NaN}', b""), "JSON"),
        "header of 10,000 digits": (header_file(b'{"a":' + b"9" * 10_000 + b"}", b""), "JSON"),
        "header that is no UTF-8": (header_file(b'{"\xff":1}', b""), "JSON"),
        "name twice": (header_file(pair, two), "JSON"),
        "field twice": (header_file(twice, two), "JSON"),
        "bytes that no tensor uses": (header_file({"a": entry()}, two + b"x"), "bytes that no tensor"),
        "data that is cut": (header_file({"a": entry()}, two[:4]), "cut"),
        "gap": (header_file({"a": entry(offsets=(4, 12))}, bytes(12)), "gap or overlap"),
        "overlap": (header_file({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "gap or overlap"),
        "offsets backwards": (header_file({"a": entry(offsets=(8, 0))}, two), "whole numbers"),
        "negative offset": (header_file({"a": entry(offsets=(-8, 0))}, two), "whole numbers"),
        "offset as a float": (header_file({"a": entry(offsets=(0, 8.0))}, two), "JSON"),
        "bool in a shape": (header_file({"a": entry(shape=(True, 2))}, two), "whole numbers"),
        "shape that needs more": (header_file({"a": entry(shape=(3,))}, two), "shape and dtype need"),
        "shape that overflows": (header_file({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}, b""), "2\\^60"),
        "shape of 65 dimensions": (header_file({"a": entry(shape=(1,) * 65, offsets=(0, 4))}, bytes(4)), "dimensions"),
        "unknown dtype": (header_file({"a": entry(dtype="PY")}, two), "dtype among"),
        "packed dtype": (header_file({"a": entry(dtype="F4", offsets=(0, 1))}, b"\0"), "dtype among"),
        "dtype of a list": (header_file({"a": entry(dtype=["F32"])}, two), "dtype among"),
        "field that is missing": (header_file({"a": {"dtype": "F32", "shape": [2]}}, two), "exactly"),
        "field too many": (header_file({"a": {**entry(), "code": "x"}}, two), "exactly"),
        "entry of a text": (header_file({"a": "x"}, two), "exactly"),
        "metadata of numbers": (header_file({"__metadata__": {"a": 1}}, b""), "metadata of texts"),
        "metadata of a list": (header_file({"__metadata__": []}, b""), "metadata of texts"),
        "name with NUL": (header_file({"a\0": entry()}, two), "control characters"),
        "name of a surrogate": (header_file(b'{"\\ud800":1}', b""), "exactly"),
        "NaN in safetensors": (header_file({"a": entry()}, nan), "finite values"),
        "bool of 2": (header_file({"a": entry(dtype="BOOL", offsets=(0, 2))}, b"\x01\x02"), "0 or 1"),
    }
