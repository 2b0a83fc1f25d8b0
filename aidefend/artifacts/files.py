"""Opening files once, without following links, and walking folders without leaving them."""

import dataclasses
import functools
import hashlib
import io
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from aidefend._core.checks import expected
from aidefend._core.errors import UnsafeArtifact
from aidefend.artifacts.limits import Limits


def _flags(*names: str) -> int:
    """Open flags by name; those that a system lacks (Windows has no O_NOFOLLOW) are left out."""
    return os.O_RDONLY | sum(getattr(os, name, 0) for name in names)


_FLAGS = _flags("O_BINARY", "O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_NOFOLLOW")
_ROOT_FLAGS = _flags("O_CLOEXEC", "O_DIRECTORY")
_FOLDER_FLAGS = _ROOT_FLAGS | _flags("O_NOFOLLOW")
_BLOCK = 2**20
_SHOWN_LETTERS = 120
_SHOWN_ITEMS = 6
_MAX_DEPTH = 32


@dataclasses.dataclass(frozen=True)
class Content:
    """The bytes of a file as they were read, once."""

    data: bytes

    @functools.cached_property
    def sha256(self) -> str:
        """The digest of these very bytes."""
        return hashlib.sha256(self.data).hexdigest()


class Entry(NamedTuple):
    """One file of a folder: its path in it (with /), and the problem that forbids reading it, or ""."""

    path: str
    problem: str


def unsafe(rule: str, name: str, value: object, cure: str) -> UnsafeArtifact:
    """The error of this room, in the form that all errors have."""
    return UnsafeArtifact(expected(rule, name, value if isinstance(value, Tensor) else _Shown(value), cure))


class _Shown:
    """The text of a value that a hostile file made: cut before it is written out, since it may never end."""

    def __init__(self, value: object) -> None:
        self.text = shorten(value)

    def __repr__(self) -> str:
        return self.text


def shorten(value: object, depth: int = 2) -> str:
    """A short text in bounded time, whatever the value holds and however it is nested."""
    if isinstance(value, str | bytes | bytearray):
        return repr(value[:_SHOWN_LETTERS])
    if isinstance(value, list | tuple | set | dict):
        if depth == 0 or len(value) == 0:
            return f"{type(value).__name__} of {len(value)}"
        inner = ", ".join(shorten(item, depth - 1) for item in itertools.islice(value, _SHOWN_ITEMS))
        more = ", ..." if len(value) > _SHOWN_ITEMS else ""
        return f"[{inner}{more}]" if isinstance(value, list) else f"({inner}{more})"
    return repr(value)[:_SHOWN_LETTERS]


def read_file(path: str | os.PathLike[str], limits: Limits) -> Content:
    """Read a regular file once; what is hashed is what is returned. Refuses links, devices, pipes and folders."""
    return _read(open_file(path, limits), limits)


def read_entry(folder: str | os.PathLike[str], path: str, limits: Limits) -> Content:
    """Read a file that `walk` found, again without following links on the way."""
    return _read(_open_entry(Path(folder), path, limits), limits)


def hash_entry(folder: str | os.PathLike[str], path: str, limits: Limits) -> tuple[int, str]:
    """Size and SHA-256 of a file that `walk` found, in blocks, so that its size does not matter."""
    return _hash(_open_entry(Path(folder), path, limits))


def hash_file(path: str | os.PathLike[str], limits: Limits) -> tuple[int, str]:
    """Size and SHA-256 of a regular file, in blocks."""
    return _hash(open_file(path, limits))


def open_file(path: str | os.PathLike[str], limits: Limits) -> int:
    """A descriptor of a regular file; a link is followed only inside the root."""
    given = Path(path)
    try:
        is_link = stat.S_ISLNK(given.lstat().st_mode)
        handle = _open_target(given, link_root(given, limits), limits) if is_link else os.open(given, _FLAGS)
    except (OSError, ValueError, RuntimeError) as error:
        raise unsafe("a file that can be opened", "path", str(path), f"{_words(error)}: check the path") from error
    return _regular(handle, given)


def _open_entry(folder: Path, path: str, limits: Limits) -> int:
    target = folder / path
    try:
        is_link = stat.S_ISLNK(target.lstat().st_mode)
        if is_link:
            handle = _open_target(target, link_root(folder, limits), limits)
        else:
            handle = _open_beneath(folder, tuple(path.split("/")))
    except (OSError, ValueError, RuntimeError) as error:
        raise unsafe("a file that can be opened", "path", path, f"{_words(error)}: check the folder") from error
    return _regular(handle, target)


