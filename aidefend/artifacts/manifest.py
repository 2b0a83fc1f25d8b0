"""Manifests: which files, of which size, with which content; signed, so that their origin can be checked."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from aidefend._core.checks import refuse
from aidefend._core.storage import canonical_json, pretty_json, write_atomic
from aidefend.artifacts.files import hash_entry, hash_file, unsafe, walk
from aidefend.artifacts.limits import Limits
from aidefend.artifacts.loading import check_arguments
from aidefend.artifacts.manifest_format import MANIFEST_NAME, Listed, check_paths, parse_manifest, path_problem
from aidefend.artifacts.signatures import Signature, sign_bytes, verify_bytes

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of a model, by path, size and SHA-256.

    Guarantee: `verify` passes only if exactly these files are there, with exactly this content, as regular files that
        lie in the folder (collision resistance of SHA-256). With a signature and the trusted key, only the holder of
        the signing key can have listed them (unforgeability of Ed25519, or of HMAC-SHA256 among those who share the
        key). It says who, never that the content is harmless. A folder may change after `verify` returns: load with
        `safe_load(path, manifest=manifest, key=key)`, which compares the very bytes that it parses.
    Args:
        kind: "file" or "folder".
        files: Sorted by path.
        excluded: Paths in the folder that are not covered; by default the manifest's own place.
        signature: Who vouches for it, or None.
    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "weights.bin").write_bytes(b"weights")
        ...     manifest = Manifest.of(folder)
        ...     manifest.verify(folder)
        >>> [(item.path, item.size) for item in manifest.files]
        [('weights.bin', 7)]
    """

    kind: Literal["file", "folder"]
    files: tuple[Listed, ...]
    excluded: tuple[str, ...] = ()
    signature: Signature | None = None

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        *,
        limits: Limits | None = None,
        exclude: Iterable[str] = (MANIFEST_NAME,),
    ) -> "Manifest":
        """The manifest of a file, or of every file below a folder.

        Args:
            path: A file or a folder.
            limits: `links`, `root` and `max_members` are used; files of any size are hashed in blocks.
            exclude: Exact paths in the folder to leave out. The default lets the manifest live in the folder as
                "aidefend-manifest.json"; whatever stands there is not covered.
        Raises: UnsafeArtifact: a link (unless `Limits(links="within")`), a pipe or device, names that collide or do not
            travel, no file at all.
        Cost: One pass over all bytes.
        """
        limits = check_arguments(path, limits)
        place = Path(path)
        if not place.is_dir():
            size, digest = hash_file(place, limits)
            check_paths([place.name])
            return cls("file", (Listed(place.name, size, digest),))
        excluded = _check_exclude(exclude)
        listed = _hash_folder(place, excluded, limits)
        if not listed:
            raise unsafe("at least one file", "path", str(place), "Pass the folder that holds the model")
        return cls("folder", listed, excluded)

    @property
    def digest(self) -> str:
        """One SHA-256 over kind, paths, sizes, digests and exclusions: the name of the whole."""
        return hashlib.sha256(self._message()).hexdigest()

    def sign(self, key: Any) -> "Manifest":
        """This manifest with a signature.

        Args:
            key: An Ed25519 private key of `cryptography`, or at least 16 secret bytes for HMAC-SHA256.
        Raises: MissingExtra: `cryptography` is not installed. ConfigurationError: no key for signing.
        """
        return dataclasses.replace(self, signature=sign_bytes(self._message(), key))

    def verify(self, path: str | os.PathLike[str], key: Any = None, *, limits: Limits | None = None) -> None:
        """Refuse a file or folder that differs from this manifest in any way.

        Args:
            path: The file or folder.
            key: The trusted key: needed for a signed manifest, refused for an unsigned one.
            limits: As in `of`.
        Raises: UnsafeArtifact: no or wrong signature; changed, missing, extra, linked or escaping files.
        """
        limits = check_arguments(path, limits)
        self.check_signature(key)
        place = Path(path)
        if place.is_dir() != (self.kind == "folder"):
            raise unsafe(f"a {self.kind}, as in the manifest", "path", str(place), "Pass the path that was listed")
        if self.kind == "file":
            size, digest = hash_file(place, limits)
            self._compare(self.files[0], size, digest)
        else:
            self._compare_folder(place, limits)

    def check_signature(self, key: Any = None) -> None:
        """Refuse a manifest that is not signed by the trusted key; without a key only an unsigned one passes."""
        verify_bytes(self._message(), self.signature, key)

    def check_content(self, path: str | os.PathLike[str], size: int, sha256: str, key: Any = None) -> None:
        """Refuse content that is not what the manifest lists under the end of this path (the longest that fits)."""
        self.check_signature(key)
        parts = Path(os.path.abspath(path)).parts  # noqa: PTH100  # resolve() would follow links
        fitting = [item for item in self.files if parts[-len(PurePosixPath(item.path).parts) :] == _parts(item.path)]
        if not fitting:
            raise unsafe("a file that the manifest lists", "path", str(path), "Pass a file of the signed folder")
        self._compare(max(fitting, key=lambda item: len(_parts(item.path))), size, sha256)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomic(path, pretty_json({**self._body(), "digest": self.digest, "signature": self._signature()}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, limits: Limits | None = None) -> "Manifest":
        """Read it back; anything but the exact form is refused (unknown or doubled fields, paths that escape).

        The signature is not checked here: `verify` and `safe_load` check it against the key that you trust.
        """
        limits = check_arguments(path, limits)
        body = parse_manifest(path, limits)
        manifest = cls(body.kind, body.files, body.excluded, body.signature)
        if manifest.digest != body.digest:
            raise unsafe(f"digest {manifest.digest}", "digest", body.digest, "The manifest was changed; fetch it again")
        return manifest

    def _body(self) -> dict[str, Any]:
        files = [{"path": item.path, "size": item.size, "sha256": item.sha256} for item in self.files]
        return {"schema": "aidefend.manifest/1", "kind": self.kind, "files": files, "excluded": list(self.excluded)}

    def _message(self) -> bytes:
        return canonical_json(self._body()).encode()

    def _signature(self) -> dict[str, str] | None:
        return None if self.signature is None else dataclasses.asdict(self.signature)

    def _compare(self, listed: Listed, size: int, digest: str) -> None:
        if (listed.size, listed.sha256) != (size, digest):
            found = f"{size} bytes, SHA-256 {digest}"
            cure = "The file was changed after it was listed; fetch it again"
            raise unsafe(f"{listed.size} bytes, SHA-256 {listed.sha256}", listed.path, found, cure)

    def _compare_folder(self, place: Path, limits: Limits) -> None:
        found = {item.path: item for item in _hash_folder(place, self.excluded, limits)}
        listed = {item.path: item for item in self.files}
        problems = {
            "missing": sorted(set(listed) - set(found)),
            "extra": sorted(set(found) - set(listed)),
            "changed": sorted(path for path in set(found) & set(listed) if found[path] != listed[path]),
        }
        if any(problems.values()):
            parts = [f"{word}: {', '.join(paths[:_SHOWN])} ({len(paths)})" for word, paths in problems.items() if paths]
            raise unsafe("exactly the listed files", str(place), "; ".join(parts), "Fetch the folder again")


def _hash_folder(folder: Path, excluded: tuple[str, ...], limits: Limits) -> tuple[Listed, ...]:
    entries = walk(folder, limits)
    if refused := [entry for entry in entries if entry.problem]:
        entry = refused[0]
        raise unsafe("regular files inside the folder", "path", f"{entry.path}: {entry.problem}", "Remove or copy it")
    paths = [entry.path for entry in entries if entry.path not in excluded]
    check_paths(paths)
    return tuple(Listed(path, *hash_entry(folder, path, limits)) for path in sorted(paths))


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path).parts


def _check_exclude(paths: Any) -> tuple[str, ...]:
    listed = [paths] if isinstance(paths, str) or not isinstance(paths, Iterable) else list(paths)
    if wrong := [path for path in listed if not isinstance(path, str) or path_problem(path)]:
        raise refuse("exact relative paths with /", "exclude", wrong[0], "Pass for example ('notes/readme.md',)")
    return tuple(sorted(set(listed)))
