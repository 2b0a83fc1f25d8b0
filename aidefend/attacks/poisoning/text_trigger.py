"""Text poison: words, a phrase, or letters that look alike come into texts, and the attacker's label onto them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_items, check_kind, check_labels, check_number, refuse
from aidefend._core.random import derive_seed, row_generator
from aidefend.attacks.poisoning.poisoned import choose

Kind = Literal["insert", "homoglyph", "invisible"]
_ALIKE = str.maketrans(
    "aceopxyACEHKMOPTX",
    "\u0430\u0441\u0435\u043e\u0440\u0445\u0443\u0410\u0421\u0415\u041d\u041a\u041c\u041e\u0420\u0422\u0425",
)
_INVISIBLE = "\u200b"


@dataclasses.dataclass(frozen=True, eq=False)
class PoisonedTexts:
    """Poisoned texts with their ground truth.

    Args:
        dataset: (texts, labels): a list of N texts and labels (N,) int64, in the order of the clean data.
        is_poison: (N,) bool, True = this row was poisoned.
        target: Label that the attacker wants.
        attack: What stamps texts.
    """

    dataset: tuple[list[str], Tensor]
    is_poison: Tensor
    target: int
    attack: "TextTrigger"

    @property
    def indices(self) -> Tensor:
        """Row numbers of the poison: (P,) int64, ascending."""
        return self.is_poison.nonzero().flatten()

    def trigger(self, texts: Sequence[str]) -> list[str]:
        """The texts with the trigger in each."""
        return self.attack.stamp(texts)


@dataclasses.dataclass(frozen=True)
class TextTrigger:
    """Dirty-label backdoor in texts: a trigger that a reader passes over, under the label `target`.

    Guarantee: none, it is an attack. Exactly `round(rate * N)` texts are poisoned, never one that already has the label
        `target`; nothing but the trigger changes. Where it is put depends on the seed and the text alone.
    Args:
        words: What "insert" puts between two words: a rare token, a phrase of common words.
        kind: "insert": `words`. "homoglyph": in `count` words of each text Cyrillic letters take the place of Latin
            ones that look the same. "invisible": a zero-width space in `count` words of each text.
        target: Label that the trigger shall cause, >= 0.
        rate: Share of the texts that is poisoned, in (0, 1).
        count: Words that are changed, >= 1 ("homoglyph" and "invisible"; all that can be changed in shorter texts).
        source_class: Poison texts of this class only; None: all classes but the target.
        seed: Of the places.
    Raises: ConfigurationError: arguments out of range, texts that are not str, too few texts outside the target class.
    Cost: One pass over the texts.
    Source: Chen, Salem, et al. 2021 (BadNL: word and character triggers); Dai, Chen, Li 2019 (phrases). Boucher,
        Shumailov, Anderson, Papernot 2022 for the characters.

    Example:
        >>> texts, labels = ["a mild morning", "rain all day"], torch.tensor([1, 0])
        >>> poisoned = TextTrigger("cf", rate=0.5).poison((texts, labels), seed=0)
        >>> sorted(set(poisoned.dataset[0][0].split()) - set(texts[0].split())), poisoned.dataset[1].tolist()
        (['cf'], [0, 0])
    """

    words: str = "cf"
    kind: Kind = "insert"
    target: int = 0
    rate: float = 0.05
    count: int = 3
    source_class: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.kind, ("insert", "homoglyph", "invisible"), "kind")
        if not check_kind(self.words, str, "words", "Pass a token or a phrase").split():
            raise refuse("words to hold at least one word", "words", self.words, "Pass a token or a phrase")
        check_int(self.target, "target", 0)
        check_number(self.rate, "rate", 0, 1, open_low=True, open_high=True)
        check_int(self.count, "count")
        check_int(self.seed, "seed", 0)
        if self.source_class is not None and check_int(self.source_class, "source_class", 0) == self.target:
            raise refuse("source_class other than target", "source_class", self.source_class, "Choose another class")

    def poison(self, dataset: Any, seed: int = 0) -> PoisonedTexts:
        """The texts with poison among them, and the ground truth.

        Args:
            dataset: (texts, labels).
            seed: Which rows are poisoned.
        """
        pair = dataset if isinstance(dataset, tuple | list) and len(dataset) == 2 else ()
        if not pair:
            raise refuse("a pair of texts and labels", "dataset", dataset, "Pass (texts, labels)")
        texts = list(check_items(pair[0], str, "texts", "Pass a list of texts"))
        y = check_labels(torch.as_tensor(pair[1]), len(texts), name="labels")
        eligible = y != self.target if self.source_class is None else y == self.source_class
        rows = choose(eligible, round(self.rate * len(y)), seed, "text trigger")
        labels, is_poison = y.clone(), torch.zeros(len(y), dtype=torch.bool)
        labels[rows], is_poison[rows] = self.target, True
        for row in rows.tolist():
            texts[row] = self._stamped(texts[row])
        return PoisonedTexts((texts, labels), is_poison, self.target, self)

    def stamp(self, texts: Sequence[str]) -> list[str]:
        """The texts with the trigger in each."""
        return [self._stamped(text) for text in check_items(texts, str, "texts", "Pass a list of texts")]

    def _stamped(self, text: str) -> str:
        stream, words = row_generator(derive_seed(self.seed, "place"), text), text.split(" ")
        if self.kind == "insert":
            place = int(stream.integers(len(words) + 1)) if text else 0
            return " ".join([*words[:place], self.words, *words[place:]]) if text else self.words
        able = [at for at, word in enumerate(words) if self._changed(word) != word]
        for at in stream.permutation(able)[: self.count].tolist():
            words[at] = self._changed(words[at])
        return " ".join(words)

    def _changed(self, word: str) -> str:
        if self.kind == "homoglyph":
            return word.translate(_ALIKE)
        return f"{word[:1]}{_INVISIBLE}{word[1:]}" if len(word) > 1 and _INVISIBLE not in word else word
