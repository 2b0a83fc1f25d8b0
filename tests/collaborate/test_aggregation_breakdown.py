"""Hostile clients: what each method promises holds against every attack here, and the mean shows that they bite."""

import numpy as np
import pytest
import torch

from aidefend import ConfigurationError
from aidefend.collaborate import aggregate
from tests.collaborate.naive_aggregation import FEWEST, ROBUST, stated_bound

every_robust = pytest.mark.parametrize("method", ROBUST)
NAN = torch.nan


def attack(kind, honest, f):
    """f hostile updates (flat) by a client who sees all honest ones (h, d)."""
    mean, spread = honest.mean(dim=0), honest.std(dim=0, unbiased=False)
    diameter = torch.cdist(honest, honest).max()
    towards = torch.ones_like(mean) / len(mean) ** 0.5
    made = {
        "huge": [mean + 1e30] * f,
        "huge, both signs": [mean + 1e30 * (-1) ** i for i in range(f)],
        "nan": [torch.full_like(mean, NAN)] * f,
        "one inf": [torch.cat([mean[:-1], torch.tensor([torch.inf], dtype=mean.dtype)])] * f,
        "larger than squares allow": [mean + 1e200] * f,
        "sign flipped": [-10 * mean] * f,
        "a little is enough": [mean - 1.5 * spread] * f,
        "at the edge": [mean + diameter * towards] * f,
        "identical colluders": [mean + 5 * diameter * towards] * f,
        "copies of the outermost": [honest[(honest - mean).norm(dim=1).argmax()].clone()] * f,
        "graded": [mean + 10.0**i * diameter * towards for i in range(f)],
        "wrong shape": [torch.zeros(len(mean) + 1, dtype=mean.dtype)] * f,
        "wrong dtype": [mean.float()] * f,
        "not a tensor": [None, "weights", {"w": mean}, [1.0], {}][:f],
        "zero": [torch.zeros_like(mean)] * f,
    }
    return made[kind]


KINDS = (
    "huge", "huge, both signs", "nan", "one inf", "larger than squares allow", "sign flipped", "a little is enough",
    "at the edge", "identical colluders", "copies of the outermost", "graded", "wrong shape", "wrong dtype",
    "not a tensor", "zero",
)  # fmt: skip
every_attack = pytest.mark.parametrize("kind", KINDS)


def world(seed, h, d=6):
    stream = np.random.default_rng(seed)
    return torch.from_numpy(stream.normal(size=(h, d)) + stream.normal(size=d) * 3)


@every_robust
@every_attack
def test_stays_within_the_stated_bound(method, kind):
    for f, more, seed in ((1, 0, 10), (1, 3, 11), (2, 1, 12), (3, 4, 13)):
        n = FEWEST[method](f) + more
        honest = world(seed, n - f)
        rows = [*honest, *attack(kind, honest, f)]
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(n)]
        value = aggregate(rows, method, byzantine=f).value
        bound = stated_bound(method, honest.numpy(), n, f)
        assert float((value - honest.mean(dim=0)).norm()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("method", ["median", "trimmed-mean"])
@every_attack
def test_each_coordinate_stays_in_the_range_of_the_honest(method, kind):
    honest = world(0, 5)
    value = aggregate([*attack(kind, honest, 4), *honest], method, byzantine=4).value
    assert bool(((value >= honest.amin(dim=0)) & (value <= honest.amax(dim=0))).all())


@every_attack
def test_bulyan_stays_in_the_widened_box(kind):
    honest = world(1, 9)
    value = aggregate([*attack(kind, honest, 2), *honest], "bulyan", byzantine=2).value
    low, high = honest.amin(dim=0), honest.amax(dim=0)
    assert bool(((value >= 2 * low - high) & (value <= 2 * high - low)).all())


def test_planted_violation_one_client_moves_the_mean_anywhere():
    honest = world(2, 9)
    value = aggregate([*honest, honest.mean(dim=0) + 1e30], "mean", byzantine=0).value
    loosest = max(stated_bound(method, honest.numpy(), 10, 1) for method in ROBUST)
    assert float((value - honest.mean(dim=0)).norm()) > 1e6 * loosest


@every_robust
def test_planted_violation_more_hostile_clients_than_stated_break_every_method(method):
    honest = world(3, 4)
    hostile = [honest.mean(dim=0) + 1e6] * 9
    value = aggregate([*honest, *hostile], method, byzantine=2).value
    assert float((value - honest.mean(dim=0)).norm()) > stated_bound(method, honest.numpy(), 13, 2)


@every_robust
@pytest.mark.parametrize("f", [1, 2, 5])
def test_counts_that_void_the_breakdown_point_are_refused(method, f):
    n = FEWEST[method](f)
    rows = torch.randn(n, 3, generator=torch.Generator().manual_seed(f))
    assert len(aggregate(rows, method, byzantine=f).report) == n
    with pytest.raises(ConfigurationError, match=f"Expected at least .* usable updates for {method}"):
        aggregate(rows[:-1], method, byzantine=f)


def test_the_mean_bears_none():
    with pytest.raises(ConfigurationError, match="byzantine=0"):
        aggregate(torch.ones(9, 2), "mean", byzantine=1)


BAD = {
    "nan": torch.tensor([NAN, 1.0, 1.0]),
    "inf": torch.tensor([1.0, -torch.inf, 1.0]),
    "shape": torch.ones(4),
    "matrix": torch.ones(1, 3),
    "dtype": torch.ones(3, dtype=torch.float64),
    "integers": torch.ones(3, dtype=torch.int64),
    "complex": torch.ones(3, dtype=torch.complex64),
    "sparse": torch.ones(3).to_sparse(),
    "meta": torch.ones(3, device="meta"),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0),
    "none": None,
    "text": "weights",
    "number": 1.0,
    "list": [1.0, 1.0, 1.0],
    "array": np.ones(3, dtype=np.float32),
    "state": {"w": torch.ones(3)},
    "stride 0": torch.ones(1).expand(10**12),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_bad_update_is_dropped_counted_and_reported_wherever_it_stands(bad, place):
    rows = list(torch.tensor([[1.0, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]]))
    rows.insert(place, bad)
    joined = aggregate(rows, "trimmed-mean", byzantine=2)
    assert torch.equal(joined.value, torch.full((3,), 2.5))
    assert joined.report.keep.tolist() == [i != place for i in range(5)]
    assert joined.report.reasons[place][0].startswith("dropped: ")
    assert bool(joined.report.scores["distance"][place].isnan())
    with pytest.raises(ConfigurationError, match=r"at most byzantine=0 bad updates, got dropped='1 updates"):
        aggregate(rows, "median", byzantine=0)


def test_what_was_dropped_is_no_longer_feared():
    rows = [torch.full((2,), NAN), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]), torch.tensor([6.0, 6.0])]
    assert aggregate(rows, "trimmed-mean", byzantine=1).value.tolist() == [3.0, 3.0]
    with pytest.raises(ConfigurationError, match="at least 2 x byzantine"):
        aggregate(rows[:3], "trimmed-mean", byzantine=2)


