"""What an image file says about itself, read without decoding a pixel: format, size, frames, and where the file ends.

Our own reading of five containers, so that caps hold before a decoder runs, and so that two readers must agree: what
this one and the decoder see differently is refused. Nothing here allocates more than the file.
"""

import dataclasses
import itertools
import re
import struct
import zlib
from collections.abc import Callable, Iterator

_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_AFTER_FILL = re.compile(rb"[^\xff]")
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ABOUT = frozenset([*range(0xE0, 0xF0), 0xFE])  # segments of applications, and comments
_NOT_NEEDED = _ABOUT - {0xE0, 0xE1, 0xEE}  # but JFIF, EXIF (orientation), Adobe (how colours are coded)
_ALONE = frozenset([0x01, *range(0xD0, 0xD8)])
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PIXELS_OF_WEBP = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 65_536
_MOST_SCANS = 100  # each scan of a progressive JPEG is a pass over the whole image
_MOST_SEGMENTS = 100_000


class BadImage(Exception):
    """Why a file is no image that may be decoded; the message is the rule."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a file says about itself.

    Args:
        format: "png", "jpeg", "gif", "bmp" or "webp".
        width, height: In pixels, >= 1.
        frames: Number of frames, >= 1.
        end: Place after the last byte that belongs to the image.
        metadata: Bytes that carry no pixels (profiles, EXIF, comments).
        core: The bytes for the decoder: the file up to `end`; of PNG and JPEG without what tells nothing about pixels,
            so that no decoder of profiles, of further pictures in the file, or of comments runs.
    """

    format: str
    width: int
    height: int
    frames: int
    end: int
    metadata: int
    core: bytes = dataclasses.field(repr=False)


def sniff(data: bytes) -> str | None:
    """The format that the first bytes name, or None."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "bmp" if data[:2] == b"BM" else None


def read_structure(data: bytes) -> Structure:
    """Walk through a file from its first byte to the end of the image.

    Raises: BadImage: an unknown format, or a file that ends early or contradicts itself.
    """
    kind = sniff(data)
    if kind is None:
        raise BadImage("unknown image format")
    try:
        found = _WALKERS[kind](data)
    except (struct.error, IndexError):
        raise BadImage("truncated") from None
    if found.width < 1 or found.height < 1:
        raise BadImage("damaged")
    if found.end > len(data):
        raise BadImage("truncated")
    return found


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of each chunk, its checksum tested, up to the last one."""
    place = 8
    while True:
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            raise BadImage("truncated")
        if struct.unpack_from(">I", data, end - 4)[0] != zlib.crc32(memoryview(data)[place + 4 : end - 4]):
            raise BadImage("damaged")
        yield kind, place, end
        if kind == b"IEND":
            return
        place = end


def _png(data: bytes) -> Structure:
    parts, frames, metadata, count = [data[:8]], 1, 0, {b"IHDR": 0, b"IDAT": 0}
    end = 8
    for number, (kind, start, end) in enumerate(_png_chunks(data)):
        if (number == 0) != (kind == b"IHDR") or number > _MOST_SEGMENTS:
            raise BadImage("damaged")
        if kind in count:
            count[kind] += 1
        if kind == b"acTL":
            frames = max(1, struct.unpack_from(">I", data, start + 8)[0])
        if kind in _PNG_KEPT or kind == b"eXIf":
            parts.append(data[start:end])
        elif not kind[0] & 0x20:  # a critical chunk that we do not know
            raise BadImage("damaged")
        if kind not in _PNG_KEPT:
            metadata += end - start
    if not count[b"IDAT"]:
        raise BadImage("damaged")
    width, height, depth = struct.unpack_from(">IIB", data, 16)
    if depth > 8:  # of three channels a decoder would silently drop the lower half of every number
        raise BadImage("more than 8 bits a channel")
    return Structure("png", width, height, frames, end, metadata, b"".join(parts))


