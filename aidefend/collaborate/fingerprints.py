"""Keyed hashes of samples and windows, the same for a byte image and its float copy."""

import hmac
from collections.abc import Sequence

import torch
from torch import Tensor

from aidefend._core.checks import check_number, check_tensor, refuse
from aidefend._core.storage import canonical_json

Place = tuple[int, int, int, int]
_STEPS = {"sample": 255, "trigger": 15}
_CHUNK = 1024
_FARTHEST = 2.0**31 - 1


def check_key(key: object) -> bytes:
    """The secret shared with the partners."""
    if not isinstance(key, bytes) or len(key) < 16:
        found = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
        raise refuse("key of at least 16 bytes", "key", found, "Share secrets.token_bytes(32)")
    return key


def check_range(bounds: object) -> tuple[float, float]:
    """(low, high), low < high."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise refuse("bounds as (low, high)", "bounds", bounds, "Pass the range of x")
    low, high = (check_number(bound, "bounds") for bound in bounds)
    if low >= high:
        raise refuse("bounds with low < high", "bounds", bounds, "Pass the range of x")
    return low, high


def check_data(x: object, name: str, *, finite: bool = True) -> Tensor:
    """Samples (N, ...) of real numbers with at least one feature."""
    rows = check_tensor(x, name, finite=finite)
    if rows.is_complex() or rows.ndim < 2 or 0 in rows.shape[1:]:
        raise refuse(f"{name} of shape (N, ...), real numbers, not empty", name, rows, "Pass the samples themselves")
    return rows


def levels(x: Tensor, bounds: tuple[float, float], kind: str) -> Tensor:
    """Whole steps from the low end, (N, ...) int32: 255 steps to the high end for samples, 15 for triggers.

    Nothing is cut off at the ends: samples that differ outside the range keep different fingerprints.
    """
    if x.is_floating_point():
        low, high = bounds
        values = x.detach().cpu().float().double()  # float64 and float32 copies must agree
    else:
        low, high = 0.0, 1.0 if x.dtype == torch.bool else 255.0
        values = x.detach().cpu().double()
    steps = (values - low) / (high - low) * _STEPS[kind]
    return steps.round().clamp(-_FARTHEST, _FARTHEST).to(torch.int32)


def fingerprints(x: Tensor, key: bytes, bounds: tuple[float, float], place: Place | None = None) -> list[str]:
    """One digest for each row: of the whole sample, or of the window at `place`."""
    kind, shape = "sample" if place is None else "trigger", tuple(x.shape[1:])
    found = []
    for part in x.split(_CHUNK):
        content = levels(part if place is None else window(part, place), bounds, kind)
        found += [keyed(key, kind, shape, place, row) for row in content]
    return found


def keyed(key: bytes, kind: str, shape: Sequence[int], place: Place | None, content: Tensor) -> str:
    """HMAC-SHA-256 of kind, shape, place and content, as hexadecimal digits."""
    header = canonical_json([kind, list(shape), None if place is None else list(place)]).encode()
    return hmac.digest(key, header + b"\n" + content.numpy().astype("<i4").tobytes(), "sha256").hex()


def window(rows: Tensor, place: Place) -> Tensor:
    """The part (N, C, height, width) of rows (N, ..., H, W), or of rows (N, W) with H = 1."""
    top, left, height, width = place
    return as_planes(rows)[:, :, top : top + height, left : left + width]


def as_planes(rows: Tensor) -> Tensor:
    """(N, C, H, W), all dimensions before the last two taken together."""
    tall, wide = (rows.shape[-2] if rows.ndim > 2 else 1), rows.shape[-1]
    return rows.reshape(len(rows), -1, tall, wide) if rows.numel() else rows.new_zeros(0, 1, tall, wide)
