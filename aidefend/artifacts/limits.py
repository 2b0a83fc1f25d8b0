"""What a file may be before it is refused: sizes, links, number types, version floor."""

import dataclasses
import os
from typing import Any, Literal

import torch

from aidefend._core.checks import check_choice, check_int, check_number, refuse

GIB = 2**30
TORCH_FLOOR = (2, 10)
DTYPES: tuple[torch.dtype, ...] = (
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.complex64,
    torch.complex128,
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds that every file must keep; anything beyond them is refused, never cut or repaired.

    Guarantee: reading a file costs at most a small multiple of `max_file_bytes` in memory and of `max_items` in time,
        whatever the file contains.
    Args:
        max_file_bytes: Largest file that is read, in bytes.
        max_total_bytes: Largest sum of all tensor data after decompression, in bytes.
        max_header_bytes: Largest description of the data (JSON header, pickle, manifest), in bytes.
        max_members: Most entries of one archive, and most files of one folder.
        max_items: Most objects in one checkpoint, counted along every path, so that shared tuples cannot explode.
        max_compression_ratio: 1.0 accepts uncompressed archives only, as torch writes them; r > 1 accepts deflated
            members that grow by at most r.
        max_view_ratio: Bytes of all distinct tensors over bytes stored; views of one storage count each.
        links: "refuse" links, or follow those that stay "within" a folder (model caches use links).
        root: The folder that links may not leave. Default: the folder that is read; for a file, the one it is in.
        finite: Refuse NaN and infinite values in tensors.
        dtypes: Number types to accept; None is every dense type that torch saves; quantised, packed
            and complex32 ones (experimental in torch) are never read.
        min_torch: Oldest torch that may parse a torch checkpoint, at least (2, 10); below it, known files corrupt
            memory or execute code in spite of weights_only=True.
    Raises: ConfigurationError: a bound is not a number in its range.
    Example:
        >>> Limits(max_file_bytes=10**6, links="within").links
        'within'
    """

    max_file_bytes: int = 16 * GIB
    max_total_bytes: int = 32 * GIB
    max_header_bytes: int = 32 * 2**20
    max_members: int = 200_000
    max_items: int = 1_000_000
    max_compression_ratio: float = 1.0
    max_view_ratio: float = 4.0
    links: Literal["refuse", "within"] = "refuse"
    root: str | os.PathLike[str] | None = None
    finite: bool = True
    dtypes: frozenset[torch.dtype] | None = None
    min_torch: tuple[int, int] = TORCH_FLOOR

    def __post_init__(self) -> None:
        for name in ("max_file_bytes", "max_total_bytes", "max_header_bytes", "max_members", "max_items"):
            check_int(getattr(self, name), name)
        check_number(self.max_compression_ratio, "max_compression_ratio", 1.0, 1e6)
        check_number(self.max_view_ratio, "max_view_ratio", 1.0, 1e6)
        check_choice(self.links, ("refuse", "within"), "links")
        check_choice(self.finite, (True, False), "finite")
        if self.root is not None and not isinstance(self.root, str | os.PathLike):
            raise refuse("root to be a path", "root", self.root, "Pass the folder that links may not leave")
        object.__setattr__(self, "dtypes", _check_dtypes(self.dtypes))
        _check_floor(self.min_torch)

    @property
    def accepted_dtypes(self) -> frozenset[torch.dtype]:
        """The number types that a tensor may have."""
        return frozenset(DTYPES) if self.dtypes is None else self.dtypes


def _check_dtypes(dtypes: Any) -> frozenset[torch.dtype] | None:
    if dtypes is None:
        return None
    if not isinstance(dtypes, set | frozenset | list | tuple) or not all(dtype in DTYPES for dtype in dtypes):
        raise refuse("a set of dense torch dtypes", "dtypes", dtypes, "Pass for example {torch.float32, torch.int64}")
    return frozenset(dtypes)


def _check_floor(min_torch: Any) -> None:
    whole = isinstance(min_torch, tuple) and len(min_torch) == 2 and all(type(part) is int for part in min_torch)
    if not whole or min_torch < TORCH_FLOOR:
        raise refuse(f"min_torch >= {TORCH_FLOOR}", "min_torch", min_torch, "The floor can be raised, not lowered")
