"""`ImageSpec`: nothing is decoded before its caps hold, by no decoder but the named one; pixels come in one layout."""

import io
import random
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from aidefend import ConfigurationError
from aidefend.validate import ImageSpec
from aidefend.validate.image_structure import png_lacks_pixels, read_structure, sniff

FORMATS = ("png", "jpeg", "gif", "bmp", "webp")
ALL = ImageSpec(formats=FORMATS)
PIXELS = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3) * 2  # height 6, width 5


LOSSLESS = {"webp": {"lossless": True}}


def encoded(kind="png", pixels=PIXELS, mode=None, **options):
    image = Image.fromarray(pixels)
    image = image.convert(mode) if mode else image
    buffer = io.BytesIO()
    image.save(buffer, kind.upper(), **{**LOSSLESS.get(kind, {}), **options})
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, content=b"", *, before=(), depth=8, colour=0):
    """A PNG from its parts: the header may say whatever it likes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    )


def reason(image, spec=ALL):
    result = spec.check([image])
    assert result.fault is None and (len(result.x) == 1) == bool(result.accepted[0]) == (result.reasons == ((),))
    return result.reasons[0]


@pytest.mark.parametrize("kind", ["png", "bmp", "webp"])
def test_pixels_come_back_exactly_channels_first(kind):
    result = ALL.check([encoded(kind)])
    assert result.accepted.all() and result.x[0].dtype == torch.uint8 and result.x[0].is_contiguous()
    assert torch.equal(result.x[0], torch.from_numpy(PIXELS).permute(2, 0, 1))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_structure_is_what_the_decoder_says(kind):
    for mode in ("RGB", "L"):
        file = encoded(kind, mode=mode)
        found = read_structure(file)
        assert (found.format, found.width, found.height, found.frames, found.end) == (kind, 5, 6, 1, len(file))
        assert reason(file) == () and ImageSpec(formats=(kind,), mode="L").check([file]).x[0].shape == (1, 6, 5)
    assert read_structure(encoded("webp", lossless=False)).width == 5
    assert read_structure(encoded("jpeg", progressive=True)).height == 6


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_that_is_not_named_is_refused_whatever_it_is_called(kind):
    others = tuple(one for one in FORMATS if one != kind)
    assert reason(encoded(kind), ImageSpec(formats=others)) == ("input: format is not allowed",)
    assert sniff(encoded(kind)) == kind


@pytest.mark.parametrize("kind", FORMATS)
def test_every_cut_of_a_file_is_refused(kind):
    file = encoded(kind)
    for end in range(len(file)):
        assert reason(file[:end]) != (), end


@pytest.mark.parametrize("kind", FORMATS)
def test_data_after_the_image_follows_its_policy(kind):
    file = encoded(kind)
    assert reason(file + b"PK\x03\x04 a second file") == ("input: data after the image",)
    assert reason(file + b"\0", ImageSpec(FORMATS, trailing="quarantine")) == ("quarantine: data after the image",)
    clipped = ImageSpec(FORMATS, trailing="clip").check([file + b"<script>"])
    assert torch.equal(clipped.x[0], ALL.check([file]).x[0])


@pytest.mark.parametrize(
    ("file", "rule"),
    [
        (b"", "input: unknown image format"),
        (b"PK\x03\x04", "input: unknown image format"),
        (b"<svg/>", "input: unknown image format"),
        (b"#!" + encoded(), "input: unknown image format"),
        ("text", "input: not bytes"),
        (bytearray(encoded()), "input: not bytes"),
        (None, "input: not bytes"),
        (png(2**31 - 1, 2**31 - 1), "input: too many pixels"),
        (png(5000, 5000, b"\0" * 10), "input: too many pixels"),
        (png(0, 5), "input: damaged"),
        (png(4, 4, b"\0" * 19), "input: truncated"),  # fewer pixels than the header says: Pillow fills them
        (png(4, 4, before=[chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))]), "input: damaged"),
        (png(4, 4, before=[chunk(b"EVIL", b"")]), "input: damaged"),
        (encoded().replace(b"IDAT", b"IDAX"), "input: damaged"),
        (encoded()[:-4] + b"0000", "input: damaged"),  # a wrong checksum
        (encoded("jpeg")[:2] + encoded("jpeg"), "input: damaged"),
        (
            encoded("png", np.zeros((4, 4), np.uint16)),
            "input: more than 8 bits a channel",
        ),
        (encoded("jpeg", mode="CMYK"), "input: header and decoder disagree, or a colour mode without 8-bit form"),
    ],
    ids=range(18),
)
def test_what_is_no_such_image_is_refused_with_its_reason(file, rule):
    assert reason(file, ImageSpec(FORMATS, max_pixels=4_000_000)) == (rule,)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_refused_in_every_colour_type(colour, channels):
    """Planted violation: Pillow drops the lower half of two of these kinds and more, and says nothing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + bytes(range(4 * channels))))
    file = b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
    assert reason(file, ImageSpec(FORMATS)) == ("input: more than 8 bits a channel",)


