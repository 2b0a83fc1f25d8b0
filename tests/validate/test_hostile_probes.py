"""Inputs that were made to break a specification: bombs in headers, shared memory, signalling NaN, endless blocks."""

import math
import struct
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from torch import Tensor

from aidefend.validate import ImageSpec, InputSpec, TableSpec
from aidefend.validate.table_columns import Column

EVERY = ImageSpec(("png", "jpeg", "gif", "bmp", "webp"))
GIF = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
FRAME = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02"


def bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def peak_of(work):
    """Result, and the most bytes that were allocated at once."""
    tracemalloc.start()
    result = work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return result, peak


@pytest.mark.parametrize(
    ("dtype", "integer", "bits"),
    [
        (torch.float32, torch.int32, 0x7F800001),
        (torch.float64, torch.int64, 0x7FF0000000000001),
        (torch.bfloat16, torch.int16, 0x7F81),
        (torch.float16, torch.int16, 0x7C01),
    ],
)
@pytest.mark.parametrize("rows", [3, 40_000])
def test_a_signalling_nan_costs_its_own_row_alone(dtype, integer, bits, rows):
    x = torch.full((rows, 3), 0.5).to(dtype)
    x.view(integer)[1, 1] = bits
    for bounds in ({}, {"low": 0.0, "high": 1.0}, {"low": (0.0,) * 3, "high": (1.0,) * 3}):
        result = InputSpec((3,), dtype, max_rows=50_000, **bounds).check(x)
        assert (~result.accepted).nonzero().flatten().tolist() == [1] and result.reasons[1] == ("input: not finite",)


@pytest.mark.parametrize("rows", [3, 40_000])
def test_denormals_are_seen_where_the_processor_flushes_them(rows):
    x = torch.full((rows, 3), 0.5)
    x.view(torch.int32)[1, 1] = 5
    torch.set_flush_denormal(True)
    try:
        result = InputSpec((3,), low=0.0, high=1.0, denormals="reject", max_rows=50_000).check(x)
    finally:
        torch.set_flush_denormal(False)
    assert (~result.accepted).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize(("dtype", "integer"), [(torch.float32, torch.int32), (torch.float64, torch.int64)])
@pytest.mark.parametrize("high", [1.0, 0.1, 255.0, 1e-40, 1e300])
def test_the_short_look_at_the_bits_decides_like_the_long_one(dtype, integer, high):
    """Ordinary numbers, both zeros, the neighbours of the limit, denormals, infinity, NaN: one beside clean rows."""
    spec = InputSpec((2,), dtype, 0.0, high, denormals="reject")
    long = InputSpec((2,), dtype, (0.0, 0.0), (high, high), denormals="reject")  # by column: no short look
    limit = torch.tensor(high, dtype=dtype)
    edge = limit.view(integer)
    near = torch.stack([edge - 1, edge, edge + 1, edge + 2**12]).view(dtype)
    others = torch.tensor([0.0, -0.0, high / 2, high * (1 + 9e-7), -1e-7, -1.0, math.inf, -math.inf, math.nan]).to(
        dtype
    )
    tiny = torch.tensor([1, 5, -(2**31) + 3 if dtype == torch.float32 else 3], dtype=integer).view(dtype)
    smallest = torch.tensor([torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny], dtype=dtype)
    seen = set()
    for value in torch.cat([near, others, tiny, smallest]):
        x = torch.full((3, 2), min(0.5, high / 2) if high > 1e-30 else 0.0, dtype=dtype)
        x[1, 0] = value
        assert spec.check(x).reasons == long.check(x).reasons, value
        seen.add(spec.check(x).reasons[1])
    assert len(seen) >= 3 and () in seen


class LiesAboutItsClass(Tensor):
    @property
    def __class__(self):
        return Tensor

    @classmethod
    def __torch_function__(cls, *_, **__):
        raise SystemExit("the code of a subclass ran")


@pytest.mark.parametrize(
    ("x", "fault"),
    [
        (torch.rand(1, 1).expand(2**40, 3), "too many rows"),
        (torch.rand(1, 3).expand(4, 3), "overlapping memory"),
        (torch.rand(8).unfold(0, 3, 1), "overlapping memory"),
        (torch.rand(9).as_strided((3, 3), (2, 1)), "overlapping memory"),
        (torch.rand(2, 3).as_subclass(LiesAboutItsClass), "not a plain tensor"),
        (torch.rand(2, 3).to_mkldnn(), "not a dense tensor"),
        (torch.zeros(3, 0), "wrong shape"),
        (torch.zeros(0, 4), "wrong shape"),
    ],
    ids=["huge", "stride 0", "sliding", "overlap", "subclass", "other layout", "no columns", "no rows, other columns"],
)
def test_the_header_alone_refuses(x, fault):
    assert InputSpec((3,), low=0.0, high=1.0).check(x).fault == f"input: {fault}"


