"""Hardened outputs keep the decision, show what they say, and refuse what they cannot mean."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aidefend import ConfigurationError
from aidefend.validate import KeyedNoise, LabelOnly, ReverseSigmoid, Rounded, Tempered, TopK
from aidefend.validate.outputs import harden

LOGITS = torch.tensor([[0.0, 1.0, 3.0, -2.0], [5.0, 5.1, 0.0, 0.0], [0.0, 0.0, 0.0, 1e-3]])
X = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
KEY = bytes(range(16))
ALL = [
    LabelOnly(),
    TopK(2),
    Rounded(1),
    Tempered(4.0),
    ReverseSigmoid(),
    ReverseSigmoid(1.0, 5.0),
    KeyedNoise(KEY, 9.0),
]


@pytest.mark.parametrize("output", ALL, ids=repr)
def test_the_predicted_class_is_kept_in_every_dtype(output):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        shown = harden(output, LOGITS.to(dtype), X)
        label = shown if shown.ndim == 1 else shown.argmax(dim=1)
        assert torch.equal(label, LOGITS.to(dtype).argmax(dim=1))


KEEPING = [LabelOnly(), Rounded(0), Rounded(6), ReverseSigmoid(), KeyedNoise(KEY, 1.0)]


@pytest.mark.parametrize("output", KEEPING, ids=repr)
def test_the_predicted_class_is_that_of_logits_whose_probabilities_tie(output):
    """Planted violation: the largest rounded probability was looked for among probabilities that rounding had tied."""
    logits = 1e-9 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    shown = harden(output, logits, logits)
    assert torch.equal(shown if shown.ndim == 1 else shown.argmax(dim=1), logits.argmax(dim=1))
    if shown.ndim == 2:
        torch.testing.assert_close(shown.sum(dim=1), torch.ones(200))


def test_a_low_temperature_leaves_no_nan():
    shown = Tempered(1e-3)(torch.tensor([[3e38, 0.0, -3e38], [1.0, 0.0, 0.0]]))
    assert shown.tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("output", ALL, ids=repr)
def test_no_rows_pickling_and_frozenness(output):
    assert len(harden(output, torch.zeros(0, 3), torch.zeros(0, 2))) == 0
    assert pickle.loads(pickle.dumps(output)) == output
    with pytest.raises(AttributeError):
        output.k = 1
    with pytest.raises(ConfigurationError, match="logits"):
        harden(output, torch.zeros(3), torch.zeros(3))


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
    top = logits.argmax(dim=1)
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
        (lambda: ReverseSigmoid(0.0), "beta"),
        (lambda: ReverseSigmoid(gamma=-1.0), "gamma"),
        (lambda: KeyedNoise("k" * 16), "key"),
        (lambda: KeyedNoise(bytes(15)), "key of 16 to 64 bytes"),
        (lambda: KeyedNoise(bytes(65)), "key of 16 to 64 bytes"),
        (lambda: KeyedNoise(KEY, scale=0.0), "scale"),
        (lambda: KeyedNoise(KEY, step=0.0), "step"),
        (lambda: KeyedNoise(KEY, argmax="swap"), "argmax"),
        (lambda: KeyedNoise(KEY)(LOGITS, X[:2]), "logits"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_reverse_sigmoid_follows_its_formula():
    y = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    pulled = y - 0.7 * (1 / (1 + ((1 - y) / y) ** 0.2) - 0.5)
    torch.testing.assert_close(ReverseSigmoid(0.7, 0.2)(y.log()), pulled / pulled.sum())


def test_reverse_sigmoid_swaps_back_what_it_moves():
    """At this steepness 0.6 falls below 0.4: without the swap the label would change."""
    y = torch.tensor([[0.4, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(ReverseSigmoid(1.0, 20.0)(y.log()).sort(dim=1).values.argmax(dim=1), torch.tensor([1]))
    assert ReverseSigmoid(1.0, 20.0)(y.log()).argmax() == 1


def many(n=4000):
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(0))
    return torch.zeros(n, 3, dtype=torch.float64), x


def test_equal_inputs_get_equal_noise_in_every_batch_and_order():
    noisy, (logits, x) = KeyedNoise(KEY), many(40)
    together, alone = noisy(logits, x), torch.cat([noisy(logits[i : i + 1], x[i : i + 1]) for i in range(40)])
    assert torch.equal(together, alone) and torch.equal(noisy(logits, x.flip(0)), together.flip(0))
    repeated = torch.stack([noisy(logits, x) for _ in range(5)]).mean(dim=0)
    torch.testing.assert_close(repeated, together, rtol=0, atol=1e-15)
    assert len(together.unique(dim=0)) == 40


def test_the_noise_is_normal_with_the_scale_and_has_mean_zero():
    logits, x = many()
    shown = KeyedNoise(KEY, scale=0.5, argmax="free")(logits, x).log()
    gap = (shown[:, 0] - shown[:, 1]) / (0.5 * 2**0.5)  # the normalisation cancels
    assert abs(float(gap.mean())) < 4 / 4000**0.5 and abs(float(gap.std()) - 1) < 0.05
    assert abs(float((gap.abs() < 1).double().mean()) - 0.6827) < 0.03


def test_noise_depends_on_the_key_and_on_the_cell_of_the_input():
    logits, x = many(20)
    first = KeyedNoise(KEY, step=0.01)(logits, x)
    assert bool((KeyedNoise(bytes(16), step=0.01)(logits, x) != first).any(dim=1).all())
    cell = (x / 0.01).round() * 0.01
    assert torch.equal(KeyedNoise(KEY, step=0.01)(logits, cell), first)
    assert bool((KeyedNoise(KEY, step=0.01)(logits, x + 0.02) != first).any(dim=1).all())


def test_the_argmax_policy_holds():
    logits = torch.tensor([[0.0, 0.5, 0.0]]).expand(200, 3)
    x = many(200)[1]
    assert bool((KeyedNoise(KEY, scale=2.0)(logits, x).argmax(dim=1) == 1).all())
    free = KeyedNoise(KEY, scale=2.0, argmax="free")(logits, x)
    assert not bool((free.argmax(dim=1) == 1).all())
    kept = KeyedNoise(KEY, scale=2.0)(logits, x)
    torch.testing.assert_close(kept.sort(dim=1).values, free.sort(dim=1).values)


def test_the_key_is_never_shown():
    noisy = KeyedNoise(b"a very secret key")
    assert "secret" not in repr(noisy) and noisy.fingerprint != KeyedNoise(KEY).fingerprint


@pytest.mark.parametrize("kind", [LabelOnly, TopK, Rounded, Tempered, ReverseSigmoid, KeyedNoise])
def test_each_states_what_it_does_not_stop(kind):
    promise = " ".join(kind.__doc__.partition("Guarantee:")[2].partition("Returns:")[0].split())
    after = promise.partition("not stop")[2]
    assert "membership inference" in after and ("clone" in after or "distillation" in after), promise


def test_noise_tells_inputs_of_the_same_numbers_and_another_shape_apart():
    noisy, logits, x = KeyedNoise(KEY), torch.zeros(1, 3), torch.rand(1, 4)
    shown = [noisy(logits, x.reshape(1, *shape)) for shape in ((4,), (2, 2), (4, 1))]
    assert not torch.equal(shown[0], shown[1]) and not torch.equal(shown[0], shown[2])
