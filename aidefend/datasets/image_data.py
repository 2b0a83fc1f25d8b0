"""What every loader here returns: images in [0, 1] with their labels, in two parts that never mix."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from aidefend._core.checks import (
    check_flag,
    check_items,
    check_kind,
    check_labels,
    check_not_empty,
    check_tensor,
    refuse,
)

PARTS = ("train_x", "train_y", "test_x", "test_y")
_MAX_CLASSES = 65_536


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Labelled images with a training and a test part.

    Guarantee: shapes, types and ranges are as stated here. `verified` says that the bytes are the known ones; without
        it the content is whatever the file holds, poison included.
    Args:
        train_x: (N, C, H, W) float32 in [0, 1], C = 1 or 3.
        train_y: (N,) int64, class indices.
        test_x: (M, C, H, W) float32 in [0, 1].
        test_y: (M,) int64, class indices.
        classes: The name of each class; `len(classes)` is the number of logits that a model needs.
        source: What the data is and how that is known, for evidence. Holds no folder of this machine.
        verified: The SHA-256 of the data is the one written in this package for this data set.
        path: The file or folder that it was read from.
    Raises: ConfigurationError: a part has the wrong shape, dtype or range, or no rows.
    Example:
        >>> from aidefend.datasets import mnist_subset
        >>> data = mnist_subset()
        >>> data
        ImageData(6000 train + 1000 test, images (1, 28, 28), 10 classes, verified)
        >>> x, y = next(iter(torch.utils.data.DataLoader(data.train, 32, generator=torch.Generator())))
        >>> tuple(x.shape), len(data.test)
        ((32, 1, 28, 28), 1000)
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    source: str
    verified: bool = False
    path: str = ""

    def __post_init__(self) -> None:
        """Check every part once; the views need no checks of their own."""
        check_flag(self.verified, "verified")
        check_kind(self.source, str, "source", "Say where the images come from")
        check_items(self.classes, str, "classes", "Pass the name of each class")
        for part in ("train", "test"):
            self._check_part(f"{part}_x", f"{part}_y")
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            found = f"train {tuple(self.train_x.shape[1:])}, test {tuple(self.test_x.shape[1:])}"
            raise refuse("images of one shape in both parts", "shapes", found, "Resize or pad the images")

    def _check_part(self, x_name: str, y_name: str) -> None:
        x, y = getattr(self, x_name), getattr(self, y_name)
        check_tensor(x, x_name, ndim=4)
        check_not_empty(x.numel(), x_name)
        if x.dtype != torch.float32 or x.shape[1] not in (1, 3) or float(x.min()) < 0 or float(x.max()) > 1:
            raise refuse(
                f"{x_name} to be (N, 1 or 3, H, W) float32 in [0, 1]", x_name, x, "Scale and convert the images"
            )
        check_labels(y, len(x), len(self.classes), y_name)
        if y.dtype != torch.int64:
            raise refuse(f"{y_name} to be int64", y_name, y, f"Convert it with {y_name}.long()")

    @property
    def train(self) -> TensorDataset:
        """The training part as a Dataset of (x, y) pairs; it shares memory with `train_x` and `train_y`."""
        return TensorDataset(self.train_x, self.train_y)

    @property
    def test(self) -> TensorDataset:
        """The test part as a Dataset of (x, y) pairs; it shares memory with `test_x` and `test_y`."""
        return TensorDataset(self.test_x, self.test_y)

    def __repr__(self) -> str:
        """One line: counts, shape, classes, and whether the content is known."""
        shape, state = tuple(self.train_x.shape[1:]), "verified" if self.verified else "not verified"
        rows = f"{len(self.train_x)} train + {len(self.test_x)} test"
        return f"ImageData({rows}, images {shape}, {len(self.classes)} classes, {state})"


def as_images(x: Tensor, name: str) -> Tensor:
    """Raw images as (N, C, H, W), still in their own dtype; the channel may come first, last, or not at all."""
    check_not_empty(len(x) if x.ndim else 0, name)
    if x.ndim == 3 and x.numel():
        return x.unsqueeze(1)
    if x.ndim == 4 and x.numel() and x.shape[1] in (1, 3):
        return x
    if x.ndim == 4 and x.numel() and x.shape[3] in (1, 3):
        return x.permute(0, 3, 1, 2).contiguous()
    raise refuse(f"{name} to be (N, H, W), (N, C, H, W) or (N, H, W, C), C 1 or 3", name, x, "Reshape the images")


def as_unit_range(x: Tensor, name: str) -> Tensor:
    """Raw images as float32 in [0, 1]: bytes are divided by 255 (0 and 255 become exactly 0 and 1), floats must fit."""
    if x.dtype == torch.uint8:
        return x.to(torch.float32).div_(255)
    if not x.is_floating_point():
        raise refuse(f"{name} to be uint8 in 0..255 or float in [0, 1]", name, x, "Convert the images to uint8")
    if not bool(((x >= 0) & (x <= 1)).all()):  # written so that NaN fails
        cure = "Divide by the largest possible value, or save the images as uint8"
        raise refuse(f"{name} to be uint8 in 0..255 or float in [0, 1]", name, "values outside [0, 1] or NaN", cure)
    return x.to(torch.float32)


def as_labels(y: Tensor, n: int, name: str) -> Tensor:
    """Raw labels as int64 class indices; fractions and truth values are refused, not rounded."""
    check_tensor(y, name, ndim=1, floating=False, rows=n)
    # Not every integer dtype knows min and max; a uint64 beyond int64 turns negative here and is refused as such.
    return check_labels(y if y.dtype == torch.bool else y.long(), n, _MAX_CLASSES, name)


def class_names(train_y: Tensor, test_y: Tensor, name: str) -> tuple[str, ...]:
    """The names "0", "1", ... up to the largest label."""
    count = 1 + max(int(train_y.max()), int(test_y.max()))
    if count < 2:
        raise refuse("labels of at least two classes", name, "one class", "Pass data with two or more classes")
    return tuple(map(str, range(count)))


def content_digest(arrays: Mapping[str, Tensor]) -> str:
    """SHA-256 over the four raw arrays with their shapes: the same for every file format that they may come in."""
    digest = hashlib.sha256()
    for part in PARTS:
        array = arrays[part].contiguous().numpy()
        array = array.astype("<i8") if part.endswith("_y") else array
        digest.update(f"{array.dtype.str}{list(array.shape)};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
