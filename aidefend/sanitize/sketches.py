"""Short fingerprints that similar things share, and a search among them that meets similar ones only."""

import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import fft
from torch import Tensor, nn

_SIDE = 32
_LOW = 8
_SHINGLE = 3
_BITS_OF = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)
_PAIRS_AT_ONCE = 1_000_000


def perceptual_hashes(x: Tensor) -> np.ndarray:
    """(N, 8) uint8, 64 bits a picture (N, C, H, W): signs of its lowest frequencies about their median.

    Close under scaling, compression and small changes of brightness. Source: after Zauner 2010 (DCT hash).
    """
    if not len(x):
        return np.zeros((0, _LOW), dtype=np.uint8)
    grey = x.float().mean(dim=1, keepdim=True)
    small = nn.functional.interpolate(grey, size=(_SIDE, _SIDE), mode="bilinear", antialias=True)[:, 0].double()
    waves = fft.dctn(small.numpy(), axes=(1, 2), norm="ortho")[:, :_LOW, :_LOW].reshape(len(x), -1)
    floor = 1e-6 * np.abs(waves).max(axis=1, keepdims=True)  # a flat picture has no waves but rounding errors
    waves = np.where(np.abs(waves) <= floor, 0.0, waves)
    bits = waves > np.median(waves[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False  # the mean brightness says nothing
    return np.packbits(bits, axis=1)


def min_hashes(texts: Sequence[str], permutations: int, seed: int) -> np.ndarray:
    """(N, permutations) uint32: the share of equal entries of two texts estimates the overlap of their word triples.

    Case and punctuation do not count. Source: Broder 1997; one multiply-shift hash for each permutation.
    """
    draws = np.random.Generator(np.random.Philox(key=seed))
    factors = draws.integers(0, 2**63, permutations, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = draws.integers(0, 2**63, permutations, dtype=np.uint64)
    found = np.empty((len(texts), permutations), dtype=np.uint32)
    for place, text in enumerate(texts):
        tokens = np.array([_hash(piece) for piece in _shingles(text)], dtype=np.uint64)
        mixed = tokens[:, None] * factors[None, :] + offsets[None, :]  # modulo 2 ** 64, as meant
        found[place] = (mixed >> np.uint64(32)).min(axis=0).astype(np.uint32)
    return found


def _shingles(text: str) -> set[str]:
    words = re.findall(r"\w+", text.casefold())
    if len(words) < _SHINGLE:
        return {" ".join(words)}
    return {" ".join(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1)}


def _hash(piece: str) -> int:
    return int.from_bytes(hashlib.blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class BitIndex:
    """Finds every stored row of bits within `radius` differing bits of a query, by equal pieces.

    Args:
        rows: (N, B) uint8, all different.
        radius: Largest number of differing bits: the bits are cut into radius + 1 pieces, of which one must be equal.
    """

    def __init__(self, rows: np.ndarray, radius: int) -> None:
        self.rows = rows
        bits = np.unpackbits(rows, axis=1)
        self._pieces = np.array_split(np.arange(bits.shape[1]), radius + 1)
        self._tables = [_Table(_packed(bits[:, piece])) for piece in self._pieces]

    def pairs(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Query numbers, row numbers and similarities in [0, 1] of all pairs that share a piece; some come twice."""
        bits = np.unpackbits(queries, axis=1)
        for piece, table in zip(self._pieces, self._tables, strict=True):
            for ours, theirs in table.matches(_packed(bits[:, piece])):
                differing = _BITS_OF[queries[ours] ^ self.rows[theirs]].sum(axis=1, dtype=np.int64)
                yield ours, theirs, 1 - differing / bits.shape[1]


class BandIndex:
    """Finds stored MinHash rows that agree with a query in all entries of at least one band.

    Args:
        rows: (N, P) uint32, all different.
        width: Entries a band, a divisor of P.
    """

    def __init__(self, rows: np.ndarray, width: int) -> None:
        self.rows, self._width = rows, width
        self._tables = [_Table(key) for key in self._keys(rows)]

    def pairs(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """As `BitIndex.pairs`; the similarity is the share of equal entries."""
        for table, keys in zip(self._tables, self._keys(queries), strict=True):
            for ours, theirs in table.matches(keys):
                yield ours, theirs, (queries[ours] == self.rows[theirs]).mean(axis=1)

    def _keys(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, rows.shape[1], self._width):
            key = np.zeros(len(rows), dtype=np.uint64)
            for column in rows[:, start : start + self._width].T:
                key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
                key ^= key >> np.uint64(29)
            yield key


class _Table:
    """Row numbers by key: one sorted array."""

    def __init__(self, keys: np.ndarray) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def matches(self, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(query numbers, row numbers) with equal keys, about a million pairs at once."""
        low, high = np.searchsorted(self._sorted, keys, "left"), np.searchsorted(self._sorted, keys, "right")
        totals = np.cumsum(high - low)
        start = 0
        while start < len(keys):
            before = int(totals[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(totals, before + _PAIRS_AT_ONCE, "right")))
            counts = (high - low)[start:stop]
            ours = np.repeat(np.arange(start, stop), counts)
            within = np.arange(len(ours)) - np.repeat(np.cumsum(counts) - counts, counts)
            yield ours, self._order[np.repeat(low[start:stop], counts) + within]
            start = stop


def _packed(bits: np.ndarray) -> np.ndarray:
    """(N,) uint64 of the first 64 bits of rows."""
    packed = np.packbits(bits[:, :64], axis=1)
    wide = np.zeros((len(bits), 8), dtype=np.uint8)
    wide[:, : packed.shape[1]] = packed
    return wide.view(np.uint64)[:, 0]