def test_views_without_overlap_and_empty_batches_pass_whatever_their_strides():
    spec = InputSpec((3,), low=0.0, high=1.0)
    for x in (torch.rand(3, 3).T, torch.rand(6, 3)[::2], torch.rand(2, 6)[:, ::2], torch.zeros(0, 1).expand(0, 3)):
        assert spec.check(x).fault is None and spec.check(x).accepted.all()
    for row in range(3):  # and what lies behind such strides is read
        for view in (torch.rand(3, 3).T, torch.rand(6, 3)[::2]):
            view[row, 2] = 2.0
            assert (~spec.check(view).accepted).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.int64, -(2**63), 2**63 - 1), (torch.int8, -128, 127)])
def test_the_ends_of_an_integer_dtype_are_compared_exactly(dtype, low, high):
    x = torch.tensor([[low], [high], [5]], dtype=dtype)
    assert InputSpec((1,), dtype, low + 1, high).check(x).accepted.tolist() == [False, True, True]
    assert InputSpec((1,), dtype, low, high - 1).check(x).accepted.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("width", "height", "rule"),
    [
        (2**31 - 1, -(2**31), "too many pixels"),
        (1, -(2**31), "too many pixels"),
        (-1000, 30_000, "damaged"),
        (-1, -1, "damaged"),
        (0, 0, "damaged"),
    ],
)
def test_signs_and_sizes_in_a_header(width, height, rule):
    """A negative area among the files of a batch would make room under its cap for the others."""
    assert EVERY.check([bmp(width, height)]).reasons == ((f"input: {rule}",),)


@pytest.mark.parametrize(
    "file",
    [
        GIF + FRAME + b"\x01\x00" * 3_000_000 + b"\x00\x3b",
        GIF + b"\x21\xfe\x00" * 2_000_000 + b"\x3b",
        GIF + b"\x21\xfe\x01a\x00" * 1_200_000 + b"\x3b",
        b"RIFF" + struct.pack("<I", 4 + 8 * 700_000) + b"WEBP" + b"JUNK\0\0\0\0" * 700_000,
        b"\xff\xd8" + b"\xff" * 6_000_000 + b"\xd9",
    ],
    ids=["blocks of one byte", "empty comments", "short comments", "empty chunks", "fill bytes"],
)
def test_many_small_parts_cost_little(file):
    start = time.thread_time()
    result = EVERY.check([file])
    seconds = time.thread_time() - start
    assert result.reasons[0][0] in ("input: too many blocks", "input: damaged") and seconds < 1.0


