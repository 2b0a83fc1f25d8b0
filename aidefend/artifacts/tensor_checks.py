"""Judgements on loaded tensors: number types, finite values, total size, and the shapes that a model expects."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import refuse
from aidefend.artifacts.files import unsafe
from aidefend.artifacts.limits import Limits
from aidefend.artifacts.safetensors_format import Layout
from aidefend.artifacts.tensor_plan import TensorPlan

_BLOCK = 2**22
_NARROW = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
_SCALARS = (str, int, float, bool, complex, bytes, bytearray, type(None), torch.Size, torch.device, torch.dtype)


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor, plan or scalar of nested containers, with its path such as `optimizer/state/0/step`."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from leaves(value, f"{path}/{key}" if path else str(key))
    elif type(state) in (list, tuple):
        for index, value in enumerate(state):
            yield from leaves(value, f"{path}/{index}" if path else str(index))
    else:
        yield path, state


def check_planned(plan: Any, stored: int, limits: Limits) -> None:
    """Before anything is built: number types, and the bytes of all distinct views against the bytes stored."""
    views = {}
    for path, tensor in leaves(plan):
        if type(tensor) is TensorPlan:
            check_dtype(path, tensor.dtype, limits)
            views[tensor.storage.key, tensor.offset, tensor.shape, tensor.stride] = tensor.nbytes
    total = sum(views.values())
    if total > limits.max_view_ratio * stored:
        cure = "Save clones of the views, or raise Limits(max_view_ratio=...)"
        raise unsafe(f"at most {limits.max_view_ratio} bytes of tensors a stored byte", "bytes", (total, stored), cure)


def check_layout(layout: Layout, limits: Limits) -> None:
    """The same for safetensors, where no two tensors share memory."""
    for name, stored in layout.tensors.items():
        check_dtype(name, stored.dtype, limits)
    total = sum(stored.stop - stored.start for stored in layout.tensors.values())
    if total > limits.max_total_bytes:
        cure = "Raise Limits(max_total_bytes=...) if this size is right"
        raise unsafe(f"at most {limits.max_total_bytes} bytes of tensors", "bytes", total, cure)


def check_dtype(path: str, dtype: torch.dtype, limits: Limits) -> None:
    """One number type against the accepted ones."""
    if dtype not in limits.accepted_dtypes:
        cure = "Convert the tensor, or add the type to Limits(dtypes=...)"
        raise unsafe("an accepted number type", f"dtype of {path}", dtype, cure)


def check_values(state: Any, limits: Limits) -> None:
    """Finite numbers, and bools that are 0 or 1; each distinct view is looked at once."""
    seen = set()
    for path, tensor in leaves(state):
        if not isinstance(tensor, Tensor) or tensor.numel() == 0:
            continue
        view = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if view in seen:
            continue
        seen.add(view)
        if tensor.dtype == torch.bool and int(tensor.detach().view(torch.uint8).max()) > 1:
            raise unsafe("bools stored as 0 or 1", f"tensor {path}", tensor, "The file was altered or is damaged")
        if limits.finite and not is_finite(tensor):
            cure = "Repair the values, or pass Limits(finite=False) if they are meant"
            raise unsafe("finite values", f"tensor {path}", "NaN or infinity", cure)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass without a mask of the size of the tensor."""
    values = tensor.detach().resolve_conj().resolve_neg()
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point():
        return True
    if values.dtype in _NARROW:
        return all(bool(part.float().isfinite().all()) for part in values.reshape(-1).split(_BLOCK))
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_expected(expect: nn.Module | Mapping[str, Any], state: Any) -> None:
    """Exactly the keys, shapes and number types that a model or a description expects."""
    wanted = expect.state_dict() if isinstance(expect, nn.Module) else expect
    _check_mapping(wanted, state, "")


def _check_mapping(wanted: Mapping[Any, Any], state: Any, path: str) -> None:
    if not isinstance(state, Mapping):
        raise unsafe("a dict", f"entry {path}", type(state).__name__, _other_model())
    missing = [str(key) for key in wanted if key not in state]
    extra = [str(key) for key in state if key not in wanted]
    if missing or extra:
        found = f"missing {missing[:5]} ({len(missing)}), unexpected {extra[:5]} ({len(extra)})"
        raise unsafe("exactly the keys that are expected", f"keys of {path or 'the state dict'}", found, _other_model())
    for key, value in wanted.items():
        _check_leaf(value, state[key], f"{path}/{key}" if path else str(key))


def _check_leaf(wanted: Any, value: Any, path: str) -> None:
    if isinstance(wanted, Mapping):
        _check_mapping(wanted, value, path)
    elif isinstance(wanted, type):
        if not isinstance(value, wanted):
            raise unsafe(wanted.__name__, f"entry {path}", type(value).__name__, _other_model())
    elif isinstance(wanted, _SCALARS) and not isinstance(wanted, torch.Size):
        if type(value) is not type(wanted):
            raise unsafe(type(wanted).__name__, f"entry {path}", type(value).__name__, _other_model())
    else:
        _check_tensor(*_shape_of(wanted, path), value, path)


def _check_tensor(shape: tuple[int, ...], dtype: torch.dtype | None, value: Any, path: str) -> None:
    if not isinstance(value, Tensor):
        raise unsafe("a tensor", f"entry {path}", type(value).__name__, _other_model())
    if tuple(value.shape) != shape or dtype not in (None, value.dtype):
        rule = f"shape {shape}" + ("" if dtype is None else f" and {dtype}")
        raise unsafe(rule, f"tensor {path}", value, _other_model())


def _shape_of(wanted: Any, path: str) -> tuple[tuple[int, ...], torch.dtype | None]:
    """(shape, dtype or None) of what is expected: a tensor, a shape, or (shape, dtype)."""
    if isinstance(wanted, Tensor):
        return tuple(wanted.shape), wanted.dtype
    if isinstance(wanted, tuple | list):
        if len(wanted) == 2 and isinstance(wanted[1], torch.dtype):
            return tuple(wanted[0]), wanted[1]
        if all(isinstance(size, int) for size in wanted):
            return tuple(wanted), None
    cure = "Describe a tensor by itself, its shape, or (shape, dtype)"
    raise refuse("a tensor, a shape or (shape, dtype)", f"expect[{path!r}]", wanted, cure)


def _other_model() -> str:
    return "The file belongs to another model or was altered; check its origin"
