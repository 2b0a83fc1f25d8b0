"""Fingerprints recognise exact copies and nothing else; what an indicator may look like."""

import dataclasses
import hashlib
import hmac

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aidefend import ConfigurationError
from aidefend.collaborate import Indicator, apply_indicators, artifact_indicator, sample_indicators

KEY, OTHER_KEY = b"a shared secret key", b"another secret key"
few = settings(max_examples=20, deadline=None)


def images(n=6, shape=(1, 8, 8), seed=0):
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def score(indicators, x, key=KEY, **settings_):
    return apply_indicators(indicators, key, **settings_).score({"x": x})


def test_the_fingerprint_is_the_hmac_that_the_text_says():
    x = images(1, (2, 3))
    content = x.numpy().astype("<i4").tobytes()
    expected = hmac.new(KEY, b'["sample",[2,3],null]\n' + content, hashlib.sha256).hexdigest()
    assert sample_indicators(x, KEY) == [Indicator("sample", expected, "poisoned sample", None, (2, 3))]


@few
@given(seed=st.integers(0, 10**6), shape=st.sampled_from([(5,), (4, 4), (1, 6, 6), (3, 2, 5)]))
def test_exact_copies_are_recognised_across_dtypes(seed, shape):
    x = images(4, shape, seed)
    unit = x.float() / 255
    copies = [x, x.int(), x.long(), unit, unit.double(), x.double() / 255, unit.half(), x.numpy(), unit.numpy()]
    for source in (x, unit, x.double() / 255):
        indicators = sample_indicators(source[:2], KEY)
        for copy in copies:
            assert score(indicators, copy).tolist() == [1, 1, 0, 0]


@few
@given(seed=st.integers(0, 10**6))
def test_a_float_sample_and_its_narrower_copy_agree_whatever_the_values(seed):
    x = torch.from_numpy(np.random.default_rng(seed).uniform(-3, 3, size=(20, 50)))
    indicators = sample_indicators(x, KEY, bounds=(-3.0, 3.0))
    assert bool((score(indicators, x.float(), bounds=(-3.0, 3.0)) == 1).all())


def test_values_on_the_edge_between_two_steps_agree_as_well():
    x = (torch.arange(200, dtype=torch.float64)[:, None] + 0.5 + torch.tensor([-1e-9, 0.0, 1e-9])) / 255
    assert bool((score(sample_indicators(x, KEY), x.float()) == 1).all())


def test_one_changed_pixel_is_another_sample():
    x = images(1)
    changed = x.repeat(64, 1, 1, 1)
    changed.reshape(64, 64)[torch.arange(64), torch.arange(64)] ^= 1
    assert float(score(sample_indicators(x, KEY), changed).sum()) == 0


def test_values_outside_the_range_are_not_cut_off():
    tokens = torch.tensor([[300, 400], [300, 401], [255, 255], [-1, 0]])
    assert score(sample_indicators(tokens[:1], KEY), tokens).tolist() == [1, 0, 0, 0]
    floats = torch.tensor([[5.0, 7.0], [1.0, 1.0], [1e30, 1e30], [3e38, 3e38]])
    assert score(sample_indicators(floats[:1], KEY), floats).tolist() == [1, 0, 0, 0]


def test_bool_masks_match_their_float_copies():
    mask = torch.tensor([[True, False], [True, True]])
    assert score(sample_indicators(mask[:1], KEY), mask.float()).tolist() == [1, 0]


def test_another_shape_is_another_sample():
    x = images(2)
    assert float(score(sample_indicators(x, KEY), x.reshape(2, 64)).sum()) == 0
    assert float(score(sample_indicators(x.reshape(2, 64), KEY), x).sum()) == 0


def test_the_wrong_key_matches_nothing():
    x = images()
    assert float(score(sample_indicators(x, KEY), x, key=OTHER_KEY).sum()) == 0


def test_memory_layout_gradients_and_batching_do_not_matter():
    x = images(2000, (1, 4, 6)).float() / 255
    expected = sample_indicators(x, KEY)
    twisted = x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    assert sample_indicators(twisted, KEY) == expected
    assert [sample_indicators(row[None], KEY)[0] for row in x[:5]] == expected[:5]


