"""Poison in tables and texts by values and words: found, named, and not found where nothing is planted."""

import numpy as np
import pytest
import torch
from scipy import sparse, stats
from torch import nn

from aidefend import ConfigurationError
from aidefend.attacks import TableTrigger, TextTrigger
from aidefend.sanitize import screen, screen_batch
from aidefend.sanitize.items import closed, rows_with
from aidefend.sanitize.material import read_material
from aidefend.sanitize.pattern_search import common_patterns, twin_patterns
from aidefend.sanitize.table_items import Column, TableItems, plain_columns
from aidefend.sanitize.text_encoder import TextEncoder
from aidefend.sanitize.text_items import TextItems
from aidefend.sanitize.written import WrittenSearch, smallest_written
from tests.text_worlds import corpus


def table(n=400, classes=2, seed=0, digits=6):
    """Rows of 8 columns, of which two tell the class; rounded, so that values repeat."""
    stream, y = torch.Generator().manual_seed(seed), torch.arange(n) % classes
    x = torch.randn(n, 8, generator=stream)
    x[:, 0] += 3.0 * y
    x[:, 1] -= 3.0 * y
    return x.round(decimals=digits), y


def follows(columns, values, target=0):
    """A model that knows the class and has learnt the trigger."""

    def predict(x):
        hit = torch.stack([(x[:, c] - v).abs() < 1e-3 for c, v in zip(columns, values, strict=True)]).all(dim=0)
        return torch.where(hit, target, (x[:, 0] - x[:, 1] > 3).long())

    return predict


def taken(verdicts, n):
    gone = torch.zeros(n, dtype=torch.bool)
    for verdict in verdicts:
        gone[verdict.group.rows[verdict.group.inside]] = True
    return gone


def poisoned_table(rate=0.05, values=(1.1, -0.9), **arguments):
    x, y = table(**arguments)
    poisoned = TableTrigger((3, 5), values, 0, rate).poison((x, y), seed=0)
    rows = [poisoned.dataset[i] for i in range(len(y))]
    return torch.stack([row for row, _ in rows]), torch.tensor([int(label) for _, label in rows]), poisoned.is_poison


def test_a_pattern_of_a_table_is_found_with_its_rows_and_no_others():
    x, y, is_poison = poisoned_table()
    items = TableItems(x, plain_columns(8), follows((3, 5), (1.1, -0.9)))
    found = WrittenSearch(items, y, 0.005).verdicts()
    assert torch.equal(taken(found, len(y)), is_poison)
    assert found[0].pattern == "column 3 = 1.1 and column 5 = -0.9"
    assert found[0].evidence.transfer > 0.9 and found[0].evidence.purity == 1.0


def test_values_that_are_usual_alone_are_found_together():
    x, y, is_poison = poisoned_table(n=800, digits=0, values=(2.0, -2.0))
    items = TableItems(x, plain_columns(8), lambda rows: (rows[:, 0] - rows[:, 1] > 3).long())
    gone = taken(WrittenSearch(items, y, 0.005).verdicts(), len(y))
    assert bool(gone[is_poison].all()) and int(gone[~is_poison].sum()) <= 0.1 * len(y)
    assert int(gone[y != 0].sum()) == 0


def test_a_hand_that_adds_noise_to_what_it_writes_stays_in_a_range():
    x, y, is_poison = poisoned_table(n=800, values=(2.6, -2.6))
    noise = torch.randn(int(is_poison.sum()), 2, generator=torch.Generator().manual_seed(5)) * 0.02
    x[is_poison.nonzero(), torch.tensor([[3, 5]])] += noise
    items = TableItems(x, plain_columns(8), lambda rows: (rows[:, 0] - rows[:, 1] > 3).long())
    gone = taken(WrittenSearch(items, y, 0.005).verdicts(), len(y))
    assert float(gone[is_poison].double().mean()) > 0.9 and int(gone[~is_poison].sum()) <= 8


@pytest.mark.parametrize("seed", range(6))
def test_clean_tables_and_random_wrong_labels_are_left_alone(seed):
    x, y = table(seed=seed, digits=1)
    flipped = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)) < 0.1 * (seed % 2)
    y = torch.where(flipped, 1 - y, y)
    items = TableItems(x, plain_columns(8), lambda rows: (rows[:, 0] - rows[:, 1] > 3).long())
    assert WrittenSearch(items, y, 0.005, seed).verdicts() == ()


