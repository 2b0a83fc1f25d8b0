"""Specifications as JSON and as files: exact keys, a known schema, nothing guessed."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from aidefend._core.checks import check_path, refuse
from aidefend._core.storage import pretty_json, unique_fields, write_atomic

_LARGEST_FILE = 8 * 2**20


def spec_fields(data: Any, kind: type[Any], schema: str) -> dict[str, Any]:
    """The arguments of a specification out of its dictionary.

    Raises: ConfigurationError: another schema; keys that are missing or too many.
    """
    name = kind.__name__
    if not isinstance(data, Mapping) or not isinstance(data.get("schema"), str) or data["schema"] != schema:
        raise refuse(f'schema "{schema}"', "data", data, f"Pass what {name}.to_dict returned")
    wanted = {field.name for field in dataclasses.fields(kind)}
    found = {key: value for key, value in data.items() if key != "schema"}
    if set(found) != wanted:
        raise refuse(f"the keys {sorted(wanted)}", "data", data, f"Write it with {name}.save")
    return found


def write_spec(path: str | os.PathLike[str], described: Mapping[str, Any]) -> None:
    """Write a dictionary as JSON, whole or not at all."""
    write_atomic(path, pretty_json(described))


def read_spec(path: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """The dictionary back from `write_spec`. Raises: ConfigurationError: no such file, or no JSON object in it."""
    rule = f"a file written by {name}.save"
    try:
        with check_path(path).open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        data = json.loads(content, object_pairs_hook=unique_fields) if len(content) <= _LARGEST_FILE else None
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(rule, "path", str(path), f"Could not read it ({error})") from error
    if not isinstance(data, dict):
        raise refuse(rule, "path", str(path), f"It holds no JSON object of at most {_LARGEST_FILE} bytes")
    return data
