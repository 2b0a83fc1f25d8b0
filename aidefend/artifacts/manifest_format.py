"""The JSON form of a manifest, read strictly: one way to write each manifest, and no path that leaves its folder."""

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from aidefend._core.checks import check_items, refuse
from aidefend.artifacts.files import read_file, unsafe
from aidefend.artifacts.limits import Limits
from aidefend.artifacts.signatures import Signature

MANIFEST_NAME = "aidefend-manifest.json"
_SCHEMA = "aidefend.manifest/1"
_FIELDS = {"schema", "kind", "files", "excluded", "digest", "signature"}
_CURE = "Make it again with Manifest.of(path).save(...); it was altered or is damaged"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_PATH = 4096


class Listed(NamedTuple):
    """One file: path in the folder with /, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


class Parsed(NamedTuple):
    """The parts of a manifest file, each checked on its own."""

    kind: Literal["file", "folder"]
    files: tuple[Listed, ...]
    excluded: tuple[str, ...]
    digest: str
    signature: Signature | None


def parse_manifest(path: str | os.PathLike[str], limits: Limits) -> Parsed:
    """Read a manifest file; refuse everything that `Manifest.save` would not write."""
    raw = read_file(path, limits).data
    if len(raw) > limits.max_header_bytes:
        cure = "Raise Limits(max_header_bytes=...) if this is right"
        raise unsafe(f"a manifest of at most {limits.max_header_bytes} bytes", "size", len(raw), cure)
    body = _read_json(raw)
    if not isinstance(body, dict) or body.get("schema") != _SCHEMA or set(body) != _FIELDS:
        found = sorted(body) if isinstance(body, dict) else type(body).__name__
        raise unsafe(f"schema {_SCHEMA} with exactly {sorted(_FIELDS)}", "manifest", found, _CURE)
    kind, digest = body["kind"], body["digest"]
    if kind not in ("file", "folder") or not _is_digest(digest):
        raise unsafe("a kind and a digest", "manifest", (kind, digest), _CURE)
    files = _read_files(body["files"], kind, limits)
    return Parsed(kind, files, _read_excluded(body["excluded"], kind), digest, _read_signature(body["signature"]))


def check_paths(paths: Sequence[str]) -> None:
    """Paths that stay inside, can be written everywhere, and do not collide on any file system."""
    for path in paths:
        if problem := path_problem(path):
            raise unsafe("a plain relative path", "path", f"{path!r}: {problem}", "Rename the file")
    folded = Counter(unicodedata.normalize("NFC", path).casefold() for path in paths)
    if twice := [path for path, count in folded.items() if count > 1]:
        cure = "Rename one; they are one file on file systems that ignore case or accents' spelling"
        raise unsafe("paths that differ in more than case", "paths", twice[:3], cure)
    inner = set(paths)
    for path in paths:
        parts = path.split("/")
        if any("/".join(parts[:end]) in inner for end in range(1, len(parts))):
            raise unsafe("paths that are either file or folder", "path", path, _CURE)


def path_problem(path: str) -> str:
    """Why a path is not plain, or ""."""
    parts = path.split("/")
    if not path or len(path) > _MAX_PATH or any(part in ("", ".", "..") for part in parts):
        return "absolute, empty, or with . or .. parts"
    if "\\" in path or re.match(r"[A-Za-z]:", path):
        return "a separator or drive of another system"
    if any(unicodedata.category(character)[0] == "C" for character in path):
        return "control characters or bytes that are no text"
    return "" if unicodedata.normalize("NFC", path) == path else "not in the composed form (NFC)"


def _read_json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_refuse)
    except (ValueError, RecursionError) as error:
        raise unsafe("a manifest in JSON", "manifest", str(error)[:80], _CURE) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field occurs twice")
    return found


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:20]} is no whole number")


def _read_files(files: Any, kind: str, limits: Limits) -> tuple[Listed, ...]:
    if not isinstance(files, list) or not files or (kind == "file" and len(files) != 1):
        raise unsafe("a list of files", "files", files, _CURE)
    if len(files) > limits.max_members:
        cure = "Raise Limits(max_members=...) if this is right"
        raise unsafe(f"at most {limits.max_members} files", "files", len(files), cure)
    listed = tuple(_read_file(item) for item in files)
    paths = [item.path for item in listed]
    check_paths(paths)
    if paths != sorted(paths) or (kind == "file" and "/" in paths[0]):
        raise unsafe("files sorted by path", "files", paths[:5], _CURE)
    return listed


def _read_file(item: Any) -> Listed:
    if not isinstance(item, dict) or set(item) != {"path", "size", "sha256"}:
        raise unsafe("path, size and sha256 for each file", "file", item, _CURE)
    path, size, digest = item["path"], item["size"], item["sha256"]
    if not isinstance(path, str) or type(size) is not int or size < 0 or not _is_digest(digest):
        raise unsafe("a path, a size and a SHA-256 in lower case", "file", item, _CURE)
    return Listed(path, size, digest)


def _read_excluded(excluded: Any, kind: str) -> tuple[str, ...]:
    texts = isinstance(excluded, list) and all(isinstance(path, str) and not path_problem(path) for path in excluded)
    if not texts or excluded != sorted(set(excluded)) or (kind == "file" and excluded):
        raise unsafe("a sorted list of plain paths", "excluded", excluded, _CURE)
    return tuple(excluded)


def _read_signature(signature: Any) -> Signature | None:
    if signature is None:
        return None
    if not isinstance(signature, dict) or set(signature) != {"algorithm", "key_id", "value"}:
        raise unsafe("algorithm, key_id and value", "signature", signature, _CURE)
    texts = [signature[name] for name in ("algorithm", "key_id", "value")]
    patterns = {"ed25519": (r"[0-9a-f]{16}", r"[0-9a-f]{128}"), "hmac-sha256": ("", r"[0-9a-f]{64}")}
    if not all(isinstance(text, str) for text in texts) or texts[0] not in patterns:
        raise unsafe("algorithm ed25519 or hmac-sha256", "signature", signature, _CURE)
    if not all(re.fullmatch(pattern, text) for pattern, text in zip(patterns[texts[0]], texts[1:], strict=True)):
        raise unsafe("key_id and value in lower-case hex", "signature", signature, _CURE)
    return Signature(*texts)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def check_digests(digests: Any) -> frozenset[str]:
    """A set of SHA-256 digests in lower-case hex."""
    found = frozenset(check_items(digests, str, "deny", "Pass a set of SHA-256 digests such as {'9f86d0...'}"))
    if wrong := [digest for digest in found if not _is_digest(digest)]:
        raise refuse("SHA-256 digests in lower-case hex", "deny", wrong[0], "Pass for example {'9f86d0...'}")
    return found
