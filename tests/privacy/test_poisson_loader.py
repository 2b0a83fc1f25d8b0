"""Rows reach batches whatever form they have; rows that cannot be read are left out and counted."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from tests.privacy.private_worlds import one_step, private_run, quiet, released, rows


class Listed(Dataset):
    """A map-style data set of Python values; some rows are spoiled."""

    def __init__(self, form, spoiled=()):
        self.x, self.y = rows()
        self.form, self.spoiled = form, dict(spoiled)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index in self.spoiled:
            return self.spoiled[index]()
        return self.form(self.x[index], self.y[index])


FORMS = {
    "tensors": lambda x, y: (x, y),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "numbers": lambda x, y: (x, int(y)),
    "list": lambda x, y: [x, y],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batch(form):
    expected = private_run(config=quiet(expected_batch_size=24))
    one_step(expected)
    private = private_run(data=Listed(FORMS[form]), config=quiet(expected_batch_size=24))
    one_step(private)
    for name, value in released(expected).items():
        torch.testing.assert_close(released(private)[name], value)


def test_subsets_and_wrapped_tensors():
    x, y = rows()
    for data in (TensorDataset(x, y), Subset(TensorDataset(x, y), range(24)), (x.numpy(), y.numpy())):
        batch, targets = one_step(private_run(data=data, config=quiet(expected_batch_size=24)))
        assert torch.equal(batch, x) and torch.equal(targets, y)


def broken():
    raise OSError("damaged file")


def test_rows_that_cannot_be_read_are_left_out():
    spoiled = {
        3: broken,
        5: lambda: (torch.zeros(7), torch.tensor(0)),
        7: lambda: (torch.zeros(6, dtype=torch.float64), torch.tensor(0)),
        9: lambda: ("text", 1),
        11: lambda: torch.zeros(6),
    }
    private = private_run(data=Listed(FORMS["tensors"], spoiled), config=quiet(expected_batch_size=24))
    x, y = one_step(private)
    assert len(x) == len(y) == 19 and private.loader.unreadable == 5
    assert torch.equal(x, rows()[0][[i for i in range(24) if i not in spoiled]])


def test_a_batch_of_unreadable_rows_alone_is_an_empty_batch():
    data = Listed(FORMS["tensors"], {i: broken for i in range(24) if i % 8})
    private = private_run(data=data, config=quiet(expected_batch_size=24))
    data.spoiled = dict.fromkeys(range(24), broken)
    x, _ = one_step(private)
    assert x.shape == (0, 6) and private.loader.unreadable == 24


def test_a_data_set_of_one_row():
    x, y = rows(1)
    one_step(private_run(data=(x, y)))


def test_the_batch_sizes_follow_the_public_rate_and_the_true_size():
    sizes = []
    private = private_run(data=rows(400), config=quiet(public_size=100, expected_batch_size=10, steps=200))
    for x, _ in private.loader:
        sizes.append(len(x))
    assert np.mean(sizes) == pytest.approx(40, abs=2) and np.std(sizes) == pytest.approx(6, abs=1)
