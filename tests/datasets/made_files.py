"""Files for the tests of `aidefend.datasets`, written from the format descriptions and not with the code under test."""

import gzip
import struct
from pathlib import Path

import numpy as np

IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
IDX_NAMES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}
KERAS_NAMES = {"train_x": "x_train", "train_y": "y_train", "test_x": "x_test", "test_y": "y_test"}


def idx_bytes(array):
    """An array as an IDX file."""
    head = bytes([0, 0, IDX_CODES[array.dtype.str[1:]], array.ndim])
    sizes = b"".join(struct.pack(">I", n) for n in array.shape)
    return head + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def small_set(rows=12, classes=10, side=5):
    """A data set with every grey value from 0 to 255 somewhere; labels cycle through the classes."""
    grey = (np.arange(2 * rows * side * side) * 7 % 256).astype(np.uint8).reshape(2, rows, side, side)
    labels = (np.arange(rows) % classes).astype(np.uint8)
    return {"train_x": grey[0], "train_y": labels, "test_x": grey[1], "test_y": labels[::-1].copy()}


def write_idx_set(folder, arrays, suffix="", dotted=False):
    """The four IDX files; `suffix` ".gz" packs them, `dotted` gives them the other common names."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in IDX_NAMES.items():
        name = name.replace("-idx", ".idx") if dotted else name
        data = idx_bytes(arrays[part])
        Path(folder, name + suffix).write_bytes(gzip.compress(data) if suffix else data)


def write_npz_set(path, arrays, names=None):
    """One .npz file; `names` gives the arrays other names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{(names or {}).get(part, part): array for part, array in arrays.items()})