def test_bombs_are_refused_before_anything_is_decoded(monkeypatch):
    def never(*_, **__):
        raise AssertionError("a decoder ran")

    monkeypatch.setattr("aidefend.validate.image_spec.decode", never)
    rows = np.zeros((5000, 5000), np.uint8).tobytes()
    bombs = [
        png(5000, 5000, b"\0" + rows),
        encoded("jpeg", np.zeros((5000, 5000), np.uint8)),
        encoded("gif", np.zeros((5000, 5000), np.uint8)),
    ]
    assert all(len(bomb) < 500_000 for bomb in bombs)
    result = ImageSpec(FORMATS, max_pixels=2**24).check(bombs)
    assert result.reasons == (("input: too many pixels",),) * 3


def test_frames_scans_and_metadata_are_counted_before_decoding():
    frames = [Image.fromarray(PIXELS + i) for i in range(3)]
    for kind in ("png", "gif", "webp"):
        buffer = io.BytesIO()
        frames[0].save(
            buffer, kind.upper(), save_all=True, append_images=frames[1:], duration=9, **LOSSLESS.get(kind, {})
        )
        assert read_structure(buffer.getvalue()).frames == 3
        assert reason(buffer.getvalue()) == ("input: too many frames",)
        assert reason(buffer.getvalue(), ImageSpec(FORMATS, max_frames=3)) == ()
    file = encoded("jpeg", progressive=True)
    start = file.index(b"\xff\xda")
    scan = file[start : file.index(b"\xff", start + 20)]
    assert reason(file[:-2] + scan * 200 + file[-2:]) == ("input: too many scans",)
    small = ImageSpec(FORMATS, max_metadata_bytes=100)
    for kind in ("png", "jpeg", "webp"):
        assert reason(encoded(kind, exif=b"Exif\0\0" + b"x" * 300), small) == ("input: too much metadata",)
    assert reason(encoded("gif", comment=b"x" * 300), small) == ("input: too much metadata",)


def test_further_pictures_in_a_jpeg_are_data_after_the_image():
    """Photographs of phones hold several pictures, which Pillow would open as a format that nobody allowed."""
    first, second = (Image.new("RGB", (9, 5), colour) for colour in ("red", "blue"))
    out = io.BytesIO()
    first.save(out, "MPO", save_all=True, append_images=[second], quality=95)
    assert ImageSpec().check([out.getvalue()]).reasons == (("input: data after the image",),)
    result = ImageSpec(trailing="clip").check([out.getvalue()])
    assert result.reasons == ((),) and result.x[0].shape == (3, 5, 9)
    assert result.x[0][0].min() > 240 and result.x[0][2].max() < 15


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_metadata_has_the_same_pixels(mode, progressive):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)).convert(mode)
    extras = {"icc_profile": b"p" * 70_000, "comment": b"c" * 500, "exif": b"Exif\0\0" + bytes(50)}
    out = io.BytesIO()
    picture.save(out, "JPEG", progressive=progressive, restart_marker_rows=1, **extras)
    found = read_structure(out.getvalue())
    assert found.metadata > 70_000 and len(found.core) < len(out.getvalue()) - 70_000 and b"cccc" not in found.core
    whole, core = (np.array(Image.open(io.BytesIO(data))) for data in (out.getvalue(), found.core))
    assert (whole == core).all()


