"""`InputSpec`: certain checks from the header first, then per row; nothing raises, nothing is copied for a giant."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aidefend import ConfigurationError
from aidefend.validate import InputSpec

SPEC = InputSpec((1, 4, 4), low=0.0, high=1.0, max_rows=8, max_bytes=500)
GOOD = torch.full((3, 1, 4, 4), 0.5)


class Trap(torch.Tensor):
    """A subclass that must never get to run its own code."""

    @classmethod
    def __torch_function__(cls, *_):
        raise AssertionError("code of the input ran")


def test_good_rows_pass_and_are_not_copied():
    result = SPEC.check(GOOD)
    assert result.fault is None and result.accepted.all() and result.reasons == ((), (), ())
    assert result.x.data_ptr() == GOOD.data_ptr()


def test_a_row_fault_refuses_that_row_alone():
    x = GOOD.repeat(2, 1, 1, 1)
    x[0, 0, 1, 1], x[1, 0, 0, 0], x[2, 0, 3, 3], x[3, 0, 0, 1], x[4] = float("nan"), float("inf"), 1.01, -0.01, 1.0
    result = SPEC.check(x)
    assert result.accepted.tolist() == [False, False, False, False, True, True]
    assert result.reasons == (
        ("input: not finite",),
        ("input: not finite",),
        ("input: out of range",),
        ("input: out of range",),
        (),
        (),
    )


@pytest.mark.parametrize(
    ("x", "fault"),
    [
        (None, "input: not a plain tensor"),
        ([[1.0]], "input: not a plain tensor"),
        (nn.Parameter(GOOD.clone()), "input: not a plain tensor"),
        (GOOD.as_subclass(Trap), "input: not a plain tensor"),
        (torch.tensor(1.0), "input: wrong shape"),
        (GOOD[0], "input: wrong shape"),
        (GOOD[..., None], "input: wrong shape"),
        (GOOD[..., :3], "input: wrong shape"),
        (GOOD[..., :0], "input: wrong shape"),
        (torch.zeros(9, 1, 4, 4), "input: too many rows"),
        (torch.zeros(8, 1, 4, 4), "input: too many bytes"),
        (GOOD.double(), "input: wrong dtype"),
        (GOOD.to(torch.complex64), "input: wrong dtype"),
        (GOOD.to_sparse(), "input: not a dense tensor"),
        (GOOD.to("meta"), "input: not a dense tensor"),
        (torch.nested.nested_tensor([GOOD[0], GOOD[1]], layout=torch.jagged), "input: not a plain tensor"),
        (torch.zeros(1).expand(3, 1, 4, 4), "input: overlapping memory"),
        (torch.zeros(1, 1, 1, 4).expand(3, 1, 4, 4), "input: overlapping memory"),
        (torch.zeros(100).as_strided((3, 1, 4, 4), (8, 16, 4, 1)), "input: overlapping memory"),
        (torch.zeros(1).expand(10**9, 1, 4, 4), "input: too many rows"),
    ],
)
def test_a_batch_fault_refuses_all_rows(x, fault):
    result = SPEC.check(x)
    assert result.fault == fault and result.x is None
    assert len(result.accepted) >= 1 and not result.accepted[:1000].any()


def test_a_strided_view_without_overlap_is_fine():
    assert SPEC.check(GOOD.transpose(2, 3)).accepted.all()
    assert SPEC.check(torch.full((3, 4, 4, 2), 0.5)[..., :1].permute(0, 3, 1, 2)).accepted.all()


def test_the_device_rule_compares_types():
    assert InputSpec((2,), device="cuda").check(torch.zeros(1, 2)).fault == "input: wrong device"
    assert InputSpec((2,), device="cpu").check(torch.zeros(1, 2)).accepted.all()


def test_sizes_may_vary_inside_their_range():
    spec = InputSpec(((2, 4), 3))
    assert [spec.check(torch.zeros(1, n, 3)).fault is None for n in range(1, 6)] == [False, True, True, True, False]


def test_an_empty_batch_of_the_right_form_has_no_rows_to_refuse():
    result = SPEC.check(torch.zeros(0, 1, 4, 4))
    assert result.fault is None and len(result.accepted) == 0 and result.reasons == ()


def test_clipping_changes_finite_rows_only_and_never_the_input():
    spec = InputSpec((2,), low=0.0, high=1.0, out_of_range="clip")
    x = torch.tensor([[0.5, 3.0], [-2.0, 0.1], [float("nan"), 0.1], [float("inf"), 9.0]])
    before = x.clone()
    result = spec.check(x)
    assert result.accepted.tolist() == [True, True, False, False]
    assert result.x[:2].tolist() == torch.tensor([[0.5, 1.0], [0.0, 0.1]]).tolist()
    torch.testing.assert_close(x, before, equal_nan=True)


@pytest.mark.parametrize("limits", [{}, {"low": 0.0}, {"high": 9.0}])
def test_infinity_and_nan_fail_also_where_there_is_no_limit(limits):
    x = torch.tensor([[0.5], [float("nan")], [float("inf")], [float("-inf")]])
    assert InputSpec((1,), **limits).check(x).accepted.tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype(dtype):
    x = torch.tensor([[0.5, 0.5], [2.0, 0.0], [float("nan"), 0.0]], dtype=dtype)
    assert InputSpec((2,), dtype, 0.0, 1.0).check(x).accepted.tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_and_no_tolerance_for_indices(dtype):
    spec = InputSpec((2,), dtype, 0, 99, tolerance=0.5)
    assert spec.check(torch.tensor([[0, 99], [0, 100]], dtype=dtype)).accepted.tolist() == [True, False]
    assert InputSpec((2,), torch.bool).check(torch.tensor([[True, False]])).accepted.all()


def test_rounding_at_the_edge_is_tolerated():
    assert InputSpec((1,), low=0.0, high=1.0).check(torch.tensor([[1.0 + 5e-7], [1.0 + 1e-4]])).accepted.tolist() == [
        True,
        False,
    ]


@given(st.integers(1, 5), st.integers(0, 4), st.sampled_from(["nan", "inf", "-inf", "7", "-7"]), st.integers(0, 3))
def test_one_bad_row_never_changes_the_verdict_on_another(n, place, value, column):
    spec = InputSpec((4,), low=-1.0, high=1.0)
    x = torch.linspace(-1, 1, n * 4).reshape(n, 4)
    x[place % n, column] = float(value)
    expected = [i != place % n for i in range(n)]
    assert spec.check(x).accepted.tolist() == expected
    assert [bool(spec.check(x[i : i + 1]).accepted) for i in range(n)] == expected


def test_infer_finds_natural_ranges_and_leaves_room_elsewhere():
    stream = torch.Generator().manual_seed(0)
    unit = torch.rand(500, 4, generator=stream)
    assert (InputSpec.infer(unit).low, InputSpec.infer(unit).high) == (0.0, 1.0)
    assert (InputSpec.infer(2 * unit - 1).low, InputSpec.infer(2 * unit - 1).high) == (-1.0, 1.0)
    wide = InputSpec.infer(8 * unit)
    assert wide.low == pytest.approx(-2.0, abs=0.1) and wide.high == pytest.approx(10.0, abs=0.1)
    assert InputSpec.infer(torch.full((3, 2), 5.0)).high == pytest.approx(6.25)
    pixels = InputSpec.infer(torch.arange(10, dtype=torch.uint8).reshape(5, 2))
    assert (pixels.low, pixels.high, pixels.dtype) == (0.0, 255.0, torch.uint8)
    tokens = InputSpec.infer(torch.tensor([[3, 9], [4, 1]]))
    assert (tokens.low, tokens.high) == (0.0, 9.0)
    assert InputSpec.infer(torch.tensor([[True, False]])).high is None


def test_infer_merges_sizes_over_batches():
    spec = InputSpec.infer(iter([torch.rand(2, 5, 3), torch.rand(2, 7, 3)]))
    assert spec.shape == ((5, 7), 3)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3), "at least one row"),
        (torch.tensor([[float("nan")]]), "finite data"),
        (torch.tensor([[float("inf")]]), "finite data"),
        (torch.zeros(3), "at least one dimension"),
        (torch.zeros(2, 2, dtype=torch.complex64), "a dtype among"),
        (iter([torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64)]), "one dtype"),
        ("words", "tensors"),
    ],
)
def test_infer_refuses_data_that_shows_no_rule(x, message):
    with pytest.raises(ConfigurationError, match=message):
        InputSpec.infer(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": ()}, "at least one dimension"),
        ({"shape": (0,)}, "integer >= 1"),
        ({"shape": ((4, 2),)}, "integer >= 4"),
        ({"shape": ((1, 2, 3),)}, "smallest, largest"),
        ({"shape": 3}, "the shape of one row"),
        ({"dtype": torch.complex64}, "dtype to be one of"),
        ({"low": 1.0, "high": 0.0}, "low <= high"),
        ({"low": float("nan")}, "finite number"),
        ({"max_rows": 0}, "max_rows"),
        ({"max_rows": 2**25}, "max_rows"),
        ({"max_bytes": True}, "max_bytes"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"out_of_range": "repair"}, "out_of_range"),
        ({"device": torch.device("cpu")}, "device as text"),
    ],
)
def test_contradictory_rules_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        InputSpec(**{"shape": (2,), **arguments})


def test_rules_survive_a_file(tmp_path):
    spec = InputSpec(((2, 4), 3), torch.bfloat16, -1.0, None, 0.01, "clip", 7, 99, "cpu")
    spec.save(tmp_path / "spec.json")
    assert InputSpec.load(tmp_path / "spec.json") == spec


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "3",
        "[" * 100_000,
        '{"schema": "aidefend.input-spec/1"}',
        '{"schema": "other"}',
        json.dumps({**InputSpec((2,)).to_dict(), "extra": 1}),
        json.dumps({**InputSpec((2,)).to_dict(), "dtype": "float8"}),
        json.dumps({**InputSpec((2,)).to_dict(), "dtype": ["float32"]}),
        json.dumps({**InputSpec((2,)).to_dict(), "max_rows": "many"}),
        json.dumps({**InputSpec((2,)).to_dict(), "shape": "ab"}),
        json.dumps({**InputSpec((2,)).to_dict(), "out_of_range": {}}),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "spec.json").write_text(content)
    with pytest.raises(ConfigurationError):
        InputSpec.load(tmp_path / "spec.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="Could not read it"):
        InputSpec.load(tmp_path / "none.json")
