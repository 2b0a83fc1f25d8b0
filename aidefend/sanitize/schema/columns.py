"""Raw columns read without trusting a single value: what kind each entry is, its number or text, and its hash."""

import datetime
import hashlib
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from aidefend._core.checks import refuse

KINDS = ("missing", "flag", "whole", "real", "text", "binary", "array", "time", "other")
_CODE = {kind: code for code, kind in enumerate(KINDS)}
_MISSING_HASH = 0x9E3779B97F4A7C15
_EXACT = 2.0**53  # above it, neighbouring whole numbers share a float
MOST_FEATURES = 64  # of an array column (N, d) that become columns of their own

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]
Codes = np.ndarray[tuple[int], np.dtype[np.int8]]
Hashes = np.ndarray[tuple[int], np.dtype[np.uint64]]


class Column(NamedTuple):
    """The entries of one column, all (n,).

    `kinds` holds places in KINDS; `numbers` is NaN where the entry is none; `texts` and `shapes` are None where no
    entry is a text or an array. Columns that were derived from another one carry its name in `of`.
    """

    kinds: Codes
    numbers: Numbers
    hashes: Hashes
    texts: Sequence[str | None] | None = None
    shapes: Sequence[str | None] | None = None
    of: str = ""

    def is_kind(self, *kinds: str) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """(n,) bool: the entry is of one of these kinds."""
        return np.isin(self.kinds, [_CODE[kind] for kind in kinds])


def read_columns(raw: Mapping[str, Any]) -> dict[str, Column]:
    """All columns of a table, arrays split into their features or described by derived columns."""
    return dict(item for name, values in raw.items() for item in _read(name, values))


def _read(name: str, raw: Any) -> Iterator[tuple[str, Column]]:
    values = _as_array(raw)
    if values is not None and values.ndim == 2 and values.shape[1] <= MOST_FEATURES and values.dtype.kind in "biuf":
        yield from ((f"{name}[{j}]", _of_vector(values[:, j])) for j in range(values.shape[1]))
    elif values is not None and values.ndim > 1:
        yield name, _of_arrays(list(values))
        yield from _described(name, values)
    elif values is not None and values.dtype.kind in "biufM":
        yield name, _of_vector(values)
    else:
        column = _of_objects(list(raw) if values is None else values.tolist())
        yield name, column
        if column.texts is not None:
            yield f"{name}.length", _lengths(column, name)


def _as_array(raw: Any) -> "np.ndarray[Any, Any] | None":
    """The column as one array of one dtype, where it is one."""
    if isinstance(raw, Tensor):
        values = raw.detach().cpu()
        try:
            return (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
        except (TypeError, RuntimeError) as error:
            raise refuse("tensors that numpy can hold", "batches", raw, "Convert them to a plain dtype") from error
    if isinstance(raw, np.ndarray):
        return raw if raw.dtype.kind != "O" or raw.ndim > 1 else _stacked(raw.tolist())
    return _stacked(raw)


def _stacked(raw: Sequence[Any]) -> "np.ndarray[Any, Any] | None":
    """A list of equally shaped arrays, or of plain numbers, as one array; None for all else."""
    kinds = {type(value) for value in raw}
    if kinds and kinds <= {float} | {int}:
        return _numbers_of(raw) if kinds == {float} or _all_exact(raw) else None
    if not kinds or not kinds <= {list, tuple, np.ndarray, Tensor}:
        return None
    try:
        arrays = [np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value) for value in raw]
    except (TypeError, ValueError, RuntimeError):
        return None
    forms = {(array.dtype, array.shape) for array in arrays}
    return np.stack(arrays) if len(forms) == 1 and arrays[0].dtype.kind in "biuf" else None


def _all_exact(raw: Sequence[Any]) -> bool:
    return all(-_EXACT <= value <= _EXACT for value in raw if isinstance(value, int))


def _numbers_of(raw: Sequence[Any]) -> Numbers:
    return np.array(raw, dtype=np.float64)


def _of_vector(values: "np.ndarray[Any, Any]") -> Column:
    """Numbers, flags or times of one dtype: no loop over the entries."""
    if values.dtype.kind == "M":
        missing = np.isnat(values)
        kinds = np.where(missing, _CODE["missing"], _CODE["time"]).astype(np.int8)
        hashes = values.astype("datetime64[ns]").astype(np.int64).astype(np.uint64)
        return Column(kinds, np.full(len(values), np.nan), np.where(missing, np.uint64(_MISSING_HASH), hashes))
    numbers = values.astype(np.float64)
    kinds = np.full(len(values), _CODE["flag" if values.dtype.kind == "b" else "whole"], dtype=np.int8)
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            kinds[numbers != np.floor(numbers)] = _CODE["real"]
        kinds[np.isinf(numbers)] = _CODE["real"]
        kinds[np.isnan(numbers)] = _CODE["missing"]
    hashes = _bits(numbers)
    if values.dtype.kind in "iu":
        large = np.abs(numbers) > _EXACT
        hashes[large] = values[large].astype(np.uint64)
    return Column(kinds, numbers, hashes)


def _bits(numbers: Numbers) -> Hashes:
    """One word for each number: 0 and -0 alike, every NaN a missing entry."""
    words: Hashes = (numbers + 0.0).view(np.uint64).copy()
    words[np.isnan(numbers)] = np.uint64(_MISSING_HASH)
    return words


def _of_arrays(values: Sequence[Any]) -> Column:
    n = len(values)
    hashes = np.array([_hash_array(value) for value in values], dtype=np.uint64)
    shapes = [f"{value.dtype} {tuple(value.shape)}" for value in values]
    return Column(np.full(n, _CODE["array"], dtype=np.int8), np.full(n, np.nan), hashes, shapes=shapes)