def test_compressed_metadata_of_a_png_never_reaches_the_decoder():
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 20_000_000, 9))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 20_000_000, 9))
    started = time.perf_counter()
    assert reason(png(4, 4, b"\0" * 20, before=[bomb, profile])) == ()
    assert time.perf_counter() - started < 2
    core = read_structure(png(4, 4, b"\0" * 20, before=[bomb, profile])).core
    assert b"zTXt" not in core and b"iCCP" not in core


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (5, 5), (8, 9), (33, 17)])
@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (8, 0), (8, 2), (4, 3), (8, 4), (8, 6)])
def test_the_length_of_interlaced_and_plain_pixel_data_is_exact(width, height, depth, colour):
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    plain = height * (1 + (width * bits + 7) // 8)
    woven = 0
    for x, y, across, down in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        columns, rows = len(range(x, width, across)), len(range(y, height, down))
        woven += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    for interlaced, length in ((0, plain), (1, woven)):
        for given_length, lacks in ((length, False), (length - 1, True), (length + 9, False)):
            file = bytearray(png(width, height, b"\0" * given_length, depth=depth, colour=colour))
            file[28] = interlaced
            file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
            assert png_lacks_pixels(bytes(file)) == lacks


def test_pixel_data_without_end_is_unpacked_no_further_than_the_header_says():
    bomb = png(4, 4, b"\0" * 50_000_000)
    tracemalloc.start()
    assert reason(bomb) == ()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_frame_of_a_gif_may_not_leave_its_canvas():
    file = bytearray(encoded("gif"))
    place = file.index(b"\x2c\0\0\0\0")
    file[place + 5 : place + 9] = struct.pack("<HH", 60_000, 60_000)
    assert reason(bytes(file)) == ("input: damaged",)


def test_batches_are_capped_by_files_bytes_and_pixels():
    file = encoded()
    assert ImageSpec(max_rows=2).check([file] * 3).fault == "input: too many rows"
    assert ImageSpec(max_batch_bytes=2 * len(file)).check([file] * 3).fault == "input: too many bytes"
    assert ImageSpec(max_batch_pixels=89).check([file] * 3).fault == "input: too many pixels"
    assert ImageSpec(max_batch_pixels=90).check([file] * 3).accepted.all()
    assert reason(file, ImageSpec(max_bytes=len(file) - 1)) == ("input: too many bytes",)
    for no_list in (file, None, {file}, iter([file])):
        assert ALL.check(no_list).fault == "input: not a list of files"


def test_rules_without_a_policy_of_their_own_have_one_together(tmp_path):
    good = encoded("png")
    files = [b"text", good[:-3], good + b"#", encoded("gif"), "no bytes", encoded(pixels=PIXELS[:2]), good]
    spec = ImageSpec(("png",), height=6, otherwise="quarantine")
    kept, rejected = spec.check(files), ImageSpec(("png",), height=6).check(files)
    assert kept.quarantined.tolist() == [True, True, False, True, True, True, False]
    assert torch.equal(kept.accepted, rejected.accepted) and not rejected.quarantined.any()
    assert kept.reasons[2] == ("input: data after the image",) and kept.reasons[5] == ("quarantine: wrong size",)
    spec.save(tmp_path / "rules")
    assert ImageSpec.load(tmp_path / "rules") == spec
    with pytest.raises(ConfigurationError, match="otherwise"):
        ImageSpec(otherwise="clip")


def test_one_bad_file_changes_nothing_for_its_batch_mates():
    files = [encoded(), b"\x89PNG\r\n\x1a\n", encoded("bmp"), png(4, 4, b"\0")]
    result = ALL.check(files)
    assert result.accepted.tolist() == [True, False, True, False]
    assert torch.equal(result.x[0], result.x[1]) and len(result.x) == 2


def test_transparency_is_laid_on_a_stated_ground():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0], pixels[0, 0, 3] = 200, 255  # one opaque red pixel; what is under the others is red as well
    file = encoded("png", pixels)
    assert ALL.check([file]).x[0][:, 0].tolist() == [[200, 255], [0, 255], [0, 255]]
    assert ImageSpec(alpha="black").check([file]).x[0][0].tolist() == [[200, 0], [0, 0]]
    assert reason(file, ImageSpec(alpha="reject")) == ("input: transparent",)
    pixels[..., 3] = 255
    assert reason(encoded("png", pixels), ImageSpec(alpha="reject")) == ()
    grey = np.stack([np.full((2, 2), 9, np.uint8), np.zeros((2, 2), np.uint8)], axis=2)
    assert ImageSpec(mode="L").check([encoded("png", grey)]).x[0].tolist() == [[[255, 255], [255, 255]]]


