"""Indicators out of a partner's STIX bundle, read as if the partner were hostile."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from aidefend._core.checks import check_kind, refuse
from aidefend._core.errors import AidefendError, UnsafeArtifact
from aidefend.collaborate import marking
from aidefend.collaborate.indicators import Indicator
from aidefend.collaborate.marking import Tlp
from aidefend.collaborate.stix_schema import check_object, is_identifier

_DEEPEST = 6
_LONGEST_PATTERN = 1000
_FILE = re.compile(re.escape(marking.FILE_PATTERN).replace(r"\{\}", "([0-9a-f]{64})"))


@dataclasses.dataclass(frozen=True)
class Shared:
    """What a bundle brought.

    Args:
        indicators: Each once, in the order of the bundle, without revoked ones.
        tlp: Sharing limit of the whole: the strictest marking; "red" where an indicator has none.
        producer: Name that the bundle gives itself; a claim, nothing proves it.
    """

    indicators: tuple[Indicator, ...]
    tlp: Tlp
    producer: str


def from_stix(bundle: Mapping[str, Any] | str | bytes) -> Shared:
    """Read a partner's bundle as if it were hostile: all of it is sound, or none of it is used.

    Guarantee: nothing of the bundle is executed, stored or fetched; patterns are matched against two fixed forms, never
        evaluated. Nothing proves who wrote the bundle, or that its indicators are signs of attacks: check the signature
        of the file in which it came, and give `apply_indicators` a reference.
    Args:
        bundle: JSON text or bytes (at most 4 MiB), or what json.loads returned.
    Returns: The indicators with sharing limit and producer.
    Raises: UnsafeArtifact: too large or deep, repeated keys or ids, unknown types, properties, patterns or markings,
        malformed values, indicators of several producers. No other error.
    Example:
        >>> from aidefend import Evidence
        >>> from aidefend.collaborate import to_stix
        >>> from_stix(to_stix(Evidence(), [Indicator("artifact", "0" * 64)], tlp="green")).tlp
        'green'
    """
    try:
        return _read(_objects(_parsed(bundle)))
    except UnsafeArtifact:
        raise
    except (AidefendError, KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise _hostile("a well-formed bundle", "bundle", f"{type(error).__name__}: {str(error)[:200]}") from error


def _read(objects: list[dict[str, Any]]) -> Shared:
    indicators = [item for item in objects if item["type"] == "indicator" and not item.get("revoked", False)]
    found = tuple(dict.fromkeys(_indicator_of(item) for item in indicators))
    return Shared(found, _strictest(objects, indicators), _producer(objects, indicators))


def _strictest(objects: list[dict[str, Any]], indicators: list[dict[str, Any]]) -> Tlp:
    order: list[Tlp] = ["clear", "green", "amber", "red"]
    level = {marking.TLP[name]: place for place, name in enumerate(order)}
    used = [level[ref] for item in objects for ref in item.get("object_marking_refs", ())]
    unmarked = not used or any(not item.get("object_marking_refs") for item in indicators)
    return "red" if unmarked else order[max(used)]


def _producer(objects: list[dict[str, Any]], indicators: list[dict[str, Any]]) -> str:
    names: dict[str, str] = {item["id"]: item["name"] for item in objects if item["type"] == "identity"}
    makers: set[str] = {item.get("created_by_ref", "") for item in indicators} or set(names)
    if len(makers) > 1:
        raise _hostile("one producer", "created_by_ref", f"{len(makers)} producers")
    return names.get(next(iter(makers), ""), "")


def _parsed(bundle: Any) -> Any:
    if not isinstance(bundle, str | bytes):
        check_kind(bundle, Mapping, "bundle", "Pass the bundle as a dict or as JSON text")
        bundle = json.dumps(dict(bundle), allow_nan=False)
    if len(bundle) > marking.LARGEST:
        raise _hostile(f"at most {marking.LARGEST} bytes", "bundle", f"{len(bundle)} bytes")
    return _strict_json(bundle)


def _strict_json(text: str | bytes) -> Any:
    """JSON without repeated keys, without NaN and infinity, however they are written."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _hostile("each key once", "bundle", "a repeated key")
    return found


def _no_constant(name: str) -> Any:
    raise _hostile("finite numbers", "bundle", name)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _hostile("finite numbers", "bundle", text[:100])
    return value


def _objects(data: Any) -> list[dict[str, Any]]:
    if not isinstance(data, dict) or set(data) != {"type", "id", "objects"} or data["type"] != "bundle":
        raise _hostile("a STIX bundle with type, id and objects", "bundle", type(data).__name__)
    if not is_identifier(data["id"], "bundle"):
        raise _hostile("an id of the form bundle--uuid", "id", _short(data["id"]))
    objects = data["objects"]
    if not isinstance(objects, list) or len(objects) > marking.MOST_OBJECTS:
        found = len(objects) if isinstance(objects, list) else type(objects).__name__
        raise _hostile(f"a list of at most {marking.MOST_OBJECTS} objects", "objects", found)
    _check_depth(objects)
    for item in objects:
        if problem := check_object(item):
            raise _hostile(problem.rule, problem.name, _short(problem.value))
    if len({item["id"] for item in objects}) != len(objects):
        raise _hostile("each id once", "objects", "a repeated id")
    return objects


def _check_depth(data: Any) -> None:
    """Everything that follows may recurse."""
    level = [data]
    for _ in range(_DEEPEST):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _children(outer)]
    if level:
        raise _hostile(f"at most {_DEEPEST} levels", "objects", "deeper nesting")


def _children(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _indicator_of(item: dict[str, Any]) -> Indicator:
    title, pattern, kind = item.get("name", "")[:200], item["pattern"], item["pattern_type"]
    if len(pattern) > _LONGEST_PATTERN:
        raise _hostile(f"a pattern of at most {_LONGEST_PATTERN} characters", "pattern", f"{len(pattern)} characters")
    if kind == "stix" and (match := _FILE.fullmatch(pattern)):
        return Indicator("artifact", match.group(1), title)
    if kind != marking.PATTERN_TYPE:
        raise _hostile("a SHA-256 file pattern or one of type aidefend", "pattern", _short(pattern))
    fields = _strict_json(pattern)
    place = fields.get("place") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or fields != _known(fields) or not isinstance(fields["shape"], list):
        raise _hostile("kind, digest, shape, and place for a trigger", "pattern", _short(pattern))
    return Indicator(fields["kind"], fields["digest"], title, place and tuple(place), tuple(fields["shape"]))


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that a pattern of this kind must have."""
    names = ("kind", "digest", "shape", "place") if fields["kind"] == "trigger" else ("kind", "digest", "shape")
    return {name: fields[name] for name in names}


def _short(value: Any) -> str:
    return value[:100] if isinstance(value, str) else type(value).__name__


def _hostile(rule: str, name: str, value: object) -> AidefendError:
    return refuse(rule, name, value, "The whole bundle was refused: ask its sender", UnsafeArtifact)
