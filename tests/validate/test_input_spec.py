"""`InputSpec`: certain checks from the header first, then per row; nothing raises, nothing is copied for a giant."""

import json
import math

import jsonschema
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
        (GOOD.clone().requires_grad_(), "input: requires grad"),
        (torch.imag(torch.conj(torch.complex(GOOD, GOOD))), "input: a conjugate or negative view"),
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
        ({"not_finite": "clip"}, "not_finite"),
        ({"denormals": "flush"}, "denormals"),
        ({"low": (0.0,)}, "low with 2 limits"),
        ({"high": (1.0, float("nan"))}, "high to be a finite number"),
        ({"low": (0.0, 3.0), "high": 2.0}, "low <= high"),
        ({"shape": ((2, 3),), "low": (0.0, 1.0)}, "low with"),
        ({"dtype": torch.uint8, "low": 300}, "low that torch.uint8 can reach"),
    ],
)
def test_contradictory_rules_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        InputSpec(**{"shape": (2,), **arguments})


def test_rules_survive_a_file(tmp_path):
    spec = InputSpec(((2, 4), 3), torch.bfloat16, -1.0, None, 0.01, "clip", 7, 99, "cpu", "quarantine", "reject")
    spec.save(tmp_path / "spec.json")
    assert InputSpec.load(tmp_path / "spec.json") == spec
    columns = InputSpec((2, 4), torch.int64, (0, -1), (2**53 + 1, 5))
    columns.save(tmp_path / "spec.json")
    assert InputSpec.load(tmp_path / "spec.json") == columns


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


TINY = torch.finfo(torch.float32).tiny


def test_memory_that_was_taken_away_is_refused_and_never_read():
    x = torch.zeros(3, 1, 4, 4)
    x.untyped_storage().resize_(4)  # a read of the rest would end the process
    assert SPEC.check(x).fault == "input: memory is missing"


def test_attributes_of_a_tensor_never_stand_for_its_methods():
    x = torch.full((3, 1, 4, 4), 9.0)
    for name in ("aminmax", "amin", "amax", "numel", "stride", "detach", "untyped_storage", "is_conj", "element_size"):
        setattr(x, name, lambda *_: 0)
    result = SPEC.check(x)
    assert not result.accepted.any()