def test_orientation_is_applied_or_ignored_as_stated():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    for kind in ("png", "jpeg"):
        file = encoded(kind, exif=exif)
        assert ALL.check([file]).x[0].shape == (3, 5, 6)
        assert ImageSpec(FORMATS, orientation="ignore").check([file]).x[0].shape == (3, 6, 5)
        assert reason(file, ImageSpec(FORMATS, height=5, width=6)) == ()
        assert reason(file, ImageSpec(FORMATS, height=6, width=5)) == ("input: wrong size",)
    plain = encoded()
    assert reason(plain, ImageSpec(height=5, width=6)) == ("input: wrong size",)
    assert reason(plain, ImageSpec(height=(1, 6), width=(5, 9))) == ()
    assert torch.equal(ALL.check([encoded("png", exif=exif)]).x[0], ALL.check([plain]).x[0].rot90(-1, (1, 2)))


def test_an_application_that_loads_cut_files_gets_refusals(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert reason(encoded()) == ("input: Pillow is set to load truncated images",)


@given(st.sampled_from(FORMATS), st.integers(0, 2**32), st.integers(1, 8))
def test_damaged_bytes_never_raise_and_never_change_the_size(kind, seed, changes):
    draw = random.Random(seed)
    file = bytearray(encoded(kind))
    for _ in range(changes):
        file[draw.randrange(len(file))] = draw.randrange(256)
    spec = ImageSpec(FORMATS, max_pixels=10_000, max_frames=5)
    result = spec.check([bytes(file)])
    assert result.fault is None and len(result.reasons) == 1
    assert all(image.shape[1] * image.shape[2] <= 10_000 and image.shape[0] == 3 for image in result.x)


@given(
    st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFF\x20\0\0\0WEBP", b""]),
    st.binary(max_size=80),
)
def test_any_bytes_get_a_verdict(head, tail):
    assert len(ALL.check([head + tail]).reasons) == 1


def test_infer_accepts_what_it_saw():
    files = [encoded(), encoded("jpeg"), encoded("png", PIXELS[:5])]
    spec = ImageSpec.infer(files)
    assert spec.check(files).accepted.all()
    assert (spec.formats, spec.mode, spec.height, spec.width, spec.max_pixels) == (
        ("png", "jpeg"),
        "RGB",
        (5, 6),
        5,
        30,
    )
    assert ImageSpec.infer([encoded(mode="L")]).mode == "L"
    for bad in ([], encoded(), [b"x"], [encoded() + b"x"], None):
        with pytest.raises(ConfigurationError):
            ImageSpec.infer(bad)


def test_to_tensor_feeds_a_guard():
    spec = ImageSpec(height=6, width=5)
    x = spec.to_tensor(spec.check([encoded(), encoded("jpeg")]).x)
    assert x.shape == (2, 3, 6, 5) and x.dtype == torch.float32 and 0 <= float(x.min()) <= float(x.max()) <= 1
    for bad in ([], [torch.zeros(2)], [torch.zeros(1, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)], None):
        with pytest.raises(ConfigurationError):
            spec.to_tensor(bad)


def test_rules_survive_a_file(tmp_path):
    spec = ImageSpec(("gif",), "L", (1, 9), 7, 1000, 99, 3, 10, 5, 2000, 500, "clip", "black", "ignore")
    spec.save(tmp_path / "spec.json")
    assert ImageSpec.load(tmp_path / "spec.json") == spec
    for change in ({"extra": 1}, {"formats": "png"}, {"formats": ["tiff"]}, {"height": [1, 2, 3]}, {"max_bytes": "9"}):
        with pytest.raises(ConfigurationError):
            ImageSpec.from_dict({**spec.to_dict(), **change})


@pytest.mark.parametrize(
    "arguments",
    [
        {"formats": ()},
        {"formats": ("svg",)},
        {"mode": "RGBA"},
        {"height": 0},
        {"width": (5, 4)},
        {"max_frames": 0},
        {"alpha": "keep"},
        {"trailing": "accept"},
        {"orientation": True},
    ],
)
def test_contradictory_rules_are_refused(arguments):
    with pytest.raises(ConfigurationError):
        ImageSpec(**arguments)
