"""A strict reader of zip archives: every byte is accounted for, so that no two readers can see different members.

The usual tricks (a local header that disagrees with the directory, bytes before, between or after the members, two
members with one name, wrong checksums, encryption flags, archives in archive comments) all need slack in the format.
Here there is none: headers must agree, members must follow one another from byte 0 to the directory, and the directory
must reach the end of the file.
"""

import stat
import struct
import unicodedata
import zlib
from collections import Counter
from typing import NamedTuple

from aidefend.artifacts.files import unsafe
from aidefend.artifacts.limits import Limits

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_DESCRIPTORS = (struct.Struct("<4s3L"), struct.Struct("<4sL2Q"))
_STORED, _DEFLATED = 0, 8
_DOS_ARCHIVE = 0x20  # the folder bit beside it makes torch's reader return memory that nothing has written to
_DESCRIPTOR_FLAG, _UTF8_FLAG = 0x0008, 0x0800
_ZIP64, _PADDING = 0x0001, 0x4246
_CURE = "Save the checkpoint again with torch.save or as safetensors; the archive was altered or is damaged"


class Directory(NamedTuple):
    """Where the central directory is."""

    entries: int
    offset: int
    size: int


class _Header(NamedTuple):
    """One entry of the central directory."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int


class Archive(NamedTuple):
    """The entries of the directory, and where the members end."""

    headers: tuple[_Header, ...]
    stop: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all members."""
        return tuple(header.name for header in self.headers)


def open_zip(data: bytes, limits: Limits) -> Archive:
    """The directory of an archive, with names that are safe and differ; no member has been looked at."""
    directory = _find_directory(data)
    if directory.entries > limits.max_members:
        cure = "Raise Limits(max_members=...) if this is right"
        raise unsafe(f"at most {limits.max_members} members", "members", directory.entries, cure)
    headers = _read_directory(data, directory)
    _check_names([header.name for header in headers])
    return Archive(tuple(headers), directory.offset)


def read_members(data: bytes, archive: Archive, limits: Limits) -> dict[str, memoryview]:
    """The members by name, in file order, decompressed and with their checksums verified."""
    _check_sizes(archive.headers, limits)
    members: dict[str, memoryview] = {}
    cursor = 0
    for header in archive.headers:
        packed, cursor = _member(data, header, cursor, archive.stop)
        members[header.name] = _unpack(packed, header)
    if cursor != archive.stop:
        raise _bad("members that follow one another without gaps", "gap at byte", cursor)
    return members


def _find_directory(data: bytes) -> Directory:
    if len(data) < _END.size:
        raise _bad("a complete zip archive", "size", len(data))
    end = len(data) - _END.size
    magic, disk, first_disk, here, count, size, offset, comment = _END.unpack_from(data, end)
    if magic != b"PK\x05\x06" or comment or disk or first_disk or here != count:
        raise _bad("a zip that ends with its directory: one disk, no comment, no trailing bytes", "end", data[end:])
    stop, found = end, Directory(count, offset, size)
    locator = end - _LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        stop, found = _read_zip64(data, locator, found)
    if found.offset + found.size != stop:
        raise _bad("a directory that fills the space before the end record", "directory", found)
    return found


def _read_zip64(data: bytes, locator: int, short: Directory) -> tuple[int, Directory]:
    """The 64-bit end record: right before its locator, and equal to the short one wherever that is not saturated."""
    _, disk, offset, disks = _LOCATOR.unpack_from(data, locator)
    if disk or disks != 1 or offset != locator - _END64.size or offset < 0:
        raise _bad("the zip64 end record right before its locator", "offset", offset)
    magic, size, _, _, disk, first_disk, here, count, length, start = _END64.unpack_from(data, offset)
    if magic != b"PK\x06\x06" or size != _END64.size - 12 or disk or first_disk or here != count:
        raise _bad("a plain zip64 end record on one disk", "record", data[offset : offset + 12])
    long = Directory(count, start, length)
    saturated = ((0xFFFF,), (0xFFFFFFFF,), (0xFFFFFFFF,))
    for narrow, wide, (full,) in zip(short, long, saturated, strict=True):
        if narrow != wide and not (narrow == full and wide >= full):
            raise _bad("two end records that agree", "records", (tuple(short), tuple(long)))
    return offset, long


