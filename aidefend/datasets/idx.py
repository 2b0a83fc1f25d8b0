"""The IDX format of the MNIST family: a four-byte magic number, big-endian sizes, then the array in C order."""

import gzip
import math
import os
import struct
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from aidefend.datasets.reading import (
    MAX_BYTES,
    Readable,
    check_file,
    check_limit,
    check_plausible,
    check_within,
    damage_refused,
    read_exactly,
    refused,
)

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_DIMENSIONS = 32
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: str | PathLike[str], *, max_bytes: int = MAX_BYTES) -> Tensor:
    """Read one IDX file, plain or gzip-packed (told apart by content, not by name).

    Guarantee: a hostile file costs at most `max_bytes` of memory (a second time while byte order is turned) plus one
        block, and is refused; nothing in it is executed. Checked before allocation: magic number, type, dimensions, and
        the announced size against the size of the file. Checked after: no byte is missing, none is left over, and the
        gzip checksum fits. Says nothing about the content.
    Args:
        path: A regular file.
        max_bytes: Largest unpacked array to accept, in bytes.
    Returns: Tensor of the announced shape; uint8, int8, int16, int32, float32 or float64 as the file says.
    Raises:
        ConfigurationError: the path is not a readable regular file.
        UnsafeArtifact: not an IDX file, truncated, over-long, damaged, or beyond `max_bytes`.
    Cost: one pass over the file.
    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "labels-idx1-ubyte")
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        ...     read_idx(path).tolist()
        [7, 2, 1]

    Source: LeCun, Cortes, Burges, "The MNIST database", section "File formats". Limited here to 32 dimensions.
    """
    check_limit(max_bytes)
    file = check_file(path)
    with damage_refused(str(file)), file.open("rb") as raw:
        packed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        size = os.fstat(raw.fileno()).st_size
        if not packed:
            return _read(raw, str(file), size, max_bytes, exact=True)
        with gzip.GzipFile(fileobj=raw) as stream:
            return _read(stream, str(file), size, max_bytes, exact=False)


def _read(stream: Readable, label: str, size: int, max_bytes: int, *, exact: bool) -> Tensor:
    dtype, shape = _read_header(stream, label)
    # Zeros do not excuse the other sizes: an empty array of 2**32 columns is hostile, not empty.
    check_within(math.prod(max(n, 1) for n in shape) * dtype.itemsize, label, max_bytes)
    announced = math.prod(shape) * dtype.itemsize
    header = 4 + 4 * len(shape)
    if exact and size != header + announced:
        raise refused(f"{header + announced} bytes as its header says, where the file has {size}", label)
    check_plausible(announced, size, label)
    data = read_exactly(stream, announced)
    if stream.read(1):
        raise refused(f"the file to end after the {announced} bytes that its header announces", label)
    array = np.ndarray(shape, dtype, buffer=data)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))


def _read_header(stream: Readable, label: str) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    zero, code, dimensions = struct.unpack(">HBB", read_exactly(stream, 4))
    if zero != 0 or code not in _DTYPES or not 1 <= dimensions <= _MAX_DIMENSIONS:
        found = f"0x{zero:04x}{code:02x}{dimensions:02x}"
        rule = (
            f"an IDX magic number (0x0000, a type of 08 09 0b 0c 0d 0e, 1 to {_MAX_DIMENSIONS} dimensions), not {found}"
        )
        raise refused(rule, label, "Pass an IDX file, plain or gzip-packed")
    return np.dtype(_DTYPES[code]), struct.unpack(f">{dimensions}I", read_exactly(stream, 4 * dimensions))
