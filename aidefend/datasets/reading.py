"""Reading files that somebody else made: regular files only, and never more bytes than their header announces."""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Protocol

from aidefend._core.checks import check_int, refuse
from aidefend._core.errors import AidefendError, UnsafeArtifact

MAX_BYTES = 2**30
"""Unpacked size that the readers accept unless told otherwise: 1 GiB, twenty times MNIST."""

_DEFLATE_RATIO = 1032  # no deflate stream unpacks to more than this many bytes for each of its own (zlib, deflate.c)
_BLOCK = 2**20
# zipfile meets a broken directory with any of these: versions from the future, undecodable names, negative offsets.
_DAMAGE = (EOFError, OSError, RuntimeError, ValueError, OverflowError, struct.error, zlib.error, zipfile.BadZipFile)


class Readable(Protocol):
    """The one thing that a reader asks of an open file."""

    def read(self, count: int, /) -> bytes:
        """At most `count` bytes; none at the end."""


def check_path(path: object, name: str = "path") -> Path:
    """A path given by the caller, with `~` expanded where a home folder is known."""
    if not isinstance(path, str | PathLike) or isinstance(path, bytes):
        raise refuse(f"{name} to be a str or a Path", name, path, "Pass the path of a file or folder")
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no home folder, as in a container with a bare user id
        return Path(path)


def is_file(path: Path) -> bool:
    """A regular file (links followed); False where it cannot be seen at all."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """A folder (links followed); False where it cannot be seen at all."""
    try:
        return path.is_dir()
    except OSError:
        return False


def check_file(path: object) -> Path:
    """A path to a regular file. Pipes and devices are refused before they are opened: they could block or never end."""
    file = check_path(path)
    if not is_file(file):
        raise refuse("path to be a regular file", "path", str(path), "Check the spelling and the access rights")
    return file


def check_limit(max_bytes: object) -> int:
    """A limit on unpacked bytes, at least 1."""
    return check_int(max_bytes, "max_bytes", 1)


def refused(rule: str, label: str, cure: str = "Fetch the file again from its source") -> AidefendError:
    """The error for a file whose content breaks its format."""
    return refuse(rule, "path", label, cure, UnsafeArtifact)


@contextmanager
def damage_refused(label: str) -> Iterator[None]:
    """Turn what the unpackers say about a damaged file into one error that names the file."""
    try:
        yield
    except PermissionError as error:
        raise refuse("path to be readable", "path", label, "Give yourself the right to read it") from error
    except AidefendError:
        raise
    except _DAMAGE as error:
        what = str(error) or type(error).__name__
        raise refused(f"an undamaged file ({what.rstrip('.')})", label) from error


def check_within(announced: int, label: str, max_bytes: int) -> None:
    """Refuse an announced size beyond the caller's limit, before allocation."""
    if announced > max_bytes:
        cure = "Pass a larger max_bytes if you trust the file"
        raise refused(
            f"at most max_bytes={max_bytes} unpacked bytes, where the header announces {announced}", label, cure
        )


def check_plausible(announced: int, packed: int, label: str) -> None:
    """Refuse an announced size beyond what `packed` bytes of deflate can hold, before allocation."""
    if announced > packed * _DEFLATE_RATIO:
        raise refused(f"a header that {packed} packed bytes can fulfil, where it announces {announced}", label)


def read_exactly(stream: Readable, count: int) -> bytearray:
    """The next `count` bytes, in blocks, into memory that grows no further; EOFError if there are fewer."""
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        block = stream.read(min(_BLOCK, count - done))
        if not block:
            raise EOFError(f"it ends after {done} of {count} bytes")
        view[done : done + len(block)] = block
        done += len(block)
    return data