def _described(name: str, values: "np.ndarray[Any, Any]") -> Iterator[tuple[str, Column]]:
    """What stands for an image or a signal in tests of ranges and drift: four numbers a row."""
    if values.dtype.kind not in "biuf" or not values[:1].size:
        return
    flat = values.reshape(len(values), -1).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        described = {
            "mean": flat.mean(axis=1),
            "deviation": flat.std(axis=1),
            "low": flat.min(axis=1),
            "high": flat.max(axis=1),
        }
    for kind, numbers in described.items():
        yield f"{name}.{kind}", _of_vector(numbers)._replace(of=name)


def _lengths(column: Column, name: str) -> Column:
    texts = column.texts or ()
    numbers = np.array([math.nan if text is None else len(text) for text in texts], dtype=np.float64)
    return _of_vector(numbers)._replace(of=name)


def _of_objects(values: Sequence[Any]) -> Column:
    """Entry by entry, for texts and mixed columns; nothing that an entry is or raises gets out."""
    n = len(values)
    kinds, numbers = np.zeros(n, dtype=np.int8), np.full(n, np.nan)
    hashes = np.full(n, _MISSING_HASH, dtype=np.uint64)
    texts: list[str | None] = [None] * n
    shapes: list[str | None] = [None] * n
    for row, value in enumerate(values):
        kind, entry = _classified(value)
        kinds[row] = _CODE[kind]
        if kind in ("flag", "whole", "real"):
            numbers[row], hashes[row] = _number(entry), _hash_number(entry)
        elif kind == "text":
            texts[row], hashes[row] = entry, _hash_text(entry)
        elif kind == "binary":
            hashes[row] = _hash(b"binary", bytes(entry))
        elif kind == "array":
            shapes[row], hashes[row] = f"{entry.dtype} {tuple(entry.shape)}", _hash_array(entry)
        elif kind == "time":
            hashes[row] = _hash_time(entry)
        elif kind != "missing":
            hashes[row] = _hash(kind.encode(), _words(entry).encode("utf-8", "surrogatepass"))
    has_text, has_shape = bool((kinds == _CODE["text"]).any()), bool((kinds == _CODE["array"]).any())
    return Column(kinds, numbers, hashes, texts if has_text else None, shapes if has_shape else None)


def _classified(value: Any) -> tuple[str, Any]:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return "missing", None
    if isinstance(value, str):
        return "text", str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return "binary", value
    if isinstance(value, Tensor | np.ndarray | list | tuple):
        return _classified_array(value)
    if isinstance(value, np.datetime64) or hasattr(value, "isoformat"):
        return "time", value
    return _classified_number(value)


def _classified_number(value: Any) -> tuple[str, Any]:
    if isinstance(value, bool | np.bool_):
        return "flag", bool(value)
    if isinstance(value, int | np.integer):
        return "whole", int(value)
    try:  # Decimal, Fraction, float16: numbers of other makes; complex numbers and objects are none
        number = float(value) if isinstance(value, float | np.floating) or hasattr(value, "as_integer_ratio") else None
    except Exception:
        return "other", value
    if number is None:
        return "other", value
    if math.isnan(number):
        return "missing", None
    return ("whole" if number.is_integer() else "real"), number


def _classified_array(value: Any) -> tuple[str, Any]:
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        return "other", type(value).__name__
    if array.ndim == 0:
        return _classified(array.item())
    return ("array", array) if array.dtype.kind in "biufcUS" else ("other", value)


def _number(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _hash_number(value: Any) -> int:
    number = _number(value)
    if isinstance(value, int) and not -_EXACT <= value <= _EXACT:
        return value % 2**64 if -(2**63) <= value < 2**64 else _hash(b"whole", str(value).encode())
    return int(_bits(np.array([number]))[0])


def _hash_text(text: str) -> int:
    """The same for an accent on its letter and behind it: a reader sees no difference."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return _hash(b"text", composed.encode("utf-8", "surrogatepass"))


def _hash_time(value: Any) -> int:
    """Nanoseconds since 1970 in UTC, as for whole columns of times; the words of what is no date."""
    try:
        if getattr(value, "tzinfo", None) is not None:
            value = value.astimezone(datetime.timezone.utc).replace(tzinfo=None)
        moment = np.datetime64(value).astype("datetime64[ns]").astype(np.int64)
        return int(moment) % 2**64
    except Exception:  # times of day, dates of other calendars, objects that merely have isoformat
        return _hash(b"time", _words(value).encode("utf-8", "surrogatepass"))


def _hash_array(value: "np.ndarray[Any, Any]") -> int:
    return _hash(f"{value.dtype}{tuple(value.shape)}".encode(), np.ascontiguousarray(value).tobytes())


def _hash(header: bytes, data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(header + b"\x00" + data, digest_size=8).digest(), "little")


def _words(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # a hostile or half-built object
        return type(value).__name__


def row_hashes(columns: Mapping[str, Column], names: Sequence[str], rows: int, key: bytes) -> Hashes:
    """One keyed word for each row over these columns, in this order; an absent column counts as missing."""
    absent = np.full(rows, _MISSING_HASH, dtype=np.uint64)
    parts = [columns[name].hashes if name in columns else absent for name in names]
    matrix = np.ascontiguousarray(np.stack(parts, axis=1) if parts else absent[:, None]).astype("<u8")
    words = [hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in matrix]
    found: Hashes = np.frombuffer(b"".join(words), dtype="<u8").astype(np.uint64)
    return found
