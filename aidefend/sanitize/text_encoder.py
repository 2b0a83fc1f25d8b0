"""Texts as rows of numbers: hashed words, pairs of words, and triples of letters. No vocabulary, no network."""

import hashlib
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_items

_EDGES = ".,;:!?\"'()[]{}<>*_"
_LETTERS_WEIGHT = 0.3


def words_of(text: str) -> list[str]:
    """Words of a text: parts between spaces, without case and without ASCII punctuation at the ends."""
    return [word for part in text.casefold().split() if (word := part.strip(_EDGES) or part)]


class TextEncoder:
    """Hashes the words, neighbouring words and letter triples of a text into a row of fixed length.

    Guarantee: deterministic in (text, dimensions, seed), independent of other texts. The squared length of a row is
        about 1, whatever the length of the text; equal words in another order differ by their pairs.
    Args:
        dimensions: Length of a row.
        seed: Salt of the hashes: give each deployment its own, so that nobody can prepare collisions.
    Cost: one hash for each different part of the texts.
    Source: Weinberger, Dasgupta, Langford, Smola, Attenberg 2009 (signed feature hashing).

    Example:
        >>> rows = TextEncoder(dimensions=64)(["a fine day", "A fine day!", "rain"])
        >>> rows.shape, torch.equal(rows[0], rows[1]), torch.equal(rows[0], rows[2])
        (torch.Size([3, 64]), True, False)
    """

    def __init__(self, dimensions: int = 1024, seed: int = 0) -> None:
        self.dimensions, self.seed = check_int(dimensions, "dimensions"), check_int(seed, "seed", 0)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, dimensions) float32; an empty text is a row of zeros."""
        names = check_items(texts, str, "texts", "Pass a list of texts")
        rows, known = np.zeros((len(names), self.dimensions), dtype=np.float32), {}
        for row, text in zip(rows, names, strict=True):
            words = words_of(text)
            parts = [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]
            for part in parts:
                if part not in known:
                    known[part] = self._places(part)
                places, weights = known[part]
                np.add.at(row, places, weights)
            np.copyto(row, np.sign(row) * np.sqrt(np.abs(row)))
            row /= max(math.sqrt(float(row @ row)), 1e-12)
        return torch.from_numpy(rows)

    def _places(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Where a word or a pair counts, and with which sign; a word with its letters, which weigh less together."""
        letters = [] if " " in part else [f"^{part}$"[at : at + 3] for at in range(len(part))]
        weights = [1.0, *[_LETTERS_WEIGHT / math.sqrt(max(len(letters), 1))] * len(letters)]
        digests = [self._digest(part), *(self._digest(f"#{three}") for three in letters)]
        places = np.array([digest % self.dimensions for digest in digests], dtype=np.int64)
        signs = np.array([1.0 if digest >> 63 else -1.0 for digest in digests])
        return places, (signs * weights).astype(np.float32)

    def _digest(self, part: str) -> int:
        salt = self.seed.to_bytes(8, "big")
        raw = hashlib.blake2b(part.encode("utf-8", "surrogatepass"), digest_size=8, salt=salt).digest()
        return int.from_bytes(raw, "big")
