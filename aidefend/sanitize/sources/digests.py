"""SHA-256 of files and of records, the same for equal content however it is held."""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from aidefend._core.checks import expected, refuse
from aidefend._core.errors import AidefendError, UnsafeArtifact
from aidefend._core.storage import canonical_json

SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 2**20
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def unsafe(rule: str, name: str, value: object, cure: str) -> UnsafeArtifact:
    """The error about content that is not what it should be."""
    return UnsafeArtifact(expected(rule, name, value, cure))


def is_digest(value: object) -> bool:
    """Whether this is a SHA-256 in lower-case hex."""
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def record_digest(record: Any) -> str:
    """Digest of one record: SHA-256 of bytes and of the UTF-8 of texts, as everybody computes it; SHA3-256 of the rest.

    Arrays and tensors count by dtype, shape and elements, all else (numbers, dicts, lists) as canonical JSON. The other
    hash keeps bytes that are written like the form of an array or a dict from passing for one.

    Raises: ConfigurationError: a record that has no such form.
    """
    try:
        if isinstance(record, bytes | bytearray | memoryview):
            return hashlib.sha256(record).hexdigest()
        if isinstance(record, str):
            return hashlib.sha256(record.encode("utf-8", "surrogatepass")).hexdigest()
        return hashlib.sha3_256(_form_of(record)).hexdigest()
    except AidefendError:
        raise
    except Exception as error:  # whatever a foreign object raises when it is read
        found, cure = f"{type(record).__name__} ({type(error).__name__})", "Pass bytes, text, an array or plain values"
        raise refuse("a record with content that can be read", "record", found, cure) from error


def _form_of(record: Any) -> bytes:
    if isinstance(record, Tensor):
        record = record.detach().cpu().numpy()
    if isinstance(record, np.ndarray | np.generic):
        array = np.ascontiguousarray(record)
        if array.dtype.hasobject:
            raise TypeError("an array of objects")
        plain = array.astype(array.dtype.newbyteorder("<"))
        return f"array {plain.dtype.str} {np.shape(record)}\0".encode() + plain.tobytes()
    if isinstance(record, Mapping | list | tuple | int | float) or record is None:
        return b"json\0" + canonical_json(_checked(record)).encode()
    raise TypeError("no known kind of record")


def _checked(value: Any) -> Any:
    """Plain values only: the text of any other object may hold its address."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys that are no texts")
        return {key: _checked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_checked(item) for item in value]
    if isinstance(value, bytes | Tensor | np.ndarray):
        return {"sha256": record_digest(value)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} inside")


def records_digest(records: Mapping[str, str]) -> str:
    """SHA-256 over the sorted ids and digests of a source's records."""
    return hashlib.sha256(canonical_json(dict(records)).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file, in blocks; a link is followed, since the content is what counts."""
    total = hashlib.sha256()
    for block in _blocks(path):
        total.update(block)
    return total.hexdigest()


def read_file(path: Path) -> bytes:
    """The bytes of a regular file, read once."""
    return b"".join(_blocks(path))


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        handle = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:
        raise unsafe("a file that can be opened", "path", str(path), f"{error}: check the path") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise unsafe("a regular file", "path", str(path), "Pass the file itself, not a folder, pipe or device")
    with os.fdopen(handle, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def pairs_of(records: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(id, record) of a mapping or of an iterable of pairs."""
    items: Iterable[Any] = records.items() if isinstance(records, Mapping) else records
    try:
        for item in items:
            if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[0], str):
                cure = "Pass a dict from ids to records, or pairs of an id (text) and its record"
                raise refuse("records as pairs (id, record)", name, item, cure)
            yield item[0], item[1]
    except AidefendError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise refuse("records that can be read", name, found, "Read them one by one to see the cause") from error