def test_an_image_schema_accepts_what_may_be_an_image():
    jsonschema = pytest.importorskip("jsonschema")
    import base64
    import json

    spec = ImageSpec(("gif",), "L", max_bytes=100, max_rows=2)
    schema = json.loads(json.dumps(spec.to_json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    dot = base64.b64decode("R0lGODdhAQABAIAAAP///////ywAAAAAAQABAAACAkQBADs=")
    assert spec.check([dot, dot]).accepted.all()
    text = base64.b64encode(dot).decode()
    longest, longer = (base64.b64encode(bytes(n)).decode() for n in (100, 104))
    assert all(validator.is_valid(good) for good in ([], [text], [text, text], [longest]))
    assert not any(validator.is_valid(bad) for bad in (text, [text] * 3, [longer], [""], [3], [None], {"a": text}))


TEXTS = TableSpec({"a": Column("text", max_length=10)})


@pytest.mark.parametrize("form", ["dict", "structured"])
def test_one_text_that_all_rows_of_an_array_share_is_counted_for_each(form):
    shared = np.broadcast_to(np.array("x" * 100_000), (5_000,))
    if form == "structured":
        shared = np.broadcast_to(np.array(("x" * 100_000,), dtype=[("a", "U100000")]), (5_000,))
    result, peak = peak_of(lambda: TEXTS.check(shared if form == "structured" else {"a": shared}))
    assert result.fault == "input: too many bytes" and peak < 10**7


def arrow_bombs():
    """Columns of 5,000 rows over one text of a hundred thousand letters."""
    pa = pytest.importorskip("pyarrow")
    word = "x" * 100_000
    views = np.tile(np.frombuffer(struct.pack("<i4sii", len(word), b"xxxx", 0, 0), np.uint8), 5_000)
    buffers = [None, pa.py_buffer(views.tobytes()), pa.py_buffer(word.encode())]
    offsets = np.append(np.tile(np.array([0, len(word)], np.int32), 2_500), 0).astype(np.int32)
    return {
        "dictionary": pa.DictionaryArray.from_arrays(pa.array(np.zeros(5_000, np.int32)), pa.array([word])),
        "runs": pa.RunEndEncodedArray.from_arrays([5_000], [word]),
        "views": pa.Array.from_buffers(pa.string_view(), 5_000, buffers),
        "offsets": pa.StringArray.from_buffers(5_000, pa.py_buffer(offsets), pa.py_buffer(word.encode())),
        "offsets outside": pa.StringArray.from_buffers(
            2, pa.py_buffer(np.array([0, 2**20, 1], np.int32)), pa.py_buffer(b"x")
        ),
    }


@pytest.mark.parametrize("name", ["dictionary", "runs", "views", "offsets", "offsets outside"])
@pytest.mark.parametrize("form", ["arrow", "pandas"])
def test_rows_of_arrow_that_share_memory_are_not_copied(name, form):
    """Planted violation: `to_pylist` makes half a gigabyte of these columns, or reads memory of others."""
    column = arrow_bombs()[name]
    table = sys.modules["pyarrow"].table({"a": column})
    if form == "pandas":
        pandas = pytest.importorskip("pandas")
        if name in ("runs", "views"):
            pytest.skip("pandas has no such column")
        table = pandas.DataFrame({"a": pandas.arrays.ArrowExtensionArray(table["a"])})
    result, peak = peak_of(lambda: TEXTS.check(table))
    assert not result.accepted.any() and peak < 2 * 10**7
    loose = TableSpec({"b": Column("integer")}, extra="drop")
    assert (
        loose.check(table.assign(b=1) if form == "pandas" else table.append_column("b", [[1] * len(column)]))
        is not None
    )


def wide_tables(rows, columns):
    """One good column beside many that nobody named, in every form; a bit in arrow is a pointer in a list."""
    pa, pandas = pytest.importorskip("pyarrow"), pytest.importorskip("pandas")
    bits = pa.array(np.zeros(rows, bool))
    arrow = pa.table({"a": pa.array([1] * rows)} | {f"c{i}": bits for i in range(columns)})
    dictionary = pandas.Series(["x"] * rows, dtype="category")
    return {
        "arrow": arrow,
        "pandas": pandas.DataFrame({"a": [1] * rows} | {f"c{i}": dictionary for i in range(columns)}),
        "rows": [{"a": 1, f"c{i % columns}": None} for i in range(rows)],
    }


@pytest.mark.parametrize("form", ["arrow", "pandas", "rows"])
@pytest.mark.parametrize("extra", ["reject", "drop"])
def test_columns_that_nobody_named_are_never_converted(form, extra):
    """Planted violation: 2,000 columns of 5,000 bits are 1 MB in arrow and 80 MB as lists."""
    table = wide_tables(5_000, 2_000)[form]
    result, peak = peak_of(lambda: TableSpec({"a": Column("integer")}, extra=extra).check(table))
    assert (result.fault is None) == (extra == "drop") and peak < 10**7
    assert result.fault in (None, "input: columns that are not named")


def test_columns_of_arrow_are_read_as_before():
    pa = pytest.importorskip("pyarrow")
    words = pa.array(["a", None, "b", "a"])
    spec = TableSpec({"a": Column("category", categories=("a", "b"), missing="accept")}, extra="drop")
    nested = pa.array([[1], [2], [], None])
    for column in (words, words.dictionary_encode(), words.cast(pa.large_string()), words.cast(pa.string_view())):
        for table in (pa.table({"a": column, "other": nested}), pa.table({"a": column, "other": nested})[1:]):
            assert list(spec.check(table).x["a"]) == words.to_pylist()[-len(table) :]
    dates = TableSpec({"a": Column("number")}).check(pa.table({"a": pa.array([0, 1], pa.date32())}))
    assert dates.fault is None and dates.reasons == (("input: column 'a': not of kind number",),) * 2
