"""Hard checks on a batch of tensors: what can be decided for certain, before the model sees anything."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_number, refuse
from aidefend.validate.batch_schema import tensor_schema
from aidefend.validate.spec_file import read_spec, spec_fields, write_spec
from aidefend.validate.spec_header import MOST_ROWS, count_rows, kind_fault, memory_fault
from aidefend.validate.spec_inference import Size, infer_form
from aidefend.validate.spec_result import Reasons, SpecResult, refused_batch, remark
from aidefend.validate.spec_values import (
    Bound,
    Limits,
    bound_pairs,
    clamp,
    finite_rows,
    flush_subnormals,
    has_subnormals,
    highest_bits,
    knows_subnormals,
    limits_of,
    outside,
    plainly_inside,
    row_extremes,
    subnormal_rows,
    survey,
)

_SCHEMA = "aidefend.input-spec/2"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """The rules that every request must satisfy: a plain dense tensor (N, ...) of known form, size and range.

    Guarantee: `check` never raises and copies nothing before kind, layout, shape, caps, dtype, device and memory have
        been checked from the tensor's own header, so its cost is bounded by the caps whatever arrives. What a tensor
        subclass or an attribute of a tensor would run is not run. A row that breaks a rule does not change the verdict
        on another. It says nothing about inputs inside the rules: adversarial examples satisfy them.
    Refused as a whole: subclasses and parameters; nested, sparse, quantised, meta and complex tensors; conjugate or
        negative views; tensors that require grad; stride 0, overlapping or missing memory; a wrong shape, dtype or
        device; too many rows or bytes.
    Args:
        shape: Shape of one row, without N: sizes >= 1, or (smallest, largest) where a size may vary.
        dtype: The exact dtype: float16, bfloat16, float32, float64, uint8, int8 .. int64 or bool.
        low, high: Closed range of every element, in the units of x, or a tuple with one limit for each index of the
            first dimension of a row (columns of a table, channels of an image). None = no limit. Integers (token ids,
            rows of an embedding) are compared exactly.
        tolerance: Slack of the range as a share of max(1, |low|, |high|), against rounding; 0 for integers.
        out_of_range: "reject" the row, "clip" finite values into the range and accept it, or "quarantine": refuse it
            with a reason that asks to keep it aside.
        not_finite: "reject" or "quarantine" rows with NaN or infinity.
        denormals: Numbers too small for the normal form of float32, float64 or bfloat16, with which a processor may be
            a hundred times slower: "clip" them to 0, "reject" or "quarantine" the row, or "accept".
        max_rows: Largest N, up to 2 ** 24. Too many rows refuse the batch.
        max_bytes: Largest size of the batch in bytes, counted by shape (a stride-0 giant counts in full).
        device: Device type such as "cpu" or "cuda"; None = any device that holds data.
    Raises: ConfigurationError: a rule contradicts itself.
    Cost: One reduction over the batch, and one pass over its bits for denormals; a copy only if something is clipped.
        More passes only where a row breaks a rule.
    Example:
        >>> spec = InputSpec((2,), low=0.0, high=1.0)
        >>> spec.check(torch.tensor([[0.5, 1.0], [0.5, float("nan")]])).reasons
        ((), ('input: not finite',))
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype = torch.float32
    low: Bound = None
    high: Bound = None
    tolerance: float = 1e-6
    out_of_range: Literal["reject", "clip", "quarantine"] = "reject"
    max_rows: int = 16_384
    max_bytes: int = 256 * 2**20
    device: str | None = None
    not_finite: Literal["reject", "quarantine"] = "reject"
    denormals: Literal["clip", "reject", "quarantine", "accept"] = "clip"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _checked_shape(self.shape))
        check_choice(self.dtype, tuple(_DTYPES.values()), "dtype")
        check_choice(self.out_of_range, ("reject", "clip", "quarantine"), "out_of_range")
        check_choice(self.not_finite, ("reject", "quarantine"), "not_finite")
        check_choice(self.denormals, ("clip", "reject", "quarantine", "accept"), "denormals")
        check_number(self.tolerance, "tolerance", 0.0, 1.0)
        check_int(self.max_rows, "max_rows", 1, MOST_ROWS)
        check_int(self.max_bytes, "max_bytes")
        for name in ("low", "high"):
            object.__setattr__(self, name, _checked_bound(getattr(self, name), name, self.shape[0], self.dtype))
        if any(low > high for low, high in bound_pairs(self.low, self.high) if low is not None and high is not None):
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
        out_of_range: Literal["reject", "clip", "quarantine"] = "reject",
        max_rows: int = 16_384,
        max_bytes: int = 256 * 2**20,
        device: str | None = None,
        not_finite: Literal["reject", "quarantine"] = "reject",
        denormals: Literal["clip", "reject", "quarantine", "accept"] = "clip",
        by_column: bool = False,
    ) -> "InputSpec":
        """The tightest rules that trusted data satisfies, with room at the ends of a range that is not a natural one.

        The range is [0, 1] or [-1, 1] where floating point data fills it to 99 %; else what was seen, widened by
        `margin` of its width on each side. uint8 may use its full range; other integers run from min(0, smallest seen)
        to the largest seen. Sizes that differ between batches become (smallest, largest).
        Args:
            x: A tensor (N, ...), or any data that `calibration_loader` may be; trusted, finite, not empty.
            margin: Room on each side, as a share of the width that was seen, >= 0.
            tolerance: As in `InputSpec`, like all that follow but the last.
            out_of_range: As in `InputSpec`.
            max_rows: As in `InputSpec`.
            max_bytes: As in `InputSpec`.
            device: As in `InputSpec`.
            not_finite: As in `InputSpec`.
            denormals: As in `InputSpec`.
            by_column: One range for each index of the first dimension of a row instead of one for all.
        Raises: ConfigurationError: the data is empty, not finite, or mixes dtypes or numbers of dimensions.
        Cost: One pass over the data.
        Example:
            >>> spec = InputSpec.infer(torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)))
            >>> spec.shape, spec.low, spec.high
            ((3,), 0.0, 1.0)
        """
        form = infer_form(x, margin, tuple(_DTYPES.values()), by_column)
        return cls(*form, tolerance, out_of_range, max_rows, max_bytes, device, not_finite, denormals)

    def check(self, x: object) -> SpecResult:
        """Judge one batch. Any object may be passed; nothing raises.

        Args:
            x: What a caller sent.
        Returns: Verdicts for each row, or one fault for the whole batch.
        """
        try:
            fault = kind_fault(x)
            if fault is not None or not isinstance(x, Tensor):
                return refused_batch(fault or "input: not a plain tensor", count_rows(x))
            plain = Tensor.detach(x) if vars(x) else x  # attributes that were set on x could stand for its methods
            fault = self._fault(plain)
            return self._check_rows(plain) if fault is None else refused_batch(fault, count_rows(x))
        except Exception:  # a tensor whose own header or numbers cannot be read
            return refused_batch("input: cannot be inspected", count_rows(x))

    def _fault(self, x: Tensor) -> str | None:
        """Why the batch as a whole is refused, from its header alone, or None."""
        shape = x.shape
        if shape[1:] != self.shape and not _same_form(shape[1:], self.shape):
            return "input: wrong shape"
        if shape[0] > self.max_rows:
            return "input: too many rows"
        if x.numel() * x.element_size() > self.max_bytes:
            return "input: too many bytes"
        if x.dtype != self.dtype:
            return "input: wrong dtype"
        if self.device is not None and x.device.type != self.device:
            return "input: wrong device"
        return memory_fault(x)

    def smallest_row(self) -> Tensor:
        """Zeros (1, ...) of the smallest shape that the rules allow, in or out of the range; one number in memory."""
        sizes = (size[0] if isinstance(size, tuple) else size for size in self.shape)
        return torch.zeros((), dtype=self.dtype).expand(1, *sizes)

    def clip(self, x: Tensor) -> Tensor:
        """The rows with what the rules clip clipped, else x itself; differentiable."""
        if self.out_of_range == "clip" and self._limits is not None and x.numel():
            x = clamp(x, self.low, self.high)
        return flush_subnormals(x) if self._small(x.detach()) and self.denormals == "clip" else x

    @cached_property
    def _highest(self) -> int | None:
        """Of a range from 0 up: the bits of its upper limit, where bits are enough to compare."""
        limits = self._limits
        if limits is None or self.low != 0 or isinstance(limits[1], list):
            return None
        return highest_bits(float(limits[1]), self.dtype)

    @cached_property
    def _limits(self) -> Limits | None:
        """What numbers are compared with; None where every one is fine."""
        if self.dtype == torch.bool or (self.low is None and self.high is None):
            return None
        return limits_of(self.low, self.high, self.dtype, self.tolerance)

    def _check_rows(self, x: Tensor) -> SpecResult:
        if self._highest is not None and plainly_inside(x, self._highest):
            return _all_accepted(x)
        finite, inside, small = self._look(x)
        whole = inside or self.out_of_range == "clip"
        if finite and whole and (not small or self.denormals == "clip"):
            return _all_accepted(x if inside and not small else self.clip(x))
        return self._row_by_row(x)

    def _look(self, x: Tensor) -> tuple[bool, bool, bool]:
        """Whether all numbers of the batch are finite, whether they are in range, and whether any is subnormal."""
        if x.numel() == 0 or x.dtype == torch.bool:
            return True, True, False
        if self._limits is None or not isinstance(self._limits[0], list):
            low, high, small = survey(x, self.denormals != "accept")
            least, most = self._limits or (-_LARGEST, _LARGEST)
            return low >= -_LARGEST and high <= _LARGEST, least <= low and high <= most, small  # NaN is neither
        lows, highs = row_extremes(x)
        lows, highs = lows.amin(0, keepdim=True), highs.amax(0, keepdim=True)
        inside = not bool(outside(lows, highs, self._limits).any())
        return bool(finite_rows(lows, highs)), inside, self._small(x)

    def _small(self, x: Tensor) -> bool:
        return self.denormals != "accept" and knows_subnormals(x.dtype) and x.numel() > 0 and has_subnormals(x)

    def _row_by_row(self, x: Tensor) -> SpecResult:
        low, high = row_extremes(x)
        finite = finite_rows(low, high)
        broken = {remark(self.not_finite, "not finite"): ~finite}
        if self._limits is not None and self.out_of_range != "clip":
            rule = remark(self.out_of_range, "out of range")
            broken[rule] = outside(low, high, self._limits).any(dim=1) & finite
        if self.denormals in ("reject", "quarantine") and knows_subnormals(x.dtype):
            broken[remark(self.denormals, "denormal numbers")] = subnormal_rows(x) & finite
        marks = torch.stack(tuple(broken.values()), dim=1)
        return SpecResult(None, ~marks.any(dim=1), _reasons(tuple(broken), marks.tolist()), self.clip(x))

    def to_dict(self) -> dict[str, Any]:
        """The rules as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        sizes = [list(size) if isinstance(size, tuple) else size for size in self.shape]
        return {"schema": _SCHEMA, **lists, "shape": sizes, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "InputSpec":
        """The rules back from `to_dict`; another schema, unknown keys and unknown dtypes are refused."""
        found = spec_fields(data, cls, _SCHEMA)
        if not isinstance(found["dtype"], str) or found["dtype"] not in _DTYPES or not isinstance(found["shape"], list):
            raise refuse("a list as shape and a known dtype", "data", data, "Write it with InputSpec.save")
        sizes = tuple(tuple(size) if isinstance(size, list) else size for size in found["shape"])
        bounds = {
            name: tuple(found[name]) if isinstance(found[name], list) else found[name] for name in ("low", "high")
        }
        return cls(**{**found, **bounds, "shape": sizes, "dtype": _DTYPES[found["dtype"]]})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rules as JSON, whole or not at all."""
        write_spec(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "InputSpec":
        """The rules back from `save`."""
        return cls.from_dict(read_spec(path, cls.__name__))

    def to_json_schema(self) -> dict[str, Any]:
        """A JSON Schema (draft 2020-12) of a batch as nested arrays, for the door of a web service.

        What it accepts, `check` accepts after conversion to `dtype`, and the other way round for rows of these sizes:
        only the cap in bytes has no counterpart, nor has quarantine, which is a refusal here. JSON has no NaN.
        """
        limits = self._limits if self.out_of_range != "clip" else None
        return tensor_schema(self.shape, self.dtype, limits, self.max_rows, self.denormals in ("reject", "quarantine"))


_LARGEST = float(torch.finfo(torch.float64).max)


def _all_accepted(x: Tensor) -> SpecResult:
    n = x.shape[0]
    return SpecResult(None, torch.ones(n, dtype=torch.bool, device=x.device), ((),) * n, x)


def _reasons(rules: Reasons, marks: list[list[bool]]) -> tuple[Reasons, ...]:
    return tuple(tuple(rule for rule, broken in zip(rules, row, strict=True) if broken) for row in marks)


def _checked_bound(bound: Any, name: str, size: Size, dtype: torch.dtype) -> Bound:
    """A number or one for each index of the first dimension, whole where the dtype is."""
    if bound is None:
        return None
    if not isinstance(bound, tuple | list):
        return _checked_limit(bound, name, dtype)
    if len(bound) != size:
        raise refuse(
            f"{name} with {size} limits, one for each index of shape[0]", name, bound, "Pass one number for all"
        )
    return tuple(_checked_limit(value, name, dtype) for value in bound)


def _checked_limit(value: Any, name: str, dtype: torch.dtype) -> float:
    number = check_number(value, name)
    if dtype.is_floating_point or dtype == torch.bool:
        return number
    whole: int = math.ceil(value) if name == "low" else math.floor(value)
    kind = torch.iinfo(dtype)
    if (name == "low" and whole > kind.max) or (name == "high" and whole < kind.min):
        raise refuse(f"{name} that {dtype} can reach", name, value, "Change the limit or the dtype")
    return whole


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


def _same_form(actual: Sequence[int], wanted: tuple[Size, ...]) -> bool:
    return len(actual) == len(wanted) and all(map(_fits, actual, wanted))


def _fits(actual: int, size: Size) -> bool:
    return size[0] <= actual <= size[1] if isinstance(size, tuple) else actual == size
