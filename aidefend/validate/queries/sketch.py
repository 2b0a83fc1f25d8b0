"""Keyed fingerprints of quantised windows: short secret summaries of an input that keep distances, for any rank."""

import dataclasses
import functools
import hashlib
import hmac

import numpy as np
import numpy.typing as npt

from aidefend._core.checks import check_int, refuse

Floats = npt.NDArray[np.float32]
WIDTH = 32  # windows
MARKS = 8  # fingerprints of a row
_IN_MARK = 8  # windows in a fingerprint
_CELLS = 1024
_FARTHEST = 1e12  # scales: sums of these are finite
_LARGEST = 6e4  # what half precision holds


@dataclasses.dataclass(frozen=True, eq=False)
class Sketcher:
    """Secret signed sums over windows of the input, and fingerprints of their quantised values.

    A window is a run of features, a quarter of the input long, at a secret place, with secret signs: 32 of them keep
    the distance of two rows within about an eighth (standard deviation). A fingerprint is a keyed hash of eight
    windows, quantised with secret offsets, so nobody without the key can tell on which side of an edge a row falls.
    Args:
        key: >= 16 secret bytes.
        centre: (F,) subtracted from the flattened rows.
        scale: (F,) divides them, > 0.
        unit: Length of a sketch that counts as 1, > 0.
        step: Width of a quantum, in units, > 0.
    """

    key: bytes
    centre: Floats
    scale: Floats
    unit: float = 1.0
    step: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.key, bytes) or len(self.key) < 16:
            raise refuse("key of at least 16 secret bytes", "key", "fewer or no bytes", "Take secrets.token_bytes(32)")
        check_int(len(self.centre), "features")

    def sketch(self, rows: Floats) -> Floats:
        """(N, 32) of rows (N, F), in units, clipped to what half precision holds."""
        with np.errstate(over="ignore"):
            x = np.clip((rows - self.centre) / self.scale, -_FARTHEST, _FARTHEST)
        signs, length = self._cells
        if length > 1:
            x = x * signs
            x = np.pad(x, ((0, 0), (0, -x.shape[1] % length))).reshape(len(x), -1, length).sum(axis=2)
        values: Floats = np.clip(x @ self._windows / self.unit, -_LARGEST, _LARGEST).astype(np.float32)
        return values

    def marks(self, sketches: Floats) -> list[list[bytes]]:
        """Eight fingerprints of 8 bytes for each sketch (N, 32)."""
        places, offsets = self._groups
        cells = np.floor(sketches / self.step + offsets).astype(np.int32)[:, places]  # (N, MARKS, _IN_MARK)
        return [[self._hash(b"m%d" % i, group.tobytes(), 8) for i, group in enumerate(row)] for row in cells]

    def contents(self, rows: Floats) -> list[bytes]:
        """A keyed hash of 8 bytes of each row: equal rows, and nothing else in practice, share it."""
        return [self._hash(b"content", row.tobytes(), 8) for row in np.ascontiguousarray(rows)]

    def name(self, principal: str) -> bytes:
        """What stands for a principal in a store: 16 bytes that say nothing without the key."""
        return self._hash(b"principal", principal.encode("utf-8", "surrogatepass"), 16)

    def _hash(self, purpose: bytes, data: bytes, size: int) -> bytes:
        return hashlib.blake2b(data, digest_size=size, key=self._subkey, person=purpose[:16]).digest()

    @functools.cached_property
    def _subkey(self) -> bytes:
        return hmac.digest(self.key, b"fingerprints", "sha256")

    def _secret(self, purpose: bytes, count: int) -> bytes:
        """A cryptographic stream of this key and purpose."""
        return hashlib.shake_256(hmac.digest(self.key, purpose, "sha256")).digest(count)

    def _secret_signs(self, purpose: bytes, count: int) -> Floats:
        bits = np.unpackbits(np.frombuffer(self._secret(purpose, -(-count // 8)), dtype=np.uint8))[:count]
        return (2.0 * bits - 1.0).astype(np.float32)

    def _secret_shares(self, purpose: bytes, count: int) -> npt.NDArray[np.float64]:
        words = np.frombuffer(self._secret(purpose, 8 * count), dtype=np.uint64)
        shares: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return shares

    @functools.cached_property
    def _cells(self) -> tuple[Floats, int]:
        """Long rows are first summed, with secret signs, over at most 1,024 short runs."""
        features = len(self.centre)
        return self._secret_signs(b"cells", features), -(-features // _CELLS)

    @functools.cached_property
    def _windows(self) -> Floats:
        """(cells, 32): signs inside the window of each column, zero outside."""
        cells = -(-len(self.centre) // self._cells[1])
        length = max(min(cells, 8), cells // 4)
        starts = (self._secret_shares(b"starts", WIDTH) * cells).astype(np.int64)
        inside = (np.arange(cells)[:, None] - starts) % cells < length
        signs = self._secret_signs(b"signs", cells * WIDTH).reshape(cells, WIDTH)
        windows: Floats = (inside * signs * np.sqrt(cells / (length * WIDTH))).astype(np.float32)
        return windows

    @functools.cached_property
    def _groups(self) -> tuple[npt.NDArray[np.int64], Floats]:
        """Which windows make up each fingerprint, and where the quanta of a window begin."""
        order = self._secret_shares(b"groups", MARKS * WIDTH).reshape(MARKS, WIDTH)
        return np.argsort(order, axis=1)[:, :_IN_MARK], self._secret_shares(b"offsets", WIDTH).astype(np.float32)
