"""Cuts and discriminants against naive twins and scikit-learn."""

import math

import pytest
import torch

from aidefend.sanitize.separation import (
    bisections,
    cut,
    discriminant,
    held_out_log_odds,
    held_out_regression,
    inverse_covariance,
    settle,
    valley_counts,
    whiten,
)


def two_parts(n=200, share=0.2, gap=5.0, d=4):
    inside = torch.arange(n) < round(share * n)
    points = torch.randn(n, d).double()
    points[inside, 0] += gap
    return points, inside


def test_the_cut_equals_an_exhaustive_search():
    scores = torch.cat([torch.randn(30), torch.randn(12) + 4]).double()

    def between(threshold):
        high = scores >= threshold
        if min(int(high.sum()), int((~high).sum())) < 6:
            return -1.0
        return float(high.sum() * (~high).sum() * (scores[high].mean() - scores[~high].mean()) ** 2)

    best = max(scores.tolist(), key=between)
    assert torch.equal(cut(scores), scores >= best)
    assert not bool(cut(scores[:11]).any())  # too few to cut


def test_the_rank_one_inverse_equals_the_discriminant_with_the_covariance_within():
    points, inside = two_parts()
    direction, offset = discriminant(points, inside, inverse_covariance(points))
    covariance = torch.cov(points.T, correction=0)
    damped = covariance + 0.1 * covariance.trace() / 4 * torch.eye(4).double()
    ours, rest = points[inside].mean(dim=0), points[~inside].mean(dim=0)
    within = damped - 0.2 * 0.8 * torch.outer(ours - rest, ours - rest)
    naive = torch.linalg.solve(within, ours - rest)
    torch.testing.assert_close(direction, naive)
    assert float(offset) == pytest.approx(math.log(0.25) - float(naive @ (ours + rest)) / 2)


def test_a_spoilt_start_settles_on_the_planted_part_and_stays_there():
    points, inside = two_parts(gap=9.0)
    start = inside.clone()
    start[:12], start[100:120] = False, True
    settled = settle(points, start, inverse_covariance(points))
    assert settled is not None and torch.equal(settled, inside)
    assert torch.equal(settle(points, settled, inverse_covariance(points)), settled)


def test_parts_that_die_out_give_none():
    points, inside = two_parts()
    nobody = torch.zeros_like(inside)
    assert settle(points, nobody, inverse_covariance(points)) is None
    assert settle(points, ~nobody, inverse_covariance(points)) is None


def test_held_out_values_know_the_signal_and_not_the_noise():
    points, inside = two_parts()
    stream = torch.Generator().manual_seed(0)
    assert ((held_out_log_odds(points, inside, stream) > 0) == inside).double().mean() > 0.97
    chance = torch.rand(200) > 0.5  # labels without a cause: held-out fits must not find any
    assert abs(float(((held_out_log_odds(points, chance, stream) > 0) == chance).double().mean()) - 0.5) < 0.15
    fitted = held_out_regression(points, inside, stream)
    assert fitted[inside].mean() - fitted[~inside].mean() > 0.5


def test_valley_counts_tell_two_bumps_from_one():
    bumps = torch.cat([torch.randn(300) + 10, torch.randn(700) - 10])
    between, peak = valley_counts(bumps, torch.arange(1000) < 300)
    assert between == 0 and peak > 250
    one = torch.randn(1000).sort().values
    between, peak = valley_counts(one, torch.arange(1000) >= 700)
    assert between > peak
    assert valley_counts(torch.zeros(9), torch.arange(9) < 4) == (9, 0)


def test_whitening_gives_unit_variance_and_no_correlation():
    raw = torch.randn(500, 5).double() @ torch.randn(5, 5).double()
    white = whiten(raw, dimensions=5)
    covariance = torch.cov(white.T, correction=0)
    assert torch.allclose(covariance, torch.diag(covariance.diagonal()), atol=1e-9)
    assert float(covariance.diagonal()[-1]) == pytest.approx(1 / 1.01)
    assert torch.equal(whiten(torch.ones(9, 3)), torch.zeros(9, 3).double())


def test_bisections_contain_the_planted_cluster_and_never_the_whole():
    points, inside = two_parts(gap=9.0)
    nodes = bisections(points)
    assert any(set(node.tolist()) == set(inside.nonzero().flatten().tolist()) for node in nodes)
    assert all(8 <= len(node) < 200 for node in nodes)
    assert bisections(torch.zeros(50, 3).double()) == []
