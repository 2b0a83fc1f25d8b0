"""Approximate neighbours: what they promise is measured, and what they give is exact."""

import pytest
import torch

from aidefend import ConfigurationError, MissingExtra
from aidefend._core.approximate import ApproximateIndex
from aidefend._core.neighbours import k_nearest
from aidefend.sanitize import NearDuplicates, NeighbourDisagreement

pytest.importorskip("faiss")


def clusters(n, d=8, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(20, d, generator=stream)[torch.arange(n) % 20] + torch.randn(n, d, generator=stream)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_measured_recall_is_true_and_distances_are_exact(metric):
    bank, queries = clusters(3000), clusters(300, seed=0)
    index = ApproximateIndex(bank, 5, metric=metric)
    distances, rows = index.nearest(queries)
    exact, true = k_nearest(queries, bank, 5, metric=metric)
    recall = float((true.unsqueeze(2) == rows.unsqueeze(1)).any(dim=2).double().mean())
    assert recall >= 0.93 and index.measured.value >= 0.94 and index.measured.low - 0.02 <= recall
    found = rows[:, 0] == true[:, 0]
    torch.testing.assert_close(distances[found, 0], exact[found, 0], rtol=1e-4, atol=1e-5)
    assert bool((distances[:, 1:] >= distances[:, :-1]).all())


def test_recall_one_searches_everything():
    bank = torch.randn(800, 6, generator=torch.Generator().manual_seed(0))
    distances, rows = ApproximateIndex(bank, 4, recall=1.0).nearest(bank)
    exact, true = k_nearest(bank, bank, 4)
    assert torch.equal(rows, true)
    torch.testing.assert_close(distances, exact, rtol=1e-4, atol=1e-5)


def test_far_off_features_keep_their_digits():
    bank = clusters(1000)
    near = ApproximateIndex(bank, 3).nearest(bank)[1]
    far = ApproximateIndex(bank.double() + 1e6, 3).nearest(bank.double() + 1e6)[1]
    assert float((near == far).double().mean()) >= 0.99


def test_bad_banks_are_refused(monkeypatch):
    for bank in (torch.zeros(3, 2), torch.full((50, 2), torch.nan), torch.zeros(50)):
        with pytest.raises(ConfigurationError, match="bank"):
            ApproximateIndex(bank, 3)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingExtra, match="ann"):
        ApproximateIndex(clusters(100), 3)


def test_copies_are_found_by_the_index_as_by_all_pairs():
    stream = torch.Generator().manual_seed(0)
    features = torch.randn(6000, 16, generator=stream)
    copies = torch.randperm(6000, generator=stream)[:200]
    features[copies[:100]] = features[copies[100:]] * 1.0001
    block = {"ids": tuple(map(str, range(6000))), "features": features, "labels": torch.zeros(6000, dtype=torch.int64)}
    exact = NearDuplicates("features").partial_fit(block)
    quick = NearDuplicates("features", index="faiss").partial_fit(block)
    assert quick.groups() == exact.groups() and len(exact.groups()) == 100
    torch.testing.assert_close(quick.score(block), exact.score(block), rtol=1e-4, atol=1e-4)
    assert exact.recall() == {} and 0 < quick.recall()["features"].value <= 1


def test_a_detector_says_how_much_of_it_is_approximate():
    features, labels = clusters(12_000), torch.arange(12_000) % 2
    block = {"ids": tuple(map(str, range(12_000))), "features": features, "labels": labels}
    exact = NeighbourDisagreement(limit=6000).partial_fit(block)
    quick = NeighbourDisagreement(limit=6000, index="faiss").partial_fit(block)
    part = {"ids": block["ids"][:500], "features": features[:500], "labels": labels[:500]}
    gap = (exact.score(part) - quick.score(part)).abs()
    assert float(gap.median()) < 0.01 and float(gap.quantile(0.99)) < 0.3
    assert exact.recall() == {} and quick.recall().keys() == {0, 1}
    assert all(share.value >= 0.94 for share in quick.recall().values())
    with pytest.raises(ConfigurationError, match="Merge detectors"):
        exact.merge(quick)
