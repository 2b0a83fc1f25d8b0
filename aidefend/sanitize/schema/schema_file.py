"""The JSON form of a schema: written whole or not at all, read strictly."""

import base64
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from aidefend._core.checks import check_path, expected
from aidefend._core.errors import ConfigurationError
from aidefend._core.storage import canonical_json, unique_fields, write_atomic
from aidefend.sanitize.schema.columns import KINDS
from aidefend.sanitize.schema.facts import Expectation
from aidefend.sanitize.schema.profile import ColumnProfile, Profile, Sizes, Values
from aidefend.sanitize.schema.row_records import RowHashes, RowSample

_SCHEMA = "aidefend.dataset-schema/1"
_LARGEST = 2**30
_CURE = "It was altered or is damaged: infer the schema again and save it"
Parts = tuple[Profile, float, dict[str, Expectation]]


def save_schema(
    path: str | os.PathLike[str], profile: Profile, alpha: float, expectations: Mapping[str, Expectation]
) -> None:
    """Write the schema with a digest over all of it."""
    body = _body(profile, alpha, expectations)
    write_atomic(path, canonical_json({**body, "digest": _digest(body)}) + "\n")


def schema_digest(profile: Profile, alpha: float, expectations: Mapping[str, Expectation]) -> str:
    """SHA-256 of what `save_schema` writes."""
    return _digest(_body(profile, alpha, expectations))


