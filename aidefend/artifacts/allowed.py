"""The closed list of names that a checkpoint may use, and what a call to each of them stands for.

Names match exactly, as a pair (module, qualified name); there is no prefix, no wildcard and no attribute walk. The list
does not depend on `torch.serialization.add_safe_globals`, so nobody can widen it from outside.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from aidefend._core.errors import UnsafeArtifact
from aidefend.artifacts.files import unsafe
from aidefend.artifacts.limits import DTYPES
from aidefend.artifacts.tensor_plan import StorageType, plan_parameter, plan_tensor

_ALTERED = "The file was altered or is damaged; fetch it again"
_KEYS = (str, int, bool, type(None))


class Global(NamedTuple):
    """A name in a pickle."""

    module: str
    name: str


class Ordered(OrderedDict[Any, Any]):
    """Stands for an OrderedDict; carries the `_metadata` of a state dict."""

    metadata: Any = None
    used_as_hooks: bool = False


def check_key(key: Any) -> None:
    """Keys are texts and integers below 2^60: nothing whose hash an attacker could make collide."""
    if type(key) not in _KEYS or (type(key) is int and not -(2**60) < key < 2**60):
        raise unsafe("keys that are texts or integers below 2^60", "key", key, "Use texts as keys")


def call(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What an allowed function would return, after its arguments have been checked."""
    action = _CALLS.get(function) if type(function) is Global else None
    if action is None:
        raise unsafe("calls of allowed functions", "function", function, _ALTERED)
    return action(arguments)


def refuse_global(module: str, name: str) -> UnsafeArtifact:
    """The error for a name outside the list; it names the safe way out for the common innocent ones."""
    cures = (text for prefix, text in _CURES if module.startswith(prefix) or name.startswith(prefix))
    shown = f"{module[:100]}.{name[:100]}"
    return unsafe(
        "only tensors and plain containers", "global", shown, f"{next(cures, _DEFAULT_CURE)}. Nothing was executed"
    )


_DEFAULT_CURE = "Save model.state_dict() in place of the object, or as safetensors"
_CURES = (
    ("numpy", "Save float(value), value.tolist() or torch.from_numpy(value) in place of numpy objects"),
    ("_rebuild_sparse", "Save tensor.to_dense()"),
    ("_rebuild_qtensor", "Save tensor.dequantize(), or its integers, scale and zero point as plain tensors"),
    ("_rebuild_", "Save a plain tensor: tensor.detach().clone()"),
    *((name, "Convert the tensor to a dense number type") for name in ("complex32", "bits", "float4", "QInt", "QUInt")),
    ("Uninitialized", "Run the lazy module once, so that it has weights to save"),
    ("pathlib", "Save str(path)"),
)


def _ordered_dict(arguments: tuple[Any, ...]) -> Ordered:
    _check_arguments("OrderedDict", arguments, arguments == ())
    return Ordered()


def _counter(arguments: tuple[Any, ...]) -> Counter[Any]:
    fits = arguments == () or (len(arguments) == 1 and type(arguments[0]) is dict)
    _check_arguments("Counter", arguments, fits and all(type(n) is int for items in arguments for n in items.values()))
    return Counter(*arguments)


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    _check_arguments("set", arguments, len(arguments) == 1 and type(arguments[0]) is list)
    for item in arguments[0]:
        check_key(item)
    return set(arguments[0])


def _encode(arguments: tuple[Any, ...]) -> bytes:
    """Bytes, which pickle protocol 2 writes as a text and its encoding."""
    fits = len(arguments) == 2 and type(arguments[0]) is str and arguments[1] == "latin1"
    _check_arguments("encode", arguments, fits and all(ord(character) < 256 for character in arguments[0]))
    return bytes(arguments[0], "latin1")


def _bytearray(arguments: tuple[Any, ...]) -> bytearray:
    _check_arguments("bytearray", arguments, arguments == () or [type(part) for part in arguments] == [bytes])
    return bytearray(*arguments)


def _complex(arguments: tuple[Any, ...]) -> complex:
    _check_arguments("complex", arguments, [type(part) for part in arguments] == [float, float])
    return complex(*arguments)


def _size(arguments: tuple[Any, ...]) -> torch.Size:
    fits = len(arguments) == 1 and type(arguments[0]) is tuple
    _check_arguments("Size", arguments, fits and all(type(n) is int and 0 <= n < 2**62 for n in arguments[0]))
    return torch.Size(arguments[0])


def _device(arguments: tuple[Any, ...]) -> torch.device:
    kinds = [type(part) for part in arguments]
    _check_arguments("device", arguments, kinds in ([str], [str, int]))
    try:
        return torch.device(*arguments)
    except RuntimeError as error:
        raise unsafe("a device of this torch", "device", arguments, _ALTERED) from error


def _tensor(arguments: tuple[Any, ...]) -> Any:
    """storage, offset, size, stride, requires_grad, hooks[, bits]."""
    _check_arguments("_rebuild_tensor_v2", arguments, len(arguments) in (6, 7))
    _check_hooks(arguments[5])
    return plan_tensor(arguments[0], None, arguments[1:5], arguments[6:])


def _tensor_of_dtype(arguments: tuple[Any, ...]) -> Any:
    """storage, offset, size, stride, requires_grad, hooks, dtype[, bits], for number types younger than storages."""
    fits = len(arguments) in (7, 8) and type(arguments[6]) is torch.dtype
    _check_arguments("_rebuild_tensor_v3", arguments, fits)
    _check_hooks(arguments[5])
    return plan_tensor(arguments[0], arguments[6], arguments[1:5], arguments[7:])


def _parameter(arguments: tuple[Any, ...]) -> Any:
    _check_arguments("_rebuild_parameter", arguments, len(arguments) == 3)
    _check_hooks(arguments[2])
    return plan_parameter(*arguments[:2])


def _check_hooks(hooks: Any) -> None:
    """An empty OrderedDict, which stays empty: later opcodes cannot fill it."""
    if type(hooks) is not Ordered or hooks or hooks.metadata is not None:
        raise unsafe("tensors without hooks", "hooks", hooks, "Save tensor.detach()")
    hooks.used_as_hooks = True


def _check_arguments(name: str, arguments: tuple[Any, ...], fits: bool) -> None:
    if not fits:
        raise unsafe("the arguments that torch.save writes", f"arguments of {name}", arguments, _ALTERED)


_BUILTINS = ("__builtin__", "builtins")
_CALLS: dict[Global, Callable[[tuple[Any, ...]], Any]] = {
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("collections", "Counter"): _counter,
    Global("_codecs", "encode"): _encode,
    Global("torch", "Size"): _size,
    Global("torch", "device"): _device,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    **{Global(module, "set"): _set for module in _BUILTINS},
    **{Global(module, "bytearray"): _bytearray for module in _BUILTINS},
    **{Global(module, "complex"): _complex for module in _BUILTINS},
}
_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}
GLOBALS: dict[Global, Global | StorageType | torch.dtype] = {
    **{name: name for name in _CALLS},
    **{Global("torch", name): StorageType(dtype) for name, dtype in _STORAGES.items()},
    Global("torch.storage", "UntypedStorage"): StorageType(None),
    **{Global("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPES},
}
