"""Croissant metadata (JSON-LD) in and out: files with their digests, read without expanding anything."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aidefend._core.checks import check_choice, refuse
from aidefend._core.errors import ConfigurationError, UnsafeArtifact
from aidefend._core.storage import pretty_json, write_atomic
from aidefend.sanitize.sources.digests import is_digest, unsafe
from aidefend.sanitize.sources.source import Source, check_line
from aidefend.sanitize.sources.strict_json import read_json

_CROISSANT = "http://mlcommons.org/croissant/"
_VERSIONS = tuple(
    f"{scheme}://mlcommons.org/croissant/{version}" for scheme in ("http", "https") for version in ("1.0", "1.1")
)
_SCHEMA_ORG = ("https://schema.org/", "http://schema.org/")
_PREFIXES = {
    "sc": _SCHEMA_ORG,
    "schema": _SCHEMA_ORG,
    "cr": (_CROISSANT, "https://mlcommons.org/croissant/"),
    "dct": ("http://purl.org/dc/terms/", "https://purl.org/dc/terms/"),
    "aidefend": ("urn:aidefend:",),
}
_EXPANDED = {iri: prefix for prefix, iris in _PREFIXES.items() for iri in iris}
_TERMS = {  # what is read here, and where each term may come from
    **dict.fromkeys(
        ("name", "license", "url", "distribution", "contentUrl", "containedIn", "sha256"), ("sc", "schema")
    ),
    **dict.fromkeys(("Dataset", "FileObject", "FileSet"), ("sc", "schema", "cr")),
    "conformsTo": ("dct",),
    "records": ("aidefend",),
    "digest": ("aidefend",),
    "origin": ("aidefend",),
    "signature": ("aidefend",),
}
_OWN = ("records", "digest", "origin", "signature")
_FORBIDDEN = ("@graph", "@included", "@reverse", "@nest", "@import", "@set", "@list")
_SCHEMES = ("http", "https", "hf", "s3", "gs", "az", "abfs", "abfss", "ftp", "ftps", "sftp", "git+https")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_MOST_FILES = 100_000
_CURE = "Do not use the file, or mend it; see the Croissant specification 1.0"
_CONTEXT_TERMS = (
    *("citeAs", "column", "data", "dataType", "examples", "extract", "field", "fileProperty", "fileObject", "fileSet"),
    *(
        "format",
        "includes",
        "isLiveDataset",
        "jsonPath",
        "key",
        "md5",
        "parentField",
        "path",
        "recordSet",
        "references",
    ),
    *(
        "equivalentProperty",
        "samplingRate",
        "regex",
        "repeated",
        "replace",
        "separator",
        "source",
        "subField",
        "transform",
    ),
)


def read_croissant(path: Path, unverifiable: str) -> tuple[list[Source], Any]:
    """The sources of a description, and its signature in hex or None."""
    check_choice(unverifiable, ("refuse", "skip"), "unverifiable")
    top = read_json(path, "a Croissant description")
    if not isinstance(top, dict):
        raise unsafe("a Croissant description", "path", type(top).__name__, _CURE)
    _check_context(top.get("@context"))
    fields = _fields({key: value for key, value in top.items() if key != "@context"})
    version = [text for value in _listed(fields.get("conformsTo")) if (text := _text_or_id(value))]
    if "Dataset" not in _types(fields) or not set(version) & set(_VERSIONS):
        raise unsafe("a sc:Dataset that conforms to Croissant 1.0 or 1.1", "conformsTo", version, _CURE)
    nodes = [_fields(node) for node in _listed(fields.get("distribution"))]
    if not 0 < len(nodes) <= _MOST_FILES:
        raise unsafe(f"1 to {_MOST_FILES} files", "distribution", len(nodes), _CURE)
    sources = list(_sources(nodes, _licence(fields), skip=unverifiable == "skip"))
    if not sources:
        raise unsafe("at least one file with a sha256", "distribution", f"{len(nodes)} without", _CURE)
    return sources, fields.get("signature")


def _sources(nodes: Sequence[dict[str, Any]], licence: str, *, skip: bool) -> Iterator[Source]:
    names = [_name(node) for node in nodes]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise unsafe("each @id once", "@id", twice[:5], _CURE)
    covered = {name for name, node in zip(names, nodes, strict=True) if is_digest(node.get("sha256"))}
    for name, node in zip(names, nodes, strict=True):
        if "sha256" in node and is_digest(node["sha256"]) and "FileObject" in _types(node):
            yield _source(name, node, licence, node["sha256"])
        elif "records" in node:
            yield _source(name, node, licence, node.get("digest"))
        elif not skip and not _containers(node) & covered:
            found = f"{name}: {str(node.get('sha256'))[:80]}"
            cure = 'Ask for digests, or pass unverifiable="skip" to leave it out of the manifest'
            raise unsafe("a sha256 of 64 lower-case hex digits for each file", "sha256", found, cure)


def _source(name: str, node: dict[str, Any], licence: str, digest: Any) -> Source:
    url = _url(node.get("origin", node.get("contentUrl", "")))
    try:
        return Source(name, _licence(node) if "license" in node else licence, digest, node.get("records"), url)
    except ConfigurationError as error:
        raise unsafe("a well-formed file", "distribution", f"{name}: {str(error)[:160]}", _CURE) from error


def _check_context(context: Any) -> None:
    """Refuse contexts that give the terms read here another meaning; a missing one means the standard terms."""
    for part in _listed(context):
        if isinstance(part, str):
            known = {*_SCHEMA_ORG, *(iri.rstrip("/") for iri in _SCHEMA_ORG), *_VERSIONS}
            if part not in known:
                raise unsafe("no foreign @context", "@context", part[:120], _CURE)
        elif isinstance(part, dict):
            for term, meaning in part.items():
                _check_term(term, meaning)
        else:
            raise unsafe("@context as an object or a known address", "@context", part, _CURE)


def _check_term(term: str, meaning: Any) -> None:
    iri = meaning.get("@id", term) if isinstance(meaning, dict) else meaning
    if term == "@vocab":
        allowed = iri in _SCHEMA_ORG
    elif term.startswith("@"):
        allowed = term in ("@language", "@base", "@version")
    elif term in _PREFIXES:
        allowed = iri in _PREFIXES[term]
    elif term in _TERMS or ":" in term or "/" in term:
        allowed = isinstance(iri, str) and _local(iri) == _local(term) is not None and _local(iri) in _TERMS
    else:  # a term of its own may not stand for one of ours
        allowed = isinstance(iri, str) and _local(iri) not in _TERMS
    nested = isinstance(meaning, dict) and set(meaning) - {"@id", "@type", "@container", "@language"}
    if not allowed or nested:
        raise unsafe("a @context that keeps the meaning of terms", "@context", {term: meaning}, _CURE)


def _local(key: str) -> str | None:
    """The term behind a key, whole, prefixed or expanded; None where it is no term that is read here."""
    for iri, prefix in _EXPANDED.items():
        if key.startswith(iri):
            key = f"{prefix}:{key[len(iri) :]}"
            break
    prefix, colon, local = key.rpartition(":")
    if not colon:
        return key if key in _TERMS and key not in _OWN else None
    return local if local in _TERMS and prefix in _TERMS[local] else None


def _fields(node: Any) -> dict[str, Any]:
    """A node's fields by plain term; two spellings of one term are refused, as are nodes that reach elsewhere."""
    if not isinstance(node, dict):
        raise unsafe("an object", "distribution", node, _CURE)
    found: dict[str, Any] = {}
    for key, value in node.items():
        if key in _FORBIDDEN or key == "@context":
            raise unsafe(f"no {key} in a description", "field", key, _CURE)
        term = key if key in ("@id", "@type") else _local(key)
        if term is not None:
            if term in found:
                raise unsafe("each term once", "field", key, _CURE)
            found[term] = value
    return found


