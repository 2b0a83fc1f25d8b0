"""Argument checks for public doors. Each raises an `AidefendError` that names the argument, its value and the cure."""

import math
import os
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from aidefend._core.errors import AidefendError, ConfigurationError, ThreatModelError

T = TypeVar("T")
_NESTED = (dict, frozenset, list, set, tuple)
_LARGEST = 2**63 - 1


def expected(rule: str, name: str, value: object, cure: str) -> str:
    """The one form of a message: rule, argument, value, cure."""
    return f"Expected {rule}, got {name}={describe(value)}. {cure}{'' if cure.endswith('.') else '.'}"


def describe(value: object) -> str:
    """A short text for any value: tensors by type, shape and device; nested values and long texts cut."""
    if isinstance(value, Tensor):
        return f"tensor({str(value.dtype).removeprefix('torch.')}, shape={tuple(value.shape)}, {value.device})"
    try:
        text = reprlib.repr(value) if isinstance(value, _NESTED) else repr(value)
    except Exception:  # a hostile or half-built object must not break the message about it
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 160 else f"{text[:78]} ... {text[-77:]}"


def refuse(
    rule: str, name: str, value: object, cure: str, error: type[AidefendError] = ConfigurationError
) -> AidefendError:
    """Make the error for a bad argument, to be raised by the caller."""
    return error(expected(rule, name, value, cure))


def check_choice(value: T, choices: Collection[T], name: str) -> T:
    """One of a closed set."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        options = ", ".join(repr(choice) for choice in choices)
        raise refuse(f"{name} to be one of {options}", name, value, "Use one of these")
    return value


def check_kind(value: Any, kind: type[T] | tuple[type[T], ...], name: str, cure: str = "Pass one of these") -> T:
    """An object of one class, or of one among several."""
    if not isinstance(value, kind):
        kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise refuse(f"{name} to be a {kinds}", name, value, cure)
    return value


def check_items(
    values: Any, kind: type[T] | tuple[type[T], ...], name: str, cure: str = "Pass a list of these"
) -> tuple[T, ...]:
    """A collection (not a text, a mapping or a tensor) of objects of one class."""
    if isinstance(values, str | bytes | Mapping | Tensor) or not isinstance(values, Iterable):
        kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise refuse(f"{name} to be a collection of {kinds}", name, values, cure)
    items = tuple(values)
    if _texts(items) if kind is str else set(map(type, items)) <= {kind}:  # without a call for each of a million ids
        return items
    return tuple(check_kind(value, kind, name, cure) for value in items)


def _texts(items: tuple[Any, ...]) -> bool:
    """Joining takes nothing else, and looks at each item in the least time."""
    try:
        "".join(items)
    except TypeError:
        return False
    return True


def check_callable(value: T, name: str, cure: str) -> T:
    """Something that can be called."""
    if not callable(value):
        raise refuse(f"{name} to be callable", name, value, cure)
    return value


def check_flag(value: Any, name: str) -> bool:
    """True or False, and nothing that merely counts as such."""
    if not isinstance(value, bool):
        raise refuse(f"{name} to be True or False", name, value, "Pass one of these")
    return value


def check_range(
    bounds: Any, name: str = "bounds", error: type[AidefendError] = ConfigurationError
) -> tuple[float, float]:
    """A pair of finite numbers, the lower one first."""
    cure = "Pass (low, high), the range of your inputs"
    pair = bounds if isinstance(bounds, tuple | list) and len(bounds) == 2 else ()
    if not pair or any(isinstance(end, bool) or not isinstance(end, int | float) for end in pair):
        raise refuse(f"{name} to be two numbers", name, bounds, cure, error)
    low, high = (float(end) if abs(end) < _LARGEST else math.inf for end in pair)
    if not low < high or math.isinf(high) or math.isinf(low):
        raise refuse(f"{name} to be finite with low < high", name, bounds, cure, error)
    return low, high


def check_path(path: Any, name: str = "path") -> Path:
    """The name of a file or folder; it need not exist."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise refuse(f"{name} to be a file name", name, path, "Pass a str or a Path, not an open file or bytes")
    return Path(text)


def check_int(value: Any, name: str, low: int = 1, high: int | None = None) -> int:
    """An integer (not a bool) with low <= value <= high, and never more than 64 bits hold."""
    limit = "" if high is None else f" and <= {high}"
    top = _LARGEST if high is None else high
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= top:
        raise refuse(f"{name} to be an integer >= {low}{limit}", name, value, "Pass a whole number in this range")
    return value


