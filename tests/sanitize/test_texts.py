"""Data sets of texts in every form: one reading of them all, and a row without a text costs that row alone."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from aidefend import ConfigurationError
from aidefend.sanitize import Samples, ScreenReport, screen, screen_batch, screen_stream
from aidefend.sanitize.material import read_material
from aidefend.sanitize.texts import TextRows, read_texts, text_rows

TEXTS = ["a fine day", "rain all week", "sun again", "storm and hail"] * 5
LABELS = [0, 1, 0, 1] * 5
WORDS = ["good" if label == 0 else "bad" for label in LABELS]


class Rows(Dataset):
    """Samples by number; those in `damaged` raise."""

    def __init__(self, samples, damaged=()):
        self.samples, self.damaged = samples, damaged

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        if row in self.damaged:
            raise OSError("the file is gone")
        return self.samples[row]


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


class Once:
    """An iterator that goes on after it raised."""

    def __init__(self, samples, damaged):
        self.samples, self.damaged, self.at = samples, damaged, -1

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        if self.at in self.damaged:
            raise OSError("the line is cut")
        if self.at == len(self.samples):
            raise StopIteration
        return self.samples[self.at]


def pairs(labels=LABELS):
    return list(zip(TEXTS, labels, strict=True))


def named(text="text", label="label"):
    return [{text: words, label: number} for words, number in pairs()]


def hugging_face():
    return pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS, "label": LABELS})


FORMS = {
    "lists": lambda: (TEXTS, LABELS),
    "array and tensor": lambda: (np.array(TEXTS), torch.tensor(LABELS)),
    "dict": lambda: {"text": TEXTS, "label": LABELS},
    "dict of arrays": lambda: {"sentence": np.array(TEXTS), "y": torch.tensor(LABELS)},
    "dict that is named": lambda: Samples({"review": TEXTS, "stars": LABELS}, "review", "stars"),
    "list of pairs": pairs,
    "list of dicts": named,
    "list of dicts that are named": lambda: Samples(named("review", "stars"), "review", "stars"),
    "data set of pairs": lambda: Rows(pairs()),
    "data set of dicts": lambda: Rows(named()),
    "loader": lambda: DataLoader(Rows(pairs()), batch_size=3),
    "stream of pairs": lambda: Stream(pairs()),
    "stream of dicts": lambda: Stream(named()),
    "generator": lambda: (pair for pair in pairs()),
    "generator of batches": lambda: ((TEXTS[i : i + 7], LABELS[i : i + 7]) for i in range(0, 20, 7)),
    "hugging face": hugging_face,
    "hugging face stream": lambda: hugging_face().to_iterable_dataset(),
    "pandas that is named": lambda: Samples(
        pytest.importorskip("pandas").DataFrame({"review": TEXTS, "stars": LABELS}), "review", "stars"
    ),
    "words": lambda: Samples((TEXTS, WORDS), classes=["good", "bad"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_texts(form):
    plain, found = read_material((TEXTS, LABELS)), read_material(FORMS[form]())
    assert found.kind == "text" and found.texts == plain.texts and found.samples.ids == plain.samples.ids
    assert torch.equal(found.samples.x, plain.samples.x) and not found.samples.broken


@pytest.mark.parametrize("form", [form for form in FORMS if "generator" not in form])
def test_rows_for_views_are_texts_with_their_labels(form):
    rows = text_rows(FORMS[form]())
    assert [text for text, _ in rows] == TEXTS and len(rows) == 20


@pytest.mark.parametrize(
    "data",
    [
        [("0001", torch.ones(3)), ("0002", torch.ones(3))],  # (key, x), as WebDataset gives them
        [{"__key__": "1", "text": "x", "cls": 0}],
        [(torch.ones(3), 1)],
        torch.ones(3, 2),
        {"x": torch.ones(3, 2), "y": [0, 1, 0]},
        Rows([(torch.ones(2), 0)]),
        Samples(pairs(), decode=lambda text: torch.ones(2)),
    ],
)
def test_what_is_no_text_is_left_to_others(data):
    assert read_texts(data)[0] is None


@pytest.mark.parametrize("error", [False, True])
def test_looking_at_an_iterator_loses_none_of_its_samples(error):
    samples = [(torch.full((2,), float(row)), row % 2) for row in range(30)]
    source = Once(samples, damaged=[0] if error else [])
    report = screen(source, torch.nn.Linear(2, 2), detectors=[])
    assert len(report) == 30
    assert report.quarantine_indices.tolist() == ([0] if error else [])


@pytest.mark.parametrize(
    ("data", "row", "reason"),
    [
        (lambda: (["x", None, *TEXTS], [0, 1, *LABELS]), 1, "there is no text"),
        (lambda: (["x", "y", *TEXTS], [0, None, *LABELS]), 1, "no usable label: None"),
        (lambda: (["x", "y", *TEXTS], [0, -1, *LABELS]), 1, "no usable label: -1"),
        (lambda: Samples((["x", "y", *TEXTS], ["good", "ugly", *WORDS]), classes=["good", "bad"]), 1, "ugly"),
        (lambda: Rows([*pairs(), ("x", 1)], damaged=[0]), 0, "the file is gone"),
        (lambda: Rows([*pairs(), (3.5, 1)]), 20, "no text but float"),
        (lambda: Rows([*pairs(), "no pair"]), 20, "there is no text"),
        (lambda: Once([*pairs()], damaged=[4]), 4, "the line is cut"),
        (lambda: Once([*pairs()], damaged=[0]), 0, "the line is cut"),
        (lambda: Stream([*named(), {"text": "x"}]), 20, "no usable label: None"),
    ],
)
def test_a_bad_row_is_quarantined_and_ends_nothing(data, row, reason):
    found = read_material(data()).samples
    assert [place for place, _ in found.broken] == [row] and len(found.ids) in (20, 21, 22)
    assert reason in found.broken[0][1] and found.ids[row] == f"unreadable:{row}"
    assert bool(found.x[row].isnan().all()) and bool(found.x.isnan().any(dim=1).sum() == 1)


def test_a_screen_says_why_a_row_without_text_is_not_kept():
    report = screen((["x", None, None, *TEXTS], [0, 1, 1, *LABELS]), seed=0)
    assert report.quarantine_indices.tolist() == [1, 2]
    assert report.reasons[1] == report.reasons[2] == ("there is no text",)


def test_texts_that_cannot_be_judged_are_refused():
    for data, match in (
        ((["a", 3], [0, 1]), "texts"),
        (([None, None, "a"], [0, 1, None]), "at least one text with a label"),
        ((["a", "b"], [0]), "rows"),
        ({"text": ["a", "b"]}, "label column"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            read_material(data)
    with pytest.raises(ConfigurationError, match="texts that were judged"):
        text_rows(iter(pairs()))


@pytest.mark.parametrize("form", ["lists", "dict", "list of pairs", "dict that is named", "pandas that is named"])
def test_a_stream_that_takes_numbers_only_says_what_to_do_with_texts(form, tmp_path):
    with pytest.raises(ConfigurationError, match=r"inputs of numbers.*TextEncoder\(\)\(texts\)"):
        screen_stream(FORMS[form](), torch.nn.Linear(2, 2), tmp_path / "store", rows_per_class=24)
    assert not (tmp_path / "store").exists()


def test_batches_are_looked_up_under_the_names_of_the_screen(tmp_path):
    data = Samples({"review": TEXTS, "stars": WORDS}, "review", "stars", classes=["good", "bad"])
    report = screen(data, detectors=[], seed=0)
    assert report.parameters["columns"] == {"inputs": "review", "label": "stars", "classes": ["good", "bad"]}
    report.save(tmp_path / "report")
    state = ScreenReport.load(tmp_path / "report").state()
    for names in (("review", "stars"), ("text", "label")):
        batch = dict(zip(names, ([*TEXTS[:3], "new"], [*WORDS[:3], "good"]), strict=True))
        assert screen_batch(batch, state)["aidefend_keep"] == [True, True, True, False]
    assert report.view(data)[1] == ("rain all week", "bad")
    report.to_html(tmp_path / "page.html", data)


def test_nothing_is_read_twice_from_an_iterator():
    drawn = itertools.count()
    found, _ = read_texts((text, next(drawn) * 0 + label) for text, label in pairs())
    assert isinstance(found, TextRows) and found.texts == TEXTS and next(drawn) == 20
