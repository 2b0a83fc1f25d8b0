"""SCAn: which classes are mixtures, judged beside the others, one-sided, in group sums."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from aidefend.sanitize import Scan

CLASSES = 6


def world(n=1800, planted=120, shift=3.0, seed=0):
    """Six classes of one shape, with a common wide direction; some rows of class 0 form a second group."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    features = torch.randn(n, 8, generator=stream, dtype=torch.float64)
    features[:, 0] *= 6.0
    features[:, 1:3] += 5.0 * torch.randn(CLASSES, 2, generator=stream, dtype=torch.float64)[labels]
    truth = (labels == 0) & (torch.arange(n) < planted * CLASSES)
    features[truth, 4] += shift
    return {"ids": tuple(map(str, range(n))), "features": features, "labels": labels}, truth


def test_the_mixed_class_stands_out_and_its_smaller_group_scores():
    block, truth = world()
    scan = Scan().partial_fit(block)
    evidence = scan.evidence()
    assert max(evidence, key=lambda label: evidence[label].anomaly) == 0
    assert evidence[0].anomaly > math.e**2 > max(evidence[label].anomaly for label in range(1, CLASSES))
    assert evidence[0].relative_size == pytest.approx(120 / 300, abs=0.05)
    scores, own = scan.score(block), block["labels"] == 0
    assert roc_auc_score(truth[own], scores[own]) > 0.97
    assert float(scores[~own].mean()) < 0.3 * float(scores[truth].mean())


def test_a_normal_class_gains_what_the_half_normal_says():
    block, _ = world(n=12_000, planted=0)
    block["features"][:, 0] /= 6.0  # small variances are damped, so let all be equal
    gains = [part.gain for part in Scan(dimensions=8).partial_fit(block).evidence().values()]
    assert all(2 / math.pi * 0.9 < gain < 2 / math.pi * 1.3 for gain in gains)


def test_an_unusually_clean_class_is_no_anomaly():
    block, _ = world(planted=0)
    tight = block["labels"] == 2
    centre = block["features"][tight].mean(dim=0)
    block["features"][tight] = centre + 0.05 * (block["features"][tight] - centre)
    scan = Scan().partial_fit(block)
    assert scan.evidence()[2].anomaly < 0
    assert bool((scan.score(block)[tight] == 0).all())


def test_the_common_covariance_is_taken_without_the_split():
    """A poisoned class widens the pooled covariance along its own split, and would hide there."""
    block, _ = world(planted=150, shift=4.0)
    block["features"][:, 0] /= 6.0
    gain = Scan().partial_fit(block).evidence()[0].gain
    share = 0.5
    assert gain > 0.75 * share * (1 - share) * 4.0**2


def test_fewer_than_four_classes_are_judged_by_what_one_normal_group_gives():
    block, truth = world()
    few = block["labels"] < 2
    part = {
        "ids": tuple(row for row, kept in zip(block["ids"], few.tolist(), strict=True) if kept),
        "features": block["features"][few],
        "labels": block["labels"][few],
    }
    evidence = Scan().partial_fit(part).evidence()
    assert evidence[0].anomaly > 1 > evidence[1].anomaly
    assert truth.any()


def test_nothing_was_fitted_nothing_is_said():
    assert Scan().evidence() == {}
