"""The .npz format of numpy, read without pickle, without evaluating a header, without trust in announced sizes."""

import math
import re
import struct
import zipfile
from collections.abc import Sequence
from os import PathLike
from typing import IO

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_items
from aidefend.datasets.reading import (
    MAX_BYTES,
    check_file,
    check_limit,
    check_plausible,
    check_within,
    damage_refused,
    read_exactly,
    refused,
)

_MAX_HEADER = 10_000
_MAX_DIMENSIONS = 32
_HEADER = re.compile(
    r"\{\s*'descr':\s*(?P<descr>'[^']{1,16}'|\[.*\])\s*,\s*"
    r"'fortran_order':\s*(?P<fortran>True|False)\s*,\s*"
    r"'shape':\s*\((?P<shape>[\d,\s]*)\)\s*,?\s*\}\s*",
    re.ASCII | re.DOTALL,
)
_DTYPES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"))


def read_npz(
    path: str | PathLike[str], keys: Sequence[str] | None = None, *, max_bytes: int = MAX_BYTES
) -> dict[str, Tensor]:
    """Read numeric arrays from an .npz file.

    Guarantee: a hostile file costs at most `max_bytes` of memory (a second time for arrays that need reordering) plus
        its own directory, and is refused; nothing in it is unpickled or evaluated. Object, text and structured arrays
        are refused. Refused before allocation: encrypted or repeated members, packings other than stored and deflate,
        sizes that contradict each other. The zip checksum finds accidents only: whoever changes the file can change it
        too. Says nothing about the content.
    Args:
        path: A regular file.
        keys: Names of the arrays that must be there; others are left unread. None reads all.
        max_bytes: Largest unpacked size to accept, in bytes, over all arrays read.
    Returns: The arrays by name, in the order of `keys` (or of the file), in their own shapes and dtypes.
    Raises:
        ConfigurationError: the path is not a readable regular file, or `keys` is not a list of names.
        UnsafeArtifact: not an .npz file, a key is missing, damaged, or refused as above.
    Cost: one pass over the members read.
    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "small.npz")
        ...     np.savez_compressed(path, train_y=np.array([7, 2, 1]))
        ...     read_npz(path, ["train_y"])["train_y"].tolist()
        [7, 2, 1]

    Source: the NPY format specification, versions 1.0 and 2.0 (numpy.lib.format).
    """
    if keys is not None:
        keys = check_items(keys, str, "keys", 'Pass for example keys=["train_x", "train_y"]')
    check_limit(max_bytes)
    file = check_file(path)
    with damage_refused(str(file)), file.open("rb") as stream:
        return read_members(stream, str(file), keys, max_bytes)


def member_names(stream: IO[bytes], label: str) -> list[str]:
    """The names of the arrays in an open .npz file."""
    with zipfile.ZipFile(stream) as archive:
        return list(_members(archive, label))


def read_members(
    stream: IO[bytes], label: str, keys: Sequence[str] | None = None, max_bytes: int = MAX_BYTES
) -> dict[str, Tensor]:
    """The same as `read_npz` for an open file; the caller wraps it in `damage_refused`."""
    size = stream.seek(0, 2)
    with zipfile.ZipFile(stream) as archive:
        members = _members(archive, label)
        wanted = list(members) if keys is None else list(dict.fromkeys(keys))
        missing = [key for key in wanted if key not in members]
        if missing:
            present = ", ".join(list(members)[:20]) or "nothing"
            raise refused(
                f"arrays named {', '.join(missing)} (the file has {present})", label, "Pass a file that has them"
            )
        _check_sizes([members[key] for key in wanted], size, label, max_bytes)
        return {key: _read_member(archive, members[key], f"{label}[{key}]", max_bytes) for key in wanted}


def _members(archive: zipfile.ZipFile, label: str) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        key = info.filename.removesuffix(".npy")
        if key == info.filename or key in members:
            rule = f"only .npy members, each name once, where {info.filename!r} is not"
            raise refused(rule, label, "Save the arrays with numpy.savez_compressed")
        members[key] = info
    return members


def _check_sizes(members: Sequence[zipfile.ZipInfo], size: int, label: str, max_bytes: int) -> None:
    check_within(sum(info.file_size for info in members), label, max_bytes)
    for info in members:
        if info.flag_bits & 0x1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            rule = f"members that are stored or deflated and not encrypted, where {info.filename!r} is not"
            raise refused(rule, label, "Save the arrays with numpy.savez_compressed")
        check_plausible(info.file_size, min(info.compress_size, size), label)


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, label: str, max_bytes: int) -> Tensor:
    with archive.open(info) as stream:
        dtype, shape, fortran, header = _read_header(stream, label)
        announced = math.prod(shape) * dtype.itemsize
        # Zeros do not excuse the other sizes: an empty array of 2**40 columns is hostile, not empty.
        check_within(math.prod(max(n, 1) for n in shape) * dtype.itemsize, label, max_bytes)
        if header + announced != info.file_size:
            raise refused(f"{info.file_size - header} bytes of data, where shape {shape} needs {announced}", label)
        data = read_exactly(stream, announced)  # the last byte makes zipfile compare the checksum
    array = np.ndarray(shape, dtype, buffer=data, order="F" if fortran else "C")
    native = np.asarray(array.astype(dtype.newbyteorder("="), copy=False), order="C")
    return torch.from_numpy(native)


def _read_header(stream: IO[bytes], label: str) -> tuple[np.dtype[np.generic], tuple[int, ...], bool, int]:
    """Type, shape, Fortran order and the number of bytes that magic number and header take."""
    magic = bytes(read_exactly(stream, 8))
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(magic)
    if width is None:
        raise refused("an array in NPY format 1.0 or 2.0", label, "Save numeric arrays with numpy.savez_compressed")
    (length,) = struct.unpack("<H" if width == 2 else "<I", read_exactly(stream, width))
    if length > _MAX_HEADER:
        raise refused(f"an NPY header of at most {_MAX_HEADER} bytes, not {length}", label)
    match = _HEADER.fullmatch(read_exactly(stream, length).decode("latin-1"))
    if match is None:
        raise refused("an NPY header as numpy writes it", label)
    shape = tuple(int(n[:20]) for n in match["shape"].replace(",", " ").split())
    if len(shape) > _MAX_DIMENSIONS:
        raise refused(f"at most {_MAX_DIMENSIONS} dimensions, not {len(shape)}", label)
    return _numeric(match["descr"].strip("'"), label), shape, match["fortran"] == "True", 8 + width + length


def _numeric(descr: str, label: str) -> np.dtype[np.generic]:
    if descr[1:] not in _DTYPES or descr[0] not in "<>|=":
        rule = f"a plain numeric array, not dtype {descr[:40]!r}: object arrays need pickle, which can run code"
        raise refused(rule, label, "Save numbers only")
    return np.dtype(descr)
