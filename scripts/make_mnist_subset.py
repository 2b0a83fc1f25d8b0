#!/usr/bin/env python3
"""Make the MNIST subset that ships with aidefend from the full set, or check the shipped file against it.

    python -m scripts.make_mnist_subset --source PATH            # write aidefend/datasets/mnist_subset.npz
    python -m scripts.make_mnist_subset --source PATH --check    # compare only; exit status 1 if they differ

PATH is a copy of the full MNIST: an .npz file, or the folder of its four IDX files. A copy whose SHA-256 is not that of
the published set is refused. The result depends on nothing else: rows are chosen by hash, not by a random number
generator, and the archive has fixed names, times and headers. Its bytes depend on the deflate implementation of the
Python at hand: with zlib they are those of the shipped file; with another one (zlib-ng, for example) only the arrays in
it are.
"""

import argparse
import hashlib
import io
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aidefend._core.checks import refuse
from aidefend._core.errors import AidefendError
from aidefend._core.storage import write_atomic
from aidefend.datasets.copies import only_copy, read_raw
from aidefend.datasets.mnist import SUBSET_FILE, SUBSET_SHA256
from aidefend.datasets.npz import read_npz

SEED = "aidefend mnist subset 1"
ROWS = {"train": 6_000, "test": 1_000}


def shares(labels: NDArray[np.integer], rows: int) -> list[int]:
    """How many rows each class gets: in proportion, by largest remainder (the smaller class index wins a tie)."""
    counts = np.bincount(labels)
    quotas = [rows * int(count) for count in counts]
    taken = [quota // len(labels) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda k: (-(quotas[k] % len(labels)), k))
    for k in by_remainder[: rows - sum(taken)]:
        taken[k] += 1
    return taken


def chosen_rows(labels: NDArray[np.integer], rows: int, part: str) -> list[int]:
    """Row numbers, in the order of the subset: within each class those with the smallest hashes, then all by hash."""
    rank = [hashlib.sha256(f"{SEED}/{part}/{i}".encode()).digest() for i in range(len(labels))]
    chosen: list[int] = []
    for k, share in enumerate(shares(labels, rows)):
        members = np.flatnonzero(labels == k).tolist()
        chosen += sorted(members, key=rank.__getitem__)[:share]
    return sorted(chosen, key=rank.__getitem__)


def subset(full: Mapping[str, NDArray[np.integer]]) -> dict[str, NDArray[np.integer]]:
    """The arrays of the subset, with the row numbers that they had in the full set."""
    arrays: dict[str, NDArray[np.integer]] = {}
    for part, rows in ROWS.items():
        index = np.array(chosen_rows(full[f"{part}_y"], rows, part))
        arrays[f"{part}_x"] = full[f"{part}_x"][index].astype(np.uint8)
        arrays[f"{part}_y"] = full[f"{part}_y"][index].astype(np.uint8)
        arrays[f"{part}_index"] = index.astype(np.uint16)
    return arrays


def npy(array: NDArray[np.integer]) -> bytes:
    """The array in NPY format 1.0. Written out here because the padding of numpy's own headers differs by version."""
    dtype = array.dtype.newbyteorder("<")
    header = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}"
    header += " " * (-(10 + len(header) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + array.astype(dtype).tobytes()


def pack(arrays: Mapping[str, NDArray[np.integer]]) -> bytes:
    """The .npz file: members in the given order, fixed times and attributes, deflate level 9."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, npy(array), zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def full_mnist(source: Path) -> dict[str, NDArray[np.integer]]:
    """The published MNIST, (N, 28, 28) and (N,), or an error."""
    raw = read_raw(only_copy(source))
    if raw.actual != "mnist":
        found = f"SHA-256 of images and labels {raw.digest}"
        raise refuse("--source to be MNIST as published", "--source", found, "Pass an unchanged copy of the full set")
    return {
        name: array.numpy().reshape(len(array), 28, 28) if name.endswith("_x") else array.numpy()
        for name, array in raw.arrays.items()
    }


def check(packed: bytes, arrays: Mapping[str, NDArray[np.integer]]) -> tuple[bool, str]:
    """Compare a rebuilt subset with the shipped file: bytes first, then arrays."""
    if SUBSET_FILE.read_bytes() == packed and hashlib.sha256(packed).hexdigest() == SUBSET_SHA256:
        return True, "identical to the byte"
    shipped = read_npz(SUBSET_FILE)
    if list(shipped) == list(arrays) and all(np.array_equal(shipped[name].numpy(), arrays[name]) for name in arrays):
        return True, "the arrays are identical, the bytes are not (another deflate implementation packed them)"
    return False, "the shipped file does not hold the rebuilt arrays"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--source", type=Path, required=True, help="the full MNIST: an .npz file or a folder of IDX files"
    )
    parser.add_argument(
        "--output", type=Path, default=SUBSET_FILE, help="file to write (default: the one in the package)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the shipped file")
    options = parser.parse_args(arguments)
    try:
        arrays = subset(full_mnist(options.source))
        packed = pack(arrays)
        if options.check:
            same, verdict = check(packed, arrays)
            sys.stdout.write(f"{verdict}\n")
            return 0 if same else 1
        write_atomic(options.output, packed)
    except AidefendError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    digest = hashlib.sha256(packed).hexdigest()
    sys.stdout.write(f"{options.output}: {len(packed)} bytes, SHA-256 {digest}\n")
    if digest != SUBSET_SHA256:
        sys.stdout.write("Put this digest into SUBSET_SHA256 in aidefend/datasets/mnist.py\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
