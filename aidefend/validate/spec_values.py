"""What the numbers of a batch tell: extremes in one reduction, ranges by row, and subnormal numbers."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Bound = float | tuple[float, ...] | None
Limits = tuple[float, float] | tuple[list[float], list[float]]

_FEW = 2**16  # numbers for which numpy's two passes are quicker than torch's one
_BITS = {
    torch.float32: (torch.int32, np.uint32, 23),
    torch.float64: (torch.int64, np.uint64, 52),
    torch.bfloat16: (torch.int16, np.uint16, 7),
}


def survey(x: Tensor, subnormal: bool) -> tuple[float, float, bool]:
    """Smallest and largest number of a batch that is not empty, both NaN if one is; whether any is subnormal, if asked.

    Numpy starts sooner, torch reads faster.
    """
    if x.numel() > _FEW or x.device.type != "cpu" or x.dtype in (torch.bfloat16, torch.float16):
        low, high = torch.stack(tuple(x.aminmax())).tolist()
        return low, high, subnormal and knows_subnormals(x.dtype) and has_subnormals(x)
    numbers = x.numpy()
    low, high = np.minimum.reduce(numbers, axis=None).item(), np.maximum.reduce(numbers, axis=None).item()
    return low, high, subnormal and knows_subnormals(x.dtype) and _any_subnormal(numbers, x.dtype)


def highest_bits(most: float, dtype: torch.dtype) -> int | None:
    """The bits of the largest number of float32 or float64 up to `most` > 0; None for other dtypes."""
    kinds = {torch.float32: np.float32, torch.float64: np.float64}
    if dtype not in kinds or not 0 < most < math.inf:
        return None
    number = kinds[dtype](min(most, torch.finfo(dtype).max))
    number = np.nextafter(number, kinds[dtype](0)) if float(number) > most else number
    return int(number.view(_BITS[dtype][1]))


def plainly_inside(x: Tensor, highest: int) -> bool:
    """Whether all numbers of a small batch on the CPU are 0 or normal, and lie between 0 and that of `highest_bits`.

    False may also mean: not looked at. Bits of positive numbers are in the order of the numbers; those of negative
    ones, of infinity and NaN are higher than all of them. So two reductions tell what else takes five steps.
    """
    if not 0 < x.numel() <= _FEW or x.device.type != "cpu":
        return False
    _, unsigned, mantissa = _BITS[x.dtype]
    bits = x.numpy().view(unsigned)
    if np.maximum.reduce(bits, axis=None) > highest:
        return False
    return bool(np.minimum.reduce(bits - 1, axis=None) >= 2**mantissa - 1)  # zero becomes the largest of all


def row_extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number by row and first dimension of a row: x (N, C, ...) to two (N, C), NaN kept."""
    inner = tuple(range(2, x.ndim))
    return (x.amin(inner), x.amax(inner)) if inner else (x, x)


def finite_rows(low: Tensor, high: Tensor) -> Tensor:
    """(N,) bool: every number of the row is finite, from its extremes."""
    return (torch.isfinite(low) & torch.isfinite(high)).all(dim=1)


def outside(low: Tensor, high: Tensor, limits: "Limits") -> Tensor:
    """(N, C) bool: where the extremes break the limits.

    Compared as float64 or int64: a limit that the dtype of the data cannot hold must not wrap round.
    """
    wide = torch.float64 if low.is_floating_point() else torch.int64
    least, most = (torch.as_tensor(limit, dtype=wide, device=low.device) for limit in limits)
    return (low.to(wide) < least) | (high.to(wide) > most)


def knows_subnormals(dtype: torch.dtype) -> bool:
    """Whether subnormal numbers of this dtype are slow on a CPU; those of float16 are ordinary small numbers."""
    return dtype in _BITS


def has_subnormals(x: Tensor) -> bool:
    """Whether any number is subnormal: not 0, and smaller than the smallest normal one of its dtype.

    Read from the bits: a comparison of floats would see zeros where the processor flushes them.
    """
    if x.device.type != "cpu":
        return bool(_subnormal(x).any())
    known = x.view(_BITS[x.dtype][0]) if x.dtype == torch.bfloat16 else x  # which numpy does not know
    return _any_subnormal(known.numpy(), x.dtype)


def _any_subnormal(numbers: np.ndarray[Any, np.dtype[Any]], dtype: torch.dtype) -> bool:
    _, unsigned, mantissa = _BITS[dtype]
    bits = numbers.view(unsigned) << 1  # drops the sign; a subnormal has no exponent
    bits -= 1  # zero becomes the largest of all
    return bool(np.minimum.reduce(bits, axis=None) < 2 ** (mantissa + 1) - 1)


def subnormal_rows(x: Tensor) -> Tensor:
    """(N,) bool: a number of the row is subnormal."""
    return _subnormal(x).flatten(1).any(dim=1)


def flush_subnormals(x: Tensor) -> Tensor:
    """The numbers with the subnormal ones as zeros: a copy; differentiable."""
    return x.masked_fill(_subnormal(x.detach()), 0.0)


def _subnormal(x: Tensor) -> Tensor:
    signed, _, mantissa = _BITS[x.dtype]
    magnitude: Tensor = x.view(signed) & torch.iinfo(signed).max
    small: Tensor = (magnitude > 0) & (magnitude < 2**mantissa)
    return small


def bound_pairs(low: Bound, high: Bound) -> list[tuple[float | None, float | None]]:
    """(low, high) for each index of the first dimension of a row; one pair where neither bound is a tuple."""
    count = max((len(bound) for bound in (low, high) if isinstance(bound, tuple)), default=1)
    lows, highs = (bound if isinstance(bound, tuple) else (bound,) * count for bound in (low, high))
    return list(zip(lows, highs, strict=True))


def limits_of(low: Bound, high: Bound, dtype: torch.dtype, tolerance: float) -> Limits:
    """The numbers that are compared with: slack added, rounded as the dtype rounds; lists where a bound is a tuple."""
    pairs = [_limits(*pair, dtype, tolerance) for pair in bound_pairs(low, high)]
    if isinstance(low, tuple) or isinstance(high, tuple):
        return [least for least, _ in pairs], [most for _, most in pairs]
    return pairs[0]


def _limits(low: float | None, high: float | None, dtype: torch.dtype, tolerance: float) -> tuple[float, float]:
    if not dtype.is_floating_point:
        kind = torch.iinfo(dtype)
        return (kind.min if low is None else max(low, kind.min), kind.max if high is None else min(high, kind.max))
    slack = tolerance * max(1.0, abs(low or 0.0), abs(high or 0.0))
    return (
        -math.inf if low is None else min(low - slack, torch.tensor(low, dtype=dtype).item()),
        math.inf if high is None else max(high + slack, torch.tensor(high, dtype=dtype).item()),
    )


def clamp(x: Tensor, low: Bound, high: Bound) -> Tensor:
    """The numbers moved into a range by the first dimension of a row; dtype and shape stay; differentiable."""
    kind = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
    pairs = bound_pairs(low, high)
    least = [kind.min if low is None else min(max(low, kind.min), kind.max) for low, _ in pairs]
    most = [kind.max if high is None else min(max(high, kind.min), kind.max) for _, high in pairs]
    edges = [
        torch.tensor(edge, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 2)) for edge in (least, most)
    ]
    return x.clamp(*edges)
