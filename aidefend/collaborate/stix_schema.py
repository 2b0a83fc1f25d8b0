"""The STIX objects that a partner's bundle may hold: their properties, and what each property may be."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from aidefend.collaborate import marking

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_KIND = re.compile(r"[a-z][a-z0-9-]{2,99}")
_LONGEST_TEXT = 20_000
_MOST_ITEMS = 100


class Problem(NamedTuple):
    """What was expected of which property, and what was found."""

    rule: str
    name: str
    value: Any


def is_identifier(value: object, kind: str | None = None) -> bool:
    """type--uuid, lower case; of one type if `kind` is given."""
    if not isinstance(value, str) or len(value) > 140:
        return False
    found, separator, number = value.partition("--")
    of_kind = bool(_KIND.fullmatch(found)) if kind is None else found == kind
    return of_kind and separator == "--" and bool(_UUID.fullmatch(number))


def check_object(item: Any) -> Problem | None:
    """The first thing that is wrong with an object, None if it is sound."""
    kind = item.get("type") if isinstance(item, dict) else None
    if not isinstance(kind, str) or kind not in _OWN:
        return Problem(f"types among {tuple(_OWN)}", "type", kind if isinstance(item, dict) else item)
    known = _EVERY | _OWN[kind]
    for name in sorted(item):
        if name not in known:
            return Problem(f"known properties of {kind}", "property", name)
        if not known[name](item[name]):
            return Problem(f"a well-formed {name}", name, item[name])
    missing = (_NEEDED | _NEEDED_BY.get(kind, set())) - set(item)
    if missing:
        return Problem(f"{kind} with {min(missing)}", "properties", ", ".join(sorted(item)))
    if not is_identifier(item["id"], kind):
        return Problem(f"an id of the form {kind}--uuid", "id", item["id"])
    if kind == "marking-definition" and not _is_known_marking(item):
        return Problem("a marking of the Traffic Light Protocol", "id", item["id"])
    return None


def _is_known_marking(item: dict[str, Any]) -> bool:
    level = next((name for name, known in marking.TLP.items() if known == item["id"]), None)
    return level is not None and item["definition"] == {"tlp": marking.older_name(level)}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_percentage(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 100


def _is_tlp_marking(value: object) -> bool:
    return value in marking.TLP.values()


def _is_reference(value: object) -> bool:
    if not isinstance(value, dict) or "source_name" not in value:
        return False
    allowed = {"source_name", "external_id", "url", "description"}
    return set(value) <= allowed and all(_is_text(text) for text in value.values())


def _is_tlp_definition(value: object) -> bool:
    return isinstance(value, dict) and set(value) == {"tlp"} and _is_text(value["tlp"])


def _exactly(text: str) -> Callable[[object], bool]:
    return lambda value: value == text


def _list_of(check: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and len(value) <= _MOST_ITEMS and all(map(check, value))


_Checks = dict[str, Callable[[Any], bool]]
_EVERY: _Checks = {
    "type": _is_text,
    "spec_version": _exactly("2.1"),
    "id": is_identifier,
    "created": marking.is_time,
    "modified": marking.is_time,
    "created_by_ref": lambda value: is_identifier(value, "identity"),
    "object_marking_refs": _list_of(_is_tlp_marking),
    "external_references": _list_of(_is_reference),
    "labels": _list_of(_is_text),
    "confidence": _is_percentage,
    "revoked": _is_flag,
    "lang": _is_text,
    "name": marking.is_name,
    "description": _is_text,
}
_OWN: Mapping[str, _Checks] = {
    "attack-pattern": {"aliases": _list_of(_is_text)},
    "course-of-action": {},
    "identity": {"identity_class": _is_text, "sectors": _list_of(_is_text), "roles": _list_of(_is_text)},
    "indicator": {
        "indicator_types": _list_of(_is_text),
        "pattern": _is_text,
        "pattern_type": _is_text,
        "pattern_version": _is_text,
        "valid_from": marking.is_time,
    },
    "marking-definition": {"definition_type": _exactly("tlp"), "definition": _is_tlp_definition},
    "note": {
        "abstract": _is_text,
        "content": _is_text,
        "authors": _list_of(_is_text),
        "object_refs": _list_of(is_identifier),
    },
    "relationship": {"relationship_type": _is_text, "source_ref": is_identifier, "target_ref": is_identifier},
}
_NEEDED = {"type", "spec_version", "id", "created"}
_NEEDED_BY = {
    "identity": {"name", "modified"},
    "indicator": {"modified", "pattern", "pattern_type", "valid_from"},
    "marking-definition": {"definition_type", "definition"},
}