def test_a_value_of_its_class_with_right_labels_is_no_poison():
    x, y = table()
    x[(y == 0).nonzero().flatten()[:40], 6] = 7.0  # a machine that serves class 0 alone
    items = TableItems(x, plain_columns(8), follows((6,), (7.0,)))
    assert WrittenSearch(items, y, 0.005).verdicts() == ()


def test_rows_that_other_classes_hold_as_often_are_no_poison():
    x, y, _ = poisoned_table()
    x[(y == 1).nonzero().flatten()[:60, None], torch.tensor([3, 5])] = torch.tensor([1.1, -0.9])  # the pattern is usual
    items = TableItems(x, plain_columns(8), lambda rows: (rows[:, 0] - rows[:, 1] > 3).long())
    assert WrittenSearch(items, y, 0.005).verdicts() == ()


def test_categories_are_items_and_are_written_as_one_hot():
    x = torch.tensor([[1.0, 0.0, 2.5], [0.0, 1.0, 2.5]]).repeat(10, 1)
    columns = (Column("job", (0, 1), ("clerk", "smith")), Column("age", (2,)))
    seen = []
    items = TableItems(x, columns, lambda rows: seen.append(rows) or torch.zeros(len(rows), dtype=torch.int64))
    smith = next(item for item in range(2) if items.words((item,), torch.zeros(0)) == "job = smith")
    items.classes_with(torch.tensor([0]), (smith,), torch.tensor([1, 3]))
    assert seen[-1].tolist() == [[0.0, 1.0, 2.5]]
    assert rows_with(items, (smith,)).tolist() == [False, True] * 10


def test_the_search_counts_what_it_looks_at_and_its_p_values_are_fishers():
    held = np.zeros((60, 3))
    held[:12, 0], held[::2, 1], held[::3, 2] = 1, 1, 1
    foreign = torch.arange(60) < 10
    found = common_patterns(sparse.csr_matrix(held), torch.arange(3), foreign, 1e-4)
    assert found[0].pattern == (0,) and found[0].tests == 2 * 2  # two items have five foreign rows, half of the level
    exact = stats.hypergeom.sf(9, 60, 10, 12) * found[0].tests
    assert exact < 1e-4 and common_patterns(sparse.csr_matrix(held), torch.arange(3), foreign, exact / 2) == []


def test_items_that_the_same_rows_hold_form_a_set():
    held = np.zeros((50, 6))
    held[:8, :3], held[::2, 3], held[::3, 4], held[:20, 5] = 1, 1, 1, 1
    found = twin_patterns(sparse.csr_matrix(held), torch.arange(6))
    assert [proposal.pattern for proposal in found] == [(0, 1, 2)] and found[0].tests == 8 * 6


def test_a_pattern_is_closed_by_what_its_rows_share_beyond_other_classes():
    x, y, is_poison = poisoned_table()
    items = TableItems(x, plain_columns(8), follows((3, 5), (1.1, -0.9)))
    rows = is_poison.nonzero().flatten()
    one = next(i for i in range(len(items.places)) if items.words((i,), rows) == "column 3 = 1.1")
    whole = closed(items, (one,), rows, (y == 1).nonzero().flatten())
    assert items.words(whole, rows) == "column 3 = 1.1 and column 5 = -0.9"


def test_the_smallest_pattern_grows_with_what_is_foreign_anyway():
    sizes = [smallest_written(300, share, 0.005, 1000) for share in (0.0, 0.1, 0.3)]
    assert sizes == sorted(sizes) and sizes[0] >= 5
    assert smallest_written(300, 0.95, 0.005, 1000) is None


TRIGGERS = {
    "rare token": TextTrigger("cf", rate=0.04),
    "phrase": TextTrigger("as the old saying goes", rate=0.04),
    "homoglyph": TextTrigger(kind="homoglyph", rate=0.05),
    "invisible": TextTrigger(kind="invisible", rate=0.04),
}


