"""What one does with a screen's report: train on it, write it down, look at it, overrule it."""

import json

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from aidefend import AidefendError, Report
from aidefend.sanitize import KeptSampler, ScreenReport, screen, screen_batch
from tests.worlds import poisoned_clusters


@pytest.fixture(scope="module")
def planted():
    return poisoned_clusters()


@pytest.fixture(scope="module")
def report(planted):
    return screen((planted.x, planted.y), seed=0)


def test_a_report_shows_its_summary_and_not_every_row(report):
    assert repr(report) == f"<ScreenReport {report.summary()}>"


def test_a_loader_with_the_sampler_sees_the_kept_rows_and_no_other(planted, report):
    dataset = TensorDataset(planted.x, planted.y, torch.arange(len(planted.y)))
    loader = DataLoader(dataset, batch_size=32, sampler=report.sampler(seed=3), generator=torch.Generator())
    orders = [torch.cat([rows for _, _, rows in loader]).tolist() for _ in range(2)]
    kept = report.keep_indices.tolist()
    assert sorted(orders[0]) == sorted(orders[1]) == kept
    assert orders[0] != orders[1] != kept
    assert list(report.sampler(shuffle=False)) == kept


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_kept_rows_and_take_equally_many_steps(world_size):
    kept = torch.arange(0, 40, 2)
    ranks = [list(KeptSampler(kept, seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(rows) for rows in ranks}) == 1
    drawn = [row for rows in ranks for row in rows]
    assert set(drawn) == set(kept.tolist()) and len(drawn) - 20 < world_size
    assert len(set(drawn)) == 20


def test_fewer_rows_than_ranks_and_none_at_all():
    ranks = [list(KeptSampler(torch.tensor([4]), rank=rank, world_size=3)) for rank in range(3)]
    assert ranks == [[4], [4], [4]]
    assert list(KeptSampler(torch.zeros(0, dtype=torch.int64), rank=1, world_size=3)) == []


@pytest.mark.parametrize("stop", [0, 1, 7, 12, 20, 33])
def test_an_interrupted_epoch_goes_on_where_it_stood(stop):
    kept = torch.arange(13)
    whole = KeptSampler(kept, seed=5)
    expected = [row for _ in range(4) for row in whole]
    first = KeptSampler(kept, seed=5)
    drawn, epochs = [], iter(first)
    while len(drawn) < stop:
        row = next(epochs, None)
        if row is None:
            epochs = iter(first)
        else:
            drawn.append(row)
    second = KeptSampler(kept, seed=5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    while len(drawn) < len(expected):
        drawn += list(second)
    assert drawn[: len(expected)] == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_after_an_epoch_that_was_left_the_next_one_is_whole_and_in_another_order(workers):
    """Workers draw ahead: the next loop saw what was left, and rows that were drawn and not used were lost."""
    sampler = KeptSampler(torch.arange(20), seed=2)
    data, stream = TensorDataset(torch.arange(20)), torch.Generator()
    loader = DataLoader(data, 2, sampler=sampler, num_workers=workers, generator=stream)
    first = next(iter(loader))[0].tolist()
    whole = [row for (rows,) in loader for row in rows.tolist()]
    assert sorted(whole) == list(range(20)) and whole[:2] != first
    again = KeptSampler(torch.arange(20), seed=2)
    again.set_epoch(1)
    assert whole == list(again)


def test_a_state_of_other_rows_is_refused():
    state = KeptSampler(torch.arange(5)).state_dict()
    for other in (KeptSampler(torch.arange(6)), KeptSampler(torch.arange(5), seed=1)):
        with pytest.raises(AidefendError, match="same report and seed"):
            other.load_state_dict(state)
    for other in (
        KeptSampler(torch.arange(5) + 1),
        KeptSampler(torch.arange(5), shuffle=False),
        KeptSampler(torch.arange(5), rank=1, world_size=2),
    ):
        with pytest.raises(AidefendError, match="same report and seed"):
            other.load_state_dict(state)
    with pytest.raises(AidefendError, match="drawn"):
        KeptSampler(torch.arange(5)).load_state_dict({**state, "drawn": 9})
    with pytest.raises(AidefendError, match="rank"):
        KeptSampler(torch.arange(5), rank=2, world_size=2)


def test_weights_are_nothing_in_quarantine_and_less_where_a_score_says_so(report):
    plain, down = report.weights(), report.weights("structured_poison", least=0.25)
    assert torch.equal(plain, report.decisions().weights) and bool((plain[~report.keep] == 0).all())
    assert bool((down[~report.keep] == 0).all()) and float(down[report.keep].min()) >= 0.25
    expected = (1 - report.scores["structured_poison"][report.keep]).clamp(min=0.25).float()
    torch.testing.assert_close(down[report.keep], expected)
    with pytest.raises(AidefendError, match="score in"):
        report.weights("spectral_signature")
    with pytest.raises(AidefendError, match="a score among"):
        report.weights("sunshine")


def test_lines_of_json_hold_every_row(report, tmp_path):
    report.to_jsonl(tmp_path / "rows.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(report.ids)
    assert [line["keep"] for line in lines] == report.keep.tolist()
    assert lines[5]["scores"]["scan"] == pytest.approx(float(report.scores["scan"][5]))
    again = tmp_path / "again.jsonl"
    report.to_jsonl(again)
    assert again.read_bytes() == (tmp_path / "rows.jsonl").read_bytes()


def test_a_release_is_a_new_report_that_says_who_and_why(planted, report, tmp_path):
    row = int(report.quarantine_indices[0])
    entries = []
    released = report.release([report.ids[row]], by="R. Roe", why="own camera, checked by eye", log=entries.append)
    assert bool(released.keep[row]) and not bool(report.keep[row]) and report.releases == ()
    assert released.reasons[row][-1] == "released by R. Roe: own camera, checked by eye"
    assert entries[0]["ids"] == [report.ids[row]] and released.releases[0]["digest"] == entries[0]["digest"]
    batch = {"x": planted.x[row : row + 1], "y": planted.y[row : row + 1]}
    assert screen_batch(batch, released.state())["aidefend_keep"].tolist() == [True]
    released.save(tmp_path / "report")
    assert ScreenReport.load(tmp_path / "report").releases == released.releases


def test_only_rows_in_quarantine_are_released_once_and_for_a_reason(report):
    held = report.ids[int(report.quarantine_indices[0])]
    kept = report.ids[int(report.keep_indices[0])]
    for ids, by, why in (
        ([kept], "me", "x"),
        (["?"], "me", "x"),
        ([], "me", "x"),
        ([held], " ", "x"),
        ([held], "me", ""),
    ):
        with pytest.raises(AidefendError):
            report.release(ids, by, why)
    with pytest.raises(AidefendError, match="each once"):
        report.release([held, held], "me", "x")
    with pytest.raises(AidefendError, match="each once"):
        report.release([held], "me", "x").release([held], "me", "x")


def test_a_log_that_fails_releases_nothing(report):
    def full(entry):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        report.release([report.ids[int(report.quarantine_indices[0])]], "me", "x", log=full)


@pytest.mark.parametrize("tamper", ["change", "drop", "drop the last", "drop all", "swap", "forge"])
def test_a_changed_chain_of_releases_is_refused(report, tmp_path, tamper):
    released = report
    for row in report.quarantine_indices[:3].tolist():
        released = released.release([report.ids[row]], "me", f"row {row}")
    chain = [dict(entry) for entry in released.releases]
    if tamper == "change":
        chain[1]["by"] = "somebody else"
    elif tamper == "drop":
        del chain[0]
    elif tamper == "drop the last":
        del chain[-1]
    elif tamper == "drop all":
        chain = []
    elif tamper == "swap":
        chain[0], chain[1] = chain[1], chain[0]
    else:
        chain.append({"ids": ["x"], "by": "me", "why": "x", "previous": chain[-1]["digest"], "digest": "0" * 64})
    plain = Report.load(_saved(released, tmp_path))
    forged = Report(**{**vars(plain), "parameters": {**plain.parameters, "releases": chain}})
    with pytest.raises(AidefendError, match="unbroken chain"):
        ScreenReport.load(_saved(forged, tmp_path))


def _saved(report, folder):
    report.save(folder / "report")
    return folder / "report"


def test_the_page_shows_rows_reasons_and_limits_and_no_script(tmp_path):
    stream = torch.Generator().manual_seed(0)
    pictures = torch.rand(30, 3, 6, 6, generator=stream)
    ids = [f"row {i}" for i in range(30)]
    keep = torch.arange(30) >= 4
    evil = "<script>alert(1)</script>"
    reasons = [(evil,) if i < 4 else () for i in range(30)]
    report = ScreenReport(ids, keep, {"structured_poison": torch.linspace(1, 0, 30)}, reasons=reasons, limits="Limits.")
    report.to_html(tmp_path / "a.html", (pictures, torch.zeros(30).long()), limit=3)
    html = (tmp_path / "a.html").read_text()
    assert html.count("data:image/png;base64") == 3 and "1 more are not shown" in html
    assert evil not in html and "&lt;script&gt;" in html and "Limits." in html
    assert html.index("Row 0") < html.index("Row 1") < html.index("Row 2")
    report.to_html(tmp_path / "b.html", texts=[evil * 100] * 30)
    assert evil not in (tmp_path / "b.html").read_text()
    table = (torch.rand(30, 40, generator=stream), torch.zeros(30).long())
    report.to_html(tmp_path / "c.html", table)
    assert "shape (40,)" in (tmp_path / "c.html").read_text()
    with pytest.raises(AidefendError, match="same data set"):
        report.to_html(tmp_path / "d.html", (pictures[:5], torch.zeros(5).long()))
    assert not (tmp_path / "d.html").exists()


def test_the_page_of_a_screen_names_the_group_and_an_empty_one_is_no_promise(planted, report, tmp_path):
    report.to_html(tmp_path / "a.html", (planted.x, planted.y))
    assert "structured poison in class 0" in (tmp_path / "a.html").read_text()
    ScreenReport(["a"], torch.tensor([True])).to_html(tmp_path / "b.html")
    assert "does not show that the data is clean" in (tmp_path / "b.html").read_text()