@pytest.mark.parametrize("n", [1, 2])
def test_a_giant_that_fills_no_memory_is_refused_before_it_is_read(n):
    giant = torch.ones(1, 1).expand(10**6, 10**6)
    rows = [giant, *torch.ones(n, 3)]
    with pytest.raises(ConfigurationError, match=r"of one form|usable updates"):
        aggregate(rows, "median", byzantine=n)
    with pytest.raises(ConfigurationError, match="bad updates"):
        aggregate(rows, "mean", byzantine=0)
    joined = aggregate([giant, torch.ones(3)], "fltrust", byzantine=1, trusted=torch.ones(3))
    assert joined.report.keep.tolist() == [False, True]


@pytest.mark.parametrize("method", ["median", "trimmed-mean", "geometric-median", "centered-clipping"])
def test_more_hostile_clients_than_honest_ones_cannot_win_by_a_form_of_their_own(method):
    rows = [*torch.ones(2, 3), *torch.full((3, 4), 1e9)]
    with pytest.raises(ConfigurationError, match="more than byzantine=3 updates of one form, got updates='3 alike'"):
        aggregate(rows, method, byzantine=3)


HOSTILE_STATES = {
    "missing key": {"w": torch.ones(2)},
    "extra key": {"w": torch.ones(2), "n": torch.tensor(1), "evil": torch.ones(1)},
    "other names": {"v": torch.ones(2), "n": torch.tensor(1)},
    "integer key": {"w": torch.ones(2), 1: torch.tensor(1)},
    "mixed keys": {"w": torch.ones(2), None: torch.tensor(1)},
    "float buffer": {"w": torch.ones(2), "n": torch.tensor(1.0)},
    "buffer of another shape": {"w": torch.ones(2), "n": torch.ones(1 << 20, dtype=torch.int64)},
    "sparse value": {"w": torch.ones(2).to_sparse(), "n": torch.tensor(1)},
    "list value": {"w": [1.0, 1.0], "n": torch.tensor(1)},
    "nan": {"w": torch.tensor([1.0, NAN]), "n": torch.tensor(1)},
    "integers only": {"n": torch.tensor(1)},
    "empty": {},
}


@pytest.mark.parametrize("bad", HOSTILE_STATES.values(), ids=HOSTILE_STATES)
def test_a_hostile_first_client_cannot_define_the_form(bad):
    good = [{"w": torch.full((2,), float(i)), "n": torch.tensor(i)} for i in (1, 2, 3)]
    joined = aggregate([bad, *good], "median", byzantine=1)
    assert torch.equal(joined.value["w"], torch.full((2,), 2.0)) and list(joined.value) == ["w", "n"]
    assert joined.report.keep.tolist() == [False, True, True, True]


