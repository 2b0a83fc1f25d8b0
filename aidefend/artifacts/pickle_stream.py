"""The opcodes of a pickle, one by one, from the small set that torch.save writes; any other opcode is refused.

Nothing is built here. The set holds no opcode that imports by computed name, calls without REDUCE, reads the extension
registry, resolves frames or drops values from the stack, so what the checks see is what the loader sees.
"""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from aidefend.artifacts.files import unsafe

PROTOCOL = 2
_CURE = "Save tensors and plain containers with torch.save, or use safetensors"
_PLAIN = {
    b"(": "MARK",
    b"N": "NONE",
    b"\x88": "NEWTRUE",
    b"\x89": "NEWFALSE",
    b")": "EMPTY_TUPLE",
    b"]": "EMPTY_LIST",
    b"}": "EMPTY_DICT",
    b"\x85": "TUPLE1",
    b"\x86": "TUPLE2",
    b"\x87": "TUPLE3",
    b"t": "TUPLE",
    b"a": "APPEND",
    b"e": "APPENDS",
    b"s": "SETITEM",
    b"u": "SETITEMS",
    b"R": "REDUCE",
    b"b": "BUILD",
    b"Q": "BINPERSID",
    b".": "STOP",
}
_FIXED = {
    b"\x80": ("PROTO", struct.Struct("<B")),
    b"K": ("BININT1", struct.Struct("<B")),
    b"M": ("BININT2", struct.Struct("<H")),
    b"J": ("BININT", struct.Struct("<i")),
    b"G": ("BINFLOAT", struct.Struct(">d")),
    b"q": ("BINPUT", struct.Struct("<B")),
    b"r": ("LONG_BINPUT", struct.Struct("<I")),
    b"h": ("BINGET", struct.Struct("<B")),
    b"j": ("LONG_BINGET", struct.Struct("<I")),
}
_LENGTHS = {
    b"X": ("BINUNICODE", struct.Struct("<I")),
    b"\x8a": ("LONG1", struct.Struct("<B")),
}
_PLAIN_BY_CODE = {code[0]: name for code, name in _PLAIN.items()}
_FIXED_BY_CODE = {code[0]: entry for code, entry in _FIXED.items()}
_LENGTHS_BY_CODE = {code[0]: entry for code, entry in _LENGTHS.items()}
OPCODES = frozenset([*_PLAIN.values(), "GLOBAL", *(name for name, _ in (*_FIXED.values(), *_LENGTHS.values()))])
_REFUSED = {
    0x93: "STACK_GLOBAL",
    0x95: "FRAME",
    0x94: "MEMOIZE",
    0x81: "NEWOBJ",
    0x92: "NEWOBJ_EX",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x30: "POP",
    0x31: "POP_MARK",
    0x32: "DUP",
    0x69: "INST",
    0x6F: "OBJ",
    0x50: "PERSID",
    0x97: "NEXT_BUFFER",
}


class Operation(NamedTuple):
    """An opcode with its decoded argument (None where it has none) and its position."""

    position: int
    name: str
    argument: Any


def operations(data: bytes | memoryview, limit: int) -> Iterator[Operation]:
    """Walk through exactly one pickle of protocol 2 that starts at byte 0 and ends with the data.

    Raises: UnsafeArtifact: an opcode outside the set, a cut argument, bytes after STOP, more than `limit` opcodes.
    """
    buffer = bytes(data)
    if buffer[:2] != bytes([0x80, PROTOCOL]):
        raise unsafe(f"a pickle of protocol {PROTOCOL}", "first bytes", buffer[:2], _CURE)
    position = 2
    for _ in range(limit):
        if position >= len(buffer):
            raise unsafe("a pickle that ends with STOP", "end", f"byte {position}", "The file is cut; fetch it again")
        start, (name, argument, position) = position, _decode(buffer, position)
        yield Operation(start, name, argument)
        if name == "STOP":
            if position != len(buffer):
                raise unsafe("nothing after STOP", "bytes after STOP", len(buffer) - position, _CURE)
            return
    raise unsafe(f"at most {limit} opcodes", "opcodes", f"> {limit}", "Raise Limits(max_items=...) if this is right")


def _decode(buffer: bytes, position: int) -> tuple[str, Any, int]:
    """Name, argument and end of the opcode at `position`."""
    code, start = buffer[position], position + 1
    name = _PLAIN_BY_CODE.get(code)
    if name is not None:
        return name, None, start
    if code in _FIXED_BY_CODE:
        name, form = _FIXED_BY_CODE[code]
        stop = start + form.size
        if stop > len(buffer) or name == "PROTO":
            raise unsafe("whole opcodes and one PROTO", f"opcode at byte {position}", name, _CURE)
        return name, form.unpack_from(buffer, start)[0], stop
    if code in _LENGTHS_BY_CODE:
        return _decode_sized(buffer, position, *_LENGTHS_BY_CODE[code])
    if code == ord("c"):
        return _decode_global(buffer, position)
    shown = _REFUSED.get(code, hex(code))
    raise unsafe("only the opcodes that torch.save writes", f"opcode at byte {position}", shown, _CURE)


def _decode_sized(buffer: bytes, position: int, name: str, form: struct.Struct) -> tuple[str, Any, int]:
    start = position + 1 + form.size
    length = form.unpack_from(buffer, position + 1)[0] if start <= len(buffer) else 0
    stop = start + length
    if start > len(buffer) or stop > len(buffer):
        raise unsafe("arguments inside the pickle", f"opcode at byte {position}", name, "The file is cut or altered")
    raw = buffer[start:stop]
    if name == "LONG1":
        return name, int.from_bytes(raw, "little", signed=True), stop
    try:
        return name, raw.decode("utf-8"), stop
    except UnicodeDecodeError as error:
        raise unsafe("texts in UTF-8", f"opcode at byte {position}", raw[:32], _CURE) from error


def _decode_global(buffer: bytes, position: int) -> tuple[str, Any, int]:
    """(module, qualified name), both on lines of their own; decoded only if they are plain ASCII."""
    first = buffer.find(b"\n", position + 1)
    second = buffer.find(b"\n", first + 1) if first > 0 else -1
    if second < 0:
        raise unsafe("names that end with a line", f"opcode at byte {position}", "GLOBAL", "The file is cut or altered")
    module, name = buffer[position + 1 : first], buffer[first + 1 : second]
    if not (module.isascii() and name.isascii()):
        raise unsafe("names in ASCII", f"global at byte {position}", (module[:64], name[:64]), _CURE)
    return "GLOBAL", (module.decode("ascii"), name.decode("ascii")), second + 1
