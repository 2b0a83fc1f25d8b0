"""Clusters per class, their evidence against a naive twin, and that no class loses rows for being cut in two."""

import pytest
import torch

from aidefend.sanitize import ActivationClustering
from aidefend.sanitize.activation_clustering import two_means


def block_of(features, labels):
    return {"ids": tuple(map(str, range(len(labels)))), "features": features, "labels": labels}


def naive_silhouette(points, side):
    """Rousseeuw 1987, row by row."""
    widths = []
    for i in range(len(points)):
        own = [float((points[i] - points[j]).norm()) for j in range(len(points)) if side[j] == side[i] and j != i]
        other = [float((points[i] - points[j]).norm()) for j in range(len(points)) if side[j] != side[i]]
        a, b = sum(own) / len(own), sum(other) / len(other)
        widths.append((b - a) / max(a, b))
    return sum(widths) / len(widths)


def test_two_planted_clusters_are_found_with_size_and_silhouette():
    features = torch.cat([torch.randn(90, 6), torch.randn(10, 6) + 8]).double()
    block = block_of(features, torch.zeros(100, dtype=torch.int64))
    detector = ActivationClustering(dimensions=6).partial_fit(block)
    found = detector.evidence()[0]
    assert ((detector.score(block) > 0) == (torch.arange(100) >= 90)).all()
    assert found.relative_size == 0.1 and found.separation > 5
    assert found.silhouette == pytest.approx(naive_silhouette(features, torch.arange(100) >= 90), abs=1e-9)


def test_clean_classes_show_poor_evidence_though_they_can_be_cut():
    block = block_of(torch.randn(300, 6), torch.arange(300) % 3)
    for found in ActivationClustering().partial_fit(block).evidence().values():
        assert found.silhouette < 0.3 and found.relative_size > 0.2


def test_two_means_is_a_fixed_point_of_lloyd():
    points = torch.randn(60, 3)
    side = two_means(points)
    near = torch.cdist(points, torch.stack([points[side].mean(dim=0), points[~side].mean(dim=0)])).argmin(dim=1) == 0
    assert torch.equal(near, side)


def test_equal_rows_and_tiny_classes_score_zero():
    block = block_of(torch.ones(7, 3), torch.tensor([0, 0, 0, 0, 1, 1, 2]))
    assert ActivationClustering().partial_fit(block).score(block).tolist() == [0.0] * 7


@pytest.mark.parametrize("settings", [{"dimensions": 0}, {"limit": 2}, {"seed": -1}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match="Expected"):
        ActivationClustering(**settings)