def test_an_indicator_reveals_no_sample():
    x = torch.full((1, 3), 0.123)
    indicator = sample_indicators(x, KEY)[0]
    assert set(indicator.to_dict()) == {"kind", "digest", "title", "shape"}
    assert sample_indicators(x, OTHER_KEY)[0].digest != indicator.digest
    assert "secret" not in repr(apply_indicators([indicator], KEY))


def test_no_samples_no_indicators():
    assert sample_indicators(torch.zeros(0, 3), KEY) == []
    assert score([], torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize(
    ("x", "key", "bounds"),
    [
        ([[1.0]], KEY, (0.0, 1.0)),
        (torch.ones(3), KEY, (0.0, 1.0)),
        (torch.ones(3, 0), KEY, (0.0, 1.0)),
        (torch.ones(2, 2, dtype=torch.complex64), KEY, (0.0, 1.0)),
        (torch.tensor([[torch.nan]]), KEY, (0.0, 1.0)),
        (torch.ones(2, 2).to_sparse(), KEY, (0.0, 1.0)),
        (torch.ones(2, 2), b"short", (0.0, 1.0)),
        (torch.ones(2, 2), "a shared secret key", (0.0, 1.0)),
        (torch.ones(2, 2), None, (0.0, 1.0)),
        (torch.ones(2, 2), KEY, (1.0, 0.0)),
        (torch.ones(2, 2), KEY, (0.0, float("inf"))),
        (torch.ones(2, 2), KEY, 1.0),
        (torch.ones(2, 2), KEY, (0.0, 1.0, 2.0)),
    ],
)
def test_malformed_calls_are_refused(x, key, bounds):
    with pytest.raises(ConfigurationError, match="Expected"):
        sample_indicators(x, key, bounds=bounds)


def test_the_key_is_never_in_a_message():
    with pytest.raises(ConfigurationError) as caught:
        sample_indicators(torch.ones(1, 2), b"hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "file"},
        {"kind": ["artifact"]},
        {"digest": "0" * 63},
        {"digest": "A" * 64},
        {"digest": "０" * 64},
        {"digest": 7},
        {"title": "x" * 201},
        {"title": "two\nlines"},
        {"title": "right to left \u202e"},
        {"title": "lone \ud800"},
        {"title": None},
        {"shape": (3,)},
        {"place": (0, 0, 1, 1)},
        {"kind": "sample"},
        {"kind": "sample", "shape": ()},
        {"kind": "sample", "shape": (1,) * 9},
        {"kind": "sample", "shape": (0, 3)},
        {"kind": "sample", "shape": (True, 3)},
        {"kind": "sample", "shape": (2.0,)},
        {"kind": "sample", "shape": 5},
        {"kind": "sample", "shape": "35"},
        {"kind": "sample", "shape": (1 << 25,)},
        {"kind": "trigger", "shape": (8, 8)},
        {"kind": "trigger", "shape": (8, 8), "place": (0, 0, 1)},
        {"kind": "trigger", "shape": (8, 8), "place": (6, 0, 3, 3)},
        {"kind": "trigger", "shape": (8, 8), "place": (0, 6, 3, 3)},
        {"kind": "trigger", "shape": (8, 8), "place": (0, 0, 0, 3)},
        {"kind": "trigger", "shape": (8, 8), "place": (-1, 0, 3, 3)},
        {"kind": "trigger", "shape": (8,), "place": (0, 0, 2, 2)},
        {"kind": "trigger", "shape": (8, 8), "place": 3},
    ],
)
def test_malformed_indicators_are_refused(fields):
    with pytest.raises(ConfigurationError, match="Expected"):
        Indicator(**{"kind": "artifact", "digest": "0" * 64, **fields})


def test_indicators_are_frozen_values():
    one = Indicator("trigger", "0" * 64, "t", [1, 2, 3, 3], [8, 8])
    assert one == Indicator("trigger", "0" * 64, "t", (1, 2, 3, 3), (8, 8)) and hash(one)
    assert artifact_indicator("0" * 64, "t").to_dict() == {"kind": "artifact", "digest": "0" * 64, "title": "t"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.digest = "1" * 64
