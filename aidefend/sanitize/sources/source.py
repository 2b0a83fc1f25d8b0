"""One source of data: its name, its licence, and what its content hashed to when somebody looked at it."""

import dataclasses
import hashlib
import os
import types
import unicodedata
from collections.abc import Mapping
from typing import Any

from aidefend._core.checks import check_kind, check_path, refuse
from aidefend.sanitize.sources.digests import file_digest, is_digest, pairs_of, record_digest, records_digest

_LONGEST = 4096


@dataclasses.dataclass(frozen=True)
class Source:
    """What a source held when it was looked at.

    Args:
        name: One line without control characters, unique in a manifest.
        licence: SPDX name or address of its terms; "" where it is not known.
        sha256: Digest of the file, or of the list of record digests, in lower-case hex.
        records: Id to SHA-256 of each record; None where the source is known as a whole only.
        url: Where it came from; nothing is ever fetched.
    Raises: ConfigurationError: a malformed name, digest or record.
    Example:
        >>> source = Source.of("captions", {"a": "a cat", "b": "a dog"}, licence="CC-BY-4.0")
        >>> len(source.records), source.sha256 == Source.of("again", {"b": "a dog", "a": "a cat"}).sha256
        (2, True)
    """

    name: str
    licence: str
    sha256: str
    records: Mapping[str, str] | None = None
    url: str = ""

    def __post_init__(self) -> None:
        for field in ("name", "licence", "url"):
            check_line(getattr(self, field), field, empty=field != "name")
        if not is_digest(self.sha256):
            raise refuse("sha256 to be a SHA-256 in lower-case hex", "sha256", self.sha256, "Use Source.of(...)")
        if self.records is not None:
            check_kind(self.records, Mapping, "records", "Pass a dict from ids to SHA-256, or use Source.of(...)")
            for record_id, digest in self.records.items():
                if not isinstance(record_id, str) or not is_digest(digest):
                    raise refuse("a text and a SHA-256 in hex", "records", (record_id, digest), "Use Source.of(...)")
            object.__setattr__(self, "records", types.MappingProxyType(dict(sorted(self.records.items()))))

    def __reduce__(self) -> tuple[Any, ...]:
        records = None if self.records is None else dict(self.records)
        return type(self), (self.name, self.licence, self.sha256, records, self.url)

    @classmethod
    def of(cls, name: str, content: Any, *, licence: str = "", url: str = "") -> "Source":
        """The source as it is now.

        Args:
            name: Its name in the manifest.
            content: A path of a file; the bytes of one; or its records: a dict from ids to records, or an iterable of
                pairs (id, record). A record is bytes, text, an array or tensor, or plain values (dict, list, number).
            licence: SPDX name or address of its terms.
            url: Where it came from.
        Raises: ConfigurationError: content of another kind, an id that occurs twice. UnsafeArtifact: no regular file.
        """
        if isinstance(content, str | os.PathLike):
            return cls(name, licence, file_digest(check_path(content, "content")), None, url)
        if isinstance(content, bytes):
            return cls(name, licence, hashlib.sha256(content).hexdigest(), None, url)
        if not hasattr(content, "__iter__"):
            raise refuse("a path, bytes or records", "content", content, "Pass one of these")
        records: dict[str, str] = {}
        for record_id, record in pairs_of(content, "content"):
            if record_id in records:
                raise refuse("each record id once", "content", record_id, "Give every record an id of its own")
            records[record_id] = record_digest(record)
        return cls(name, licence, records_digest(records), records, url)

    def to_dict(self) -> dict[str, Any]:
        """The source as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "records": None if self.records is None else dict(self.records)}


def check_line(value: Any, name: str, *, empty: bool) -> str:
    """One line of text that shows what it holds."""
    shown = isinstance(value, str) and not any(unicodedata.category(letter)[0] == "C" for letter in value)
    if not shown or len(value) > _LONGEST or not (value or empty):
        rule = f"{name} to be a line of {0 if empty else 1} to {_LONGEST} visible characters"
        raise refuse(rule, name, value, "Remove control and invisible characters")
    return str(value)
