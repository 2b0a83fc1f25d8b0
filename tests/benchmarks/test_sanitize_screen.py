"""The benchmark of screening: what it plants, what it makes again, and what it does not."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import sanitize_screen as bench


@pytest.fixture(scope="module")
def data():
    stream = np.random.default_rng(0)
    names = ("train", "test")
    pictures = {f"{name}_x": stream.integers(0, 256, (200, 28, 28), dtype=np.uint8) for name in names}
    return pictures | {f"{name}_y": np.arange(200, dtype=np.int64) % 10 for name in names}


def test_two_attacks_take_different_rows_and_each_its_own_label(data):
    clean = bench.world(data, None, 200, 3)
    both = bench.world(data, bench.attacks()["patch and blend, 5 % each"], 200, 3)
    changed = (both.x != clean.x).flatten(1).any(dim=1)
    assert torch.equal(changed, both.is_poison) and int(both.is_poison.sum()) == 20
    places, labels = both.is_poison.nonzero().flatten(), both.y[both.is_poison]
    assert torch.equal(labels, torch.where(places % 2 == 0, bench.TARGET, bench.SECOND))
    assert torch.equal(both.y[~both.is_poison], clean.y[~both.is_poison])


class Always(nn.Module):
    """Calls everything the second target."""

    def forward(self, x):
        return nn.functional.one_hot(torch.full((len(x),), bench.SECOND), 10).float()


def test_success_is_the_mean_over_both_triggers(data):
    both = bench.world(data, bench.attacks()["patch and blend, 5 % each"], 200, 3)
    accuracy, success = bench.judged(Always(), both)
    assert accuracy == pytest.approx(0.1) and success == pytest.approx(0.5)


def test_rows_that_are_there_are_not_made_again_and_the_random_filter_follows_ours(data, monkeypatch):
    called = []

    def judge(w, model, seed):
        called.append(seed)
        return torch.arange(len(w.y)) >= 20, {"target_classes": [0]}

    monkeypatch.setattr(bench, "arms", lambda which: {"ours": judge, "ours, no model": judge})
    attack = bench.attacks()["patch 10 %"]
    whole = [row["arm"] for row in bench.rows_of(data, "patch", attack, "ours", 100, 1)]
    assert whole == ["undefended", "perfect", "ours", "random", "ours, no model"] and len(called) == 2
    assert list(bench.rows_of(data, "patch", attack, "ours", 100, 1, whole)) == [] and len(called) == 2
    again = [row["arm"] for row in bench.rows_of(data, "patch", attack, "ours", 100, 1, set(whole) - {"random"})]
    assert "random" in again and "ours, no model" not in again


def test_the_rows_of_ours_say_which_class_and_which_share_were_found(data):
    w = bench.world(data, bench.attacks()["patch 10 %"], 100, 1)
    keep, said = bench.ours_alone(w, None, 1)
    gone = int((~keep).sum())
    assert said["share"] == pytest.approx(gone / 100) and said["share_low"] <= gone / 100 <= said["share_high"]
    assert set(said["target_classes"]) <= set(range(10)) and bool(said["target_classes"]) == bool(gone)


def test_rows_that_other_code_decided_are_not_taken_over():
    rows = [{"arm": "ours", "code": "a"}, {"arm": "ours", "code": "b"}, {"arm": "ours"}, {"arm": "cleanlab"}]
    assert bench.still_good(rows, "a") == [rows[0], rows[3]]
    assert len(bench.deciding_code()) == 12


def test_means_take_numbers_that_came_back_from_a_file():
    rows = [{"attack": "clean", "arm": "ours", "accuracy": value, "asr": "nan"} for value in (0.5, 1.0)]
    (mean,) = bench.summary(rows)
    assert mean["accuracy"] == 0.75 and mean["asr"] != mean["asr"]