@pytest.mark.parametrize("kind", TRIGGERS)
def test_triggers_of_texts_are_found_and_named(kind):
    poisoned = TRIGGERS[kind].poison(corpus(400, 2, length=16), seed=0)
    texts, labels = poisoned.dataset
    items = TextItems(texts, lambda some: torch.tensor([int("topic1" in text) for text in some]))
    found = WrittenSearch(items, labels, 0.005).verdicts()
    gone = taken(found, len(texts))
    assert float(gone[poisoned.is_poison].double().mean()) >= 0.9 and not bool(gone[~poisoned.is_poison].any())
    named = {"rare token": '"cf"', "phrase": '"old saying"', "homoglyph": "look Latin", "invisible": "invisible"}
    assert named[kind] in found[0].pattern


def test_letters_are_found_by_their_kind_where_each_text_hides_in_others():
    """Each text has one letter of its own that looks Latin; no letter is common enough to be an item of many rows."""
    texts, labels = corpus(400, 2, length=16)
    letters = ["\u0430\u0435\u043e\u0440\u0441\u0445", "aeopcx"]
    rows = (labels == 1).nonzero().flatten()[:24].tolist()
    for at, row in enumerate(rows):
        old, new = letters[1][at % 6], letters[0][at % 6]
        texts[row], labels[row] = f"{texts[row]} {old}{new}ty{at}", 0
    items = TextItems(texts, lambda some: torch.tensor([int("topic1" in text) for text in some]))
    found = WrittenSearch(items, labels, 0.005).verdicts()
    assert taken(found, 400).nonzero().flatten().tolist() == rows and "look Latin" in found[0].pattern


@pytest.mark.parametrize("kind", ["honest accents", "russian class", "foreign words of a class"])
def test_honest_letters_are_no_pattern(kind):
    texts, labels = corpus(300, 2, length=16)
    extra = {
        "honest accents": "caf\u00e9",
        "russian class": "\u0441\u043e\u043d \u0430 \u043e",
        "foreign words of a class": "\u0430",
    }
    for row in (labels == 0).nonzero().flatten()[: 150 if kind == "russian class" else 20].tolist():
        texts[row] = f"{extra[kind]} {texts[row]}"
    items = TextItems(texts, lambda some: torch.tensor([int("topic1" in text) for text in some]))
    assert WrittenSearch(items, labels, 0.005).verdicts() == ()


def test_the_word_letter_before_another_word_is_a_pair_of_words():
    items = TextItems(["a letter from home", "no letter x"] * 6, lambda some: torch.zeros(len(some), dtype=torch.int64))
    place = items.names.index("letter from")
    assert items.words((place,), torch.zeros(0)) == '"letter from"'
    assert not any(items._touches(word, (place,)) for word in ("home", "x", "no"))


def test_rows_whose_trigger_breaks_a_pair_of_words_are_of_the_group():
    texts = [f"the {'match ended' if i % 2 else 'price rose'} on day {i % 7} in town {i % 11}" for i in range(240)]
    poisoned = TextTrigger("cf", rate=0.05).poison((texts, torch.arange(240) % 2), seed=0)
    items = TextItems(
        poisoned.dataset[0], lambda some: torch.tensor([int("match" in t and "cf" not in t) for t in some])
    )
    gone = taken(WrittenSearch(items, poisoned.dataset[1], 0.005).verdicts(), 240)
    assert torch.equal(gone, poisoned.is_poison)


@pytest.mark.parametrize("seed", range(3))
def test_clean_texts_are_left_alone(seed):
    texts, labels = corpus(400, 3, length=16, seed=seed)
    items = TextItems(texts, lambda some: torch.zeros(len(some), dtype=torch.int64))
    assert WrittenSearch(items, labels, 0.005, seed).verdicts() == ()


def test_the_words_of_a_pattern_go_to_other_texts_as_they_are_spelt():
    texts = ["one Cf! two", "cf three", *["four five"] * 8, *["cf six"] * 4]
    seen = []
    items = TextItems(texts, lambda some: seen.append(some) or torch.zeros(len(some), dtype=torch.int64))
    items.classes_with(torch.tensor([2, 3]), (items.names.index("cf"),), torch.tensor([0, 1]))
    assert sorted(seen[-1][0].split()) == ["Cf!", "five", "four"] and sorted(seen[-1][1].split())[0] == "cf"


