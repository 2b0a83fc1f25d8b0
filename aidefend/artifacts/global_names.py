"""Names of code that a refused file mentions, for the report. The verdict never rests on this list: it may be short."""

import io
import itertools
import pickletools
import re
import sys
from collections.abc import Iterable
from typing import Any

_MAX_BYTES = 2**24
_MAX_OPCODES = 200_000
_MAX_NAMES = 50
_MAX_STARTS = 16
_MAX_PICKLES = 100
_START = re.compile(rb"\x80[\x02-\x05]")
_KNOWN = {
    *sys.stdlib_module_names,
    *["__builtin__", "commands", "torch", "numpy", "pandas", "joblib", "dill", "cloudpickle", "pip"],
}
_RAW = re.compile(rb"[ci]([A-Za-z_][A-Za-z0-9_.]{0,120})\n([A-Za-z_][A-Za-z0-9_.]{0,120})\n")
_INNOCENT = re.compile(
    r"torch\.nn\.modules\.[a-z_]+\.[A-Z]\w*|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_\w+"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray)|(builtins|__builtin__)\.(set|dict|list|tuple)"
)
_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "UNICODE", "BINUNICODE8", "STRING", "SHORT_BINSTRING", "BINSTRING")


def find_globals(data: bytes) -> list[str]:
    """Sorted `module.name` pairs that pickles in these bytes may import; at least those that can be read off."""
    head = data[:_MAX_BYTES]
    names = {f"{_module(match[1].decode('ascii'))}.{match[2].decode('ascii')}" for match in _RAW.finditer(head)}
    starts = [match.start() for match in itertools.islice(_START.finditer(head), _MAX_STARTS)]
    for start in [0, *starts]:
        names |= _walk(head, start)
    return sorted(names)[:_MAX_NAMES]


def is_pickle(data: bytes) -> bool:
    """Whether the bytes, all of them, read as a few pickles, whatever the protocol."""
    stream = io.BytesIO(data[:_MAX_BYTES])
    try:
        for _ in range(_MAX_PICKLES):
            for _ in pickletools.genops(stream):
                pass
            if stream.tell() == len(data):
                return True
    except Exception:  # no pickle, or one that is cut
        return False
    return False


def _module(found: str) -> str:
    """The module in a run of letters that may begin before its opcode: `ghtcposix` ends with the opcode c and posix."""
    for start in [0, *(index + 1 for index, letter in enumerate(found) if letter in "ci")]:
        if found[start:].partition(".")[0] in _KNOWN:
            return found[start:]
    return found


def _walk(data: bytes, start: int) -> set[str]:
    """The names in the pickle at `start`, up to its end or to where it breaks."""
    reader = _Reader()
    try:
        for opcode, argument, _ in itertools.islice(pickletools.genops(data[start:]), _MAX_OPCODES):
            reader.read(opcode.name, argument)
    except Exception:  # a hostile stream may fail in any way; the names so far count
        return reader.names
    return reader.names


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


def suspicious(names: Iterable[str], allowed: Iterable[tuple[str, str]]) -> list[str]:
    """The names outside the list that are not those of a whole saved module or of numpy values either."""
    return [name for name in outside(names, allowed) if not _INNOCENT.fullmatch(name)]
