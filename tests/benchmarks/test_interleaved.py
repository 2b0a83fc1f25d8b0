from types import SimpleNamespace

import pytest

from benchmarks.interleaved import interleave


def world(**costs):
    """Candidates that move a clock of their own; everything gets twice as slow after the tenth call."""
    state = SimpleNamespace(now=0.0, calls=[])

    def candidate(name, cost):
        def run():
            state.calls.append(name)
            state.now += cost * (1 if len(state.calls) <= 10 else 2)

        return run

    return state, {name: candidate(name, cost) for name, cost in costs.items()}


def test_ratios_are_exact_where_drift_is_shared_by_a_round():
    state, candidates = world(ours=3.0, peer=4.0)
    timing = interleave(candidates, reference="peer", rounds=8, warmup=1, clock=lambda: state.now)
    assert len(state.calls) == 18
    assert timing.ratios("peer") == [1.0] * 8
    assert timing.ratios("ours") == [0.75] * 8
    assert [row["ratio"] for row in timing.rows()] == [0.75, 1.0]
    assert "0.750 [0.750, 0.750]" in timing.table()


def test_timing_one_after_the_other_would_have_been_wrong():
    state, candidates = world(ours=3.0, peer=4.0)
    apart = [
        interleave({name: run}, reference=name, rounds=9, warmup=1, clock=lambda: state.now)
        for name, run in candidates.items()
    ]
    ours, peer = (timing.rows()[0]["median_seconds"] for timing in apart)
    assert ours / peer != 0.75


def test_every_round_runs_each_once_in_a_seeded_changing_order():
    orders = []
    for _ in range(2):
        state, candidates = world(a=1.0, b=1.0, c=1.0)
        interleave(candidates, reference="a", rounds=12, warmup=0, seed=3, clock=lambda state=state: state.now)
        orders.append([tuple(state.calls[i : i + 3]) for i in range(0, 36, 3)])
    assert orders[0] == orders[1]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders[0])
    assert len(set(orders[0])) > 3


@pytest.mark.parametrize("change", [{"reference": "absent"}, {"rounds": 1}])
def test_bad_calls(change):
    with pytest.raises(ValueError, match="Expected reference to be one of"):
        interleave({"a": lambda: None}, **{"reference": "a", **change})
