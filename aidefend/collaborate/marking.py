"""The names that both directions of the STIX exchange use: markings, patterns, times, catalogue entries."""

import datetime
import re
from collections.abc import Mapping
from typing import Literal

Tlp = Literal["clear", "green", "amber", "red"]
# From free to strict. The predefined marking definitions of STIX 2.1 (section 7.2.1.4), whose "white" is now "clear".
TLP: Mapping[str, str] = {
    "clear": "marking-definition--613f2e26-407d-48c7-9eca-b8e91df99dc9",
    "green": "marking-definition--34098fce-860f-48ae-8e50-ebd3cc5e41da",
    "amber": "marking-definition--f88d31f6-486f-44da-b317-01333bde0b82",
    "red": "marking-definition--5e57c739-391a-4eb3-b6be-7d15ca92d5ed",
}
LARGEST = 4 << 20
MOST_OBJECTS = 20_000
LONGEST_NAME = 256
PATTERN_TYPE = "aidefend"
FILE_PATTERN = "[file:hashes.'SHA-256' = '{}']"
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?Z")
_TECHNIQUE = re.compile(r"AML\.T[0-9]{4}(?:\.[0-9]{3})?")
_MITIGATION = re.compile(r"AML\.M[0-9]{4}")


def older_name(tlp: str) -> str:
    """The name of a level in the marking definitions of STIX 2.1."""
    return "white" if tlp == "clear" else tlp


def is_time(value: object) -> bool:
    """RFC 3339 in UTC, a time that exists."""
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        return False
    try:
        datetime.datetime.strptime(value[:19], "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return False
    return True


def is_name(value: object) -> bool:
    """One printable line: no control characters, no marks that change the direction of reading."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def techniques(mapping: Mapping[str, str]) -> list[str]:
    """The techniques of MITRE ATLAS that a finding's mapping names."""
    return sorted(set(_TECHNIQUE.findall(" ".join(map(str, mapping.values())))))


def mitigations(mapping: Mapping[str, str]) -> list[str]:
    """The mitigations of MITRE ATLAS that a finding's mapping names."""
    return sorted(set(_MITIGATION.findall(" ".join(map(str, mapping.values())))))


def atlas_page(entry: str) -> str:
    """The public page of a technique or mitigation."""
    folder = "mitigations" if entry.startswith("AML.M") else "techniques"
    return f"https://atlas.mitre.org/{folder}/{entry}"
