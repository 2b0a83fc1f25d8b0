"""`ImageData`: what it refuses to hold, and that its views are views."""

import dataclasses
import pickle

import pytest
import torch

from aidefend._core.errors import AidefendError
from aidefend.datasets import ImageData


def parts(**changes):
    x, y = torch.rand(6, 3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    good = {
        "train_x": x,
        "train_y": y,
        "test_x": x[:4],
        "test_y": y[:4],
        "classes": ("no", "yes"),
        "source": "made here",
    }
    return {**good, **changes}


BAD = {
    "not a tensor": ({"train_x": [[1.0]]}, "train_x to be a torch.Tensor"),
    "three dimensions": ({"train_x": torch.rand(6, 4, 5)}, "train_x to have 4 dimension"),
    "double": ({"test_x": torch.rand(4, 3, 4, 5).double()}, "test_x to be .*float32"),
    "bytes": ({"test_x": torch.zeros(4, 3, 4, 5, dtype=torch.uint8)}, "test_x to be .*float32"),
    "two channels": ({"train_x": torch.rand(6, 2, 4, 5)}, "1 or 3"),
    "above one": ({"train_x": torch.rand(6, 3, 4, 5) + 0.5}, r"in \[0, 1\]"),
    "below zero": ({"train_x": torch.rand(6, 3, 4, 5) - 0.5}, r"in \[0, 1\]"),
    "not a number": ({"train_x": torch.full((6, 3, 4, 5), torch.nan)}, "finite"),
    "empty": ({"test_x": torch.rand(0, 3, 4, 5), "test_y": torch.zeros(0, dtype=torch.int64)}, "at least one sample"),
    "too few labels": ({"train_y": torch.zeros(5, dtype=torch.int64)}, "train_y to have 6 row"),
    "label out of range": ({"test_y": torch.tensor([0, 1, 2, 0])}, "< 2"),
    "short labels": ({"test_y": torch.zeros(4, dtype=torch.int32)}, "test_y to be int64"),
    "another shape": ({"test_x": torch.rand(4, 3, 4, 6)}, "one shape in both parts"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_parts_are_refused(case):
    changes, message = BAD[case]
    with pytest.raises(AidefendError, match=message):
        ImageData(**parts(**changes))


def test_views_share_memory_and_the_object_is_frozen():
    data = ImageData(**parts())
    assert data.train.tensors[0].data_ptr() == data.train_x.data_ptr()
    assert data.test.tensors[1].data_ptr() == data.test_y.data_ptr()
    assert not data.verified
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.source = "elsewhere"


def test_repr_is_one_line_and_pickle_keeps_everything():
    data = ImageData(**parts())
    assert repr(data) == "ImageData(6 train + 4 test, images (3, 4, 5), 2 classes, not verified)"
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.train_x, data.train_x)
    assert copy.classes == data.classes
