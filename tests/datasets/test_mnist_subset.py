"""The shipped digits: what is in the file, that it is checked, and that loading leaves no trace."""

import hashlib
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from aidefend import datasets
from aidefend._core.errors import UnsafeArtifact
from aidefend.datasets import mnist_subset, read_npz
from aidefend.datasets.mnist import SUBSET_FILE, SUBSET_SHA256, load_subset

# Rows of each digit in the full training and test part, as published with MNIST.
FULL = {
    "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}
ROWS = {"train": 6_000, "test": 1_000}


@pytest.fixture(scope="module")
def data():
    return mnist_subset()


def test_shapes_types_and_ranges(data):
    assert data.train_x.shape == (6000, 1, 28, 28)
    assert data.test_x.shape == (1000, 1, 28, 28)
    assert data.train_y.shape == (6000,)
    assert data.test_y.shape == (1000,)
    assert data.train_x.dtype == data.test_x.dtype == torch.float32
    assert data.train_y.dtype == data.test_y.dtype == torch.int64
    for x in (data.train_x, data.test_x):
        assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert data.classes == tuple("0123456789")
    assert data.verified


@pytest.mark.parametrize("part", ROWS)
def test_class_counts_are_those_of_the_full_set_to_the_nearest_row(data, part):
    counts = torch.bincount(getattr(data, f"{part}_y"), minlength=10).tolist()
    assert sum(counts) == ROWS[part]
    for count, full in zip(counts, FULL[part], strict=True):
        assert abs(count - ROWS[part] * full / sum(FULL[part])) < 1


def test_exact_class_counts(data):
    assert torch.bincount(data.train_y).tolist() == [592, 674, 596, 613, 584, 542, 592, 627, 585, 595]
    assert torch.bincount(data.test_y).tolist() == [98, 114, 103, 101, 98, 89, 96, 103, 97, 101]


def test_no_row_and_no_picture_twice():
    arrays = read_npz(SUBSET_FILE)
    for part, rows in ROWS.items():
        index = arrays[f"{part}_index"].long()
        assert len(index.unique()) == rows
        assert 0 <= int(index.min()) <= int(index.max()) < sum(FULL[part])
    pictures = [x.numpy().tobytes() for part in ROWS for x in arrays[f"{part}_x"]]
    assert len(set(pictures)) == len(pictures) == 7000


def test_any_slice_is_a_fair_sample(data):
    # 600 rows from a fair order: each digit's count is hypergeometric, spread < 8. Six spreads for 20 counts: false
    # failure below 1e-7. The original order of MNIST's test part would pass too, one sorted by class would not.
    for y, full in ((data.train_y, FULL["train"]), (data.test_y, FULL["test"])):
        counts = torch.bincount(y[:600], minlength=10)
        expected = 600 * torch.tensor(full) / sum(full)
        assert float((counts - expected).abs().max()) < 48
        assert float((torch.bincount(y.sort().values[:600], minlength=10) - expected).abs().max()) > 48


def test_the_digits_look_like_their_labels(data):
    # A centroid classifier needs real digits with the right labels; 82 % is its known accuracy on MNIST.
    centroids = torch.stack([data.train_x[data.train_y == k].mean(dim=0).flatten() for k in range(10)])
    correct = torch.cdist(data.test_x.flatten(1), centroids).argmin(dim=1) == data.test_y
    assert 0.76 < float(correct.float().mean()) < 0.88


def test_datasets_feed_a_loader(data):
    batches = list(DataLoader(data.test, batch_size=300, generator=torch.Generator()))
    assert [len(y) for _, y in batches] == [300, 300, 300, 100]
    assert torch.equal(torch.cat([x for x, _ in batches]), data.test_x)
    assert len(data.train) == 6000
    x, y = data.train[5]
    assert torch.equal(x, data.train_x[5])
    assert y == data.train_y[5]


def test_each_call_gives_fresh_tensors(data):
    mine = mnist_subset()
    mine.train_x.zero_()
    mine.train_y.zero_()
    again = mnist_subset()
    assert torch.equal(again.train_x, data.train_x)
    assert torch.equal(again.train_y, data.train_y)


def test_the_file_is_the_one_that_the_code_names():
    packed = SUBSET_FILE.read_bytes()
    assert hashlib.sha256(packed).hexdigest() == SUBSET_SHA256
    assert len(packed) <= 2_500_000
    beside = SUBSET_FILE.with_suffix(".md").read_text(encoding="utf-8")
    assert SUBSET_SHA256 in beside
    assert f"{len(packed):,} bytes" in beside
    for word in ("LeCun", "Cortes", "Burges", "Special Database 3", "CC BY-SA 3.0", "make_mnist_subset"):
        assert word in beside


@pytest.mark.parametrize("position", [0, 40, 500_000, -1])
def test_one_flipped_bit_is_refused(tmp_path, position):
    packed = bytearray(SUBSET_FILE.read_bytes())
    (tmp_path / "copy.npz").write_bytes(packed)
    assert load_subset(tmp_path / "copy.npz").verified
    packed[position] ^= 1
    (tmp_path / "copy.npz").write_bytes(packed)
    with pytest.raises(UnsafeArtifact, match=f"a file with SHA-256 {SUBSET_SHA256}"):
        load_subset(tmp_path / "copy.npz")


def test_a_valid_archive_with_one_poisoned_label_is_refused(tmp_path):
    arrays = {name: array.numpy() for name, array in read_npz(SUBSET_FILE).items()}
    arrays["train_y"][0] ^= 1
    np.savez_compressed(tmp_path / "poisoned.npz", **arrays)
    assert read_npz(tmp_path / "poisoned.npz")["train_y"].shape == (6000,)
    with pytest.raises(UnsafeArtifact, match="Install aidefend again"):
        load_subset(tmp_path / "poisoned.npz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UnsafeArtifact, match="No such file"):
        load_subset(tmp_path / "gone.npz")


def test_no_global_random_stream_is_touched():
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
    mnist_subset()
    after = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_public_names():
    assert datasets.__all__ == sorted(datasets.__all__)
    assert all(hasattr(datasets, name) for name in datasets.__all__)