def _types(node: dict[str, Any]) -> set[str]:
    kinds = _listed(node.get("@type"))
    return {term for kind in kinds if isinstance(kind, str) and (term := _local(kind)) is not None}


def _name(node: dict[str, Any]) -> str:
    name = node.get("@id", node.get("name"))
    if not _types(node) & {"FileObject", "FileSet"}:
        raise unsafe("a FileObject or FileSet", "@type", node.get("@type"), _CURE)
    return _line(name, "@id", empty=False)


def _line(value: Any, name: str, *, empty: bool) -> str:
    try:
        return check_line(value, name, empty=empty)
    except ConfigurationError as error:
        raise unsafe("a line of visible text", name, str(value)[:120], _CURE) from error


def _licence(node: dict[str, Any]) -> str:
    texts = [_text_or_id(value) for value in _listed(node.get("license"))]
    return _line(", ".join(text for text in texts if text), "license", empty=True)


def _text_or_id(value: Any) -> str:
    if isinstance(value, dict):
        value = next(
            (value[key] for key in ("@id", "@value", "url", "sc:url", "name", "sc:name") if key in value), None
        )
    if not isinstance(value, str):
        raise unsafe("a text or a reference", "field", value, _CURE)
    return value


def _containers(node: dict[str, Any]) -> set[str]:
    return {_text_or_id(value) for value in _listed(node.get("containedIn"))}


