"""Sources of samples: every library's form gives the same rows, names are found or named, and no bad sample is lost."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from aidefend import ConfigurationError, MissingExtra
from aidefend._core import frames
from aidefend._core.batches import as_dataset, content_ids, gather, iterate
from aidefend._core.samples import Samples
from aidefend.sanitize import DatasetSchema, screen

X = torch.arange(21.0).reshape(7, 3)
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
WORDS = ["ant", "bee", "cat"]


def frame():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(
        {"a": X[:, 0], "b": X[:, 1].int(), "c": X[:, 2].double(), "label": Y}, index=range(9, 2, -1)
    )


def arrow():
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.table({"image": X.tolist(), "label": Y.tolist()})


def parquet(folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    for place, part in enumerate((slice(0, 4), slice(4, 7))):
        parquet.write_table(arrow()[part], folder / f"part-{place}.parquet", row_group_size=2)
    return folder


def hugging_face():
    return pytest.importorskip("datasets").Dataset.from_dict({"image": X.tolist(), "label": Y.tolist()})


def web(keys=("npy", "cls")):
    """As WebDataset gives them: one dict a sample, all bytes."""
    rows = zip(X.numpy(), Y.tolist(), strict=True)
    return [{"__key__": f"{i:04}", keys[0]: x.tobytes(), keys[1]: str(y).encode()} for i, (x, y) in enumerate(rows)]


def floats(raw):
    return torch.frombuffer(bytearray(raw), dtype=torch.float32)


class Web(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


LIBRARIES = {
    "pandas": lambda _: frame(),
    "pandas chunks": lambda _: iter([frame()[:4], frame()[4:]]),
    "pandas list of chunks": lambda _: [frame()[:4], frame()[4:]],
    "arrow": lambda _: arrow(),
    "arrow batch": lambda _: arrow().to_batches()[0],
    "arrow batches": lambda _: iter(arrow().to_batches(max_chunksize=2)),
    "arrow reader": lambda _: arrow().to_reader(2),
    "parquet folder": parquet,
    "parquet file": lambda folder: as_one(parquet(folder)),
    "arrow data set": lambda folder: pytest.importorskip("pyarrow.dataset").dataset(parquet(folder)),
    "parquet opened": lambda folder: pytest.importorskip("pyarrow.parquet").ParquetFile(as_one(parquet(folder))),
    "hugging face": lambda _: hugging_face(),
    "hugging face torch": lambda _: hugging_face().with_format("torch"),
    "hugging face stream": lambda _: hugging_face().to_iterable_dataset(),
    "hugging face batches": lambda _: hugging_face().iter(2),
    "hugging face loader": lambda _: DataLoader(hugging_face().with_format("torch"), 3, generator=torch.Generator()),
    "web dicts": lambda _: Samples(web(), decode=floats, classes=["0", "1", "2"]),
    "web stream": lambda _: Samples(Web(web()), decode=floats, classes=["0", "1", "2"]),
    "web named": lambda _: Samples(iter(web(("wav", "txt"))), "wav", "txt", floats, ["0", "1", "2"]),
    "web tuples": lambda _: [(f"{i:04}", x, y) for i, (x, y) in enumerate(zip(X, Y.tolist(), strict=True))],
    "generator of samples": lambda _: zip(X, Y.tolist(), strict=True),
    "named table": lambda _: Samples({"f": X[:, 0], "g": X[:, 1], "h": X[:, 2], "z": Y}, ["f", "g", "h"], "z"),
    "dict of lists": lambda _: {
        "a": X[:, 0].tolist(),
        "b": X[:, 1].int().tolist(),
        "c": X[:, 2].tolist(),
        "y": Y.tolist(),
    },
    "dict of arrays": lambda _: {"a": X[:, 0].numpy(), "b": X[:, 1].numpy(), "c": X[:, 2].numpy(), "y": Y.numpy()},
    "dict of tensors": lambda _: {"a": X[:, 0], "b": X[:, 1], "c": X[:, 2], "target": Y},
    "dict with an input column": lambda _: {"x": X, "y": Y},
    "structured array": lambda _: structured(),
    "words": lambda _: Samples((X.numpy(), np.array(WORDS)[Y]), classes=WORDS),
}


def as_one(folder):
    table = pytest.importorskip("pyarrow.parquet")
    path = folder / "all.parquet"
    table.write_table(arrow(), path, row_group_size=2)
    return str(path)


def structured():
    rows = np.zeros(7, dtype=[("a", "f4"), ("b", "i8"), ("c", "f8"), ("label", "i8")])
    for place, name in enumerate("abc"):
        rows[name] = X[:, place]
    rows["label"] = Y
    return rows


@pytest.mark.parametrize("bad", ["raise", "mark"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library_gives_the_same_rows(name, bad, tmp_path):
    batch = gather(LIBRARIES[name](tmp_path), 3, bad=bad)
    assert torch.equal(batch.x.float(), X) and torch.equal(batch.y, Y) and not batch.broken
    assert batch.ids == content_ids(batch.x, Y)


@pytest.mark.parametrize("name", ["dict of lists", "dict of tensors", "dict with an input column", "structured array"])
def test_tables_in_memory_are_data_sets_for_views(name):
    rows = as_dataset(LIBRARIES[name](None))
    assert len(rows) == 7 and rows[3][0].tolist() == X[3].tolist() and int(rows[3][1]) == 0
    assert [len(batch.ids) for batch in iterate(LIBRARIES[name](None), 3)] == [3, 3, 1]


def test_parquet_is_read_in_parts(tmp_path):
    assert [len(batch.ids) for batch in iterate(parquet(tmp_path), 2)] == [2, 2, 2, 1]


def test_tables_become_map_style_data_for_views():
    assert len(as_dataset(frame())) == 7
    x, y = as_dataset(Samples(frame(), inputs=["c", "a"]))[3]
    assert x.tolist() == [11.0, 9.0] and int(y) == 0


def test_holes_in_a_table_are_nan_and_columns_of_words_are_named():
    holed = frame().astype({"b": "Int64"})
    holed.iloc[2, 1] = None
    found = gather(holed)
    assert found.x.dtype == torch.float32 and found.x[2].isnan().tolist() == [False, True, False]
    with pytest.raises(ConfigurationError, match="input columns of numbers"):
        gather(frame().assign(a="word"))
    with pytest.raises(ConfigurationError, match="columns \\['weight'\\]"):
        gather(Samples(frame(), inputs=["weight"]))
    with pytest.raises(ConfigurationError, match="each column name once"):
        gather(frame().rename(columns={"a": "b"}))


def test_a_number_column_that_has_the_name_of_an_input_hides_no_other():
    assert gather(frame().rename(columns={"a": "data"})).x.shape == (7, 3)


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    parquet(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match="arrow"):
        gather(tmp_path)
    with pytest.raises(ConfigurationError, match="Expected"):
        gather("no-such.csv")


@pytest.mark.parametrize("damage", ["no table", "a broken page"])
def test_a_damaged_file_is_named_and_no_error_of_a_library_gets_out(damage, tmp_path):
    place = tmp_path / "rows.parquet"
    table = pytest.importorskip("pyarrow").table(
        {"a": list(range(999)), "b": list(range(999)), "label": [0, 1, 2] * 333}
    )
    pytest.importorskip("pyarrow.parquet").write_table(table, place)
    whole = place.read_bytes()
    place.write_bytes(b"PAR1" + 40 * b"?" if damage == "no table" else whole[:8] + 200 * b"?" + whole[208:])
    for read in (gather, screen, DatasetSchema.infer):
        with pytest.raises(ConfigurationError, match=r"data|batches"):
            read(place)


class Damaged(Dataset):
    """Samples 0 (no form is known yet), 3, 4, 5, 6 and 9 are bad, each in another way."""

    def __init__(self, n=12, dtype=torch.float32):
        self.n, self.dtype = n, dtype

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in (0, 3):
            raise OSError(f"row {i} is damaged")
        x = torch.full((3,), float(i)).to(self.dtype)
        return {4: (x[:2], 1), 5: (x, None), 6: (x, -1), 9: (x, float("nan"))}.get(i, (x, i % 2))


BAD = {0: "OSError: row 0", 3: "OSError: row 3", 4: "shape (2,)", 5: "no label", 6: "below 0", 9: "integers"}


def stream_of(data):
    """An iterator that goes on after an error, as those of readers do."""

    class Stream:
        def __init__(self):
            self.at = -1

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            if self.at >= len(data):
                raise StopIteration
            return data[self.at]

    return Stream()


@pytest.mark.parametrize("size", [1, 2, 5, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("form", [lambda d: d, stream_of, lambda d: DataLoader(d, 4, generator=torch.Generator())])
def test_n_samples_in_n_rows_out(size, dtype, form):
    found = gather(form(Damaged(dtype=dtype)), size, bad="mark")
    assert found.x.shape == (12, 3) and found.x.dtype == dtype and found.y.tolist()[1:3] == [1, 0]
    assert [row for row, _ in found.broken] == list(BAD)
    assert all(BAD[row] in reason for row, reason in found.broken)
    assert [row_id for row_id in found.ids if row_id.startswith("unreadable")] == [f"unreadable:{row}" for row in BAD]
    good = [row for row in range(12) if row not in BAD]
    assert found.x[good, 0].tolist() == good and set(found.y.tolist()) == {0, 1}
    assert [found.ids[row] for row in good] == list(content_ids(found.x[good], found.y[good]))
    if dtype.is_floating_point:
        assert bool(found.x[list(BAD)].isnan().all())


def test_what_cannot_go_on_is_an_error_and_no_short_stream():
    dead = (Damaged()[i] for i in range(12))
    for data in (dead, map(tuple, (Damaged()[i] for i in range(1, 12)))):
        with pytest.raises(ConfigurationError, match="is damaged"):
            gather(data, bad="mark")
    with pytest.raises(ConfigurationError, match="at least one sample that can be read"):
        gather([(torch.zeros(2), "x")] * 3, bad="mark")
    with pytest.raises(ConfigurationError, match="is damaged"):
        gather(stream_of(Damaged(1)), bad="mark")  # nobody can tell whether more would have come

    class Stuck:
        def __iter__(self):
            return self

        def __next__(self):
            raise OSError("the disk is gone")

    with pytest.raises(ConfigurationError, match="the disk is gone"):
        gather(Stuck(), bad="mark")


def test_a_decoder_that_fails_costs_one_sample():
    samples = web()
    samples[2]["npy"] = b"abc"
    samples[5]["cls"] = b"9"
    found = gather(Samples(samples, decode=floats, classes=["0", "1", "2"]), bad="mark")
    assert [row for row, _ in found.broken] == [2, 5] and len(found.ids) == 7
    with pytest.raises(ConfigurationError):
        gather(Samples(samples, decode=floats, classes=["0", "1", "2"]))


def test_bad_rows_of_a_table_are_marked():
    broken = frame().astype({"a": object, "label": float})
    broken.iloc[1, 0], broken.iloc[4, 3] = "seven", np.nan
    found = gather(broken, bad="mark")
    assert [row for row, _ in found.broken] == [1, 4] and found.x[2].tolist() == X[2].tolist()


def test_a_screen_gives_bad_samples_a_row_and_a_reason():
    stream = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 5, generator=stream), torch.arange(60) % 2
    samples = [(x[i], y[i]) for i in range(60)]
    samples[7], samples[11] = (x[7, :3], y[7]), (x[11], -1)
    samples[20] = (x[20].clone().index_fill_(0, torch.tensor([1]), torch.nan), y[20])
    model = torch.nn.Linear(5, 2)
    report = screen(samples, model, seed=0)
    assert len(report) == 60 and report.quarantine_indices.tolist() == [7, 11, 20]
    assert [report.reasons[row][0][:12] for row in (7, 11, 20)] == ["the shape (3", "the label -1", "the input ho"]
    assert (report.parameters["bad_rows"], report.parameters["unreadable_rows"]) == (3, 2)
    good = [i for i in range(60) if i not in (7, 11, 20)]
    alone = screen((x[good], y[good]), model, seed=0)  # the others are judged as if the bad rows were not there
    assert torch.equal(alone.scores["structured_poison"], report.scores["structured_poison"][good])
    assert [alone.ids[i] for i in range(57)] == [report.ids[row] for row in good]


def test_reasons_hold_no_addresses_and_words_lead_to_classes():
    def broken(raw):
        raise OSError(f"cannot read {object()}")

    samples = [{"x": b"1", "y": 0}, {"x": torch.zeros(2), "y": 1}]
    found = gather(Samples(samples, decode=lambda raw: broken(raw) if isinstance(raw, bytes) else raw), bad="mark")
    assert found.broken == ((0, "the sample cannot be read (OSError: cannot read <object object>)"),)
    with pytest.raises(ConfigurationError, match="classes="):
        gather(frame().assign(label="ant"))


def test_names_are_checked():
    for wrong in (
        {"inputs": []},
        {"inputs": ["a", "a"]},
        {"inputs": 3},
        {"label": 0},
        {"decode": 1},
        {"classes": [1, 1]},
    ):
        with pytest.raises(ConfigurationError):
            Samples(frame(), **wrong)
    with pytest.raises(ConfigurationError, match="no Samples already"):
        Samples(Samples(X))
    with pytest.raises(ConfigurationError, match="more than its labels"):
        gather(frame()[["label"]])


def test_schema_reads_the_same_sources(tmp_path):
    for data in (parquet(tmp_path), hugging_face(), Samples(frame(), inputs=["a", "b", "c"], label="label")):
        schema = DatasetSchema.infer(data)
        assert schema.rows == 7 and schema.label == "label"
    assert not frames.is_stored("no-such-file")
    assert next(iterate(arrow(), 4)).x.shape == (4, 3)