def load_schema(path: str | os.PathLike[str], key: bytes) -> Parts:
    """Read a file back; anything that `save_schema` would not write is refused with one error."""
    place = check_path(path)
    try:
        if place.stat().st_size > _LARGEST:
            raise ValueError(f"larger than {_LARGEST} bytes")
        body = json.loads(
            place.read_bytes().decode("ascii"), object_pairs_hook=unique_fields, parse_constant=_no_constant
        )
        if not isinstance(body, dict) or body.get("schema") != _SCHEMA:
            raise ValueError("not a schema of this version")
        if body.pop("digest", None) != _digest(body):
            raise ValueError("the digest does not fit the content")
        if body["key"] != _key_check(key):
            raise ValueError("inferred with another key; pass key=")
        return _profile(body, key), float(body["alpha"]), _expectations(body["expectations"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        found = f"{str(path)!r} ({type(error).__name__}: {str(error)[:120]})"
        raise ConfigurationError(expected("a file written by DatasetSchema.save", "path", found, _CURE)) from error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def _key_check(key: bytes) -> str:
    """Tells keys apart without telling the key."""
    return hashlib.blake2b(b"aidefend dataset schema", key=key, digest_size=16).hexdigest()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _body(profile: Profile, alpha: float, expectations: Mapping[str, Expectation]) -> dict[str, Any]:
    return {
        "schema": _SCHEMA,
        "alpha": alpha,
        "key": _key_check(profile.key),
        "label": profile.label,
        "ignored": sorted(profile.ignored),
        "sizes": list(profile.sizes),
        "rows": profile.rows,
        "unreadable": profile.unreadable,
        "inputs": list(profile.inputs or ()),
        "columns": [[name, _column(column)] for name, column in profile.columns.items()],
        "occurrences": [[*measure, count] for measure, count in sorted(profile.occurrences.items())],
        "expectations": {name: vars(expectation) for name, expectation in sorted(expectations.items())},
        "hashes": _hashes(profile.hashes),
        "sample": {
            "keys": _text_of(profile.sample.keys),
            "columns": [[name, _text_of(values)] for name, values in profile.sample.columns.items()],
        },
    }


def _column(column: ColumnProfile) -> dict[str, Any]:
    return {
        "of": column.of,
        "rows": column.rows,
        "kinds": {kind: count for kind, count in sorted(column.kinds.items()) if count},
        "range": [column.low, column.high] if column.low <= column.high else None,
        "values": _values(column.values),
        "shapes": _values(column.shapes),
    }


def _values(values: Values) -> dict[str, Any]:
    return {"limit": values.limit, "counts": None if values.counts is None else dict(sorted(values.counts.items()))}


def _hashes(hashes: RowHashes) -> dict[str, Any]:
    words = sorted(hashes.counts)
    return {
        "limit": hashes.limit,
        "bound": str(hashes.bound),
        "words": _text_of(np.array(words, dtype=np.uint64)),
        "counts": _text_of(np.array([hashes.counts[word] for word in words], dtype=np.uint64)),
        "labels": _text_of(np.array([hashes.labels[word] for word in words], dtype=np.uint64)),
    }


def _text_of(values: "np.ndarray[Any, Any]") -> str:
    """Eight bytes a number, little-endian, in base 64: exact, NaN included."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def _array_of(text: str, dtype: str) -> "np.ndarray[Any, Any]":
    raw = base64.b64decode(text, validate=True)
    return np.frombuffer(raw, dtype=f"<{dtype}").astype(dtype)


def _profile(body: Mapping[str, Any], key: bytes) -> Profile:
    sizes = Sizes(*(_count(size) for size in body["sizes"]))
    profile = Profile(_name_or_none(body["label"]), [_name(name) for name in body["ignored"]], key, sizes)
    profile.rows, profile.unreadable = _count(body["rows"]), _count(body["unreadable"])
    profile.inputs = tuple(_name(name) for name in body["inputs"])
    profile.columns = {_name(name): _read_column(column) for name, column in body["columns"]}
    profile.occurrences = Counter({(_name(rule), _name(name)): _count(n) for rule, name, n in body["occurrences"]})
    profile.hashes = _read_hashes(body["hashes"], sizes.hashes)
    profile.sample = _read_sample(body["sample"], sizes.sample)
    return profile


def _read_column(data: Mapping[str, Any]) -> ColumnProfile:
    column = ColumnProfile(_name(data["of"]), 0)
    column.rows = _count(data["rows"])
    column.kinds = Counter({kind: _count(data["kinds"][kind]) for kind in KINDS if kind in data["kinds"]})
    if data["range"] is not None:
        column.low, column.high = (_finite(end) for end in data["range"])
    column.values, column.shapes = _read_values(data["values"]), _read_values(data["shapes"])
    return column


def _read_values(data: Mapping[str, Any]) -> Values:
    limit, counts = _count(data["limit"]), data["counts"]
    if counts is None:
        return Values(limit, open_ended=True)
    if len(counts) > limit:
        raise ValueError("more values than the limit")
    return Values(limit, {_name(name): _count(count) for name, count in counts.items()})


def _read_hashes(data: Mapping[str, Any], limit: int) -> RowHashes:
    hashes = RowHashes(limit)
    hashes.bound = int(data["bound"])
    words, counts, labels = (_array_of(data[name], "u8").tolist() for name in ("words", "counts", "labels"))
    hashes.counts, hashes.labels = dict(zip(words, counts, strict=True)), dict(zip(words, labels, strict=True))
    if not 0 < hashes.bound <= 2**64 or len(hashes.counts) > limit or any(word >= hashes.bound for word in words):
        raise ValueError("row hashes that do not fit their bound")
    return hashes


def _read_sample(data: Mapping[str, Any], limit: int) -> RowSample:
    sample = RowSample(limit)
    sample.keys = _array_of(data["keys"], "u8")
    sample.columns = {_name(name): _array_of(text, "f8") for name, text in data["columns"]}
    if len(sample) > limit or any(len(values) != len(sample) for values in sample.columns.values()):
        raise ValueError("a sample whose columns differ in length")
    return sample


def _expectations(data: Mapping[str, Any]) -> dict[str, Expectation]:
    found = {}
    for name, fields in data.items():
        numbers = {field: None if fields[field] is None else _finite(fields[field]) for field in _NUMBERS}
        values = fields["values"]
        found[_name(name)] = Expectation(
            values=None if values is None else tuple(map(_name, values)),
            required=_flag(fields["required"]),
            unchecked=tuple(map(_name, fields["unchecked"])),
            **numbers,
        )
    return found


_NUMBERS = ("low", "high", "max_missing")


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} in place of a flag")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of a name")
    return value


def _name_or_none(value: Any) -> str | None:
    return None if value is None else _name(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("a count that is no whole number")
    return value


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError("a limit that is no finite number")
    return float(value)