def _url(value: Any) -> str:
    """An address, or a relative path that stays where it is; nothing is fetched, but others may follow it."""
    text = _line(value, "contentUrl", empty=True)
    scheme = _SCHEME.match(text)
    if scheme is not None:
        if scheme[1].lower() not in _SCHEMES:
            raise unsafe(f"an address with a scheme among {_SCHEMES}", "contentUrl", text[:120], _CURE)
        return text
    if text.startswith("/") or "\\" in text or ".." in text.split("/"):
        raise unsafe("a relative path that does not leave its folder", "contentUrl", text[:120], _CURE)
    return text


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def write_croissant(
    path: str | os.PathLike[str], sources: Sequence[Source], name: str, description: str, signature: bytes | None
) -> None:
    """Write a description with one node for each source."""
    check_line(name, "name", empty=False)
    check_line(description, "description", empty=True)
    licences = sorted({source.licence for source in sources if source.licence})
    body: dict[str, Any] = {
        "@context": _context(),
        "@type": "sc:Dataset",
        "name": name,
        "description": description or name,
        "conformsTo": _VERSIONS[0],
        "license": licences,
        "distribution": [_node(source) for source in sources],
    }
    if signature is not None:
        body["aidefend:signature"] = signature.hex()
    write_atomic(path, pretty_json(body))


def _context() -> dict[str, Any]:
    terms: dict[str, Any] = {term: f"cr:{term}" for term in _CONTEXT_TERMS}
    terms |= {term: {"@id": f"cr:{term}", "@type": "@json"} for term in ("data", "examples")}
    terms["dataType"] = {"@id": "cr:dataType", "@type": "@vocab"}
    prefixes = {prefix: _PREFIXES[prefix][0] for prefix in ("cr", "sc", "dct", "aidefend")}
    prefixes["rai"] = f"{_CROISSANT}RAI/"
    return {"@language": "en", "@vocab": _SCHEMA_ORG[0], **terms, **prefixes, "conformsTo": "dct:conformsTo"}


def _node(source: Source) -> dict[str, Any]:
    node: dict[str, Any] = {"@id": source.name, "name": source.name, "license": source.licence}
    if source.records is None:
        node |= {"@type": "cr:FileObject", "encodingFormat": "application/octet-stream", "sha256": source.sha256}
    else:
        node |= {"@type": "cr:FileSet", "encodingFormat": "application/octet-stream", "includes": "*"}
        node |= {"aidefend:records": dict(source.records), "aidefend:digest": source.sha256}
    if not source.url:  # every file needs an address there
        return node | {"contentUrl": quote(source.name, safe=""), "aidefend:origin": ""}
    try:
        return node | {"contentUrl": _url(source.url)}
    except UnsafeArtifact as error:
        rule = "sources with addresses that may go into a Croissant file"
        raise refuse(rule, "url", source.url, "Give the source an address such as https://..., or none") from error