def test_a_tensor_inside_a_transformation_is_refused_not_raised():
    faults = []
    torch.func.vmap(lambda x: (faults.append(InputSpec((2,)).check(x).fault), x)[1])(torch.zeros(3, 4, 2))
    assert faults == ["input: cannot be inspected"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_denormals_are_found_by_their_bits_and_normal_numbers_are_not(dtype):
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([[0.0, -0.0], [tiny, 1.0], [-tiny, 1.0], [tiny / 2, 1.0], [1.0, -tiny / 4]], dtype=dtype)
    for policy, word in (("reject", "input"), ("quarantine", "quarantine")):
        result = InputSpec((2,), dtype, denormals=policy).check(x)
        assert result.accepted.tolist() == [True, True, True, False, False]
        assert result.reasons[3:] == ((f"{word}: denormal numbers",),) * 2
    flushed = InputSpec((2,), dtype).check(x)
    assert flushed.accepted.all() and flushed.x.tolist() == [[0, 0], [tiny, 1], [-tiny, 1], [0, 1], [1, 0]]
    assert x[3, 0] == tiny / 2
    assert InputSpec((2,), dtype, denormals="accept").check(x).x.data_ptr() == x.data_ptr()


def test_small_numbers_of_half_precision_are_ordinary():
    x = torch.tensor([[2.0**-24, 1.0]], dtype=torch.float16)
    assert InputSpec((2,), torch.float16, denormals="reject").check(x).accepted.all()


def test_a_denormal_beside_a_broken_row_is_still_flushed():
    x = torch.tensor([[TINY / 2, 1.0], [float("nan"), 1.0]])
    result = InputSpec((2,)).check(x)
    assert result.accepted.tolist() == [True, False] and result.x[0].tolist() == [0.0, 1.0]


def test_quarantine_refuses_the_row_and_marks_it():
    spec = InputSpec((1,), low=0.0, high=1.0, out_of_range="quarantine")
    x = torch.tensor([[0.5], [2.0], [float("nan")]])
    result = spec.check(x)
    assert result.accepted.tolist() == [True, False, False]
    assert result.reasons == ((), ("quarantine: out of range",), ("input: not finite",))
    assert result.quarantined.tolist() == [False, True, False] and x[result.quarantined].tolist() == [[2.0]]
    assert not spec.check("no tensor").quarantined.any()


def test_limits_by_column():
    spec = InputSpec((3,), low=(0.0, -5.0, 100.0), high=(1.0, 5.0, 200.0))
    x = torch.tensor([[0.5, 0.0, 150.0], [0.5, 0.0, 1.0], [150.0, 0.0, 150.0], [0.0, 5.0, 200.0]])
    assert spec.check(x).accepted.tolist() == [True, False, False, True]
    clipped = InputSpec((3,), low=spec.low, high=spec.high, out_of_range="clip").check(x)
    assert clipped.accepted.all() and clipped.x[1:3].tolist() == [[0.5, 0.0, 100.0], [1.0, 0.0, 150.0]]
    channels = InputSpec((2, 2, 2), low=(0.0, 1.0), high=(1.0, 2.0))
    image = torch.tensor([0.5, 1.5])[None, :, None, None].repeat(2, 1, 2, 2)
    image[1, 0, 1, 1] = 1.5
    assert channels.check(image).accepted.tolist() == [True, False]
    assert InputSpec.infer(x, by_column=True).high == (187.5, 6.25, 249.75)
    assert InputSpec.infer(torch.tensor([[1, 9], [3, 4]]), by_column=True).high == (3, 9)


def test_indices_are_compared_exactly():
    spec = InputSpec((1,), torch.int64, 0, 2**53)
    assert spec.check(torch.tensor([[2**53], [2**53 + 1], [-1]])).accepted.tolist() == [True, False, False]
    narrow = InputSpec((1,), torch.uint8, -5, 300)  # limits that the dtype cannot hold do not wrap round
    assert narrow.check(torch.tensor([[0], [255]], dtype=torch.uint8)).accepted.all()
    clipped = InputSpec((1,), torch.uint8, 0.5, 99.5, out_of_range="clip").check(torch.tensor([[0], [200]]).byte())
    assert clipped.x.tolist() == [[1], [99]] and clipped.x.dtype == torch.uint8


def test_a_limit_that_the_dtype_rounds_accepts_the_rounded_limit():
    x = torch.tensor([[0.1], [0.11]], dtype=torch.bfloat16)  # 0.1 becomes 0.10009765625
    assert InputSpec((1,), torch.bfloat16, 0.0, 0.1).check(x).accepted.tolist() == [True, False]


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec((2,), low=-1.0, high=1.0, max_rows=3),
        InputSpec((2,), low=(-1.0, 0.0), high=(0.0, 1.0), max_rows=3),
        InputSpec((2,), torch.int64, 0, 5, max_rows=3),
        InputSpec((2,), torch.uint8, max_rows=3),
        InputSpec(((1, 2),), torch.float16, max_rows=3),
        InputSpec((2,), torch.bool, max_rows=3),
        InputSpec((2,), low=-1.0, high=1.0, denormals="reject", max_rows=3),
    ],
)
def test_the_json_schema_accepts_what_the_check_accepts(spec):
    judge = jsonschema.Draft202012Validator(spec.to_json_schema())
    judge.check_schema(judge.schema)
    numbers = [-0.5, 0.5, 0, 1, 7, -3, 300, 1e-40, 1e39, True, 0.25]
    both = set()
    for first in numbers:
        for second in numbers:
            for rows in ([[first, second]], [[first]], [[first, second]] * 4):
                same_kind = len({_kind(value) for row in rows for value in row}) == 1
                whole = spec.dtype not in (torch.bool,) and not spec.dtype.is_floating_point
                if not same_kind or (whole and _kind(first) is float):
                    continue  # what a conversion to the dtype would change is for the schema alone
                verdict = spec.check(_converted(rows, spec.dtype))
                accepted = verdict.fault is None and bool(verdict.accepted.all())
                assert judge.is_valid(rows) == accepted, (rows, verdict)
                both.add(accepted)
    assert both == {True, False}
    assert not judge.is_valid([["nan", 0.5]]) and not judge.is_valid(3) and not judge.is_valid([[None, None]])


def _kind(value):
    return bool if isinstance(value, bool) else float if isinstance(value, float) or math.inf == value else int


def _converted(rows, dtype):
    """Rows as an honest front end converts them: what the dtype cannot hold stays in a type that can."""
    exact = torch.tensor(rows)
    if exact.dtype == torch.bool or dtype == torch.bool:
        return exact
    if dtype.is_floating_point:
        return torch.tensor(rows, dtype=dtype) if exact.is_floating_point() else exact.to(dtype)
    return (
        exact
        if bool((exact > torch.iinfo(dtype).max).any() | (exact < torch.iinfo(dtype).min).any())
        else exact.to(dtype)
    )


def test_the_tolerance_is_a_share_of_the_larger_limit():
    for low, high, edge in ((0.0, 1000.0, 1001.0), (-500.0, 2.0, 2.5), (0.0, 0.5, 0.501)):
        spec = InputSpec((1,), torch.float64, low=low, high=high, tolerance=1e-3)
        inside, outside = edge - 1e-4, edge + 1e-4
        assert spec.check(torch.tensor([[inside], [outside]], dtype=torch.float64)).accepted.tolist() == [True, False]
