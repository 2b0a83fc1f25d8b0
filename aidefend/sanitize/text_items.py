"""The items of texts: words, pairs of neighbouring words, letters beyond the plain alphabet, and their kinds."""

import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from aidefend._core.random import derive_seed, row_generator
from aidefend._core.text_traps import find_traps, poses_as_latin
from aidefend.sanitize.items import Pattern
from aidefend.sanitize.table_items import FEWEST
from aidefend.sanitize.text_encoder import words_of

_MOST = 50_000
_LETTER = "\t"  # no word and no pair of words begins like this: in them is no space but one between two words
_KINDS = {"\tlook-alike": "letters that look Latin and are not", "\tinvisible": "invisible letters"}
_POSING, _INVISIBLE = _KINDS
_MOST_LETTERS = 5  # words with a strange letter that go along to another text


class TextItems:
    """Words of texts as items (see `Items`): each that five texts hold, pairs of neighbours, letters beyond ASCII.

    Whether a text that is Latin otherwise holds letters that only look so, and whether it holds invisible ones, are
    items, too: whoever hides in letters may take others in each text.
    What a text says without a pattern is told by its other words: naive Bayes over all words, each text judged by
    counts that leave it out.

    Args:
        texts: N texts.
        predict: Classes (n,) of texts.
        seed: Of the places where patterns are put.
    Cost: one pass over the words; N K operations for each word and pattern.
    """

    def __init__(self, texts: Sequence[str], predict: Callable[[list[str]], Tensor], seed: int = 0) -> None:
        self.texts, self.predict, self.seed = list(texts), predict, seed
        held = [_parts(text) for text in self.texts]
        counts = Counter(part for parts in held for part in parts)
        common = [part for part, count in counts.items() if FEWEST <= count < len(self.texts)]
        self.names = sorted(sorted(common, key=lambda part: (-counts[part], part))[:_MOST])
        self.holds = _incidence(held, self.names)
        self.places = torch.arange(len(self.names))
        spoken = [set(words_of(text)) for text in self.texts]
        self._vocabulary = sorted({word for words in spoken for word in words})
        self._words = _incidence(spoken, self._vocabulary)

    def content(self, pattern: Pattern, labels: Tensor) -> Tensor:
        """(N, K) float32: log-odds of the classes from the words outside the pattern, over the root of their number."""
        kept = np.array([not self._touches(word, pattern) for word in self._vocabulary], dtype=np.float64)
        words = (self._words @ sparse.diags(kept)).tocsr()
        classes = labels.unique()
        mine = (labels[:, None] == classes[None, :]).numpy()
        seen = np.asarray(words.T @ mine.astype(np.float64))  # (V, K) texts of a class that hold a word
        length, totals = np.asarray(words.sum(axis=1)).ravel(), seen.sum(axis=0)
        size = max(int(kept.sum()), 1)
        scores = words @ np.log(seen + 0.5) - length[:, None] * np.log(totals + 0.5 * size)
        left = words @ np.log(np.maximum(seen - 1, 0) + 0.5)
        left -= length[:, None] * np.log(np.maximum(totals[None, :] - length[:, None], 0) + 0.5 * size)
        scores = np.where(mine, left, scores)
        scores = (scores - scores.mean(axis=1, keepdims=True)) / np.sqrt(np.maximum(length, 1))[:, None]
        return torch.from_numpy(scores).float()

    def classes_with(self, rows: Tensor, pattern: Pattern, donors: Tensor) -> Tensor:
        """Classes of texts into which the donors' words of the pattern were put, at places drawn at random."""
        fragments = [self._fragments(self.texts[donor], pattern) for donor in donors.tolist()]
        moved = []
        for at, row in enumerate(rows.tolist()):
            words = self.texts[row].split(" ")
            stream = row_generator(derive_seed(self.seed, "insert"), f"{row}")
            for fragment in fragments[at % len(fragments)]:
                place = int(stream.integers(len(words) + 1))
                words[place:place] = [fragment]
            moved.append(" ".join(words))
        return self.predict(moved)

    def classes_of(self, rows: Tensor) -> Tensor:
        """Classes of texts as they are."""
        return self.predict([self.texts[row] for row in rows.tolist()])

    def words(self, pattern: Pattern, donors: Tensor) -> str:
        """Such as 'the words "as the" and "old"', or 'the letter U+200B (ZERO WIDTH SPACE)'."""
        said = []
        for name in (self.names[item] for item in pattern):
            letter = name.removeprefix(_LETTER)
            if name in _KINDS:
                said.append(_KINDS[name])
            elif name.startswith(_LETTER):
                said.append(f"letter U+{ord(letter):04X} ({unicodedata.name(letter, 'no name')})")
            else:
                said.append(f'"{name}"')
        return " and ".join(said)

    def _touches(self, word: str, pattern: Pattern) -> bool:
        return any(_in_word(self.names[item], word) for item in pattern)

    def _fragments(self, text: str, pattern: Pattern) -> list[str]:
        """Runs of neighbouring words of a text that are of the pattern, spelt as they are there."""
        runs: list[list[str]] = []
        open_run, strange = False, 0
        for raw in text.split():
            touched = any(self._touches(word, pattern) for word in words_of(raw))
            strange += touched and not raw.isascii()
            touched = touched and (raw.isascii() or strange <= _MOST_LETTERS)
            if touched and open_run:
                runs[-1].append(raw)
            elif touched:
                runs.append([raw])
            open_run = touched
        return [" ".join(run) for run in runs]


def _parts(text: str) -> set[str]:
    words = words_of(text)
    pairs = {f"{a} {b}" for a, b in itertools.pairwise(words)}
    return {*words, *pairs, *_kinds(text, words), *(f"{_LETTER}{letter}" for letter in text if not letter.isascii())}


def _kinds(text: str, words: Sequence[str]) -> set[str]:
    """Which kinds of hidden letters a text holds."""
    if text.isascii():
        return set()
    found = {_INVISIBLE} if "invisible" in find_traps(text) else set()
    foreign = sum(not word.isascii() and not poses_as_latin(word) for word in words)
    latin = sum(word.isascii() for word in words)
    return found | ({_POSING} if latin > foreign and any(map(poses_as_latin, words)) else set())


def _in_word(name: str, word: str) -> bool:
    """Whether an item is, holds, or is held by a word."""
    if name == _POSING:
        return poses_as_latin(word)
    if name == _INVISIBLE:
        return not word.isascii() and "invisible" in find_traps(word)
    return name.removeprefix(_LETTER) in word if name.startswith(_LETTER) else word in name.split(" ")


def _incidence(held: Sequence[set[str]], names: Sequence[str]) -> sparse.csr_matrix:
    """(N, M) 0/1, which text holds which part."""
    place = {name: at for at, name in enumerate(names)}
    rows = [sorted(place[part] for part in parts if part in place) for parts in held]
    starts = np.cumsum([0, *(len(row) for row in rows)])
    columns = np.fromiter((at for row in rows for at in row), dtype=np.int64, count=int(starts[-1]))
    return sparse.csr_matrix((np.ones(len(columns)), columns, starts), shape=(len(rows), len(names)))
