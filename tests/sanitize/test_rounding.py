"""Six significant digits: what two orders of a sum agree on."""

import math

import pytest
import torch

from aidefend.sanitize.rounding import rounded, rounded_facts


@pytest.mark.parametrize("size", [1e-300, 1e-12, 1.0, 3e7, 1e300])
def test_last_bits_vanish_and_six_digits_stay(size):
    values = size * (1 + torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    other = values * (1 + 4e-16 * torch.randint(-3, 4, (200,), generator=torch.Generator().manual_seed(1)).double())
    assert not torch.equal(values, other) and torch.equal(rounded(values), rounded(other))
    torch.testing.assert_close(rounded(values), values, rtol=5.01e-6, atol=0)
    assert torch.equal(rounded(-values), -rounded(values))


def test_what_is_no_number_to_round_stays():
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0, 0.5])
    torch.testing.assert_close(rounded(odd), odd, rtol=0, atol=0, equal_nan=True)
    assert rounded(torch.tensor([1234567])).tolist() == [1234567]


def test_facts_are_rounded_at_any_depth():
    facts = {"a": [0.12345678, {"b": 1e-9 / 3}], "n": 12345678, "words": "0.12345678", "none": None, "odd": math.inf}
    expected = {
        "a": [0.123457, {"b": 3.33333e-10}],
        "n": 12345678,
        "words": "0.12345678",
        "none": None,
        "odd": math.inf,
    }
    assert rounded_facts(facts) == expected
