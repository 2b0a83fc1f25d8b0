"""Names of code that a refused file mentions, for the report. The verdict never rests on this list: it may be short."""

import pickletools
import re
from collections.abc import Iterable
from typing import Any

_MAX_BYTES = 2**24
_MAX_OPCODES = 200_000
_MAX_NAMES = 50
_RAW = re.compile(rb"[ci]([A-Za-z_][A-Za-z0-9_.]{0,120})\n([A-Za-z_][A-Za-z0-9_.]{0,120})\n")
_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "UNICODE", "BINUNICODE8", "STRING", "SHORT_BINSTRING", "BINSTRING")


def find_globals(data: bytes) -> list[str]:
    """Sorted `module.name` pairs that pickles in these bytes may import; at least those that can be read off."""
    head = data[:_MAX_BYTES]
    names = {f"{_text(match[1])}.{_text(match[2])}" for match in _RAW.finditer(head)}
    start = 0
    while start < len(head) and len(names) <= _MAX_NAMES:
        found, start = _walk(head, start)
        names |= found
    return sorted(names)[:_MAX_NAMES]


def _walk(data: bytes, start: int) -> tuple[set[str], int]:
    """The names in the pickle at `start`, and where the next one may begin."""
    reader = _Reader()
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data[start:])):
            reader.read(opcode.name, argument)
            if opcode.name == "STOP":
                return reader.names, start + (position or 0) + 1
            if count > _MAX_OPCODES:
                break
    except Exception:  # a hostile stream may fail in any way; the names so far count
        return reader.names, len(data)
    return reader.names, len(data)


class _Reader:
    """Follows texts through stack and memo, as far as STACK_GLOBAL needs them."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.texts: list[str] = []
        self.memo: dict[int, str] = {}

    def read(self, opcode: str, argument: Any) -> None:
        if opcode in _TEXTS:
            self.texts.append(str(argument))
        elif opcode in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if argument is None else int(argument)] = self.texts[-1] if self.texts else ""
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            self.texts.append(self.memo.get(int(argument), ""))
        elif opcode == "STACK_GLOBAL":
            self.names.add(".".join(self.texts[-2:]))
        elif opcode in ("GLOBAL", "INST"):
            self.names.add(str(argument).replace(" ", "."))
        elif opcode.startswith("EXT"):
            self.names.add(f"extension registry code {argument}")


def outside(names: Iterable[str], allowed: Iterable[tuple[str, str]]) -> list[str]:
    """The names that no checkpoint needs."""
    known = {f"{module}.{name}" for module, name in allowed}
    return [name for name in names if name not in known]


def _text(raw: bytes) -> str:
    return raw.decode("ascii")
