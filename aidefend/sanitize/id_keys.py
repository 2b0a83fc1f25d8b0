"""Keys of ids: 64 bits a text, for all texts of a block at once."""

from collections.abc import Sequence

import numpy as np

_STEP = 0x9E3779B97F4A7C15  # what a counter advances by in SplitMix64
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = tuple(np.uint64(bits) for bits in (30, 27, 31))


def id_keys(ids: Sequence[str], seed: int) -> np.ndarray:
    """(n,) uint64: looks random, is the same for the same id and seed on every machine, in every block and order.

    The bytes of an id are read eight at a time; each of these words is added to the key, which is then mixed. Ids of
    equal length collide as random 64-bit numbers do. It hides nothing: who may choose ids freely may choose their
    keys, as with any hash whose seed is known; content ids are digests, which nobody chooses.

    Cost: about ten passes over the bytes, and no Python for a single id.
    Source: the mixing function of SplitMix64 (Steele, Lea, Flood 2014).

    Example:
        >>> bool((id_keys(["a", "b"], 0) == id_keys(["b", "a"], 0)[::-1]).all())
        True
    """
    text, ends = _bytes(ids)
    starts = np.concatenate([[0], ends + 1])[: len(ids)]
    lengths = ends - starts
    keys: np.ndarray = lengths.astype(np.uint64) + np.uint64((seed + 1) * _STEP % 2**64)
    _mix(keys)
    words = (lengths + 7) // 8
    for number in range(int(words.max(initial=0))):
        longer = np.flatnonzero(words > number) if int(words.min()) <= number else slice(None)
        part = keys[longer]
        part += _word(text, starts[longer] + 8 * number, lengths[longer] - 8 * number)
        _mix(part)
        keys[longer] = part
    return keys


def _bytes(ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """All ids as one row of bytes, zero after each and eight times at the end; and where each one ends (n,)."""
    text = np.frombuffer(("\0".join(ids) + 9 * "\0").encode(), dtype=np.uint8)
    ends = np.flatnonzero(text == 0)
    if len(ends) != len(ids) + 8:  # an id holds the separator itself
        parts = [row_id.encode() for row_id in ids]
        ends = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64) - 1
    return text, ends[: len(ids)]


def _word(text: np.ndarray, starts: np.ndarray, left: np.ndarray) -> np.ndarray:
    """(n,) uint64: the eight bytes from each start on; those beyond the `left` ones of the id count as zero."""
    anywhere = np.ndarray((len(text) - 7,), dtype="<u8", buffer=text, strides=(1,))  # a word at each byte
    words: np.ndarray = anywhere.take(starts).astype(np.uint64, copy=False)
    beyond = np.uint64(8) * np.clip(8 - left, 0, 7).astype(np.uint64)
    words <<= beyond  # the first byte of an id is the lowest, so what lies beyond the id is shifted out ...
    words >>= beyond  # ... at the top
    return words


def _mix(keys: np.ndarray) -> None:
    """In place: each key to another, one to one; one bit changed changes half of the result."""
    keys ^= keys >> _SHIFTS[0]
    keys *= _FIRST
    keys ^= keys >> _SHIFTS[1]
    keys *= _SECOND
    keys ^= keys >> _SHIFTS[2]
