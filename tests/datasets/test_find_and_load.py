"""`find` and `load` on copies in every layout that people keep, and on folders that do not hold what was asked for."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from aidefend._core.errors import AidefendError, ConfigurationError, UnsafeArtifact
from aidefend.datasets import ImageData, copies, find, load
from aidefend.datasets.image_data import content_digest
from tests.datasets.made_files import IDX_NAMES, KERAS_NAMES, idx_bytes, small_set, write_idx_set, write_npz_set

LAYOUTS = {
    "npz": ("mnist", lambda root, data: write_npz_set(root / "mnist.npz", data), "mnist.npz"),
    "npz keras": ("mnist", lambda root, data: write_npz_set(root / "mnist.npz", data, KERAS_NAMES), "mnist.npz"),
    "torchvision": ("mnist", lambda root, data: write_idx_set(root / "MNIST" / "raw", data), "MNIST/raw"),
    "torchvision gz": ("mnist", lambda root, data: write_idx_set(root / "MNIST" / "raw", data, ".gz"), "MNIST/raw"),
    "plain folder": ("mnist", lambda root, data: write_idx_set(root / "mnist", data), "mnist"),
    "root itself": ("mnist", lambda root, data: write_idx_set(root, data), "."),
    "root itself gz": ("mnist", lambda root, data: write_idx_set(root, data, ".gz"), "."),
    "dotted names": ("mnist", lambda root, data: write_idx_set(root, data, dotted=True), "."),
    "raw below the root": ("mnist", lambda root, data: write_idx_set(root / "raw", data), "raw"),
    "fashion npz": (
        "fashion-mnist",
        lambda root, data: write_npz_set(root / "fashion_mnist.npz", data),
        "fashion_mnist.npz",
    ),
    "fashion npz dash": (
        "fashion-mnist",
        lambda root, data: write_npz_set(root / "fashion-mnist.npz", data),
        "fashion-mnist.npz",
    ),
    "fashion torchvision": (
        "fashion-mnist",
        lambda root, data: write_idx_set(root / "FashionMNIST" / "raw", data),
        "FashionMNIST/raw",
    ),
    "fashion Debian": (
        "fashion-mnist",
        lambda root, data: write_idx_set(root / "fashion-mnist", data, ".gz"),
        "fashion-mnist",
    ),
}


def assert_same(found, data):
    """The data in the form that every loader promises, computed here with numpy alone."""
    assert isinstance(found, ImageData)
    for part in ("train", "test"):
        x = data[f"{part}_x"].astype(np.float32)[:, None] / np.float32(255)
        np.testing.assert_array_equal(getattr(found, f"{part}_x").numpy(), x)
        np.testing.assert_array_equal(getattr(found, f"{part}_y").numpy(), data[f"{part}_y"])
        assert getattr(found, f"{part}_x").dtype == torch.float32
        assert getattr(found, f"{part}_y").dtype == torch.int64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found(tmp_path, layout):
    name, write, place = LAYOUTS[layout]
    data = small_set()
    write(tmp_path, data)
    found = find(name, roots=[tmp_path])
    assert_same(found, data)
    assert Path(found.path).samefile(tmp_path / place)
    assert not found.verified
    assert "not the published files" in found.source
    assert str(tmp_path) not in found.source
    assert found.classes[1] == ("1" if name == "mnist" else "Trouser")
    assert_same(load(tmp_path), data)
    assert_same(load(tmp_path / place), data)


def test_every_layout_gives_the_same_digest(tmp_path):
    data, sources = small_set(), set()
    for layout, (name, write, _) in LAYOUTS.items():
        write(tmp_path / layout, data)
        sources.add(find(name, roots=tmp_path / layout).source.partition("SHA-256")[2])
    assert len(sources) == 1
    data["train_y"][0] ^= 1
    write_npz_set(tmp_path / "changed" / "mnist.npz", data)
    assert find("mnist", roots=tmp_path / "changed").source.partition("SHA-256")[2] not in sources


def test_zero_and_255_become_exactly_zero_and_one(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    labels = np.array([1])
    write_npz_set(tmp_path / "a.npz", {"train_x": grey, "train_y": labels, "test_x": grey, "test_y": labels})
    x = load(tmp_path / "a.npz").train_x.flatten()
    assert (float(x[0]), float(x[255])) == (0.0, 1.0)
    assert x.tolist() == [np.float32(k) / np.float32(255) for k in range(256)]
    assert torch.equal((x * 255).round().to(torch.uint8), torch.arange(256, dtype=torch.uint8))


def test_the_first_root_wins_and_plain_wins_over_packed(tmp_path):
    first, second = small_set(rows=12), small_set(rows=10)
    write_idx_set(tmp_path / "b" / "MNIST" / "raw", first)
    write_idx_set(tmp_path / "b" / "MNIST" / "raw", second, ".gz")
    write_idx_set(tmp_path / "c", second)
    assert_same(find("mnist", [tmp_path / "absent", tmp_path / "b", tmp_path / "c"]), first)
    assert_same(find("mnist", str(tmp_path / "c")), second)


def test_environment_variable_comes_first_and_only_without_roots(tmp_path, monkeypatch):
    data = small_set()
    write_npz_set(tmp_path / "mine" / "mnist.npz", data)
    write_npz_set(tmp_path / "work" / "data" / "mnist.npz", small_set(rows=10))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("AIDEFEND_DATA", os.pathsep.join(["", str(tmp_path / "absent"), str(tmp_path / "mine")]))
    assert_same(find("mnist"), data)
    with pytest.raises(ConfigurationError) as caught:
        find("mnist", roots=tmp_path / "absent")
    assert "mine" not in str(caught.value)
    monkeypatch.delenv("AIDEFEND_DATA")
    assert len(find("mnist").train_x) == 10


def test_usual_places(tmp_path, monkeypatch):
    monkeypatch.delenv("AIDEFEND_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert [str(root) for root in copies._search_roots(None)] == [
        "data",
        f"{tmp_path}/data",
        f"{tmp_path}/.keras/datasets",
        "/usr/share/datasets",
    ]
    write_npz_set(tmp_path / ".keras" / "datasets" / "mnist.npz", small_set(), KERAS_NAMES)
    assert_same(find("mnist"), small_set())
    write_idx_set(tmp_path / ".keras" / "datasets" / "fashion-mnist", small_set(), ".gz")
    assert find("fashion-mnist").classes[9] == "Ankle boot"


def test_the_error_names_every_place(tmp_path):
    write_idx_set(tmp_path / "here" / "MNIST" / "raw", small_set())
    (tmp_path / "here" / "MNIST" / "raw" / IDX_NAMES["test_y"]).unlink()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError) as caught:
        find("mnist", roots=[tmp_path / "absent", tmp_path / "here", tmp_path / "file"])
    message = str(caught.value)
    assert message.startswith("Expected a copy of MNIST in one of the places looked at, got name='mnist'.")
    for line in (
        f"{tmp_path}/absent: no such folder\n",
        f"{tmp_path}/here: none of mnist.npz, MNIST.npz\n",
        f"{tmp_path}/here/MNIST/raw: incomplete, without t10k-labels-idx1-ubyte\n",
        f"{tmp_path}/here/MNIST: no IDX files\n",
        f"{tmp_path}/here/mnist: no IDX files\n",
        f"{tmp_path}/here: no IDX files\n",
        f"{tmp_path}/file: a file; pass it to load()\n",
    ):
        assert f"  {line}" in message
    assert message.endswith("pass roots=, or set AIDEFEND_DATA.")


def test_published_data_is_recognised_by_content_only(tmp_path, monkeypatch):
    data = small_set()
    write_npz_set(tmp_path / "whatever.npz", data)
    write_idx_set(tmp_path / "flat", data)
    tensors = {part: torch.from_numpy(array) for part, array in data.items()}
    tensors |= {part: tensors[part][:, None] for part in ("train_x", "test_x")}
    known = content_digest(tensors)
    monkeypatch.setattr(copies, "identify", lambda digest: "fashion-mnist" if digest == known else None)
    found = load(tmp_path / "whatever.npz")
    assert found.verified
    assert found.classes[0] == "T-shirt/top"
    assert found.source == f"Fashion-MNIST as published (SHA-256 of images and labels {known})"
    assert find("fashion-mnist", tmp_path / "flat").verified
    # The IDX names of both sets are the same: only the content can tell that this is not what was asked for.
    with pytest.raises(ConfigurationError, match="flat: fashion-mnist, not mnist"):
        find("mnist", tmp_path / "flat")


def test_one_changed_pixel_is_no_longer_the_published_set(tmp_path, monkeypatch):
    data = small_set()
    write_idx_set(tmp_path, data)
    known = find("mnist", tmp_path).source.split()[-1].rstrip(")")
    monkeypatch.setattr(copies, "identify", lambda digest: "mnist" if digest == known else None)
    assert find("mnist", tmp_path).verified
    data["test_x"][3, 2, 1] ^= 1
    write_idx_set(tmp_path, data)
    assert not find("mnist", tmp_path).verified


def test_a_damaged_copy_raises_instead_of_being_passed_over(tmp_path):
    write_idx_set(tmp_path / "a" / "mnist", small_set(), ".gz")
    write_npz_set(tmp_path / "b" / "mnist.npz", small_set())
    victim = tmp_path / "a" / "mnist" / "t10k-images-idx3-ubyte.gz"
    victim.write_bytes(victim.read_bytes()[:-5])
    with pytest.raises(UnsafeArtifact, match="undamaged"):
        find("mnist", [tmp_path / "a", tmp_path / "b"])


def test_folders_with_two_sets_are_ambiguous_for_load(tmp_path):
    write_npz_set(tmp_path / "mnist.npz", small_set())
    write_idx_set(tmp_path / "FashionMNIST" / "raw", small_set())
    with pytest.raises(ConfigurationError, match=r"holds one data set.*mnist\.npz, .*FashionMNIST/raw"):
        load(tmp_path)
    assert_same(load(tmp_path / "FashionMNIST"), small_set())


def test_links_to_one_set_are_one_set(tmp_path):
    write_idx_set(tmp_path / "MNIST" / "raw", small_set())
    (tmp_path / "mnist").symlink_to(tmp_path / "MNIST" / "raw")
    assert_same(load(tmp_path), small_set())


def test_load_says_what_it_wants(tmp_path):
    with pytest.raises(ConfigurationError, match=r'found by name with find\("mnist"\)'):
        load("no-such-thing")
    with pytest.raises(ConfigurationError, match="FashionMNIST/raw: no IDX files"):
        load(tmp_path)
    (tmp_path / "images").write_bytes(idx_bytes(np.zeros((2, 3, 3), np.uint8)))
    with pytest.raises(UnsafeArtifact, match="pass the folder that holds all four"):
        load(tmp_path / "images")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(UnsafeArtifact, match="train_x, train_y, test_x, test_y or x_train"):
        load(tmp_path / "other.npz")
    with pytest.raises(ConfigurationError, match="name to be one of 'mnist', 'fashion-mnist', got name='cifar10'"):
        find("cifar10")
    for wrong in ([], [3]):
        with pytest.raises(ConfigurationError, match="roots"):
            find("mnist", roots=wrong)


def changed(**parts):
    return {**small_set(), **parts}


UNIT = np.linspace(0, 1, 300).reshape(12, 5, 5)
BAD_SETS = {
    "flat images": (changed(train_x=np.zeros((12, 25), np.uint8)), r"train_x.* \(N, H, W\)"),
    "four channels": (changed(train_x=np.zeros((12, 5, 5, 4), np.uint8)), r"train_x.* \(N, H, W\)"),
    "no pixels": (changed(train_x=np.zeros((12, 0, 5), np.uint8)), r"train_x.* \(N, H, W\)"),
    "no rows": (changed(test_x=np.zeros((0, 5, 5), np.uint8), test_y=np.zeros(0, np.uint8)), "at least one sample"),
    "signed integers": (changed(train_x=np.zeros((12, 5, 5), np.int64)), "uint8 in 0..255 or float"),
    "floats to 255": (changed(train_x=UNIT * 255), "values outside"),
    "not a number": (changed(train_x=UNIT * np.nan), "values outside"),
    "label missing": (changed(train_y=np.zeros(11, np.uint8)), "train_y.* 12 row"),
    "label negative": (changed(test_y=np.full(12, -1)), ">= 0"),
    "label fraction": (changed(train_y=np.full(12, 0.5)), "hold integers"),
    "label true": (changed(train_y=np.full(12, True)), "class indices"),
    "label column": (changed(train_y=np.zeros((12, 1), np.uint8)), "1 dimension"),
    "label huge": (changed(train_y=np.full(12, 2**40)), "< 65536"),
    "label wraps": (changed(train_y=np.full(12, 2**64 - 1, dtype=np.uint64)), ">= 0"),
    "one class": (changed(train_y=np.zeros(12, int), test_y=np.zeros(12, int)), "two classes"),
    "two shapes": (changed(test_x=np.zeros((12, 5, 6), np.uint8)), "one shape in both parts"),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_arrays_that_do_not_fit_are_refused(tmp_path, case):
    data, message = BAD_SETS[case]
    write_npz_set(tmp_path / "a.npz", data)
    with pytest.raises(AidefendError, match=message):
        load(tmp_path / "a.npz")


def test_find_knows_the_classes_and_refuses_others(tmp_path):
    write_npz_set(tmp_path / "mnist.npz", changed(train_y=np.full(12, 10)))
    with pytest.raises(ConfigurationError, match=r"mnist\.npz\[train_y\] >= 0 and < 10"):
        find("mnist", tmp_path)
    assert len(load(tmp_path / "mnist.npz").classes) == 11


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_in_the_unit_range_are_taken_as_they_are(tmp_path, kind):
    write_npz_set(tmp_path / "a.npz", changed(train_x=UNIT.astype(kind), test_x=UNIT.astype(kind)))
    np.testing.assert_array_equal(load(tmp_path / "a.npz").train_x[:, 0].numpy(), UNIT.astype(kind).astype(np.float32))


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_labels_of_any_integer_type(tmp_path, kind):
    labels = small_set()["train_y"].astype(kind)
    write_npz_set(tmp_path / "a.npz", changed(train_y=labels))
    np.testing.assert_array_equal(load(tmp_path / "a.npz").train_y.numpy(), labels.astype(np.int64))


def test_colour_images_come_out_channels_first(tmp_path):
    colour = np.arange(12 * 5 * 6 * 3).reshape(12, 5, 6, 3).astype(np.uint8)
    write_npz_set(tmp_path / "last.npz", changed(train_x=colour, test_x=colour))
    write_npz_set(
        tmp_path / "first.npz", changed(train_x=colour.transpose(0, 3, 1, 2), test_x=colour.transpose(0, 3, 1, 2))
    )
    last, first = load(tmp_path / "last.npz"), load(tmp_path / "first.npz")
    assert last.train_x.shape == (12, 3, 5, 6)
    assert torch.equal(last.train_x, first.train_x)
    assert last.source.split()[-1] == first.source.split()[-1]


def test_a_gzip_bomb_in_a_found_folder_is_refused(tmp_path):
    write_idx_set(tmp_path, small_set(), ".gz")
    victim = tmp_path / "train-images-idx3-ubyte.gz"
    victim.write_bytes(gzip.compress(gzip.decompress(victim.read_bytes()) + bytes(5_000_000)))
    with pytest.raises(UnsafeArtifact, match="to end after"):
        find("mnist", tmp_path)


def test_load_passes_its_limit_on(tmp_path):
    write_npz_set(tmp_path / "a.npz", small_set())
    write_idx_set(tmp_path / "idx", small_set())
    for path in (tmp_path / "a.npz", tmp_path / "idx"):
        assert len(load(path, max_bytes=2_000).train_x) == 12
        with pytest.raises(UnsafeArtifact, match="max_bytes=200 "):
            load(path, max_bytes=200)
        with pytest.raises(ConfigurationError, match="max_bytes"):
            load(path, max_bytes=0)


def test_the_digest_depends_on_shapes_and_types_too():
    tensors = {part: torch.zeros(6, 1, 2, 3, dtype=torch.uint8) for part in ("train_x", "test_x")}
    tensors |= {part: torch.zeros(6, dtype=torch.uint8) for part in ("train_y", "test_y")}
    turned = {**tensors, "test_x": tensors["test_x"].reshape(6, 1, 3, 2)}
    retyped = {**tensors, "test_x": tensors["test_x"].to(torch.int8)}
    moved = {**tensors, "train_x": tensors["train_x"][:5], "test_x": torch.zeros(7, 1, 2, 3, dtype=torch.uint8)}
    assert len({content_digest(each) for each in (tensors, turned, retyped, moved)}) == 4
    wide = {**tensors, "train_y": tensors["train_y"].long(), "test_y": tensors["test_y"].int()}
    assert content_digest(wide) == content_digest(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_published_sets(name):
    try:
        data = find(name)
    except ConfigurationError:
        pytest.skip(f"no copy of {name} here; set AIDEFEND_DATA")
    assert data.verified
    assert data.train_x.shape == (60_000, 1, 28, 28)
    assert data.test_x.shape == (10_000, 1, 28, 28)
    assert torch.bincount(data.test_y).sum() == 10_000