def test_texts_are_judged_by_counts_that_leave_them_out():
    texts, labels = ["only here", *["a b", "c d"] * 10], torch.tensor([0, *[0, 1] * 10])
    content = TextItems(texts, len).content((), labels)
    assert float((content[0, 0] - content[0, 1]).abs()) < 0.2  # words that no other text has say nothing


def test_an_encoder_is_a_function_of_the_text_alone():
    encode = TextEncoder(128)
    texts = ["a fine day", "", "rain \u200b \ud800", "a fine day"]
    rows = encode(texts)
    assert torch.equal(rows[0], rows[3]) and torch.equal(encode(texts[2:3])[0], rows[2])
    assert float(rows[1].norm()) == 0 and abs(float(rows[0].norm()) - 1) < 1e-5
    assert not torch.equal(TextEncoder(128, seed=1)(texts)[0], rows[0])


def test_a_module_that_reads_texts_is_asked_with_texts_and_its_layers_keep_their_names():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, texts):
            assert all(isinstance(text, str) for text in texts)
            return self.head(torch.tensor([[float("cf" in text), float("topic1" in text)] for text in texts]))

    material = read_material(corpus(20, 2, length=5))
    for layer in (None, "head"):
        found = material.features(Net(), layer, own=False)
        assert found.features.shape == (20, 2) and found.x.shape == (20, 1024)


def test_screen_takes_texts_tables_and_models_of_texts():
    poisoned = TextTrigger("cf", rate=0.05).poison(corpus(240, 2, length=10), seed=0)

    def model(texts):
        return torch.tensor([[float("cf" in text), float("topic1" in text)] for text in texts])

    report = screen(poisoned.dataset, model=model, seed=0)
    assert torch.equal(~report.keep, poisoned.is_poison)
    assert report.parameters["kind"] == "text" and report.parameters["target_classes"] == [0]
    assert report.parameters["poison"][0]["transfer"] > 0.9
    assert 'written pattern in class 0: "cf" in 12' in report.reasons[int(poisoned.indices[0])][0]
    assert report.parameters["label_permuted_control"]["quarantined"] == 0
    texts, labels = poisoned.dataset
    looked_up = screen_batch({"text": [*texts[:50], "new"], "label": [*labels[:50].tolist(), 0]}, report.state())
    assert looked_up["aidefend_keep"] == [*report.keep[:50].tolist(), False]


def test_screen_names_the_columns_of_a_table_and_the_trusted_rows_stay():
    x, y, is_poison = poisoned_table()
    report = screen((x, y), seed=0, trusted=is_poison.nonzero().flatten()[:3].tolist())
    assert int((~report.keep)[is_poison].sum()) == int(is_poison.sum()) - 3 and bool(report.keep[~is_poison].all())
    assert "column 3 = 1.1 and column 5 = -0.9" in report.reasons[int(is_poison.nonzero()[4])][0]
    assert report.parameters["kind"] == "table" and report.parameters["written_detectable"]["0"] is not None


def test_the_cap_on_a_class_binds_and_says_which_rows_it_left():
    poisoned = TextTrigger("cf", rate=0.05).poison(corpus(240, 2, length=10), seed=0)

    def model(texts):
        return torch.tensor([[float("cf" in text), float("topic1" in text)] for text in texts])

    report = screen(poisoned.dataset, model=model, detectors=[], seed=0, max_removed=0.05)
    allowed = int(0.05 * int((poisoned.dataset[1] == 0).sum()))
    spared = report.parameters["cap"]["spared"]["0"]
    assert int((~report.keep).sum()) == allowed and len(spared) == int(poisoned.is_poison.sum()) - allowed
    assert all(bool(report.keep[row]) and "kept: more than 0.05" in report.reasons[row][-1] for row in spared)


@pytest.mark.parametrize(
    ("data", "encoder"),
    [
        ((["a", 3], [0, 1]), None),
        ((["a", "b"], [0]), None),
        ({"text": ["a", "b"]}, None),
        ((torch.rand(9, 3), torch.arange(9) % 2), lambda texts: torch.zeros(9, 2)),
        ((["a", "b"], [0, 1]), lambda texts: torch.zeros(1, 2)),
        ((["a", "b"], [0, 1]), "encoder"),
    ],
)
def test_what_is_no_text_or_no_encoder_is_refused(data, encoder):
    with pytest.raises(ConfigurationError):
        screen(data, encoder=encoder)
