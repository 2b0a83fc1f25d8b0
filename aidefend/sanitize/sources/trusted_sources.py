"""The manifest: which sources are trusted, and what they held."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from aidefend._core.checks import check_callable, check_items, check_kind, check_path, refuse
from aidefend._core.errors import AidefendError, ConfigurationError
from aidefend._core.storage import canonical_json, pretty_json, write_atomic
from aidefend.sanitize.sources.croissant import read_croissant, write_croissant
from aidefend.sanitize.sources.digests import read_file, unsafe
from aidefend.sanitize.sources.source import Source
from aidefend.sanitize.sources.strict_json import fields_of, read_json

_SCHEMA = "aidefend.trusted-sources/1"
_DOMAIN = b"aidefend.trusted-sources.signature/1\0"
_LONGEST_SIGNATURE = 16_384

Verifier = Callable[[bytes, bytes], bool]


@dataclasses.dataclass(frozen=True)
class TrustedSources:
    """Sources that somebody looked at and trusts, each with the digest of what it held then.

    Guarantee: content that verifies against the manifest is, bit by bit, what was hashed when it was made (collision
        resistance of SHA-256). With a signature and a sound `verifier`, only the holder of the signing key made the
        manifest; without, whoever can write the manifest decides what is trusted. Nothing here shows that the content
        was free of poison when it was hashed, nor that a licence is what a source says.
    Args:
        sources: The sources, names unique.
        signature: By whoever vouches for them, or None; see `signed`.
    Raises: ConfigurationError: a name occurs twice.
    Example:
        >>> from aidefend.sanitize import verify_sources
        >>> manifest = TrustedSources(
        ...     [Source.of("captions", {"a": "a cat", "b": "a dog"}, licence="CC-BY-4.0")]
        ... )
        >>> report = verify_sources(manifest, {"captions": {"a": "a cat", "b": "a wolf"}})
        >>> report.keep.tolist(), report.reasons[1][0][:36]
        ([True, False], 'changed since the manifest was made:')
    """

    sources: tuple[Source, ...]
    signature: bytes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "sources", check_items(self.sources, Source, "sources", "Pass a list of Source.of(...)")
        )
        times = Counter(source.name for source in self.sources)
        if twice := sorted(name for name, count in times.items() if count > 1):
            raise refuse("each source name once", "sources", twice[:5], "Rename or join the sources")
        if self.signature is not None and not (
            isinstance(self.signature, bytes) and 0 < len(self.signature) <= _LONGEST_SIGNATURE
        ):
            raise refuse("signature to be bytes", "signature", self.signature, "Use signed(signer)")

    def __getitem__(self, name: str) -> Source:
        """The source of this name; KeyError if there is none."""
        source = self.get(name)
        if source is None:
            raise KeyError(name)
        return source

    def get(self, name: str) -> Source | None:
        """The source of this name, or None."""
        return next((source for source in self.sources if source.name == name), None)

    def __contains__(self, name: object) -> bool:
        return any(source.name == name for source in self.sources)

    @property
    def message(self) -> bytes:
        """What a signature is over: all sources, bound to this purpose."""
        return _DOMAIN + canonical_json([source.to_dict() for source in self._sorted()]).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of `message`."""
        return hashlib.sha256(self.message).hexdigest()

    def signed(self, signer: Callable[[bytes], bytes]) -> "TrustedSources":
        """This manifest with the signature `signer(message)`, such as `private_key.sign` of an Ed25519 key."""
        check_callable(signer, "signer", "Pass signer(message) -> bytes")
        try:
            signature = signer(self.message)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            raise refuse("a signer that signs bytes", "signer", found, "Pass signer(message) -> bytes") from error
        return dataclasses.replace(self, signature=signature)

    def check_signature(self, verifier: Verifier | None = None) -> None:
        """Raise `UnsafeArtifact` unless the manifest is signed and verified, or neither.

        Args:
            verifier: `verifier(message, signature)`; True, and nothing else, means that a key you trust made the
                signature. An exception means that it did not.
        """
        if verifier is not None:
            check_callable(verifier, "verifier", "Pass verifier(message, signature) -> bool")
        if self.signature is None and verifier is None:
            return
        if self.signature is None:
            raise unsafe("a signed manifest", "signature", None, "Get the signed one: a verifier was given")
        if verifier is None:
            cure = "Pass verifier=(message, signature) -> bool with a key that you trust"
            raise unsafe("a verifier for a signed manifest", "verifier", None, cure)
        try:
            verdict: object = verifier(self.message, self.signature)
        except Exception as error:
            cure = "Do not use the data; ask who signed the manifest"
            raise unsafe("a valid signature", "verifier", f"{type(error).__name__}: {error}", cure) from error
        if verdict is not True:
            cure = "Do not use the data; if the verifier raises instead, let it return True at its end"
            raise unsafe("a verifier that returns True", "verifier", verdict, cure)

    def read(self, name: str, path: str | os.PathLike[str], *, verifier: Verifier | None = None) -> bytes:
        """The bytes of a source's file, read once and verified: no gap between check and use.

        Raises: UnsafeArtifact: a bad signature, an unknown source, other content. Nothing is returned then.
        """
        self.check_signature(verifier)
        source = self.get(check_kind(name, str, "name", "Pass the name of a source"))
        if source is None:
            raise unsafe("a source of the manifest", "name", name, "Add it to the manifest if you trust it")
        data = read_file(check_path(path))
        found = hashlib.sha256(data).hexdigest()
        if found != source.sha256:
            raise unsafe(f"content with SHA-256 {source.sha256}", name, found, "The file is not the one hashed")
        return data

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest as JSON, whole or not at all."""
        signature = None if self.signature is None else self.signature.hex()
        body = {"schema": _SCHEMA, "sources": [source.to_dict() for source in self._sorted()]}
        write_atomic(path, pretty_json({**body, "digest": self.digest, "signature": signature}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TrustedSources":
        """The manifest back from `save`. The signature is checked where it is used, by `verify_sources` and `read`.

        Raises: UnsafeArtifact: a file of another kind, altered or hostile.
        """
        body = fields_of(
            read_json(check_path(path), "a manifest"), {"schema", "sources", "digest", "signature"}, "a manifest"
        )
        if body["schema"] != _SCHEMA or not isinstance(body["sources"], list):
            raise unsafe(f"schema {_SCHEMA}", "schema", body["schema"], "Use TrustedSources.save to write it")
        manifest = _built([_source(item) for item in body["sources"]], body["signature"])
        if manifest.digest != body["digest"]:
            raise unsafe(f"digest {manifest.digest}", "digest", body["digest"], "The manifest was changed")
        return manifest

    @classmethod
    def from_croissant(
        cls, path: str | os.PathLike[str], *, unverifiable: Literal["refuse", "skip"] = "refuse"
    ) -> "TrustedSources":
        """The files of a Croissant description (JSON-LD) as sources: every FileObject with its sha256.

        A file without a digest of its own inside an archive that has one is covered by the archive. Record digests and
        a signature are read where `to_croissant` wrote them. Nothing is fetched, no context is expanded: terms that a
        context turns into others are refused.

        Args:
            path: A JSON file.
            unverifiable: What to do with files and file sets that have no digest: "refuse", or "skip", which leaves
                them out of the manifest, so that they verify as unknown.
        Raises: UnsafeArtifact: no Croissant file, hostile or ambiguous content, nothing that can be verified.
        """
        sources, signature = read_croissant(check_path(path), unverifiable)
        return _built(sources, signature)

    def to_croissant(self, path: str | os.PathLike[str], *, name: str, description: str = "") -> None:
        """Write the sources as Croissant 1.0 (JSON-LD), whole or not at all; `from_croissant` gives them back.

        Files are FileObjects with sha256; sources that are lists of records are FileSets with their digests under
        "aidefend:", which other readers pass over.

        Args:
            path: Where to.
            name: Name of the data set.
            description: What it is, one line.
        """
        write_croissant(path, self._sorted(), name, description, self.signature)

    def _sorted(self) -> list[Source]:
        return sorted(self.sources, key=lambda source: source.name)


def _source(item: Any) -> Source:
    fields = fields_of(item, {"name", "licence", "sha256", "records", "url"}, "a source")
    try:
        return Source(**fields)
    except ConfigurationError as error:
        raise unsafe("a well-formed source", "source", str(error)[:200], "It was altered or is damaged") from error


def _built(sources: list[Source], signature: Any) -> TrustedSources:
    """A manifest out of a file: what is wrong with it is the file's fault, not the caller's."""
    try:
        made = None if signature is None else bytes.fromhex(signature)
        return TrustedSources(tuple(sources), made)
    except (AidefendError, TypeError, ValueError) as error:
        cure = "It was altered or is damaged"
        raise unsafe(
            "a manifest with unique names and a signature in hex", "manifest", str(error)[:200], cure
        ) from error