def _read_directory(data: bytes, directory: Directory) -> list[_Header]:
    cursor, stop = directory.offset, directory.offset + directory.size
    headers = []
    for _ in range(directory.entries):
        if cursor + _CENTRAL.size > stop:
            raise _bad("a directory of the stated size", "entries", directory.entries)
        header, cursor = _read_header(data, cursor, stop)
        headers.append(header)
    if cursor != stop:
        raise _bad("a directory of the stated size", "unused bytes", stop - cursor)
    return headers


def _read_header(data: bytes, cursor: int, stop: int) -> tuple[_Header, int]:
    fields = _CENTRAL.unpack_from(data, cursor)
    magic, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, disk = fields[:14]
    mode, offset = fields[15:]
    start = cursor + _CENTRAL.size
    finish = start + name_length + extra_length
    if magic != b"PK\x01\x02" or comment or disk or finish > stop:
        raise _bad("directory entries without comments, on one disk", "entry", data[cursor : cursor + 16])
    raw = data[start : start + name_length]
    if flags & ~(_DESCRIPTOR_FLAG | _UTF8_FLAG) or method not in (_STORED, _DEFLATED):
        raise _bad("members that are neither encrypted nor patched", f"flags of {raw!r}", (hex(flags), method))
    if stat.S_IFMT(mode >> 16) not in (0, stat.S_IFREG) or mode & 0xFFFF & ~_DOS_ARCHIVE:
        raise _bad("members that are regular files", f"attributes of {raw!r}", hex(mode))
    extra = data[start + name_length : finish]
    size, packed, offset = _widen(extra, size, packed, offset)
    return _Header(_decode(raw), raw, flags, method, crc, packed, size, offset), finish


def _widen(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """The 64-bit values of the fields that are saturated; nothing else may be in the extra part."""
    values = [size, packed, offset]
    wide = [index for index, value in enumerate(values) if value == 0xFFFFFFFF]
    if not extra and not wide:
        return size, packed, offset
    if len(extra) != 4 + 8 * len(wide) or struct.unpack_from("<2H", extra) != (_ZIP64, 8 * len(wide)) or not wide:
        raise _bad("zip64 sizes for exactly the fields that need them", "extra", extra[:16])
    for index, value in zip(wide, struct.unpack_from(f"<{len(wide)}Q", extra, 4), strict=True):
        if value < 0xFFFFFFFF:
            raise _bad("zip64 sizes where 32 bits are not enough", "value", value)
        values[index] = value
    return values[0], values[1], values[2]


def _member(data: bytes, header: _Header, cursor: int, stop: int) -> tuple[memoryview, int]:
    """The packed bytes of a member whose local header is at the cursor, and the position after it."""
    if header.offset != cursor or cursor + _LOCAL.size > stop:
        raise _bad("members in directory order without gaps or overlap", f"offset of {header.name}", header.offset)
    magic, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack_from(data, cursor)
    start = cursor + _LOCAL.size
    name = data[start : start + name_length]
    if magic != b"PK\x03\x04" or name != header.raw_name or (flags, method) != (header.flags, header.method):
        raise _bad("a local header equal to the directory's", f"local header of {header.name}", name)
    described = bool(flags & _DESCRIPTOR_FLAG) and (crc, packed, size) == (0, 0, 0)
    known = (header.crc, min(header.packed, 0xFFFFFFFF), min(header.size, 0xFFFFFFFF))
    if not described and (crc, packed, size) != known:
        raise _bad("local sizes and checksum equal to the directory's", f"member {header.name}", (crc, packed, size))
    body = start + name_length + extra_length
    _check_local_extra(data[start + name_length : body], header)
    after = body + header.packed
    if after > stop:
        raise _bad("members inside the archive", f"size of {header.name}", header.packed)
    if flags & _DESCRIPTOR_FLAG:
        after += _descriptor_length(data, after, header)
    return memoryview(data)[body : body + header.packed], after


def _check_local_extra(extra: bytes, header: _Header) -> None:
    """Alignment padding as torch writes it, and zip64 sizes that equal the directory's."""
    sizes, place = struct.pack("<Q", header.size), struct.pack("<Q", header.offset)
    wide = (sizes + struct.pack("<Q", header.packed), sizes + bytes(8), place)  # torch leaves the packed size at 0
    cursor = 0
    while cursor + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, cursor)
        value = extra[cursor + 4 : cursor + 4 + length]
        fits = kind == _PADDING or (kind == _ZIP64 and value in wide)
        if not fits or len(value) != length:
            raise _bad("alignment padding only", f"extra field of {header.name}", extra[:16])
        cursor += 4 + length
    if cursor != len(extra):
        raise _bad("whole extra fields", f"extra field of {header.name}", extra[:16])


