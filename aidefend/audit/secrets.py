"""Secrets in text: formats of well-known credentials, and values of telling names that look random."""

import math
import re
from typing import NamedTuple

_FORMATS = (
    ("private key", re.compile(r"-----BEGIN (?:[A-Z]{2,10} )?PRIVATE KEY-----")),
    ("AWS access key id", re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("GitHub token", re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b")),
    ("Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{30,60}\b")),
    ("Slack token", re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,250}")),
    ("Google API key", re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b")),
    ("JSON web token", re.compile(r"\beyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,2000}\.[A-Za-z0-9_-]{8,2000}\b")),
    ("password in a URL", re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,80}:[^\s/:@]{3,120}@")),
)
_ASSIGNED = re.compile(
    r"""["']?([A-Za-z0-9_.-]{0,40}(?:secret|password|passwd|token|api[_-]?key|access[_-]?key|private[_-]?key)"""
    r"""[A-Za-z0-9_.-]{0,20})["']?\s{0,4}[:=]\s{0,4}["']?([^\s"',;#]{8,300})""",
    re.IGNORECASE,
)
_PLACEHOLDERS = re.compile(
    r"^(?:<.*>?|\$\{?.*|\{\{.*|%\(.*|env:.*|os\.environ.*|x{4,}|\*{4,}|change[-_]?me.*|your[-_].*|example.*|placeholder.*"
    r"|none|null|true|false|self\..*|.*\(.*)$",
    re.IGNORECASE,
)
_MOST_ON_A_LINE = 4096


class Secret(NamedTuple):
    """Where a secret was seen and of what kind; never the secret itself."""

    line: int
    kind: str


def find_secrets(text: str) -> list[Secret]:
    """Lines that hold what looks like a credential, at most one finding a line.

    Guarantee: none: unknown formats of low entropy pass, random-looking public values are flagged. Linear in the text:
        lines are cut at 4096 characters.

    Example:
        >>> find_secrets('db_password = "' + "q7Zr0pLw9Xk2" + '"')
        [Secret(line=1, kind='value of db_password')]
        >>> find_secrets("api_key = ${API_KEY}")
        []
    """
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        kind = _kind(line[:_MOST_ON_A_LINE])
        if kind:
            found.append(Secret(number, kind))
    return found


def entropy(value: str) -> float:
    """Shannon entropy of the characters, in bits a character."""
    counts = [value.count(symbol) for symbol in set(value)]
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts)


def _kind(line: str) -> str:
    for kind, pattern in _FORMATS:
        if pattern.search(line):
            return kind
    for match in _ASSIGNED.finditer(line):
        name, value = match.group(1), match.group(2)
        if not _PLACEHOLDERS.match(value) and _looks_random(value):
            return f"value of {name}"
    return ""


def _looks_random(value: str) -> bool:
    """Letters with digits or marks, and at least 2.8 bits a character: more than words and version numbers have."""
    kinds = sum(any(test(symbol) for symbol in value) for test in (str.isalpha, str.isdigit, _is_mark))
    return kinds >= 2 and entropy(value) >= 2.8


def _is_mark(symbol: str) -> bool:
    return not symbol.isalnum() and symbol not in "._-/"