def test_a_hostile_first_client_cannot_reorder_the_names():
    good = [{"w": torch.full((2,), float(i)), "n": torch.tensor(i)} for i in (1, 2, 3)]
    joined = aggregate([dict(reversed(good[0].items())), *good], "median", byzantine=1)
    assert list(joined.value) == ["w", "n"] and bool(joined.report.keep.all())


def test_numbers_as_names_do_not_pass_for_their_text():
    good = [{"1": torch.full((2,), float(i))} for i in (1, 2, 3)]
    joined = aggregate([{1: torch.zeros(2)}, *good], "median", byzantine=1)
    assert joined.value["1"].tolist() == [2.0, 2.0] and not joined.report.keep[0]


def test_with_fltrust_a_hostile_majority_can_neither_define_the_form_nor_the_integers():
    own = {"w": torch.tensor([1.0, 0.0]), "n": torch.tensor(7)}
    rows = [
        {"w": torch.ones(9), "n": torch.tensor(0)},
        {"w": torch.ones(9), "n": torch.tensor(0)},
        {"w": torch.tensor([-1e9, 1.0]), "n": torch.tensor(0)},
        {"w": torch.tensor([2.0, 0.0]), "n": torch.tensor(0)},
    ]
    joined = aggregate(rows, "fltrust", byzantine=3, trusted=own)
    assert joined.value["w"].tolist() == [1.0, 0.0] and int(joined.value["n"]) == 7
    assert joined.report.keep.tolist() == [False, False, False, True]


@pytest.mark.parametrize("row", [torch.zeros(3), torch.full((3,), 1e-160, dtype=torch.float64), -torch.ones(3)])
def test_fltrust_gives_an_update_without_direction_no_weight(row):
    own = torch.ones(3, dtype=row.dtype)
    joined = aggregate([row, 5 * own], "fltrust", byzantine=1, trusted=own)
    assert torch.allclose(joined.value, own)
    with pytest.raises(ConfigurationError, match="agrees with trusted"):
        aggregate([row], "fltrust", byzantine=0, trusted=own)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"updates": []}, "at least one update"),
        ({"updates": torch.ones(3)}, r"dense tensor of shape \(n, ...\)"),
        ({"updates": torch.tensor(1.0)}, "dense tensor"),
        ({"updates": torch.ones(3, 3).to_sparse()}, "dense tensor"),
        ({"updates": {"w": torch.ones(3)}}, "one update for each client"),
        ({"updates": "weights"}, "one update for each client"),
        ({"updates": None}, "one update for each client"),
        ({"updates": [None, None, None]}, "tensors or state dicts"),
        ({"updates": [np.ones(3)] * 3}, "tensors or state dicts"),
        ({"updates": [{"empty": torch.zeros(0)}] * 3}, "tensors or state dicts"),
        ({"method": "average"}, "method to be one of"),
        ({"byzantine": -1}, "byzantine to be an integer"),
        ({"byzantine": True}, "byzantine to be an integer"),
        ({"byzantine": 0.5}, "byzantine to be an integer"),
        ({"max_norm": 0.0}, "max_norm to be a finite number"),
        ({"max_norm": float("nan")}, "max_norm to be a finite number"),
        ({"trusted": torch.ones(2)}, "only with it"),
        ({"method": "fltrust"}, "trusted= with"),
        ({"method": "fltrust", "trusted": "mine"}, "tensors or state dicts"),
        ({"method": "fltrust", "trusted": torch.full((2,), NAN)}, "finite trusted update"),
        ({"method": "fltrust", "trusted": torch.ones(3)}, "at most byzantine=0 bad updates"),
    ],
)
def test_malformed_calls_are_refused_by_name(arguments, message):
    call = {"updates": torch.ones(5, 2), "method": "median", "byzantine": 0, **arguments}
    with pytest.raises(ConfigurationError, match=message):
        aggregate(call.pop("updates"), call.pop("method"), **call)


def test_the_report_says_what_became_of_each_client():
    rows = [torch.tensor([float(i), 0.0]) for i in range(5)] + [torch.tensor([500.0, 0.0]), torch.tensor([NAN, 0.0])]
    report = aggregate(rows, "multi-krum", byzantine=2).report
    assert report.ids == tuple(f"update-{i}" for i in range(7))
    assert not report.keep[5] and not report.keep[6] and report.reasons[5] == ("not used by multi-krum",)
    assert report.parameters == {"method": "multi-krum", "byzantine": 2, "max_norm": None}
    distance = report.scores["distance"]
    assert int(distance[:6].argmax()) == 5 and bool(distance[6].isnan())
    assert report.to_evidence()["aggregate.rejected_share"].n == 7


@every_robust
def test_the_distance_to_the_joined_update_is_reported(method):
    rows = world(4, 12)
    joined = aggregate(rows, method, byzantine=1)
    assert torch.allclose(joined.report.scores["distance"], (rows - joined.value).norm(dim=1))
