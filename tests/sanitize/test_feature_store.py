"""Features on disk: what is read is what was written, an interrupted run goes on, and changed bytes are refused."""

import json
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aidefend import ConfigurationError
from aidefend._core import batches
from aidefend.sanitize import FeatureStore, Outliers, SpectralSignature, extract_features, feature_shards
from aidefend.sanitize.feature_shards import halved, restored

STREAM = torch.Generator().manual_seed(0)
X = torch.randn(50, 6, generator=STREAM) * torch.logspace(-3, 3, 50)[:, None]
Y = torch.arange(50) % 3


class Counting(nn.Module):
    """Counts the rows that it sees, and breaks down after `limit` of them."""

    def __init__(self, limit=10**9):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.rows, self.limit = nn.Linear(6, 5), nn.Linear(5, 3), 0, limit

    def forward(self, x):
        if len(x) > 1:  # one row alone is the search for the last layer
            self.rows += len(x)
        if self.rows > self.limit:
            raise OSError("power cut")
        return self.head(torch.relu(self.body(x)))


def whole(store, size=1024):
    found = list(store.blocks(size))
    tensors = {name: torch.cat([block[name] for block in found]) for name in ("features", "logits", "losses", "labels")}
    return tensors | {"ids": tuple(row_id for block in found for row_id in block["ids"])}


@pytest.mark.global_random("Counting seeds its weights")
@pytest.mark.parametrize("batch_size", [4, 7, 64])
def test_what_is_read_is_what_was_made(tmp_path, batch_size):
    model = Counting()
    store = FeatureStore.write((X, Y), model, tmp_path, shard_rows=16, batch_size=batch_size)
    made, read = extract_features((X, Y), model), whole(FeatureStore.open(tmp_path), 5)
    bound = made.features.abs().amax(dim=1, keepdim=True) * 2**-11
    assert bool(((read["features"] - made.features).abs() <= bound).all())
    for name in ("logits", "losses", "labels"):
        torch.testing.assert_close(read[name], getattr(made, name))
    assert read["ids"] == made.ids and len(store) == 50
    assert [shard["rows"] for shard in store.index["shards"]] == [16, 16, 16, 2]
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 50 * 200 + 4 * 1000


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no list of what is mapped")
@pytest.mark.global_random("Counting seeds its weights")
def test_features_are_float16_in_the_file_and_mapped_and_not_read_into_memory(tmp_path, monkeypatch):
    store = FeatureStore.write((X, Y), Counting(), tmp_path, shard_rows=16)
    with safetensors.safe_open(tmp_path / "shard-000000.safetensors", framework="pt") as file:
        assert file.get_tensor("features").dtype == torch.float16
    seen = []

    def looking(halves, exponents):
        seen.append((halves.dtype, Path("/proc/self/maps").read_text().count("shard-")))
        return restored(halves, exponents)

    monkeypatch.setattr(feature_shards, "restored", looking)
    whole(store)
    assert len(seen) == 4 and all(kind == torch.float16 and maps for kind, maps in seen)
    assert len(store.digest) == 64 and all(len(shard["sha256"]) == 64 for shard in store.index["shards"])


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=6))
def test_a_row_is_off_by_at_most_a_2048th_of_its_largest_entry(row):
    rows = torch.tensor([row, [0.0] * len(row)])
    found = restored(*halved(rows))
    assert bool(((found - rows).abs() <= rows.abs().amax(dim=1, keepdim=True) * 2**-11 + 1e-38).all())


@pytest.mark.global_random("Counting seeds its weights")
def test_an_interrupted_run_goes_on_and_gives_the_same_bits(tmp_path):
    plain = FeatureStore.write((X, Y), Counting(), tmp_path / "plain", shard_rows=16, batch_size=8)
    with pytest.raises(ValueError, match="power cut"):
        FeatureStore.write((X, Y), Counting(limit=40), tmp_path / "cut", shard_rows=16, batch_size=8)
    with pytest.raises(ConfigurationError, match="finished store"):
        FeatureStore.open(tmp_path / "cut")
    (tmp_path / "cut" / "shard-000002.safetensors").write_bytes(b"half a shard that no index knows")
    again, seen = Counting(), []
    store = FeatureStore.write(
        (X, Y), again, tmp_path / "cut", shard_rows=16, batch_size=8, on_batch=lambda batch, _: seen.extend(batch.ids)
    )
    assert again.rows == 50 - 32 and len(seen) == 50
    assert store.digest == plain.digest == FeatureStore.open(tmp_path / "plain").digest


