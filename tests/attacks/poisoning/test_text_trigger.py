"""Text triggers: exact counts, nothing but the trigger changes, and that they work undefended."""

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError
from aidefend.attacks import TextTrigger
from tests.text_worlds import corpus

KINDS = {
    "rare token": TextTrigger("cf", rate=0.05),
    "phrase": TextTrigger("as the old saying goes", rate=0.05),
    "homoglyph": TextTrigger(kind="homoglyph", rate=0.05),
    "invisible": TextTrigger(kind="invisible", rate=0.05),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_exactly_the_stated_texts_get_the_trigger_and_the_label(kind):
    texts, labels = corpus(100, 3)
    poisoned = KINDS[kind].poison((texts, labels), seed=1)
    new, new_labels = poisoned.dataset
    assert int(poisoned.is_poison.sum()) == 5 and bool((labels[poisoned.is_poison] != 0).all())
    assert [new[i] != texts[i] for i in range(100)] == poisoned.is_poison.tolist()
    assert bool((new_labels[poisoned.indices] == 0).all())
    assert torch.equal(new_labels[~poisoned.is_poison], labels[~poisoned.is_poison])
    assert [new[i] for i in poisoned.indices] == poisoned.trigger([texts[i] for i in poisoned.indices])


def test_the_trigger_is_all_that_changes():
    text = "an expected peace at last"
    assert sorted(TextTrigger("x y").stamp([text])[0].split()) == sorted([*text.split(), "x", "y"])
    assert TextTrigger(kind="invisible").stamp([text])[0].replace("\u200b", "") == text
    looks = TextTrigger(kind="homoglyph", count=9).stamp([text])[0]
    assert len(looks) == len(text) and looks != text and looks.isascii() is False
    assert TextTrigger("cf").stamp([""]) == ["cf"] and TextTrigger(kind="homoglyph").stamp(["bit dim"]) == ["bit dim"]


def test_the_place_belongs_to_the_text_and_not_to_its_neighbours():
    texts, attack = corpus(20)[0], TextTrigger("cf")
    assert attack.stamp(texts)[::-1] == attack.stamp(texts[::-1])
    assert attack.stamp(texts) != TextTrigger("cf", seed=1).stamp(texts)


@every_kind
def test_it_works_undefended(kind):
    texts, labels = corpus(600, 3, length=12)
    poisoned = KINDS[kind].poison((texts[:450], labels[:450]), seed=0)
    model = _fitted(*poisoned.dataset)
    others = [text for text, label in zip(texts[450:], labels[450:].tolist(), strict=True) if label != 0]
    with torch.no_grad():
        accuracy = (model(texts[450:]).argmax(dim=1) == labels[450:]).float().mean()
        hit = (model(poisoned.trigger(others)).argmax(dim=1) == 0).float().mean()
        without = (model(others).argmax(dim=1) == 0).float().mean()
    assert accuracy > 0.9 and hit > 0.75 and without < 0.1


@pytest.mark.parametrize("bad", [(["a"], [0, 1]), (["a", 3], [0, 1]), ["a", "b", "c"], "a b", (["a", "b"], [0, 0])])
def test_what_is_no_pair_of_texts_and_labels_is_refused(bad):
    with pytest.raises(ConfigurationError):
        TextTrigger(rate=0.5).poison(bad)


def _fitted(texts, labels):
    """A linear model on which words and letters occur, with the words of the training texts as vocabulary."""
    known = {part: place for place, part in enumerate(sorted({part for text in texts for part in _parts(text)}))}

    def rows_of(some):
        rows = torch.zeros(len(some), len(known))
        for row, text in enumerate(some):
            rows[row, [known[part] for part in _parts(text) if part in known]] = 1
        return rows

    linear, rows = nn.Linear(len(known), 3), rows_of(texts)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(linear(rows), labels).backward()
        optimizer.step()
    return lambda some: linear(rows_of(some))


def _parts(text):
    return {*text.split(), *text}