def _descriptor_length(data: bytes, start: int, header: _Header) -> int:
    expected = (b"PK\x07\x08", header.crc, header.packed, header.size)
    for form in _DESCRIPTORS:
        if start + form.size <= len(data) and form.unpack_from(data, start) == expected:
            return form.size
    raise _bad("a data descriptor equal to the directory's", f"descriptor of {header.name}", data[start : start + 24])


def _unpack(packed: memoryview, header: _Header) -> memoryview:
    content = packed
    if header.method == _DEFLATED:
        machine = zlib.decompressobj(-15)
        try:
            content = memoryview(machine.decompress(packed, header.size + 1))
        except zlib.error as error:
            raise _bad("deflated data", f"member {header.name}", str(error)) from error
        if not machine.eof or machine.unused_data:
            raise _bad("deflated data of the stated size", f"member {header.name}", len(content))
    if len(content) != header.size:
        raise _bad(f"{header.size} bytes", f"size of {header.name}", len(content))
    if zlib.crc32(content) != header.crc:
        raise _bad("data that matches its CRC-32", f"checksum of {header.name}", hex(zlib.crc32(content)))
    return content


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad("member names in UTF-8", "name", raw) from error


def _check_names(names: list[str]) -> None:
    for name in names:
        parts = name.split("/")
        hidden = any(unicodedata.category(character)[0] == "C" for character in name)
        if hidden or "\\" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
            raise _bad("relative member names without .. or control characters", "name", name)
    folded = Counter(unicodedata.normalize("NFC", name).casefold() for name in names)
    if len(folded) != len(names):
        raise _bad("one member a name", "names", [name for name, count in folded.items() if count > 1][:3])


def _check_sizes(headers: tuple[_Header, ...], limits: Limits) -> None:
    for header in headers:
        if header.method == _STORED and header.packed != header.size:
            raise _bad("equal sizes of a stored member", f"member {header.name}", (header.packed, header.size))
        if header.size > limits.max_compression_ratio * header.packed:
            rule = f"members that grow by at most {limits.max_compression_ratio}"
            grown = f"{header.packed} -> {header.size} bytes"
            cure = "Save it uncompressed, or raise Limits(max_compression_ratio=...) if you compressed it"
            raise unsafe(rule, f"member {header.name}", grown, cure)
    total = sum(header.size for header in headers)
    if total > limits.max_total_bytes:
        cure = "Raise Limits(max_total_bytes=...) if this size is right"
        raise unsafe(f"at most {limits.max_total_bytes} bytes in all members", "total", total, cure)


def _bad(rule: str, name: str, value: object) -> Exception:
    return unsafe(rule, name, value, _CURE)
