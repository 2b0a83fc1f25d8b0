"""Partition ensembles: one row reaches one base model, bit for bit, and no attack within the radius succeeds."""

import pytest
import torch
from torch import nn

from aidefend import AidefendError
from aidefend.datasets import mnist_subset
from aidefend.sanitize import PartitionEnsemble

# The first weights of the base models come from a fork of the global stream, which the tests would else replace.
pytestmark = pytest.mark.global_random("base models draw their first weights from a fork that is seeded for each")


def world(n=240, classes=3, seed=0):
    stream = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(n, 6, generator=stream) + 3.0 * torch.nn.functional.one_hot(y, 6)
    return x, y


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))


def answers(ensemble, x):
    """(M, N, K) logits of all base models."""
    return torch.stack(list(ensemble._bases.logits(x)))


KINDS = {"ridge": {}, "networks": {"make_model": network, "steps": 15}}
METHODS = ("dpa", "finite-aggregation", "run-off")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_data_changes_nothing(kind, method):
    x, y = world()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    one = PartitionEnsemble(partitions=6, method=method, spread=2, **KINDS[kind]).fit((x, y))
    other = PartitionEnsemble(partitions=6, method=method, spread=2, **KINDS[kind]).fit((x[order], y[order]))
    assert torch.equal(answers(one, x[:9]), answers(other, x[:9]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["insert", "remove", "relabel", "duplicate"])
@pytest.mark.parametrize(("method", "reach"), [("dpa", 1), ("finite-aggregation", 2)])
def test_one_row_reaches_no_more_base_models_than_the_certificate_says(kind, change, method, reach):
    x, y = world()
    if change == "insert":
        more = torch.cat([x, 1e3 * torch.ones(1, 6)]), torch.cat([y, torch.tensor([2])])
    elif change == "duplicate":
        more = torch.cat([x, x[5:6]]), torch.cat([y, (y[5:6] + 1) % 3])
    elif change == "remove":
        more = x[1:], y[1:]
    else:
        more = x, torch.where(torch.arange(len(y)) == 7, (y + 1) % 3, y)
    kinds = {"partitions": 8, "method": method, "spread": 2, "classes": 3, **KINDS[kind]}
    before, after = (answers(PartitionEnsemble(**kinds).fit(data), x[:9]) for data in ((x, y), more))
    moved = (before != after).flatten(1).any(dim=1)
    assert 1 <= int(moved.sum()) <= reach


def test_a_change_within_the_radius_never_changes_the_prediction():
    """Rows beside the input with another label go to as many parts as they are: about the best an attacker can do."""
    x, y = world()
    probe = x[:12]
    for method in METHODS:
        ensemble = PartitionEnsemble(partitions=9, method=method, spread=2, classes=3).fit((x, y))
        found = ensemble.certify(probe)
        assert int(found.radius.max()) >= 1
        for at in range(len(probe)):
            stream = torch.Generator().manual_seed(at)
            for _ in range(6):
                extra = int(found.radius[at])
                if not extra:
                    continue
                wrong = (int(found.prediction[at]) + 1) % 3
                near = probe[at] + 1e-3 * torch.randn(extra, 6, generator=stream)
                data = torch.cat([x, near]), torch.cat([y, torch.full((extra,), wrong)])
                attacked = PartitionEnsemble(partitions=9, method=method, spread=2, classes=3).fit(data)
                assert int(attacked.certify(probe[at : at + 1]).prediction) == int(found.prediction[at])


def test_beyond_the_radius_the_same_attack_succeeds():
    x, y = world(n=120)
    ensemble = PartitionEnsemble(partitions=9, classes=3).fit((x, y))
    found = ensemble.certify(x[:1])
    wrong = (int(found.prediction) + 1) % 3
    near = x[:1] + 1e-3 * torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    data = torch.cat([x, near]), torch.cat([y, torch.full((400,), wrong)])
    assert int(PartitionEnsemble(partitions=9, classes=3).fit(data).certify(x[:1]).prediction) == wrong


def test_parts_follow_the_bytes_and_not_the_sum_of_the_row():
    """ART's hash is int(sum(x)) mod k: on rows of length one nearly all land in the same part."""
    x, _ = world(n=900)
    x = torch.nn.functional.normalize(x, dim=1)
    ensemble = PartitionEnsemble(partitions=9)
    from aidefend.sanitize.partition_ensemble import _digests

    names = _digests(x, 0)
    sizes = [len(part) for part in ensemble._parts(names, list(range(900)))]
    assert sum(sizes) == 900 and min(sizes) > 60 and max(sizes) < 145
    by_sum = torch.bincount(x.sum(dim=1).long() % 9, minlength=9)
    assert int(by_sum.max()) > 300


def test_digits_are_learnt_and_certified():
    digits = mnist_subset()
    train = digits.train_x[:3000], digits.train_y[:3000]
    test = digits.test_x[:300], digits.test_y[:300]
    shares = {}
    for method in ("dpa", "run-off"):
        found = PartitionEnsemble(partitions=60, method=method).fit(train).certify(test[0])
        right = found.prediction == test[1]
        assert float(right.double().mean()) > 0.8
        shares[method] = float((right & (found.radius >= 15)).double().mean())
    assert shares["dpa"] > 0.4 and shares["run-off"] >= shares["dpa"]


def test_networks_answer_alike_one_by_one_and_in_batches():
    x, y = world()
    ensemble = PartitionEnsemble(network, partitions=5, steps=5).fit((x, y))
    together = answers(ensemble, x[:7])
    alone = torch.stack(list(ensemble._bases.logits(x[:7], together=1)))
    torch.testing.assert_close(together, alone)


def test_features_are_applied_on_both_sides_and_global_state_is_kept():
    x, y = world()
    before = torch.random.get_rng_state()
    plain = PartitionEnsemble(network, partitions=4, steps=3).fit((x - 1, y)).certify(x[:5] - 1)
    mapped = PartitionEnsemble(network, partitions=4, steps=3, features=lambda rows: rows).fit((x - 1, y))
    assert torch.equal(mapped.certify(x[:5] - 1).votes, plain.votes)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_rows_are_left_out_one_by_one():
    x, y = world()
    broken = torch.cat([x, torch.full((2, 6), torch.nan)]), torch.cat([y, torch.zeros(2).long()])
    one, other = (PartitionEnsemble(partitions=6).fit(data) for data in ((x, y), broken))
    assert torch.equal(answers(one, x[:5]), answers(other, x[:5]))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x, y: PartitionEnsemble().certify(x), "fit first"),
        (lambda x, y: PartitionEnsemble(partitions=0), "partitions"),
        (lambda x, y: PartitionEnsemble(method="vote"), "method"),
        (lambda x, y: PartitionEnsemble(classes=2).fit((x, y)), "labels below 2"),
        (lambda x, y: PartitionEnsemble().fit((x, y * 10**9)), "labels up to 32767"),
        (lambda x, y: PartitionEnsemble(lambda: 7).fit((x, y)), "make_model"),
        (lambda x, y: PartitionEnsemble(network, classes=7, steps=1).fit((x, y)).certify(x), "7 outputs"),
        (lambda x, y: PartitionEnsemble(features=lambda rows: rows[:1]).fit((x, y)), "features"),
        (lambda x, y: PartitionEnsemble().fit((x, y)).certify(x / 0), "x"),
    ],
)
def test_what_cannot_be_is_refused(act, message):
    with pytest.raises(AidefendError, match=message):
        act(*world())