def check_number(
    value: Any,
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """A finite number inside an interval; `open_*` excludes the end."""
    rule = f"{name} to be a finite number in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    cure = "Pass a number in this range"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refuse(rule, name, value, cure)
    too_low = value <= low if open_low else value < low
    too_high = value >= high if open_high else value > high
    if too_low or too_high:
        raise refuse(rule, name, value, cure)
    return float(value)


def check_probability(value: Any, name: str) -> float:
    """A number strictly between 0 and 1."""
    return check_number(value, name, 0.0, 1.0, open_low=True, open_high=True)


def check_tensor(
    x: object,
    name: str,
    *,
    ndim: int | None = None,
    floating: bool | None = None,
    finite: bool = True,
    rows: int | None = None,
) -> Tensor:
    """A strided tensor with a batch dimension. `floating` True or False demands a kind of dtype.

    An empty batch (N = 0) is accepted: callers that need data use `check_not_empty`.
    """
    if not isinstance(x, Tensor):
        raise refuse(f"{name} to be a torch.Tensor", name, type(x).__name__, "Convert it with torch.as_tensor")
    if x.layout != torch.strided or x.is_meta or x.ndim < 1:
        raise refuse(f"{name} to be a dense tensor of shape (N, ...)", name, x, "Add the batch dimension")
    if x.is_complex():
        raise refuse(f"{name} to hold real numbers", name, x, "Pass its real and imaginary parts as features")
    if ndim is not None and x.ndim != ndim:
        raise refuse(f"{name} to have {ndim} dimension(s)", name, x, "Reshape it; the batch dimension comes first")
    if floating is True and not x.is_floating_point():
        raise refuse(f"{name} to be floating point", name, x, f"Convert it with {name}.float() and scale it")
    if floating is False and (x.is_floating_point() or x.is_complex()):
        raise refuse(f"{name} to hold integers", name, x, f"Convert it with {name}.long()")
    if rows is not None and len(x) != rows:
        raise refuse(f"{name} to have {rows} row(s)", name, x, "Pass one row for each sample")
    if finite and x.is_floating_point() and x.numel() and not _all_finite(x):
        raise refuse(f"{name} to be finite", name, x, "Remove or repair the rows with NaN or infinity")
    return x


def _all_finite(x: Tensor) -> bool:
    """In one pass: the smallest and the largest value are NaN where any value is."""
    return bool(torch.stack(tuple(x.detach().aminmax())).isfinite().all())


def check_not_empty(n: int, name: str) -> int:
    """At least one sample."""
    if n == 0:
        raise refuse(f"{name} to hold at least one sample", name, "0 samples", "Pass data that is not empty")
    return n


def check_labels(y: Any, n: int, num_classes: int | None = None, name: str = "y") -> Tensor:
    """Class labels: an integer tensor (N,), 0 <= y, and y < num_classes where it is known."""
    labels = check_tensor(y, name, ndim=1, floating=False, rows=n)
    if labels.dtype == torch.bool:
        raise refuse(f"{name} to hold class indices", name, y, f"Convert it with {name}.long()")
    if n and (int(labels.min()) < 0 or (num_classes is not None and int(labels.max()) >= num_classes)):
        top = "" if num_classes is None else f" and < {num_classes}"
        found = f"labels in [{int(labels.min())}, {int(labels.max())}]"
        raise refuse(f"{name} >= 0{top}", name, found, "Map the labels to 0 .. num_classes - 1")
    return labels.long()


def check_logits(outputs: Any, n: int, name: str = "model(x)") -> Tensor:
    """Model outputs: a floating point tensor (N, K) with K >= 2."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != n or outputs.shape[1] < 2:
        rule = f"{name} to be logits of shape ({n}, K >= 2)"
        raise refuse(rule, name, outputs, "Wrap the model so that it returns one row of logits for each sample")
    if not outputs.is_floating_point():
        raise refuse(f"{name} to be floating point logits", name, outputs, "Return the logits, not the predicted class")
    return outputs


def check_inside(
    x: Tensor, low: Tensor | float, high: Tensor | float, name: str = "x", tolerance: float = 1e-6
) -> None:
    """Every element within [low, high] up to `tolerance` of the range's size."""
    if x.numel() == 0:
        return
    slack = tolerance * max(1.0, float(torch.as_tensor(high).abs().max()), float(torch.as_tensor(low).abs().max()))
    if isinstance(low, Tensor) and low.numel() == 1 and isinstance(high, Tensor) and high.numel() == 1:
        smallest, largest = x.detach().aminmax()  # one pass where one pair of bounds holds for all
        outside = (smallest < low - slack) | (largest > high + slack)
    else:
        outside = (x < low - slack).any() | (x > high + slack).any()
    if bool(outside):
        found = f"values in [{float(x.min()):.6g}, {float(x.max()):.6g}]"
        cure = "State the range of your data with Threat(bounds=(low, high)), or scale x into it"
        raise refuse(f"{name} inside the bounds of the threat", name, found, cure, ThreatModelError)


def check_same_rows(names: Sequence[str], *lengths: int) -> int:
    """All arguments have the same number of rows."""
    if len(set(lengths)) > 1:
        found = ", ".join(f"{name}: {length}" for name, length in zip(names, lengths, strict=True))
        raise refuse("the same number of rows in each argument", "rows", found, "Pass one row for each sample in each")
    return lengths[0]
