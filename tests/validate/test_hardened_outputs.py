"""Hardened outputs keep the decision, show what they say, and refuse what they cannot mean."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aidefend import ConfigurationError
from aidefend.validate import LabelOnly, Rounded, Tempered, TopK

LOGITS = torch.tensor([[0.0, 1.0, 3.0, -2.0], [5.0, 5.1, 0.0, 0.0], [0.0, 0.0, 0.0, 1e-3]])
ALL = [LabelOnly(), TopK(2), Rounded(1), Tempered(4.0)]


@pytest.mark.parametrize("output", ALL, ids=repr)
def test_the_predicted_class_is_kept_in_every_dtype(output):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        shown = output(LOGITS.to(dtype))
        label = shown if shown.ndim == 1 else shown.argmax(dim=1)
        assert torch.equal(label, LOGITS.to(dtype).argmax(dim=1))


@pytest.mark.parametrize("output", ALL, ids=repr)
def test_no_rows_pickling_and_frozenness(output):
    assert len(output(torch.zeros(0, 3))) == 0
    assert pickle.loads(pickle.dumps(output)) == output
    with pytest.raises(AttributeError):
        output.k = 1
    with pytest.raises(ConfigurationError, match="logits"):
        output(torch.zeros(3))


def test_top_k_shows_exact_probabilities_of_k_classes():
    exact = LOGITS.softmax(dim=1)
    shown = TopK(2)(LOGITS)
    assert (shown > 0).sum(dim=1).tolist() == [2, 2, 2]
    assert bool(((shown == exact) | (shown == 0)).all())
    torch.testing.assert_close(TopK(99)(LOGITS), exact)


@given(
    st.lists(st.lists(st.floats(-8, 8, width=32), min_size=5, max_size=5), min_size=1, max_size=6),
    st.integers(0, 6),
)
def test_rounding_keeps_the_argmax_and_sums_to_one(rows, digits):
    logits = torch.tensor(rows)
    shown = Rounded(digits)(logits)
    top = logits.softmax(dim=1).argmax(dim=1)
    assert torch.equal(shown.argmax(dim=1), top) and bool((shown >= 0).all())
    torch.testing.assert_close(shown.sum(dim=1), torch.ones(len(rows)))
    others = shown.scatter(1, top[:, None], -1.0).amax(dim=1)
    assert bool((shown.gather(1, top[:, None])[:, 0] > others).all())


def test_rounding_hides_what_lies_behind_the_digits():
    a, b = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[2.003, 0.0, 0.0]])
    assert torch.equal(Rounded(2)(a), Rounded(2)(b)) and not torch.equal(Rounded(6)(a), Rounded(6)(b))


def test_rounding_of_many_flat_classes_leaves_the_top_class():
    shown = Rounded(1)(torch.cat([torch.zeros(1, 999), torch.ones(1, 1)], dim=1))
    assert shown[0, -1] == 1.0 and shown.sum() == 1.0


def test_temperature_is_the_softmax_of_scaled_logits():
    torch.testing.assert_close(Tempered(4.0)(LOGITS), (LOGITS / 4).softmax(dim=1))
    assert Tempered(4.0)(LOGITS).amax() < LOGITS.softmax(dim=1).amax()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "k to be an integer >= 1"),
        (lambda: Rounded(7), "digits"),
        (lambda: Rounded(-1), "digits"),
        (lambda: Tempered(0.0), "temperature"),
        (lambda: Tempered(float("inf")), "temperature"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
