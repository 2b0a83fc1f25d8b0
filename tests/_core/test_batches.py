"""One way through data: every form gives the same rows, ids follow content and not position."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from aidefend import ConfigurationError
from aidefend._core.batches import (
    ContentIds,
    as_dataset,
    content_ids,
    gather,
    gather_labelled,
    in_batches,
    input_id,
    iterate,
)

X = torch.arange(21.0).reshape(7, 3)
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0])


class Rows(Dataset):
    def __init__(self, form):
        self.form = form

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return self.form(X[i], Y[i])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


FORMS = {
    "pair": (X, Y),
    "list": [X, Y],
    "arrays": (X.numpy(), Y.numpy()),
    "table": {"image": X, "label": Y},
    "one-hot": (X, torch.nn.functional.one_hot(Y)),
    "column of labels": (X, Y[:, None]),
    "float labels": (X, Y.double()),
    "dataset": TensorDataset(X, Y),
    "ints": Rows(lambda x, y: (x, int(y))),
    "numpy samples": Rows(lambda x, y: (x.numpy(), np.int64(y))),
    "dict samples": Rows(lambda x, y: {"pixel_values": x, "labels": y}),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=2, generator=torch.Generator()),
    "stream": Stream(),
    "dict batches": [{"x": X[:4], "y": Y[:4]}, {"x": X[4:], "y": Y[4:]}],
    "generator": ((X[i : i + 2], Y[i : i + 2]) for i in range(0, 7, 2)),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(name):
    batch = gather(FORMS[name], 3)
    assert torch.equal(batch.x, X) and torch.equal(batch.y, Y) and batch.y.dtype == torch.int64
    assert batch.ids == content_ids(X, Y)


def test_inputs_alone():
    for data in (
        X,
        X.numpy(),
        TensorDataset(X),
        DataLoader(TensorDataset(X), 2, generator=torch.Generator()),
        Rows(lambda x, y: x),
        {"x": X},
    ):
        batch = gather(data, 2)
        assert torch.equal(batch.x, X) and batch.y is None and batch.ids == content_ids(X)
    with pytest.raises(ValueError, match="with labels"):
        gather_labelled(X, "test")


@given(st.permutations(range(6)), st.integers(1, 7))
def test_ids_follow_content(order, batch_size):
    x = torch.tensor([[1.0], [2.0], [1.0], [3.0], [1.0], [2.0]])
    plain = content_ids(x)
    batches = list(iterate(x[list(order)], batch_size))
    shuffled = [row_id for batch in batches for row_id in batch.ids]
    assert len(set(plain)) == 6 and set(shuffled) == set(plain)
    for position, row_id in zip(order, shuffled, strict=True):
        assert input_id(row_id) == input_id(plain[position])


def test_a_loader_that_shuffles_between_passes():
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))
    first, second = gather(loader), gather(loader)
    assert first.ids != second.ids
    place = {row_id: i for i, row_id in enumerate(second.ids)}
    assert torch.equal(second.x[[place[row_id] for row_id in first.ids]], first.x)


def test_what_ids_depend_on():
    row = content_ids(X)[0]
    assert content_ids(X.T.contiguous().T)[0] == content_ids(X.clone().requires_grad_())[0] == row
    assert content_ids(torch.cat([X[:1], X[:1]], 1)[:, :3])[0] == row
    assert content_ids(X.double())[0] != row != content_ids(X.reshape(7, 1, 3))[0]
    labelled = content_ids(X, Y)[0]
    assert labelled != row == input_id(labelled) and content_ids(X, Y + 1)[0] != labelled
    assert content_ids(X[:0]) == () and len(set(content_ids(torch.zeros(3, 0)))) == 3
    assert ContentIds().of(X) == content_ids(X)
    nothing = torch.tensor([[float("nan")]]).bfloat16()
    assert content_ids(nothing) == content_ids(nothing.clone())


def test_bad_rows_pass_through():
    bad = X.clone()
    bad[2] = float("nan")
    assert torch.isnan(gather((bad, Y)).x[2]).all()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (3, "data"),
        ("text", "data"),
        ({"a": X}, "data"),
        ([{"a": X}], "key among"),
        ((X, Y[:3]), "7 labels"),
        ((X, Y + 0.5), "class indices"),
        ((X, torch.rand(7, 3)), "class indices"),
        ([(X, Y, Y)], "3 parts"),
        ([], "at least one sample"),
        (X[:0], "at least one sample"),
        ([{"x": X, "y": Y}, {"x": X}], "every batch"),
        (np.array(["a", None], dtype=object), "numbers"),
    ],
)
def test_other_data_is_refused(data, match):
    with pytest.raises(ValueError, match=match):
        gather(data)


def test_map_style_views():
    assert len(as_dataset((X, Y))) == len(as_dataset(X)) == len(as_dataset(DataLoader(TensorDataset(X), 2))) == 7
    own = Rows(lambda x, y: (x, y))
    assert as_dataset(own) is own
    with pytest.raises(ValueError, match="map-style"):
        as_dataset(Stream())
    with pytest.raises(ValueError, match="same number"):
        as_dataset((X, Y[:2]))


def test_in_batches():
    assert torch.equal(in_batches(lambda part: part * 2, X, 2), X * 2)
    assert in_batches(lambda part: part * 2, X[:0], 2).shape == (0, 3)


def test_ids_do_not_depend_on_workers():
    x, y = torch.randint(0, 3, (20, 2)).float(), torch.arange(20) % 2
    loader = DataLoader(TensorDataset(x, y), batch_size=3, num_workers=2, generator=torch.Generator())
    assert sorted(row for batch in iterate(loader) for row in batch.ids) == sorted(content_ids(x, y))


class _Damaged(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, row):
        if row == 2:
            raise OSError("row 2 is damaged")
        return torch.zeros(3), 0


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (_Damaged(), "data='OSError: row 2 is damaged'"),
        ([(torch.zeros(2), 0), (torch.zeros(3), 1)], "have one shape"),
        ([(torch.zeros(2, 2), torch.zeros(2)), (torch.zeros(2, 3), torch.zeros(2))], "have one shape"),
        (torch.eye(3).to_sparse(), "dense tensors"),
        (torch.eye(3, device="meta"), "dense tensors"),
        (torch.tensor(1.0), "data"),
        ([{"x": [[1, 2], [3]], "y": [0, 1]}], "numbers that fit a tensor"),
    ],
)
def test_data_that_cannot_be_read_is_named_and_its_cause_kept(data, match):
    with pytest.raises(ConfigurationError, match=match):
        gather(data)
    with pytest.raises(OSError, match="row 2"):
        raise _cause(_Damaged())


def _cause(data):
    try:
        gather(data)
    except ConfigurationError as error:
        return error.__cause__


def test_what_the_consumer_raises_passes_through_unchanged():
    with pytest.raises(ZeroDivisionError, match="mine"):
        for _ in iterate(torch.zeros(4, 2)):
            raise ZeroDivisionError("mine")
