"""The page shows each kind of row as what it is, also rows that are in quarantine because they cannot be read."""

import pandas
import pytest
import torch

from aidefend.sanitize import ScreenReport

N = 12


def page(dataset, folder, quarantined=(1, 3), **parameters):
    keep = torch.tensor([row not in quarantined for row in range(N)])
    reasons = tuple(() if good else ("looked odd",) for good in keep.tolist())
    report = ScreenReport(tuple(f"row-{row}" for row in range(N)), keep, reasons=reasons, parameters=parameters)
    report.to_html(folder / "page.html", dataset)
    html = (folder / "page.html").read_text(encoding="utf-8")
    assert html.count("looked odd") >= len(quarantined)
    return html


class Damaged:
    """Sample 1 raises, sample 3 is no picture."""

    def __len__(self):
        return N

    def __getitem__(self, row):
        if row == 1:
            raise OSError("the <file> is gone")
        return ([[0.0], [1.0, 2.0]] if row == 3 else torch.rand(1, 6, 6)), row % 2


def test_texts_are_shown_and_escaped(tmp_path):
    texts = [f"letter {row} <b>bold</b>" for row in range(N)]
    texts[3] = None
    for dataset in (
        (texts, [0, 1] * 6),
        list(zip(texts, [0, 1] * 6, strict=True)),
        pandas.DataFrame({"text": texts, "label": [0, 1] * 6}),
    ):
        html = page(dataset, tmp_path, kind="text")
        assert "letter 1 &lt;b&gt;bold" in html and "<b>bold" not in html and "letter 2" not in html


def test_rows_of_tables_have_the_names_of_their_columns(tmp_path):
    frame = pandas.DataFrame({"age": range(N), "city": ["Bonn", "Lyon"] * 6, "label": [0, 1] * 6})
    assert "age = 3, city = Lyon" in page(frame, tmp_path, kind="mixed")
    numbers = frame[["age"]].assign(height=1.5, label=frame["label"])
    html = page(numbers, tmp_path, kind="table", columns={"inputs": ["age", "height"], "label": "label"})
    assert "age = 3, height = 1.5" in html
    assert "3, 1.5 (shape (2,))" in page(numbers, tmp_path, kind="table")


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 6, 6)])
def test_pictures_are_pictures(shape, tmp_path):
    assert page((torch.rand(N, *shape), torch.arange(N) % 2), tmp_path, kind="array").count("data:image/png") == 2


def test_a_sample_that_cannot_be_read_has_its_reason_and_the_page_is_written(tmp_path):
    html = page(Damaged(), tmp_path, quarantined=(1, 3, 5), kind="array")
    assert "cannot be read (OSError: the &lt;file&gt; is gone)" in html and html.count("cannot be read") == 2
    assert html.count("data:image/png") == 1
