"""Users' own copies of MNIST and Fashion-MNIST: found where people keep them, or loaded from a path."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor

from aidefend._core.checks import check_choice, check_items, check_labels, refuse
from aidefend.datasets.idx import read_idx
from aidefend.datasets.image_data import (
    PARTS,
    ImageData,
    as_images,
    as_labels,
    as_unit_range,
    class_names,
    content_digest,
)
from aidefend.datasets.npz import member_names, read_npz
from aidefend.datasets.published import PUBLISHED, DatasetName, Published, identify
from aidefend.datasets.reading import MAX_BYTES, check_limit, check_path, damage_refused, is_file, is_folder, refused

ENVIRONMENT_VARIABLE = "AIDEFEND_DATA"
_DEFAULT_ROOTS = ("data", "~/data", "~/.keras/datasets", "/usr/share/datasets")
_SPELLINGS = (PARTS, ("x_train", "y_train", "x_test", "y_test"))
_STEMS = {
    "train_x": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    "train_y": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
    "test_x": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
    "test_y": ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
}


@dataclass(frozen=True)
class Copy:
    """One data set on disk: an .npz file, or a folder with four IDX files."""

    place: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Raw:
    """One data set as read, before scaling; `actual` is the published set that it is to the byte, if any."""

    place: Path
    arrays: dict[str, Tensor]
    digest: str
    actual: DatasetName | None


def find(name: DatasetName, roots: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None) -> ImageData:
    """Find the user's own copy of a published data set and load it. Nothing is downloaded.

    In each root, in order: an .npz file (`mnist.npz`; arrays `train_x` .. or `x_train` ..), then folders with the four
    IDX files, plain or `.gz`: torchvision's `MNIST/raw` and `FashionMNIST/raw`, `mnist`, `fashion-mnist` (Debian's
    package dataset-fashion-mnist), the root itself.

    Guarantee: files are read as by `read_npz` and `read_idx`. `verified` is True only if the SHA-256 over all images
        and labels is that of the published set; another copy (a subset, a poisoned one) loads too, and says so in
        `source`. A copy of the other published set is never returned under this name. A damaged copy raises; it is
        not passed over.
    Args:
        name: "mnist" or "fashion-mnist".
        roots: Folders to search, and only these. None: those in the environment variable AIDEFEND_DATA (separated like
            PATH), then `data`, `~/data`, `~/.keras/datasets`, `/usr/share/datasets`.
    Returns: The data; `.path` says which copy it is.
    Raises:
        ConfigurationError: no copy found (the message names every place), or unknown name.
        UnsafeArtifact: a copy was found and its files are damaged or hostile.
    Cost: reads the copy once and hashes it once (under a second for the full set).
    Example:
        >>> find("mnist", roots="/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        aidefend._core.errors.ConfigurationError: Expected a copy of MNIST in one of the places looked at...
    """
    check_choice(name, tuple(PUBLISHED), "name")
    looked: list[str] = []
    for root in _search_roots(roots):
        for copy in _complete_copies(root, PUBLISHED[name], looked):
            raw = read_raw(copy)
            if raw.actual in (None, name):
                return _image_data(raw, PUBLISHED[name])
            looked.append(f"{copy.place}: {raw.actual}, not {name}")
    cure = f"{_listed(looked)}Put a copy in one of them, pass roots=, or set {ENVIRONMENT_VARIABLE}"
    raise refuse(f"a copy of {PUBLISHED[name].title} in one of the places looked at", "name", name, cure)


def load(path: str | PathLike[str], *, max_bytes: int = MAX_BYTES) -> ImageData:
    """Load labelled images from a path that the user names: an .npz file, or a folder that holds exactly one data set.

    Guarantee: as for `find`; data that is not a published set has `verified=False` and classes "0", "1", ...
    Args:
        path: An .npz file with `train_x, train_y, test_x, test_y` (or `x_train` ..): images (N, H, W), (N, C, H, W) or
            (N, H, W, C), uint8 or float in [0, 1]; labels (N,), integers from 0. Or a folder, searched like a root of
            `find`.
        max_bytes: Largest unpacked size to accept, in bytes, of the .npz arrays together or of each IDX file.
    Returns: The data.
    Raises:
        ConfigurationError: nothing there, several data sets there, or arrays of another shape, dtype or range.
        UnsafeArtifact: a damaged or hostile file.
    Cost: reads and hashes the data once; bytes take four times their memory as float32.
    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     x, y = np.zeros((4, 8, 8), dtype=np.uint8), np.arange(4)
        ...     np.savez(pathlib.Path(folder, "tiny.npz"), x_train=x, y_train=y, x_test=x, y_test=y)
        ...     load(pathlib.Path(folder, "tiny.npz"))
        ImageData(4 train + 4 test, images (1, 8, 8), 4 classes, not verified)
    """
    raw = read_raw(only_copy(path), check_limit(max_bytes))
    return _image_data(raw, PUBLISHED[raw.actual] if raw.actual else None)


def only_copy(path: str | PathLike[str]) -> Copy:
    """The one data set at a path that the user names."""
    place = check_path(path)
    if is_file(place):
        return Copy(place, (place,))
    if not is_folder(place):
        cure = 'Check the spelling; the published sets are found by name with find("mnist")'
        raise refuse("path to be an existing regular file or folder", "path", str(path), cure)
    looked: list[str] = []
    copies = list(_distinct(copy for known in PUBLISHED.values() for copy in _complete_copies(place, known, looked)))
    if not copies:
        cure = f"{_listed(looked)}Pass an .npz file or the folder of the IDX files"
        raise refuse("a folder that holds a data set", "path", str(path), cure)
    if len(copies) > 1:
        cure = "Pass one of them: " + ", ".join(str(copy.place) for copy in copies)
        raise refuse("a folder that holds one data set", "path", str(path), cure)
    return copies[0]


def _listed(looked: Sequence[str]) -> str:
    return "Looked at:\n" + "".join(f"  {line}\n" for line in dict.fromkeys(looked))


def _search_roots(roots: str | PathLike[str] | Sequence[str | PathLike[str]] | None) -> list[Path]:
    if roots is None:
        extra = [root for root in os.environ.get(ENVIRONMENT_VARIABLE, "").split(os.pathsep) if root]
        return [check_path(root, "roots") for root in [*extra, *_DEFAULT_ROOTS]]
    one = isinstance(roots, str | PathLike)
    given = (roots,) if one else check_items(roots, (str, PathLike), "roots", "Pass folders")
    if not given:
        raise refuse("at least one root", "roots", roots, "Pass folders, or None for the usual places")
    return [check_path(root, "roots") for root in given]


def _complete_copies(root: Path, known: Published, looked: list[str]) -> Iterator[Copy]:
    """The copies under one root, best first; what else was looked at is noted."""
    if not is_folder(root):
        looked.append(f"{root}: {'a file; pass it to load()' if is_file(root) else 'no such folder'}")
        return
    for archive in (root / archive for archive in known.archives):
        if is_file(archive):
            yield Copy(archive, (archive,))
    looked.append(f"{root}: none of {', '.join(known.archives)}")
    for folder in (root / folder for folder in known.folders):
        found = {part: _idx_file(folder, stems) for part, stems in _STEMS.items()}
        files = tuple(file for file in found.values() if file is not None)
        if len(files) == len(found):
            yield Copy(folder, files)
        else:
            missing = [_STEMS[part][0] for part, file in found.items() if file is None]
            looked.append(f"{folder}: {'no IDX files' if not files else 'incomplete, without ' + ', '.join(missing)}")


def _idx_file(folder: Path, stems: Sequence[str]) -> Path | None:
    names = (f"{stem}{suffix}" for stem in stems for suffix in ("", ".gz"))
    return next((folder / name for name in names if is_file(folder / name)), None)


def _distinct(copies: Iterator[Copy]) -> Iterator[Copy]:
    """Each set of files once, under whatever names it is reached (links, file systems that ignore case)."""
    seen = set()
    for copy in copies:
        identity = tuple((stat.st_dev, stat.st_ino) for stat in (file.stat() for file in copy.files))
        if identity not in seen:
            seen.add(identity)
            yield copy


def read_raw(copy: Copy, max_bytes: int = MAX_BYTES) -> Raw:
    """Read one copy: images (N, C, H, W) in their own dtype, labels int64, and which published set it is."""
    arrays = _read_arrays(copy.files, max_bytes)
    for part in ("train", "test"):
        x, y = f"{part}_x", f"{part}_y"
        arrays[x] = as_images(arrays[x], f"{copy.place}[{x}]")
        arrays[y] = as_labels(arrays[y], len(arrays[x]), f"{copy.place}[{y}]")
    digest = content_digest(arrays)
    return Raw(copy.place, arrays, digest, identify(digest))


def _read_arrays(files: Sequence[Path], max_bytes: int) -> dict[str, Tensor]:
    """The four arrays as they are, from one .npz file or from four IDX files in the order of `PARTS`."""
    if len(files) > 1:
        return {part: read_idx(file, max_bytes=max_bytes) for part, file in zip(PARTS, files, strict=True)}
    with damage_refused(str(files[0])), files[0].open("rb") as stream:
        if stream.read(2) != b"PK":
            raise refused("an .npz file", str(files[0]), "For IDX files, pass the folder that holds all four")
        names = set(member_names(stream, str(files[0])))
    for spelling in _SPELLINGS:
        if names.issuperset(spelling):
            arrays = read_npz(files[0], spelling, max_bytes=max_bytes)
            return {part: arrays[key] for part, key in zip(PARTS, spelling, strict=True)}
    spellings = " or ".join(", ".join(spelling) for spelling in _SPELLINGS)
    raise refused(f"an .npz file with arrays {spellings}", str(files[0]), "Save the four arrays under these names")


def _image_data(raw: Raw, known: Published | None) -> ImageData:
    place, arrays = raw.place, raw.arrays
    classes = known.classes if known else class_names(arrays["train_y"], arrays["test_y"], str(place))
    for part in ("train_y", "test_y"):
        check_labels(arrays[part], len(arrays[part]), len(classes), f"{place}[{part}]")
    known_as = (
        f"{known.title} as published" if known and raw.actual else f"{place.name}, not the published files of any set"
    )
    return ImageData(
        train_x=as_unit_range(arrays["train_x"], f"{place}[train_x]"),
        train_y=arrays["train_y"],
        test_x=as_unit_range(arrays["test_x"], f"{place}[test_x]"),
        test_y=arrays["test_y"],
        classes=classes,
        source=f"{known_as} (SHA-256 of images and labels {raw.digest})",
        verified=raw.actual is not None,
        path=str(place),
    )
