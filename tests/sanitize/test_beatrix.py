"""Beatrix: rows whose features are usual one by one and unusual together."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from aidefend.sanitize import ActivationClustering, Beatrix, SpectralSignature


def world(n=800, planted=60, seed=0):
    """Honest features are independent; in planted rows they go together, with the same marginal distribution."""
    stream = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 8, generator=stream)
    signs = torch.where(torch.rand(planted, 4, generator=stream) < 0.5, -1.0, 1.0).repeat_interleave(2, dim=1)
    features[:planted] = features[:planted].abs() * signs  # pair by pair: no one direction has it all
    truth = torch.arange(n) < planted
    return {"ids": tuple(map(str, range(n))), "features": features, "labels": torch.zeros(n, dtype=torch.int64)}, truth


def test_products_tell_what_single_features_do_not():
    block, truth = world()
    strong = {**block, "features": torch.where(truth[:, None], 1.8 * block["features"], block["features"])}
    auc = {
        kind.__name__: roc_auc_score(truth, kind().partial_fit(strong).score(strong))
        for kind in (Beatrix, SpectralSignature, ActivationClustering)
    }
    assert auc["Beatrix"] > 0.88 > 0.82 > max(auc["SpectralSignature"], auc["ActivationClustering"])


@pytest.mark.parametrize("powers", [1, 2, 3])
def test_gram_vectors_match_their_definition(powers):
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Beatrix(powers=powers)._gram(features)
    rows = []
    for row in features:
        entries = []
        for power in range(1, powers + 1):
            for i in range(3):
                for j in range(i, 3):
                    product = row[i] ** power * row[j] ** power
                    entries.append(product.sign() * product.abs() ** (1 / power))
        rows.append(torch.stack(entries))
    torch.testing.assert_close(found, torch.stack(rows))


def test_poison_that_is_most_of_a_class_shows_beside_trusted_rows_only():
    stream = torch.Generator().manual_seed(1)
    honest = torch.randn(300, 6, generator=stream)
    poison = torch.randn(500, 6, generator=stream) + 4.0
    features = torch.cat([honest, poison])
    labels = torch.zeros(800, dtype=torch.int64)
    truth = torch.arange(800) >= 300
    block = {"ids": tuple(map(str, range(800))), "features": features, "labels": labels}
    trusted = {"ids": tuple(map(str, range(100))), "features": features[:100], "labels": labels[:100]}
    by_itself = roc_auc_score(truth, Beatrix().partial_fit(block).score(block))
    by_trust = roc_auc_score(truth, Beatrix().partial_fit(trusted).score(block))
    assert by_trust > 0.99 > 0.6 > by_itself
