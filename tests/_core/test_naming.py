"""Labels that stand beside a table or an array: the same rows as with the labels among the columns."""

import numpy as np
import pytest
import torch

from aidefend import ConfigurationError
from aidefend._core.batches import as_dataset, gather, gather_labelled
from aidefend._core.naming import columns_of, paired
from aidefend._core.samples import Samples

pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")

X = torch.arange(12.0).reshape(4, 3)
Y = [0, 1, 1, 0]
INDEX = [7, 3, 5, 1]


def frame(index=INDEX, **more):
    return pandas.DataFrame(X.numpy(), columns=["a", "b", "c"], index=index).assign(**more)


def series(values=Y, name="vote", index=INDEX):
    return pandas.Series(values, name=name, index=index)


APART = {
    "frame, series": lambda: (frame(), series()),
    "frame, series in a list": lambda: [frame(), series()],
    "frame, array": lambda: (frame(), np.array(Y)),
    "frame, list": lambda: (frame(), Y),
    "frame, tensor": lambda: (frame(), torch.tensor(Y)),
    "frame, frame of one column": lambda: (frame(), series().to_frame()),
    "frame, column of one": lambda: (frame(), np.array(Y)[:, None]),
    "frame, one-hot rows": lambda: (frame(), np.eye(2)[Y]),
    "frame, nullable": lambda: (frame(), series().astype("Int64")),
    "frame, category": lambda: (frame(), series().astype("category")),
    "array, series": lambda: (X.numpy(), series()),
    "array, list": lambda: (X.numpy(), Y),
    "tensor, series": lambda: (X, series()),
    "tensor, tuple": lambda: (X, tuple(Y)),
    "tensor, frame of one column": lambda: (X, series().to_frame()),
    "arrow, arrow": lambda: (pyarrow.table({name: X[:, i].numpy() for i, name in enumerate("abc")}), pyarrow.array(Y)),
    "arrow, list": lambda: (pyarrow.table({name: X[:, i].numpy() for i, name in enumerate("abc")}), Y),
    "column of arrays, series": lambda: (pandas.Series(list(X.numpy()), index=INDEX), series()),
    "frame with a column of arrays": lambda: (pandas.DataFrame({"image": list(X.numpy())}), Y),
    "words": lambda: Samples((frame(), series(["no", "yes", "yes", "no"])), classes=["no", "yes"]),
    "words beside an array": lambda: Samples((X.numpy(), ["no", "yes", "yes", "no"]), classes=["no", "yes"]),
}


@pytest.mark.parametrize("bad", ["raise", "mark"])
@pytest.mark.parametrize("name", APART)
def test_labels_beside_the_inputs_give_the_rows_of_two_tensors(name, bad):
    found, plain = gather(APART[name](), 3, bad=bad), gather((X, torch.tensor(Y)))
    assert torch.equal(found.x, X) and torch.equal(found.y, torch.tensor(Y)) and not found.broken
    assert found.ids == plain.ids  # so the index is in no id


@pytest.mark.parametrize("name", APART)
def test_they_are_a_data_set_in_memory(name):
    rows = as_dataset(APART[name]())
    assert len(rows) == 4 and torch.equal(rows[2][0], X[2]) and int(rows[2][1]) == 1


def test_nothing_that_was_passed_is_changed():
    x, y = frame(), series()
    gather_labelled((x, y))
    assert list(x.columns) == ["a", "b", "c"] and x.equals(frame()) and y.equals(series())


def test_the_label_column_is_called_as_the_series_or_as_nothing_else_is():
    assert columns_of((frame(), series())) == {"inputs": ("a", "b", "c"), "label": "vote", "classes": None}
    assert columns_of((frame(), Y))["label"] == "y"
    crowded = frame(y=1.0, vote=2.0)
    assert columns_of((crowded, series()))["label"] == "label"  # "vote" is another column of x
    assert columns_of((crowded, series()))["inputs"] == ("a", "b", "c", "y", "vote")
    assert columns_of(Samples((frame(), Y), inputs=["c", "a"], label="mine"))["inputs"] == ("c", "a")


def test_labels_that_are_still_among_the_inputs_are_refused():
    with pytest.raises(ConfigurationError, match=r"no column of x.*x\.drop\(columns=\['vote'\]\)"):
        gather((frame(vote=Y), series()))
    with pytest.raises(ConfigurationError, match="label to name no column of x"):
        gather(Samples((frame(), Y), label="a"))


def test_another_index_is_refused_with_both_cures_and_the_same_one_goes_by_position():
    for other in ([3, 7, 5, 1], range(4)):
        with pytest.raises(ConfigurationError, match=r"one index.*row 0.*y\.loc\[x\.index\].*y\.to_numpy\(\)"):
            gather((frame(), series(index=other)))
    assert gather((frame(), series(index=[3, 7, 5, 1]).to_numpy())).y.tolist() == Y
    twice = [1, 1, 2, 2]  # as pandas.concat leaves it
    assert gather((frame(index=twice), series(index=twice))).y.tolist() == Y


def test_other_lengths_are_refused():
    for pair in ((frame(), Y[:3]), (X, Y[:3]), (frame(), series(Y[:3], index=INDEX[:3]))):
        with pytest.raises(ConfigurationError, match="same number of rows"):
            gather(pair)


def test_missing_labels_mark_their_rows():
    found = gather((frame(), series([0, None, 1, 0])), bad="mark")
    assert [row for row, _ in found.broken] == [1] and found.ids[1] == "unreadable:1"


def test_batches_of_them_give_the_rows_of_the_whole():
    found = gather(iter([(frame()[:3], series()[:3]), (frame()[3:], series()[3:])]))
    assert found.ids == gather((frame(), series())).ids and found.y.tolist() == Y
    with pytest.raises(ConfigurationError, match="one index"):
        gather(iter([(frame()[:3], series()[1:4])]))


def test_what_is_no_pair_stays_as_it_is():
    for data in ([frame()[:2], frame()[2:]], (X, torch.tensor(Y)), [(X[0], 1), (X[1], 0)], frame(), {"x": X, "y": Y}):
        assert paired(data) is data
    assert len(gather([frame(label=Y)[:2], frame(label=Y)[2:]]).ids) == 4
