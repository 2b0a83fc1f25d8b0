"""Hostile tensors and bytes against every specification and the guard: a verdict, never an exception or a hang."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aidefend.validate import Column, Energy, Guard, ImageSpec, InputSpec, TableSpec, TextSpec
from tests.validate.hostile_tensors import HOSTILE, PLAIN
from tests.validate.small_world import model, rows

SPECIAL = (
    0.0,
    -0.0,
    0.5,
    1.0,
    -1.0,
    1.5,
    float("nan"),
    float("inf"),
    float("-inf"),
    1e-40,
    -1e-45,
    3.4e38,
    1.1754944e-38,
)
POLICIES = ("clip", "reject", "quarantine")
SECONDS = 2.0  # for one batch of a few numbers; a shared machine is slow, an endless loop is slower
IMAGES = ImageSpec(formats=("png", "jpeg", "gif", "bmp", "webp"), max_pixels=4096, max_frames=4, max_rows=4)
TABLES = TableSpec({"a": Column("number", missing="accept"), "b": Column("category", categories=("x", "y"))})


@st.composite
def batches(draw):
    shape = draw(st.sampled_from([(0, 2), (1, 2), (3, 2), (2, 3), (3, 2, 2)]))
    count = int(torch.tensor(shape).prod())
    values = draw(st.lists(st.sampled_from(SPECIAL), min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def naive(spec, x):
    """The verdict on plain rows, number by number."""
    verdict = []
    for row in x.flatten(1).tolist():
        ok = True
        for value in row:
            small = 0 < abs(value) < torch.finfo(torch.float32).tiny
            finite = value == value and abs(value) != float("inf")
            inside = finite and (spec.out_of_range == "clip" or -1 <= value <= 1)
            ok = ok and inside and (not small or spec.denormals in ("clip", "accept"))
        verdict.append(ok)
    return verdict


def judge_tensor(x, kind, rule, small):
    spec = InputSpec((2,), low=-1.0, high=1.0, tolerance=0.0, out_of_range=rule, denormals=small, max_rows=64)
    given_x = (PLAIN | HOSTILE)[kind](x) if kind in PLAIN or len(x) else x
    started = time.perf_counter()
    result = spec.check(given_x)
    assert time.perf_counter() - started < SECONDS, kind
    if result.fault is not None:
        assert result.x is None and not result.accepted[:9].any() and result.reasons == ()
        assert kind in HOSTILE or x.shape[1:] != (2,)
        return
    assert kind in PLAIN or len(x) == 0 or (kind == "overlapping" and len(x) == 1), kind
    assert result.accepted.tolist() == naive(spec, given_x), (kind, x)
    assert [not reasons for reasons in result.reasons] == result.accepted.tolist()
    passed = result.x[result.accepted]
    assert bool(passed.isfinite().all()) and bool(((passed >= -1) & (passed <= 1)).all())
    again = spec.check(result.x[result.accepted].clone())
    assert again.fault is None and again.accepted.all()


TENSORS = {
    "x": batches(),
    "kind": st.sampled_from([*PLAIN, *HOSTILE]),
    "rule": st.sampled_from(POLICIES),
    "small": st.sampled_from((*POLICIES, "accept")),
}


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(**TENSORS)
def test_any_tensor_gets_a_verdict(x, kind, rule, small):
    judge_tensor(x, kind, rule, small)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(**TENSORS)
def test_any_tensor_gets_a_verdict_at_length(x, kind, rule, small):
    judge_tensor(x, kind, rule, small)


@pytest.fixture(scope="module")
def guard():
    with Guard.calibrate(model(), rows(200, 1)[0], detectors=[Energy()], alpha=0.1) as made:
        yield made


@pytest.mark.parametrize("kind", [*PLAIN, *HOSTILE])
def test_the_whole_guard_takes_any_tensor(kind, guard):
    x = rows(3, 7)[0]
    given_x = (PLAIN | HOSTILE)[kind](x)
    started = time.perf_counter()
    decision = guard(given_x)
    assert time.perf_counter() - started < SECONDS
    if kind in PLAIN:
        alone = [guard(row[None].clone()) for row in given_x]
        assert decision.accepted.tolist() == [bool(one.accepted) for one in alone]
    else:
        assert not decision.accepted[:9].any() and not decision.report.keep.any()
        assert decision.reasons[0][0].startswith("input: ")


class Mute:
    """Any look at it is a failure, even the question of its class."""

    def __getattribute__(self, name):
        raise AssertionError(f"code of the input ran: {name}")


class Loud(str):
    """A name whose own methods fail."""

    def __bool__(self):
        raise AssertionError("code of the input ran")

    __hash__ = __len__ = __bool__


@pytest.mark.parametrize("mode", ["enforce", "monitor", "shadow"])
def test_the_guard_never_runs_the_code_of_an_input(mode):
    with Guard.calibrate(model(), rows(200, 1)[0], detectors=[Energy()], alpha=0.1, mode=mode) as guard:
        x = rows(3, 7)[0]
        for thing in (Mute(), HOSTILE["watching subclass"](x), HOSTILE["wrapping subclass"](x)):
            decision = guard(thing)
            assert decision.reasons[0] == ("input: not a plain tensor",) and not decision.report.keep.any()
        shadowed = PLAIN["attributes that shadow methods"](x)
        assert guard(shadowed).accepted.tolist() == guard(x).accepted.tolist()
        assert guard(shadowed).report.ids == guard(x).report.ids
        for principal in (Mute(), Loud("team"), 3, b"team"):
            assert guard(x, principal=principal).accepted.tolist() == guard(x).accepted.tolist()
        transformed = []
        torch.func.vmap(lambda one: (transformed.append(guard(one)), one)[1])(x[:, None])
        assert transformed[0].reasons[0] == ("input: cannot be inspected",) and not transformed[0].report.keep.any()


def judge_bytes(raw):
    started = time.perf_counter()
    for result in (IMAGES.check([raw, raw]), TextSpec(max_bytes=4096).check([raw, raw])):
        assert result.fault is None and result.reasons[0] == result.reasons[1]
        assert len(result.x) == int(result.accepted.sum()) in (0, 2)
    assert all(
        image.dtype == torch.uint8 and image.shape[1] * image.shape[2] <= 4096 for image in IMAGES.check([raw]).x
    )
    assert time.perf_counter() - started < SECONDS


HEADS = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\4\0\0\0\4\x08\2\0\0\0",
    b"\xff\xd8\xff\xc0\0\x0b\x08\0\4\0\4\1\1\x11\0\xff\xda",
    b"GIF89a\4\0\4\0\x80\0\0abcdef,\0\0\0\0\4\0\4\0\0\2",
    b"BM\x80\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\4\0\0\0\4\0\0\0",
    b"RIFF\x40\0\0\0WEBPVP8L\x20\0\0\0\x2f\3\xc0\0\0",
    b"",
)


@given(st.sampled_from(HEADS), st.binary(max_size=120))
def test_any_bytes_get_a_verdict(head, tail):
    judge_bytes(head + tail)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(st.sampled_from(HEADS), st.binary(max_size=2000))
def test_any_bytes_get_a_verdict_at_length(head, tail):
    judge_bytes(head + tail)


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab3"), inner, max_size=3)),
    max_leaves=8,
)


@given(ANYTHING)
def test_any_object_gets_a_verdict_from_every_specification(thing):
    for spec in (InputSpec((2,)), TextSpec(), TABLES, IMAGES):
        result = spec.check(thing)
        assert (result.fault is None) == (result.x is not None)
        assert len(result.accepted) == len(result.reasons) or result.fault is not None


FUZZER = """
import sys, atheris
with atheris.instrument_imports(include=["aidefend.validate"]):
    import aidefend.validate
    from tests.validate.test_fuzz_specs import judge_bytes
atheris.Setup([sys.argv[0], "-runs=20000", "-max_len=2048", "-timeout=5", "-seed=1", *sys.argv[1:]], judge_bytes)
atheris.Fuzz()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install atheris")
def test_a_fuzzer_that_follows_the_branches_finds_nothing(tmp_path):
    for i, head in enumerate(HEADS):
        (tmp_path / str(i)).write_bytes(head)
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", FUZZER, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert run.returncode == 0 and "Done 20000 runs" in run.stderr, run.stderr[-3000:]
