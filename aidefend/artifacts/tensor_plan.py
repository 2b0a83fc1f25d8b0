"""Storages and tensors as a checkpoint describes them, judged against the bytes that are there."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from aidefend.artifacts.files import unsafe

_KEY = re.compile(r"0|[1-9][0-9]{0,17}")
_LOCATION = re.compile(r"[a-z]{2,16}(:[0-9]{1,4})?")
_MAX_ELEMENTS = 2**60
_MAX_DIMENSIONS = 64
_OWN_COPY = "Save tensor.clone() or tensor.contiguous() instead of a view"
_ALTERED = "The file was altered or is damaged; fetch it again"


@dataclasses.dataclass(frozen=True)
class StorageType:
    """A storage class of torch: its number type, or None for raw bytes."""

    dtype: torch.dtype | None


@dataclasses.dataclass(frozen=True)
class StoragePlan:
    """One stored array: its key in the archive, its number type (None: raw bytes), its length in bytes."""

    key: str
    dtype: torch.dtype | None
    nbytes: int


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """A strided view of one storage that stays inside it and holds no element twice."""

    storage: StoragePlan
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    conj: bool = False
    neg: bool = False
    parameter: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_storage(identifier: Any, sizes: Mapping[str, int]) -> StoragePlan:
    """The storage that a persistent id names: ("storage", type, key, location, number of elements)."""
    if type(identifier) is not tuple or len(identifier) != 5 or identifier[0] != "storage":
        raise unsafe("persistent ids of storages only", "persistent id", identifier, _ALTERED)
    _, kind, key, location, count = identifier
    typed = type(kind) is StorageType and type(key) is str and type(location) is str and type(count) is int
    if not typed or not _KEY.fullmatch(key) or not _LOCATION.fullmatch(location) or count < 0:
        raise unsafe("(type, key, location, count) of a storage", "persistent id", identifier, _ALTERED)
    nbytes = count * (1 if kind.dtype is None else kind.dtype.itemsize)
    if key not in sizes or sizes[key] != nbytes:
        raise unsafe(f"{nbytes} bytes in data/{key}", "bytes", sizes.get(key, "missing"), _ALTERED)
    return StoragePlan(key, kind.dtype, nbytes)


def plan_tensor(storage: Any, dtype: torch.dtype | None, view: tuple[Any, ...], extra: tuple[Any, ...]) -> TensorPlan:
    """A tensor from the arguments of a rebuild function; `view` is (offset, size, stride, requires_grad)."""
    offset, shape, stride, requires_grad = view
    if type(storage) is not StoragePlan or (storage.dtype is None) == (dtype is None):
        raise unsafe("a tensor over a storage of its type", "storage", storage, _ALTERED)
    kind: Any = dtype or storage.dtype
    if type(offset) is not int or type(requires_grad) is not bool or not _whole(shape) or not _whole(stride):
        raise unsafe("offset, size and stride of a tensor", "view", view, _ALTERED)
    _check_view(storage.nbytes // kind.itemsize, offset, shape, stride)
    if requires_grad and not (kind.is_floating_point or kind.is_complex):
        raise unsafe("gradients of floating point tensors only", "dtype", kind, _ALTERED)
    conj, neg = _read_bits(extra, kind)
    return TensorPlan(storage, kind, offset, shape, stride, requires_grad, conj, neg)


def plan_parameter(tensor: Any, requires_grad: Any) -> TensorPlan:
    """A parameter around a planned tensor."""
    if type(tensor) is not TensorPlan or tensor.parameter or tensor.requires_grad or type(requires_grad) is not bool:
        raise unsafe("a parameter over a plain tensor", "tensor", tensor, _ALTERED)
    if requires_grad and not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        raise unsafe("gradients of floating point parameters only", "dtype", tensor.dtype, _ALTERED)
    return dataclasses.replace(tensor, requires_grad=requires_grad, parameter=True)


def check_shape(shape: tuple[int, ...]) -> None:
    """Dimensions whose product fits, also when one of them is zero."""
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise unsafe(f"at most {_MAX_DIMENSIONS} dimensions and 2^60 elements", "shape", shape, _ALTERED)


def _whole(sizes: Any) -> bool:
    return type(sizes) is tuple and all(type(size) is int and 0 <= size < 2**62 for size in sizes)


def _check_view(length: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    check_shape(shape)
    if len(shape) != len(stride) or not 0 <= offset <= length:
        raise unsafe("a view inside its storage", "view", (offset, shape, stride), _ALTERED)
    if 0 in shape:
        return
    reach = 0
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
        if step <= reach:
            raise unsafe("tensors that store each element once", "strides", (shape, stride), _OWN_COPY)
        reach += step * (size - 1)
    if offset + reach >= length:
        raise unsafe(f"a view inside its {length} stored elements", "view", (offset, shape, stride), _ALTERED)


def _read_bits(extra: tuple[Any, ...], dtype: torch.dtype) -> tuple[bool, bool]:
    """The conjugate and negative bits of lazily conjugated views."""
    bits = extra[0] if extra else None
    if bits is None:
        return False, False
    fits = len(extra) == 1 and type(bits) is dict and set(bits) <= {"conj", "neg"}
    if not fits or not all(type(bit) is bool for bit in bits.values()):
        raise unsafe("conj and neg bits only", "tensor metadata", bits, _ALTERED)
    conj, neg = bits.get("conj", False), bits.get("neg", False)
    if (conj and not dtype.is_complex) or (neg and not (dtype.is_floating_point or dtype.is_complex)):
        raise unsafe("conj and neg bits that fit the dtype", "dtype", dtype, _ALTERED)
    return conj, neg
