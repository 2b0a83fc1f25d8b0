"""A schema does not depend on how the rows came in, and its file comes back whole or not at all."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidefend import AidefendError, ConfigurationError
from aidefend.sanitize import DatasetSchema
from aidefend.sanitize.schema.row_records import RowHashes, RowSample
from tests.sanitize.schema_worlds import ids, learned, low_cardinality, people

SCHEMA = learned(n=500)


def cut(table, rows):
    return {
        name: values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]
        for name, values in table.items()
    }


def shards(table, n, seed, parts):
    order = np.random.default_rng(seed).permutation(n)
    return [cut(table, rows) for rows in np.array_split(order, parts)]


@settings(max_examples=12)
@given(st.integers(0, 50), st.integers(1, 4), st.sampled_from([100, 4096]))
def test_order_batches_and_merging_change_nothing(seed, parts, sample):
    """With a sample of all rows, and of some."""
    table = people(np.random.default_rng(seed), 200)
    whole = DatasetSchema.infer(table, sample=sample).digest
    pieces = shards(table, 200, seed, parts)
    assert DatasetSchema.infer(pieces, sample=sample).digest == whole
    merged = DatasetSchema.infer(pieces[0], sample=sample)
    for piece in pieces[1:]:
        before, total = merged.digest, merged.merge(DatasetSchema.infer(piece, sample=sample))
        assert merged.digest == before
        merged = total
    assert merged.digest == whole


def test_with_a_bounded_set_of_hashes_all_but_the_sample_stays_the_same():
    table = people(np.random.default_rng(0), 400)
    pieces = shards(table, 400, 1, 3)
    whole, stream = (DatasetSchema.infer(data, rows=100)._profile for data in (table, pieces))
    merged = DatasetSchema.infer(pieces[0], rows=100)
    for piece in pieces[1:]:
        merged = merged.merge(DatasetSchema.infer(piece, rows=100))
    for other in (stream, merged._profile):
        assert other.hashes.counts == whole.hashes.counts and other.hashes.bound == whole.hashes.bound < 2**64
        assert len(other.sample) == 400


def test_merging_counts_rows_that_are_in_both_parts():
    """Few different rows, so that the parts share them: everything but the sample is that of one pass."""
    table = low_cardinality(np.random.default_rng(0), 400)
    whole = DatasetSchema.infer(table)._profile
    first, second = shards(table, 400, 1, 2)
    merged = DatasetSchema.infer(first).merge(DatasetSchema.infer(second))._profile
    assert merged.hashes.counts == whole.hashes.counts and merged.hashes.labels == whole.hashes.labels
    assert merged.hashes.conflicting == whole.hashes.conflicting > 0
    assert {name: column.values.counts for name, column in merged.columns.items()} == {
        name: column.values.counts for name, column in whole.columns.items()
    }
    assert len(merged.sample) == 400


def test_schemas_of_other_columns_or_other_options_do_not_merge():
    other = people(np.random.default_rng(1), 200)
    for wrong in (DatasetSchema.infer(other, key=b"k"), DatasetSchema.infer(other, sample=500), "text"):
        with pytest.raises(ConfigurationError):
            SCHEMA.merge(wrong)
    del other["age"]
    with pytest.raises(ConfigurationError, match="same columns"):
        SCHEMA.merge(DatasetSchema.infer(other))


def test_the_hash_set_is_bounded_and_keeps_the_smallest():
    hashes = RowHashes(100)
    words = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    for part in np.array_split(np.concatenate([words, words[:2000]]), 9):
        hashes.add(part, None, 0)
        assert len(hashes.counts) <= 125
    hashes.finish()
    assert sorted(hashes.counts) == sorted(words.tolist())[:100]
    twice = set(words[:2000].tolist())
    assert all(count == (2 if word in twice else 1) for word, count in hashes.counts.items())


def test_copies_of_rows_beyond_the_bound_have_ordinals_of_their_own():
    hashes = RowHashes(100)
    hashes.add(np.arange(1000, dtype=np.uint64), None, 0)
    assert hashes.add(np.array([999, 999, 5, 5], dtype=np.uint64), None, 1000).ordinals.tolist() == [1000, 1001, 1, 2]


def test_the_sample_is_uniform_over_rows_repeated_ones_too():
    """Half of the rows are one row: its share in the sample is a half, in single pass and merged (5 sigma)."""
    single, parts = RowSample(1000), [RowSample(1000), RowSample(1000)]
    words = np.random.default_rng(1).integers(0, 2**64, 10_000, dtype=np.uint64)
    words[:5000], values = 7, (np.arange(10_000) < 5000).astype(float)
    ordinals = np.where(values == 1, np.arange(10_000), 0).astype(np.uint64)
    single.add(words, ordinals, {"v": values})
    for number, part in enumerate(parts):
        rows = np.arange(10_000) % 2 == number
        local = np.where(values[rows] == 1, np.arange(5000), 0).astype(np.uint64)
        part.add(words[rows], local, {"v": values[rows]})
    for sample in (single, parts[0].merged(parts[1])):
        assert len(sample) == 1000 and abs(sample.of("v").mean() - 0.5) < 5 * 0.5 / 1000**0.5 * 1.5


def test_a_saved_schema_judges_as_before(tmp_path):
    schema = SCHEMA.expect("age", low=18).expect("city", values=["Bonn"], max_missing=0.5)
    schema.save(tmp_path / "schema.json")
    loaded = DatasetSchema.load(tmp_path / "schema.json")
    assert loaded.digest == schema.digest
    batch = people(np.random.default_rng(5), 200)
    batch["height"][3] = 999
    assert loaded.check(batch).to_json() == schema.check(batch).to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["schema.json"]


def test_the_key_is_not_in_the_file_and_needed_to_read_it(tmp_path):
    table, path = people(np.random.default_rng(0), 200), tmp_path / "schema.json"
    keyed = DatasetSchema.infer(table, key=b"a secret of ours")
    keyed.save(path)
    assert b"a secret of ours" not in path.read_bytes()
    assert "leakage" in ids(DatasetSchema.load(path, key=b"a secret of ours").check(table))
    with pytest.raises(ConfigurationError, match="another key"):
        DatasetSchema.load(path)
    plain = DatasetSchema.infer(table)._profile.hashes.counts
    assert not set(plain) & set(keyed._profile.hashes.counts)


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "schema.json"
    SCHEMA.save(path)
    good = path.read_text()
    for wrong in (
        good[:-20],
        good.replace('"alpha":0.01', '"alpha":0.9'),
        "[]",
        "",
        "{",
        "[" * 100_000,
        '{"a":1,"a":2}',
    ):
        path.write_text(wrong)
        with pytest.raises(ConfigurationError, match=r"DatasetSchema\.save"):
            DatasetSchema.load(path)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigurationError):
            DatasetSchema.load(missing)


def every_change(value, place=()):
    """The same JSON with one part after the other replaced by what does not belong there."""
    wrong = [None, -1, "text", [], {}, 1e400]
    yield from ((place, other) for other in wrong)
    parts = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, part in list(parts):
        yield from every_change(part, (*place, key))


def test_a_forged_file_with_a_right_digest_ends_in_one_error_or_a_schema(tmp_path, monkeypatch):
    """The digest is no signature: whoever forges it meets the checks of every field."""
    monkeypatch.setattr("aidefend.sanitize.schema.schema_file._digest", lambda body: "fits")
    small = DatasetSchema.infer({"a": [1.0, 2.5, None], "y": [0, 1, 0]}, sample=100, rows=100)
    path = tmp_path / "schema.json"
    small.save(path)
    body = json.loads(path.read_text())
    for place, wrong in every_change(body):
        forged = json.loads(json.dumps(body))
        at = forged
        for key in place[:-1]:
            at = at[key]
        if place:
            at[place[-1]] = wrong
        path.write_text(json.dumps(forged if place else wrong))
        try:
            loaded = DatasetSchema.load(path)
            loaded.check({"a": [1.0, 2.0], "y": [0, 1]})
        except AidefendError:
            continue


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "schema.json"
    SCHEMA.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        learned(n=1000).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