def _regular(handle: int, path: Path) -> int:
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        os.close(handle)
        raise unsafe("a regular file", "path", f"{path} ({_kind(kind)})", "Pass the file itself")
    return handle


def _read(handle: int, limits: Limits) -> Content:
    with os.fdopen(handle, "rb", buffering=0) as file:
        size = os.fstat(handle).st_size
        if size > limits.max_file_bytes:
            cure = "Raise Limits(max_file_bytes=...) if this size is right"
            raise unsafe(f"a file of at most {limits.max_file_bytes} bytes", "size", size, cure)
        with io.BufferedReader(file) as reader:
            data = reader.read(size + 1)
    if len(data) != size:
        raise unsafe(f"a file of {size} bytes", "bytes read", len(data), "The file changed while it was read")
    return Content(data)


def _hash(handle: int) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with os.fdopen(handle, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def link_root(path: Path, limits: Limits) -> Path:
    """The folder that links may not leave."""
    if limits.root is not None:
        return Path(limits.root).resolve()
    return (path if path.is_dir() and not path.is_symlink() else path.parent).resolve()


def _open_target(link: Path, root: Path, limits: Limits) -> int:
    if limits.links == "refuse":
        cure = 'Pass the file that it points to, or Limits(links="within", root=folder) to follow links inside a folder'
        raise unsafe("a file, not a link", "path", str(link), cure)
    target = link.resolve(strict=True)
    if not target.is_relative_to(root):
        cure = 'Move the target inside, or name a wider folder with Limits(links="within", root=...)'
        raise unsafe(f"a link that stays within {root}", "path", f"{link} -> {target}", cure)
    return _open_beneath(root, target.relative_to(root).parts)


def _open_beneath(root: Path, parts: tuple[str, ...]) -> int:
    """Open root/part/part/... where no part may be a link: a swap after resolving cannot lead out of the root."""
    if os.open not in os.supports_dir_fd:
        return os.open(root.joinpath(*parts), _FLAGS)
    folder = os.open(root, _ROOT_FLAGS)
    try:
        for part in parts[:-1]:
            inner = os.open(part, _FOLDER_FLAGS, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(parts[-1] if parts else ".", _FLAGS, dir_fd=folder)
    finally:
        os.close(folder)


def walk(folder: str | os.PathLike[str], limits: Limits) -> list[Entry]:
    """Every file below a folder, sorted by path. Links to folders are never entered; nothing special is opened."""
    root = Path(folder)
    if root.is_symlink() and limits.links == "refuse":
        raise unsafe("a folder, not a link", "path", str(root), "Pass the folder that it points to")
    entries: list[Entry] = []
    try:
        for entry in _walk(root, "", 0, limits):
            entries.append(entry)
            if len(entries) > limits.max_members:
                cure = "Raise Limits(max_members=...) if this is right"
                raise unsafe(f"at most {limits.max_members} files", "path", str(root), cure)
    except OSError as error:
        raise unsafe("a folder that can be read", "path", str(root), _words(error)) from error
    return sorted(entries)


def _walk(folder: Path, prefix: str, depth: int, limits: Limits) -> Iterator[Entry]:
    if depth > _MAX_DEPTH:
        raise unsafe(f"folders at most {_MAX_DEPTH} deep", "path", str(folder), "Pass an inner folder")
    with os.scandir(folder) as items:
        found = [(item.name, item.stat(follow_symlinks=False).st_mode) for item in items]
    for name, mode in found:
        path = prefix + name
        if stat.S_ISDIR(mode):
            yield from _walk(folder / name, path + "/", depth + 1, limits)
        else:
            yield Entry(path, _problem(folder / name, mode, limits))


def _problem(path: Path, mode: int, limits: Limits) -> str:
    if stat.S_ISLNK(mode):
        if limits.links == "refuse":
            return 'a link; Limits(links="within") follows links that stay inside the folder'
        return "a link to a folder" if path.is_dir() else ""
    return "" if stat.S_ISREG(mode) else f"not a regular file ({_kind(mode)})"


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket", stat.S_ISLNK: "link"}
    return next((word for test, word in kinds.items() if test(mode)), "device")


def _words(error: Exception) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
