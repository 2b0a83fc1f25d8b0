"""safetensors, read by the parser that also checks it: the header must account for every byte of the data."""

import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aidefend.artifacts.files import unsafe
from aidefend.artifacts.limits import Limits
from aidefend.artifacts.tensor_plan import check_shape

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_FIELDS = {"dtype", "shape", "data_offsets"}
_CURE = "Write it again with safetensors.torch.save_file; the file was altered or is damaged"


class Stored(NamedTuple):
    """One tensor of the file: its type, shape and place in the data part."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Layout(NamedTuple):
    """Where the data part begins, and the tensors in it, in file order."""

    begin: int
    tensors: Mapping[str, Stored]


def read_layout(data: bytes, limits: Limits) -> Layout:
    """The header, checked against the data: names, types, shapes, and offsets without gap, overlap or rest."""
    begin = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or begin > len(data):
        raise unsafe("a header inside the file", "header length", begin - 8, "The file is cut; fetch it again")
    if begin - 8 > limits.max_header_bytes:
        cure = "Raise Limits(max_header_bytes=...) if this is right"
        raise unsafe(f"a header of at most {limits.max_header_bytes} bytes", "header length", begin - 8, cure)
    header = _read_json(data[8:begin])
    _check_metadata(header.pop("__metadata__", {}))
    if len(header) > limits.max_members:
        cure = "Raise Limits(max_members=...) if this is right"
        raise unsafe(f"at most {limits.max_members} tensors", "tensors", len(header), cure)
    tensors = {name: _read_entry(name, entry) for name, entry in header.items()}
    _check_tiling(tensors, len(data) - begin)
    return Layout(begin, tensors)


def load_layout(data: bytes, layout: Layout) -> dict[str, Tensor]:
    """The tensors, each in its own memory, in the order of the header."""
    return {name: _load_tensor(data, layout.begin, stored) for name, stored in layout.tensors.items()}


def _load_tensor(data: bytes, begin: int, stored: Stored) -> Tensor:
    raw = bytearray(memoryview(data)[begin + stored.start : begin + stored.stop])
    if not raw:
        return torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
    own = torch.frombuffer(raw, dtype=torch.uint8).clone()
    return own.view(stored.dtype).reshape(stored.shape)


def _read_json(raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise unsafe("a header that starts with {", "header", raw[:16], _CURE)
    try:
        text = raw.decode("utf-8")
        header = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_no_constant)
    except (ValueError, RecursionError) as error:
        raise unsafe("a header in JSON", "header", str(error)[:80], _CURE) from error
    checked: dict[str, Any] = header  # it starts with {
    return checked


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text[:20]} is no whole number")


def _check_metadata(metadata: Any) -> None:
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not texts:
        raise unsafe("metadata of texts", "__metadata__", type(metadata).__name__, _CURE)


def _read_entry(name: str, entry: Any) -> Stored:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise unsafe(f"exactly {sorted(_FIELDS)} for each tensor", f"entry {name}", entry, _CURE)
    if any(unicodedata.category(character)[0] == "C" for character in name):
        raise unsafe("names without control characters", "name", name, _CURE)
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise unsafe(f"a dtype among {', '.join(_DTYPES)}", f"dtype of {name}", entry["dtype"], "Convert it first")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise unsafe("shape and offsets in whole numbers", f"entry {name}", (shape, offsets), _CURE)
    check_shape(tuple(shape))
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        found = (shape, entry["dtype"], offsets)
        raise unsafe("as many bytes as shape and dtype need", f"entry {name}", found, _CURE)
    return Stored(dtype, tuple(shape), offsets[0], offsets[1])


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**60 for value in values)


def _check_tiling(tensors: Mapping[str, Stored], size: int) -> None:
    cursor = 0
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.stop)):
        if stored.start != cursor:
            raise unsafe("tensors without gap or overlap", "offset", stored.start, _CURE)
        cursor = stored.stop
    if cursor != size:
        raise unsafe(f"{cursor} bytes of data", "bytes", size, "The file is cut, or has bytes that no tensor uses")


def write_safetensors(state: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file: wide number types first, so that each tensor is aligned when mapped."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    parts = {name: _raw(tensor) for name, tensor in state.items()}
    order = sorted(state, key=lambda name: -state[name].dtype.itemsize)
    starts: dict[str, int] = {}
    cursor = 0
    for name in order:
        starts[name] = cursor
        cursor += len(parts[name])
    header = {
        name: {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], starts[name] + len(parts[name])],
        }
        for name, tensor in state.items()
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(parts[name] for name in order)])


def storable(dtype: torch.dtype) -> bool:
    """Whether safetensors has this number type."""
    return dtype in _DTYPES.values()


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