@pytest.mark.global_random("Counting seeds its weights")
def test_other_data_settings_or_models_are_refused(tmp_path):
    model = Counting()
    FeatureStore.write((X, Y), model, tmp_path, shard_rows=16)
    other = Counting()
    with torch.no_grad():
        other.head.bias[0] += 1e-3
    with pytest.raises(ConfigurationError, match="other rows in shard 0"):
        FeatureStore.write((X.flip(0), Y), model, tmp_path, shard_rows=16)
    for data in ((X[:40], Y[:40]), (torch.cat([X, X]), torch.cat([Y, Y]))):
        with pytest.raises(ConfigurationError, match="the same data"):
            FeatureStore.write(data, model, tmp_path, shard_rows=16)
    with pytest.raises(ConfigurationError, match="model="):
        FeatureStore.write((X, Y), other, tmp_path, shard_rows=16)
    with pytest.raises(ConfigurationError, match="shard_rows="):
        FeatureStore.write((X, Y), model, tmp_path, shard_rows=8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="an empty folder"):
        FeatureStore.write((X, Y), model, tmp_path / "other")


@pytest.mark.global_random("Counting seeds its weights")
def test_changed_bytes_are_refused(tmp_path):
    FeatureStore.write((X, Y), Counting(), tmp_path, shard_rows=16)
    shard, index = tmp_path / "shard-000001.safetensors", tmp_path / "index.json"
    content, listed = shard.read_bytes(), index.read_text()
    for at in (0, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ConfigurationError, match="as they were written"):
            FeatureStore.open(tmp_path)
    shard.unlink()
    with pytest.raises(ConfigurationError, match="as they were written"):
        FeatureStore.open(tmp_path)
    shard.write_bytes(content)
    for wrong in ("", "[]", listed.replace("shard-000001", "../000000001"), json.dumps({"format": "other"})):
        index.write_text(wrong)
        with pytest.raises(ConfigurationError, match="feature store"):
            FeatureStore.open(tmp_path)


@pytest.mark.global_random("Counting seeds its weights")
def test_detectors_over_shards_are_detectors_over_all_rows(tmp_path):
    store = FeatureStore.write((X, Y), Counting(), tmp_path, shard_rows=16)
    one = {**whole(store), "ids": whole(store)["ids"]}
    for kind in (SpectralSignature, Outliers):
        expected = kind().partial_fit(one).score(one)
        torch.testing.assert_close(store.scores(kind()), expected, rtol=1e-9, atol=1e-9)
        merged = kind()
        for block in store.blocks(16):
            merged = merged.merge(kind().partial_fit(block))
        assert torch.equal(torch.cat([merged.score(block) for block in store.blocks(16)]), store.scores(kind(), 16))


@pytest.mark.global_random("Counting seeds its weights")
def test_bad_samples_keep_their_rows_even_where_a_whole_shard_is_bad(tmp_path):
    samples = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
    for row in range(8):
        samples[row] = (X[row] * torch.nan, int(Y[row]))
    samples[20], samples[30] = (X[20, :2], 1), (X[30], None)
    store = FeatureStore.write(samples, Counting(), tmp_path, shard_rows=8, batch_size=4)
    found = list(FeatureStore.open(tmp_path).blocks(8))
    assert [block["features"].shape[1] for block in found] == [5] * 7 and len(store) == 50
    usable = torch.cat([block["usable"] for block in found])
    assert (~usable).nonzero().flatten().tolist() == [*range(8), 20, 30]
    assert (
        list(found[2]["broken"]) == [4]
        and "shape (2,)" in found[2]["broken"][4]
        and "no label" in found[3]["broken"][6]
    )
    assert bool(store.scores(Outliers())[usable].isfinite().all())


def test_ids_of_long_streams_are_those_of_short_ones(monkeypatch):
    x = torch.randint(0, 40, (300, 1), generator=torch.Generator().manual_seed(1)).float()
    y = torch.randint(0, 2, (300,), generator=torch.Generator().manual_seed(2))
    expected = batches.content_ids(x, y)
    monkeypatch.setattr(batches, "_NAMES_AT_ONCE", 5)
    names = batches.ContentIds()
    found = [row_id for start in range(0, 300, 7) for row_id in names.of(x[start : start + 7], y[start : start + 7])]
    assert tuple(found) == expected and names._older and len(set(found)) == 300
