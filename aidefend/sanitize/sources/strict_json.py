"""JSON from outside, read as if it were hostile: bounded, each key once, no NaN."""

import json
import math
from pathlib import Path
from typing import Any

from aidefend._core.storage import unique_fields
from aidefend.sanitize.sources.digests import read_file, unsafe

LARGEST = 2**28
_DEEPEST = 32


def read_json(path: Path, what: str) -> Any:
    """The content of a file, or `UnsafeArtifact` that says what is wrong with it."""
    raw = read_file(path)
    cure = "Get the file again from who made it; it is damaged or hostile"
    if len(raw) > LARGEST:
        raise unsafe(f"{what} of at most {LARGEST} bytes", "size", len(raw), cure)
    try:
        found = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique_fields, parse_constant=_refuse, parse_float=_finite
        )
        _check_depth(found, 0)
    except (ValueError, RecursionError) as error:
        raise unsafe(f"{what} in JSON", "path", f"{path.name}: {str(error)[:120]}", cure) from error
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _check_depth(value: Any, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST}")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(item, depth + 1)


def fields_of(value: Any, names: set[str], what: str) -> dict[str, Any]:
    """A JSON object with exactly these fields."""
    if not isinstance(value, dict) or set(value) != names:
        found = sorted(value)[:12] if isinstance(value, dict) else type(value).__name__
        raise unsafe(f"{what} with exactly {sorted(names)}", what, found, "It was altered or is damaged")
    return value
