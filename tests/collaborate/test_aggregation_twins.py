"""Every method against its naive twin, in every form that updates take, and what must not change the result."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from aidefend.collaborate import aggregate, updates
from tests.collaborate.naive_aggregation import FEWEST, ROBUST, naive

METHODS = ("mean", *ROBUST)
every_method = pytest.mark.parametrize("method", METHODS)
few = settings(max_examples=12, deadline=None)


def rows_of(seed, n, d, scale=1.0, offset=0.0):
    return offset + scale * np.random.default_rng(seed).normal(size=(n, d))


def close(value, expected, tolerance=1e-9):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@every_method
@few
@given(data=st.data())
def test_equals_the_naive_twin(method, data):
    f = 0 if method == "mean" else data.draw(st.integers(0, 3), "f")
    n = data.draw(st.integers(max(FEWEST[method](f), 1), FEWEST[method](f) + 5), "n")
    d = data.draw(st.integers(1, 20), "d")
    scale = data.draw(st.sampled_from([1e-6, 1.0, 1e4]), "scale")
    rows = rows_of(data.draw(st.integers(0, 10**6), "seed"), n, d, scale)
    expected = naive(method, rows, f)
    close(aggregate(torch.from_numpy(rows), method, byzantine=f).value, expected, 1e-7)


@every_method
def test_far_from_the_origin_the_distances_are_still_exact(method):
    rows = rows_of(0, 11, 5)
    near = aggregate(torch.from_numpy(rows), method, byzantine=0 if method == "mean" else 2).value
    far = aggregate(torch.from_numpy(rows + 2.0**30), method, byzantine=0 if method == "mean" else 2).value
    close(far - 2.0**30, near.numpy(), 1e-6)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flat_shaped_and_stacked_forms_agree_in_every_dtype(method, dtype):
    f = 0 if method == "mean" else 1
    stacked = torch.from_numpy(rows_of(1, 8, 12)).to(dtype)
    expected = torch.from_numpy(naive(method, stacked.double().numpy(), f)).to(dtype)
    for given_rows, shape in [
        (stacked, (12,)),
        (list(stacked), (12,)),
        (stacked.reshape(8, 3, 4), (3, 4)),
        (tuple(stacked.reshape(8, 2, 2, 3)), (2, 2, 3)),
        ([torch.nn.Parameter(row) for row in stacked], (12,)),
        ([row.expand(2, 12).t().contiguous().t()[0] for row in stacked], (12,)),
    ]:
        value = aggregate(given_rows, method, byzantine=f).value
        assert value.dtype == dtype and value.shape == shape and not value.requires_grad
        assert torch.allclose(value.reshape(12), expected, rtol=float(torch.finfo(dtype).eps), atol=1e-9)


def state(row, steps, flag):
    """A state dict of mixed dtypes around a row of 11 numbers; every number survives its dtype."""
    return {
        "head.weight": torch.tensor(row[:6]).reshape(2, 3).float(),
        "body.weight": torch.tensor(row[6:9]).double(),
        "body.half": torch.tensor(row[9:]).to(torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "steps": torch.tensor(steps),
        "mask": torch.tensor([flag, True]),
    }


@every_method
def test_state_dicts_with_mixed_dtypes_and_integer_buffers(method):
    f = 0 if method == "mean" else 1
    rows = np.round(rows_of(2, 7, 11) * 4) / 4
    states = [state(row, 10 * i, i > 4) for i, row in enumerate(rows)]
    value = aggregate(states, method, byzantine=f).value
    assert list(value) == list(states[0])
    for name, tensor in states[0].items():
        assert value[name].dtype == tensor.dtype and value[name].shape == tensor.shape
    by_name = np.concatenate([rows[:, 9:], rows[:, 6:9], rows[:, :6]], axis=1)
    expected = naive(method, by_name, f)
    np.testing.assert_allclose(value["body.half"].float(), expected[:2], rtol=0.01)
    np.testing.assert_allclose(value["body.weight"], expected[2:5], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(value["head.weight"].reshape(6), expected[5:], rtol=1e-6, atol=1e-7)
    assert int(value["steps"]) == 30 and value["mask"].tolist() == [False, True]


def test_integer_buffers_take_the_lower_median_in_blocks(monkeypatch):
    monkeypatch.setattr(updates, "_BLOCK", 8)
    counts = torch.randint(-5, 5, (4, 3, 7))
    value = aggregate([{"w": torch.ones(1), "n": row} for row in counts], "median", byzantine=1).value
    assert torch.equal(value["n"], counts.sort(dim=0).values[1])


@every_method
@few
@given(seed=st.integers(0, 10**6), data=st.data())
def test_the_order_of_clients_does_not_matter(method, seed, data):
    f = 0 if method == "mean" else data.draw(st.integers(0, 2), "f")
    n = max(FEWEST[method](f) + data.draw(st.integers(0, 3), "more"), 4)
    rows = torch.from_numpy(rows_of(seed, n, 6))
    order = torch.tensor(data.draw(st.permutations(range(n)), "order"))
    first, second = (aggregate(each, method, byzantine=f) for each in (rows, rows[order]))
    close(second.value, first.value.numpy())
    assert torch.equal(second.report.keep, first.report.keep[order])
    for name, scores in first.report.scores.items():
        assert torch.allclose(second.report.scores[name], scores[order], rtol=1e-6, atol=1e-9, equal_nan=True)


@every_method
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_of_any_size_give_the_same_result(method, block, monkeypatch):
    f = 0 if method == "mean" else 2
    rows = [{"a": torch.randn(13, 5, dtype=torch.float64), "b": torch.randn(31).half()} for _ in range(11)]
    whole = aggregate(rows, method, byzantine=f)
    monkeypatch.setattr(updates, "_BLOCK", block)
    cut = aggregate(rows, method, byzantine=f)
    slack = 1e-9 if method in ("geometric-median", "centered-clipping") else 0.0
    for name, value in whole.value.items():
        assert torch.allclose(cut.value[name], value, rtol=slack, atol=slack)
    assert torch.equal(cut.report.keep, whole.report.keep)


def test_no_block_is_larger_than_stated(monkeypatch):
    monkeypatch.setattr(updates, "_BLOCK", 60)
    sizes = []
    original = updates.Updates.blocks

    def watched(self):
        for block in original(self):
            sizes.append(block.numel())
            yield block

    monkeypatch.setattr(updates.Updates, "blocks", watched)
    for method in METHODS:
        aggregate(torch.randn(11, 500), method, byzantine=0 if method == "mean" else 1)
    assert max(sizes) == 55 and len(sizes) > 100


@every_method
def test_one_client_or_equal_clients_give_that_update(method):
    fewest = FEWEST[method](0)
    row = torch.tensor([1.0, -2.0, 1e-3])
    for n in (fewest, fewest + 1, fewest + 4):
        assert torch.equal(aggregate([row] * n, method, byzantine=0).value, row)


@pytest.mark.parametrize("method", [m for m in ROBUST if m not in ("krum", "multi-krum")])
def test_without_hostile_clients_the_mean_is_near(method):
    rows = torch.randn(201, 4, dtype=torch.float64)
    assert float((aggregate(rows, method, byzantine=0).value - rows.mean(dim=0)).norm()) < 0.25


@few
@given(seed=st.integers(0, 10**6), n=st.integers(2, 12), d=st.integers(1, 6))
def test_the_geometric_median_has_the_least_sum_of_distances(seed, n, d):
    rows = rows_of(seed, n, d)

    def total(point):
        return np.linalg.norm(rows - point, axis=1).sum()

    value = aggregate(torch.from_numpy(rows), "geometric-median", byzantine=0).value.numpy()
    best = min(optimize.minimize(total, start, method="Nelder-Mead").fun for start in (rows.mean(axis=0), value))
    best = min([best, *map(total, rows)])
    assert total(value) <= best * (1 + 1e-5)


def test_the_trimmed_mean_of_equal_values_is_that_value_to_the_last_bit():
    value = torch.tensor([0.1, 1 / 3, 1e300, -5e-324], dtype=torch.float64)[:2]
    assert torch.equal(aggregate([value] * 7, "trimmed-mean", byzantine=2).value, value)


def naive_trust(rows, own):
    found, total = np.zeros_like(own), 0.0
    for row in rows:
        trust = max(0.0, row @ own / np.linalg.norm(row) / np.linalg.norm(own))
        found += trust * row * np.linalg.norm(own) / np.linalg.norm(row)
        total += trust
    return found / total


@few
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), d=st.integers(1, 12))
def test_fltrust_equals_its_twin_and_keeps_its_bound(seed, n, d):
    rows, own = rows_of(seed, n, d), rows_of(seed + 1, 1, d)[0]
    rows[0] = own + 0.1
    if rows[0] @ own <= 0:
        return
    value = aggregate(torch.from_numpy(rows), "fltrust", byzantine=n - 1, trusted=torch.from_numpy(own)).value.numpy()
    close(value, naive_trust(rows, own))
    assert np.linalg.norm(value) <= np.linalg.norm(own) * (1 + 1e-9) and value @ own >= 0


@few
@given(seed=st.integers(0, 10**6), limit=st.floats(0.01, 5.0))
def test_max_norm_shortens_before_joining(seed, limit):
    rows = rows_of(seed, 5, 4)
    short = np.array([row * min(1.0, limit / np.linalg.norm(row)) for row in rows])
    joined = aggregate(torch.from_numpy(rows), "mean", byzantine=0, max_norm=limit)
    close(joined.value, short.mean(axis=0))
    scaled = [bool(row) for row in joined.report.reasons]
    assert scaled == [bool(np.linalg.norm(row) > limit) for row in rows]


def test_max_norm_counts_all_floating_point_entries_together():
    states = [{"a": torch.full((2,), 3.0), "b": torch.full((2,), 4.0), "n": torch.tensor(1000)}] * 3
    value = aggregate(states, "mean", byzantine=0, max_norm=1.0).value
    assert float((value["a"].norm() ** 2 + value["b"].norm() ** 2).sqrt()) == pytest.approx(1.0)
    assert int(value["n"]) == 1000


def test_the_updates_and_their_flags_are_left_alone():
    rows = [{"w": torch.randn(4, requires_grad=True), "n": torch.tensor(i)} for i in range(5)]
    before = [{name: value.detach().clone() for name, value in row.items()} for row in rows]
    aggregate(rows, "krum", byzantine=1, max_norm=0.5)
    for row, kept in zip(rows, before, strict=True):
        assert row["w"].requires_grad and row["w"].grad is None
        assert all(torch.equal(row[name].detach(), kept[name]) for name in kept)
