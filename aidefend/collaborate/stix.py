"""Evidence and indicators as STIX 2.1, and back from partners who may be hostile."""

import dataclasses
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from aidefend._core.checks import check_choice, refuse
from aidefend._core.errors import AidefendError, UnsafeArtifact
from aidefend._core.evidence import Evidence, Finding
from aidefend._core.storage import canonical_json
from aidefend.collaborate.indicators import Indicator

Tlp = Literal["clear", "green", "amber", "red"]
# The predefined marking definitions of the STIX 2.1 standard (section 7.2.1.4); "white" is the older name of "clear".
_TLP: Mapping[str, str] = {
    "clear": "marking-definition--613f2e26-407d-48c7-9eca-b8e91df99dc9",
    "green": "marking-definition--34098fce-860f-48ae-8e50-ebd3cc5e41da",
    "amber": "marking-definition--f88d31f6-486f-44da-b317-01333bde0b82",
    "red": "marking-definition--5e57c739-391a-4eb3-b6be-7d15ca92d5ed",
}
_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://aidefend.example/stix")
_FILE = re.compile(r"\[file:hashes\.'SHA-256' = '([0-9a-f]{64})'\]")
_ID = re.compile(r"[a-z][a-z0-9-]{2,249}--[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(?:\.\d{1,6})?Z")
_PATTERN_TYPE = "aidefend"
_LARGEST = 4 << 20
_MOST_OBJECTS = 20_000
_TYPES = ("attack-pattern", "course-of-action", "identity", "indicator", "marking-definition", "note", "relationship")
_KEYS = {
    "type", "spec_version", "id", "created", "modified", "created_by_ref", "name", "description", "indicator_types",
    "pattern", "pattern_type", "pattern_version", "valid_from", "object_marking_refs", "labels", "external_references",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shared:
    """What a bundle brought: indicators, its sharing limit (the strictest marking), and who made it."""

    indicators: tuple[Indicator, ...]
    tlp: str
    producer: str


def to_stix(
    evidence: Evidence,
    indicators: Iterable[Indicator] = (),
    *,
    tlp: Tlp = "amber",
    producer: str = "an aidefend user",
    created: str = "1970-01-01T00:00:00.000Z",
) -> dict[str, Any]:
    """A STIX 2.1 bundle: who says it, the findings as notes on ATLAS techniques, the indicators.

    Guarantee: equal arguments give an identical bundle, ids included. Samples, labels and settings of findings are not
        in it, only title, value, interval, n, threat and limits.
    Args:
        evidence: Findings; those with a mapping to "atlas" refer to the technique.
        indicators: Signs of attacks to share.
        tlp: How far the receiver may pass it on (Traffic Light Protocol).
        producer: Your organisation's name.
        created: Time stamp of all objects, RFC 3339 in UTC.
    Returns: The bundle as JSON types.
    Raises: ConfigurationError: unknown tlp, malformed time.
    Source: OASIS STIX 2.1 (2021). Own pattern type "aidefend" for samples and triggers, which STIX patterns cannot say.
    Example:
        >>> bundle = to_stix(Evidence(), [Indicator("artifact", "0" * 64)])
        >>> [item["type"] for item in bundle["objects"]]
        ['marking-definition', 'identity', 'indicator']
    """
    check_choice(tlp, tuple(_TLP), "tlp")
    if not _TIME.fullmatch(created):
        raise refuse("a time such as 2026-01-31T12:00:00.000Z", "created", created, "Use RFC 3339 in UTC")
    maker = _Maker(tlp, producer, created)
    objects = [maker.marking, maker.identity]
    techniques = {finding.mapping["atlas"] for finding in evidence.findings if "atlas" in finding.mapping}
    patterns = {technique: maker.technique(technique) for technique in sorted(techniques)}
    objects += patterns.values()
    objects += [maker.note(finding, patterns) for finding in evidence.findings]
    objects += [maker.indicator(indicator) for indicator in dict.fromkeys(indicators)]
    unique = {item["id"]: item for item in objects}
    return {"type": "bundle", "id": _identifier("bundle", list(unique)), "objects": list(unique.values())}


def from_stix(bundle: Mapping[str, Any] | str | bytes) -> Shared:
    """Read a partner's bundle as if it were hostile: all of it is sound, or none of it is used.

    Guarantee: nothing of the bundle is executed, stored or fetched; patterns are matched against two fixed forms, never
        evaluated.
    Args:
        bundle: JSON text (at most 4 MiB) or what json.loads returned.
    Returns: The indicators with sharing limit and producer.
    Raises: UnsafeArtifact: too large, repeated keys or ids, unknown types, properties or patterns, malformed values.
    Example:
        >>> from_stix(to_stix(Evidence(), [Indicator("artifact", "0" * 64)], tlp="green")).tlp
        'green'
    """
    objects = _objects(_parsed(bundle))
    try:
        found = [_indicator_of(item) for item in objects if item["type"] == "indicator"]
    except UnsafeArtifact:
        raise
    except (AidefendError, KeyError, TypeError, ValueError) as error:
        raise _hostile("well-formed indicators", "indicator", str(error)[:200]) from error
    names = [item.get("name", "") for item in objects if item["type"] == "identity"]
    order = list(_TLP)
    used = {ref for item in objects for ref in item.get("object_marking_refs", ())}
    strictest = max((order.index(name) for name, ref in _TLP.items() if ref in used), default=len(order) - 1)
    return Shared(tuple(dict.fromkeys(found)), order[strictest], names[0] if names else "")


class _Maker:
    """Makes objects that share producer, marking and time."""

    def __init__(self, tlp: str, producer: str, created: str) -> None:
        older = "white" if tlp == "clear" else tlp
        self.marking = {
            "type": "marking-definition",
            "spec_version": "2.1",
            "id": _TLP[tlp],
            "created": "2017-01-20T00:00:00.000Z",
            "definition_type": "tlp",
            "name": f"TLP:{older.upper()}",
            "definition": {"tlp": older},
        }
        self._common = {"spec_version": "2.1", "created": created, "modified": created}
        self._common |= {"object_marking_refs": [_TLP[tlp]]}
        self.identity = self._object("identity", name=producer, identity_class="organization")
        self._common |= {"created_by_ref": self.identity["id"]}

    def technique(self, technique: str) -> dict[str, Any]:
        """A technique of MITRE ATLAS."""
        reference = {"source_name": "mitre-atlas", "external_id": technique}
        return self._object("attack-pattern", name=technique, external_references=[reference])

    def note(self, finding: Finding, patterns: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """A finding in words."""
        about = patterns.get(finding.mapping.get("atlas", ""), self.identity)
        interval = "" if finding.low is None else f" ({finding.low} to {finding.high})"
        text = f"{finding.id}: {finding.value}{interval}, n = {finding.n}, {finding.status}. {finding.threat}"
        content = f"{text.strip()} {finding.limits}".strip()
        return self._object("note", abstract=finding.title, content=content, object_refs=[about["id"]])

    def indicator(self, indicator: Indicator) -> dict[str, Any]:
        """An indicator; a file digest as a STIX pattern, samples and triggers in a form of our own."""
        if indicator.kind == "artifact":
            pattern, kind = f"[file:hashes.'SHA-256' = '{indicator.digest}']", "stix"
        else:
            fields = {name: value for name, value in indicator.to_dict().items() if name != "title"}
            pattern, kind = canonical_json(fields), _PATTERN_TYPE
        return self._object(
            "indicator",
            name=indicator.title or indicator.kind,
            indicator_types=["malicious-activity"],
            pattern=pattern,
            pattern_type=kind,
            valid_from=self._common["created"],
        )

    def _object(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "id": _identifier(kind, [self._common, fields]), **self._common, **fields}


def _identifier(kind: str, content: Any) -> str:
    return f"{kind}--{uuid.uuid5(_SPACE, canonical_json([kind, content]))}"


def _parsed(bundle: Mapping[str, Any] | str | bytes) -> Any:
    try:
        text = bundle if isinstance(bundle, str | bytes) else json.dumps(bundle, allow_nan=False)
        if len(text) > _LARGEST:
            raise _hostile(f"at most {_LARGEST} bytes", "bundle", f"{len(text)} bytes")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnsafeArtifact:
        raise
    except (ValueError, TypeError, RecursionError, UnicodeDecodeError) as error:
        raise _hostile("strict JSON", "bundle", str(error)[:200]) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise _hostile("each key once", "bundle", "a repeated key")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise _hostile("finite numbers", "bundle", name)


def _objects(data: Any) -> list[dict[str, Any]]:
    if not isinstance(data, dict) or data.get("type") != "bundle" or not isinstance(data.get("objects"), list):
        raise _hostile("a STIX bundle with objects", "bundle", type(data).__name__)
    objects: list[Any] = data["objects"]
    if len(objects) > _MOST_OBJECTS:
        raise _hostile(f"at most {_MOST_OBJECTS} objects", "objects", len(objects))
    for item in objects:
        _check_object(item)
    if len({item["id"] for item in objects}) != len(objects):
        raise _hostile("each id once", "objects", "a repeated id")
    return objects


def _check_object(item: Any) -> None:
    if not isinstance(item, dict) or item.get("type") not in _TYPES:
        found = item.get("type") if isinstance(item, dict) else type(item).__name__
        raise _hostile(f"types among {_TYPES}", "type", found)
    identity = item.get("id")
    if not isinstance(identity, str) or not _ID.fullmatch(identity) or identity.split("--")[0] != item["type"]:
        raise _hostile("an id of the form type--uuid", "id", identity)
    if item.get("spec_version") != "2.1":
        raise _hostile("spec_version 2.1", "spec_version", item.get("spec_version"))
    name = item.get("name", "")
    if not isinstance(name, str) or len(name) > 256 or not (name + " ").isprintable():
        raise _hostile("a printable name", "name", name)
    marks = item.get("object_marking_refs", [])
    if not isinstance(marks, list) or not all(mark in _TLP.values() for mark in marks):
        raise _hostile("markings of the Traffic Light Protocol", "object_marking_refs", marks)


def _indicator_of(item: dict[str, Any]) -> Indicator:
    if unknown := sorted(set(item) - _KEYS):
        raise _hostile("known properties", "indicator", unknown)
    if not _TIME.fullmatch(str(item["valid_from"])):
        raise _hostile("a valid_from time", "valid_from", item["valid_from"])
    title = str(item.get("name", ""))[:200]
    pattern = item["pattern"]
    if item["pattern_type"] == "stix" and (match := _FILE.fullmatch(pattern)):
        return Indicator("artifact", match.group(1), title)
    if item["pattern_type"] == _PATTERN_TYPE:
        fields = json.loads(pattern, object_pairs_hook=_unique, parse_constant=_no_constant)
        if set(fields) - {"kind", "digest", "place", "shape"}:
            raise _hostile("kind, digest, place, shape", "pattern", sorted(fields))
        place, shape = fields.get("place"), fields.get("shape")
        return Indicator(fields["kind"], fields["digest"], title, place and tuple(place), shape and tuple(shape))
    raise _hostile("a SHA-256 file pattern or one of type aidefend", "pattern", str(pattern)[:100])


def _hostile(rule: str, name: str, value: object) -> AidefendError:
    return refuse(rule, name, value, "The whole bundle was refused: ask its sender", UnsafeArtifact)
