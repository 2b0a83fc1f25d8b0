"""Hard checks on a batch of tensors: what can be decided for certain, before the model sees anything."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_number, check_path, refuse
from aidefend._core.storage import pretty_json, write_atomic
from aidefend.validate.spec_inference import Size, infer_form

_SCHEMA = "aidefend.input-spec/1"
_LARGEST_FILE = 1_000_000
MOST_ROWS = 2**24  # a stride-0 tensor may claim any number of rows; verdicts on it must stay small
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}


@dataclasses.dataclass(frozen=True, eq=False)
class SpecResult:
    """What an `InputSpec` says about one batch.

    Args:
        fault: Why the batch as a whole was refused, or None. Then no row was looked at.
        accepted: (N,) bool, True = the row satisfies every rule. After a fault one False is shown N times.
        reasons: For each row the rules that it breaks; empty after a fault.
        x: The rows, clipped where the rule says so; None after a fault.
    """

    fault: str | None
    accepted: Tensor
    reasons: tuple[tuple[str, ...], ...]
    x: Tensor | None


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """The rules that every request must satisfy: a plain dense tensor (N, ...) of known form, size and range.

    Guarantee: `check` never raises and copies nothing before type, layout, shape, caps, dtype, device and memory
        overlap have been checked from the tensor's own header, so its cost is bounded by the caps whatever arrives. A
        row that breaks a rule does not change the verdict on another. It says nothing about inputs inside the rules:
        adversarial examples satisfy them.
    Args:
        shape: Shape of one row, without N: sizes >= 1, or (smallest, largest) where a size may vary.
        dtype: The exact dtype: float16, bfloat16, float32, float64, uint8, int8 .. int64 or bool.
        low, high: Closed range of every element, in the units of x; None = no limit. Infinity and NaN always fail.
        tolerance: Slack of the range as a share of max(1, |low|, |high|), against rounding.
        out_of_range: "reject" the row, or "clip" finite values into the range and accept it.
        max_rows: Largest N, up to 2 ** 24. Too many rows refuse the batch.
        max_bytes: Largest size of the batch in bytes, counted by shape (a stride-0 giant counts in full).
        device: Device type such as "cpu" or "cuda"; None = any device that holds data.
    Raises: ConfigurationError: a rule contradicts itself.
    Cost: Two vectorised reductions over the batch; a copy only if something is clipped.
    Example:
        >>> spec = InputSpec((2,), low=0.0, high=1.0)
        >>> spec.check(torch.tensor([[0.5, 1.0], [0.5, float("nan")]])).reasons
        ((), ('input: not finite',))
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype = torch.float32
    low: float | None = None
    high: float | None = None
    tolerance: float = 1e-6
    out_of_range: Literal["reject", "clip"] = "reject"
    max_rows: int = 16_384
    max_bytes: int = 256 * 2**20
    device: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _checked_shape(self.shape))
        check_choice(self.dtype, tuple(_DTYPES.values()), "dtype")
        check_choice(self.out_of_range, ("reject", "clip"), "out_of_range")
        check_number(self.tolerance, "tolerance", 0.0, 1.0)
        check_int(self.max_rows, "max_rows", 1, MOST_ROWS)
        check_int(self.max_bytes, "max_bytes")
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None:
                object.__setattr__(self, name, check_number(bound, name))
        if self.low is not None and self.high is not None and self.low > self.high:
            raise refuse("low <= high", "low", self.low, "Swap the two")
        if self.device is not None and not isinstance(self.device, str):
            raise refuse('device as text such as "cpu"', "device", self.device, "Pass x.device.type, or None for any")

    @classmethod
    def infer(
        cls,
        x: Any,
        *,
        margin: float = 0.25,
        tolerance: float = 1e-6,
        out_of_range: Literal["reject", "clip"] = "reject",
        max_rows: int = 16_384,
        max_bytes: int = 256 * 2**20,
        device: str | None = None,
    ) -> "InputSpec":
        """The tightest rules that trusted data satisfies, with room at the ends of a range that is not a natural one.

        The range is [0, 1] or [-1, 1] where floating point data fills it to 99 %; else what was seen, widened by
        `margin` of its width on each side. uint8 may use its full range; other integers run from min(0, smallest seen)
        to the largest seen. Sizes that differ between batches become (smallest, largest).
        Args:
            x: A tensor (N, ...), or any data that `calibration_loader` may be; trusted, finite, not empty.
            margin: Room on each side, as a share of the width that was seen, >= 0.
            tolerance: As in `InputSpec`.
            out_of_range: As in `InputSpec`.
            max_rows: As in `InputSpec`.
            max_bytes: As in `InputSpec`.
            device: As in `InputSpec`.
        Raises: ConfigurationError: the data is empty, not finite, or mixes dtypes or numbers of dimensions.
        Cost: One pass over the data.
        Example:
            >>> spec = InputSpec.infer(torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)))
            >>> spec.shape, spec.low, spec.high
            ((3,), 0.0, 1.0)
        """
        shape, dtype, low, high = infer_form(x, margin, tuple(_DTYPES.values()))
        return cls(shape, dtype, low, high, tolerance, out_of_range, max_rows, max_bytes, device)

    def check(self, x: object) -> SpecResult:
        """Judge one batch. Any object may be passed; nothing raises.

        Args:
            x: What a caller sent.
        Returns: Verdicts for each row, or one fault for the whole batch.
        """
        try:
            fault = self._fault(x)
        except Exception:  # a tensor whose own header cannot be read
            fault = "input: cannot be inspected"
        if fault is not None or not isinstance(x, Tensor):
            return SpecResult(fault, torch.zeros(1, dtype=torch.bool).expand(count_rows(x)), (), None)
        return self._check_rows(x.detach())

    def _fault(self, x: object) -> str | None:
        """Why the batch as a whole is refused, from its header alone, or None."""
        if type(x) is not Tensor:  # a subclass may run its own code on every access
            return "input: not a plain tensor"
        if x.is_nested or x.layout != torch.strided or x.is_quantized or x.device.type == "meta":
            return "input: not a dense tensor"
        if x.ndim != len(self.shape) + 1 or not all(map(_fits, x.shape[1:], self.shape)):
            return "input: wrong shape"
        if len(x) > self.max_rows:
            return "input: too many rows"
        if x.numel() * x.element_size() > self.max_bytes:
            return "input: too many bytes"
        if x.dtype != self.dtype:
            return "input: wrong dtype"
        if self.device is not None and x.device.type != self.device:
            return "input: wrong device"
        return "input: overlapping memory" if _may_overlap(x) else None

    def smallest_row(self) -> Tensor:
        """Zeros (1, ...) of the smallest shape that the rules allow, whether or not they lie in the range."""
        sizes = (size[0] if isinstance(size, tuple) else size for size in self.shape)
        return torch.zeros(1, *sizes, dtype=self.dtype)

    def clip(self, x: Tensor) -> Tensor:
        """The rows with the range applied if the rule is "clip", else x itself; differentiable."""
        if self.out_of_range == "reject" or (self.low is None and self.high is None) or x.dtype == torch.bool:
            return x
        return x.clamp(self.low, self.high)

    def _check_rows(self, x: Tensor) -> SpecResult:
        if len(x) == 0:
            return SpecResult(None, torch.zeros(0, dtype=torch.bool, device=x.device), (), x)
        features = tuple(range(1, x.ndim))
        low, high = x.amin(features), x.amax(features)  # both carry NaN
        finite = torch.isfinite(low) & torch.isfinite(high)
        inside = self._inside(low, high)
        if self.out_of_range == "clip":
            ok, inside = finite, inside | finite
            x = x if bool(self._inside(low, high).all()) else self.clip(x)
        else:
            ok = finite & inside
        if bool(ok.all()):
            return SpecResult(None, ok, ((),) * len(x), x)
        remarks = zip(finite.tolist(), inside.tolist(), strict=True)
        return SpecResult(None, ok, tuple(_row_reasons(*remark) for remark in remarks), x)

    def _inside(self, low: Tensor, high: Tensor) -> Tensor:
        slack = self.tolerance * max(1.0, abs(self.low or 0.0), abs(self.high or 0.0))
        slack = slack if self.dtype.is_floating_point else 0.0
        inside = torch.ones_like(low, dtype=torch.bool)
        if self.dtype != torch.bool and self.low is not None:
            inside &= low.double() >= self.low - slack
        if self.dtype != torch.bool and self.high is not None:
            inside &= high.double() <= self.high + slack
        return inside

    def to_dict(self) -> dict[str, Any]:
        """The rules as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        sizes = [list(size) if isinstance(size, tuple) else size for size in self.shape]
        return {"schema": _SCHEMA, **fields, "shape": sizes, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "InputSpec":
        """The rules back from `to_dict`; another schema, unknown keys and unknown dtypes are refused."""
        if not isinstance(data, Mapping) or not isinstance(data.get("schema"), str) or data["schema"] != _SCHEMA:
            raise refuse(f'schema "{_SCHEMA}"', "data", data, "Pass what InputSpec.to_dict returned")
        names = {field.name for field in dataclasses.fields(cls)}
        found = {key: value for key, value in data.items() if key != "schema"}
        if (
            set(found) != names
            or not isinstance(found["dtype"], str)
            or found["dtype"] not in _DTYPES
            or not isinstance(found["shape"], list)
        ):
            raise refuse(f"the keys {sorted(names)} with a known dtype", "data", data, "Write it with InputSpec.save")
        sizes = tuple(tuple(size) if isinstance(size, list) else size for size in found["shape"])
        return cls(**{**found, "shape": sizes, "dtype": _DTYPES[found["dtype"]]})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rules as JSON, whole or not at all."""
        write_atomic(path, pretty_json(self.to_dict()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "InputSpec":
        """The rules back from `save`."""
        try:
            with check_path(path).open("rb") as file:
                data = json.loads(file.read(_LARGEST_FILE))
        except (OSError, ValueError, RecursionError) as error:
            raise refuse(
                "a file written by InputSpec.save", "path", str(path), f"Could not read it ({error})"
            ) from error
        if not isinstance(data, dict):
            raise refuse("a file written by InputSpec.save", "path", str(path), "It holds no JSON object")
        return cls.from_dict(data)


def count_rows(x: object) -> int:
    """N of a plain tensor (N, ...), at most MOST_ROWS; 1 for anything else, so that nothing refused counts as empty."""
    try:
        return min(len(x), MOST_ROWS) if type(x) is Tensor and x.ndim else 1
    except Exception:
        return 1


def _checked_shape(shape: Any) -> tuple[Size, ...]:
    if not isinstance(shape, tuple | list) or not shape:
        raise refuse("the shape of one row, with at least one dimension", "shape", shape, "Use (1,) for scalars")
    return tuple(_size(size) for size in shape)


def _size(size: Any) -> Size:
    if not isinstance(size, tuple):
        return check_int(size, "shape")
    if len(size) != 2:
        raise refuse("a size or (smallest, largest)", "shape", size, "Give two numbers")
    smallest = check_int(size[0], "shape")
    return smallest, check_int(size[1], "shape", smallest)


def _fits(actual: int, size: Size) -> bool:
    return size[0] <= actual <= size[1] if isinstance(size, tuple) else actual == size


def _may_overlap(x: Tensor) -> bool:
    """Whether two elements may share memory: true for stride 0, and for what cannot be shown to be free of overlap."""
    reach = 0
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1
    ):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _row_reasons(finite: bool, inside: bool) -> tuple[str, ...]:
    if not finite:
        return ("input: not finite",)
    return () if inside else ("input: out of range",)