def png_lacks_pixels(core: bytes) -> bool:
    """Whether the pixel data of a PNG is shorter than its header says, which decoders fill with zeros.

    The core of a `Structure`; unpacks at most what the header says, in pieces, and keeps none of them.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", core, 16)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in passes]
    missing = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
    unpack = zlib.decompressobj()  # never flushed: that would unpack all the rest at once
    for kind, start, end in _png_chunks(core):
        rest = core[start + 8 : end - 4] if kind == b"IDAT" else b""
        piece = b"first"
        while missing > 0 and (rest or piece):
            piece = unpack.decompress(rest, _PIECE)
            rest = unpack.unconsumed_tail
            missing -= len(piece)
    return bool(missing > 0)


def _jpeg(data: bytes) -> Structure:
    place, size, scans, metadata, parts = 2, (0, 0), 0, 0, [data[:2]]
    for _ in range(_MOST_SEGMENTS):
        start = place
        marker, place = _jpeg_marker(data, place)
        if marker == 0xD9:
            if not scans or not size[0]:
                raise BadImage("damaged")
            return Structure("jpeg", *size, 1, place, metadata, b"".join([*parts, data[start:place]]))
        if marker in _ALONE:
            parts.append(data[start:place])
            continue
        length = struct.unpack_from(">H", data, place)[0]
        if length < 2 or marker == 0xD8 or (marker in _FRAME_HEADERS and size[0]):
            raise BadImage("damaged")
        if marker in _FRAME_HEADERS:
            height, width = struct.unpack_from(">HH", data, place + 3)
            size = (width, height)
        metadata += length if marker in _ABOUT else 0
        place += length
        if marker == 0xDA:
            scans += 1
            place = _after_scan(data, place, scans)
        if marker not in _NOT_NEEDED:
            parts.append(data[start:place])
    raise BadImage("damaged")


def _jpeg_marker(data: bytes, place: int) -> tuple[int, int]:
    """The marker at a place, which fill bytes may precede, and the place after it."""
    if data[place] != 0xFF:
        raise BadImage("damaged")
    place += 1
    if data[place] == 0xFF:
        found = _AFTER_FILL.search(data, place)
        if found is None:
            raise BadImage("truncated")
        place = found.start()
    return data[place], place + 1


def _after_scan(data: bytes, place: int, scans: int) -> int:
    if scans > _MOST_SCANS:
        raise BadImage("too many scans")
    found = _END_OF_SCAN.search(data, place)
    if found is None:
        raise BadImage("truncated")
    return found.start()


def _gif(data: bytes) -> Structure:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place, frames, metadata, blocks = 13 + _colours(flags), 0, 0, 0
    while data[place] != 0x3B:
        kind, start = data[place], place
        if kind == 0x21:
            place, blocks = _after_blocks(data, place + 2, blocks)
            metadata += place - start
        elif kind == 0x2C:
            left, top, across, down, flags = struct.unpack_from("<HHHHB", data, place + 1)
            if left + across > width or top + down > height:  # a decoder would enlarge the canvas
                raise BadImage("damaged")
            place, blocks = _after_blocks(data, place + 11 + _colours(flags), blocks)
            frames += 1
        else:
            raise BadImage("damaged")
    if not frames:
        raise BadImage("damaged")
    return Structure("gif", width, height, frames, place + 1, metadata, data[: place + 1])


def _colours(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, place: int, blocks: int) -> tuple[int, int]:
    """The place after a run of blocks, and how many the file has had by then; encoders fill them with 255 bytes."""
    while (size := data[place]) and blocks < _MOST_SEGMENTS:
        place, blocks = place + size + 1, blocks + 1
    if blocks >= _MOST_SEGMENTS:
        raise BadImage("too many blocks")
    return place + 1, blocks + 1


def _bmp(data: bytes) -> Structure:
    end, offset, header = struct.unpack_from("<I4xII", data, 2)
    if header == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    if header < 12 or not 14 + header <= offset <= end:
        raise BadImage("damaged")
    return Structure("bmp", width, abs(height), 1, end, 0, data[:end])


def _webp(data: bytes) -> Structure:
    size = struct.unpack_from("<I", data, 4)[0]
    end, place, frames, metadata = size + 8, 12, 0, 0
    if end > len(data):
        raise BadImage("truncated")
    for count in itertools.count():
        if place >= end:
            break
        if count > _MOST_SEGMENTS:
            raise BadImage("too many blocks")
        kind, length = struct.unpack_from("<4sI", data, place)
        if place + 8 + length > end:
            raise BadImage("damaged")
        frames += kind == b"ANMF"
        metadata += 0 if kind in _PIXELS_OF_WEBP else length
        place += 8 + length + length % 2
    width, height = _webp_size(data)
    return Structure("webp", width, height, max(1, frames), end, metadata, data[:end])


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise BadImage("damaged")


_WALKERS: dict[str, Callable[[bytes], Structure]] = {
    "png": _png,
    "jpeg": _jpeg,
    "gif": _gif,
    "bmp": _bmp,
    "webp": _webp,
}
