"""Detectors against naive twins and closed forms; the defects that other libraries shipped are tests here."""

import math

import pytest
import torch

from aidefend import ConfigurationError
from aidefend._core.neighbours import k_nearest
from aidefend._core.stats import roc_auc
from aidefend.validate import Energy, Mahalanobis, MaxLogit, MaxSoftmax, NearestNeighbours, RelativeMahalanobis, ViM


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def clean(n=300, d=6, seed=0, scale=1.0):
    """Three classes of correlated features with their labels."""
    generator = stream(seed)
    mixing = torch.eye(d, dtype=torch.float64) + 0.5 * torch.randn(d, d, generator=stream(9), dtype=torch.float64)
    y = torch.randint(0, 3, (n,), generator=generator)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing
    return scale * (x + 3 * torch.eye(3, d, dtype=torch.float64)[y]), y


def test_logit_scores_in_closed_form():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    none = torch.zeros(1, 0)
    total = math.e + math.e**2 + math.e**3
    assert Energy().score(none, logits).item() == pytest.approx(-math.log(total))
    assert MaxLogit().score(none, logits).item() == -3.0
    assert MaxSoftmax().score(none, logits).item() == pytest.approx(-math.log(math.e**3 / total))


def test_max_softmax_does_not_tie_where_the_probability_rounds_to_one():
    logits = torch.tensor([[12.0, 0.0], [15.0, 0.0]])
    assert MaxSoftmax().score(torch.zeros(2, 0), logits).diff().item() < 0


def test_nearest_neighbours_equals_a_sorted_list_of_distances():
    bank, queries = clean(60)[0], clean(20, seed=1)[0]
    fitted = NearestNeighbours(k=7).fit(bank, bank)
    unit = lambda rows: rows / rows.norm(dim=1, keepdim=True)  # noqa: E731
    naive = [sorted(1 - float(q @ b) for b in unit(bank))[6] for q in unit(queries)]
    torch.testing.assert_close(fitted.score(queries, queries), torch.tensor(naive, dtype=torch.float64))


def test_nearest_neighbours_equals_the_shared_search_in_every_blocking(monkeypatch):
    bank, queries = clean(300)[0].float(), clean(70, seed=1)[0].float()
    fitted, expected = NearestNeighbours(k=50).fit(bank, bank), k_nearest(queries, bank, 50, metric="cosine")[0][:, -1]
    for block in (1, 1000, 2**24):
        monkeypatch.setattr("aidefend.validate.nearest_neighbours._LARGEST_BLOCK", block)
        torch.testing.assert_close(fitted.score(queries, queries), expected)


def test_single_precision_mahalanobis_equals_double_to_1e_5():
    (x, y), queries = clean(d=40), clean(100, d=40, seed=1)[0]
    for detector in (Mahalanobis(), RelativeMahalanobis()):
        exact = detector.fit(x, x, y).score(queries, queries)
        single = detector.fit(x.float(), x.float(), y).score(queries.float(), queries.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-4)


def test_nearest_neighbours_ignores_length_and_survives_zero_vectors():
    fitted = NearestNeighbours(k=1).fit(torch.eye(3), torch.eye(3))
    scores = fitted.score(torch.tensor([[1e-30, 0.0, 0.0], [1e30, 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.zeros(3, 2))
    assert scores.tolist() == [0.0, 0.0, 1.0]


def test_nearest_neighbours_keeps_its_own_bank():
    bank = torch.eye(2)
    fitted = NearestNeighbours(k=1).fit(bank, bank)
    bank.zero_()
    assert fitted.score(torch.eye(2), torch.eye(2)).tolist() == [0.0, 0.0]


def test_nearest_neighbours_needs_k_rows():
    with pytest.raises(ConfigurationError, match=r"at least k=5 rows.*smaller k"):
        NearestNeighbours(k=5).fit(torch.eye(4), torch.eye(4))
    with pytest.raises(ConfigurationError, match="k to be an integer >= 1"):
        NearestNeighbours(k=0)


def oas(scatter, n):
    """Shrinkage of Chen et al. 2010, equation 23, written out."""
    d = len(scatter)
    tr, tr2 = scatter.trace(), (scatter @ scatter).trace()
    share = ((1 - 2 / d) * tr2 + tr**2) / ((n + 1 - 2 / d) * (tr2 - tr**2 / d))
    share = min(1.0, float(share))
    return (1 - share) * scatter + share * tr / d * torch.eye(d, dtype=scatter.dtype)


def naive_mahalanobis(x, y, queries):
    """One class after another, with an explicit inverse."""
    means = [x[y == c].mean(dim=0) for c in range(3)]
    gaps = torch.stack([row - means[label] for row, label in zip(x, y.tolist(), strict=True)])
    precision = torch.linalg.inv(oas(gaps.T @ gaps / len(x), len(x)))
    return torch.stack([min((q - m) @ precision @ (q - m) for m in means) for q in queries])


def test_mahalanobis_equals_the_loop_with_an_inverse():
    (x, y), queries = clean(), clean(40, seed=1)[0]
    score = Mahalanobis().fit(x, x, y).score(queries, queries)
    torch.testing.assert_close(score, naive_mahalanobis(x, y, queries), rtol=1e-9, atol=1e-9)


def whole(x, y):
    """Covariance of the data as a whole whose part within the classes is shrunk as for the class-wise distance."""
    means = torch.stack([x[y == label].mean(dim=0) for label in range(3)])
    gaps, between = x - means[y], means[y] - x.mean(dim=0)
    return oas(gaps.T @ gaps / len(x), len(x)) + between.T @ between / len(x)


def test_relative_mahalanobis_subtracts_the_distance_to_the_whole():
    (x, y), queries = clean(), clean(40, seed=1)[0]
    precision = torch.linalg.inv(whole(x, y))
    outer = torch.stack([(q - x.mean(dim=0)) @ precision @ (q - x.mean(dim=0)) for q in queries])
    torch.testing.assert_close(
        RelativeMahalanobis().fit(x, x, y).score(queries, queries),
        naive_mahalanobis(x, y, queries) - outer,
        rtol=1e-9,
        atol=1e-9,
    )


def test_what_all_classes_share_cancels_from_the_relative_distance():
    """Two covariances that are shrunk apart leave some of it: on near strangers that cost 1.5 points of AUROC."""
    x, y = clean(n=60, d=30)
    means = torch.stack([x[y == label].mean(dim=0) for label in range(3)])
    spread = torch.linalg.inv(whole(x, y)) @ (means - x.mean(dim=0)).T
    step = torch.randn(30, generator=stream(4), dtype=torch.float64)
    step -= spread @ torch.linalg.lstsq(spread, step[:, None]).solution[:, 0]  # orthogonal to what tells classes apart
    fitted, plain = (detector().fit(x, x, y) for detector in (RelativeMahalanobis, Mahalanobis))
    torch.testing.assert_close(fitted.score(x[:5] + 1e3 * step), fitted.score(x[:5]), rtol=1e-6, atol=1e-6)
    assert bool((plain.score(x[:5] + 1e3 * step) > 1e4).all())


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("detector", [Mahalanobis(), RelativeMahalanobis()])
def test_the_scale_of_the_features_changes_nothing(detector, scale):
    """A fixed ridge on small features once turned a published detector into a coin (pytorch-ood #81: AUROC 50)."""
    (x, y), (near, _) = clean(scale=scale), clean(100, seed=1, scale=scale)
    fitted = detector.fit(x, x, y)
    far = near + 6 * scale * torch.tensor([-1.0, -1, -1, 1, -1, 1], dtype=torch.float64)
    one = detector.fit(x / scale, x, y).score(far / scale, far)
    torch.testing.assert_close(fitted.score(far, far), one, rtol=1e-6, atol=1e-6)
    assert roc_auc(fitted.score(far, far), fitted.score(near, near)).value > 0.95


@pytest.mark.parametrize("detector", [Mahalanobis(), RelativeMahalanobis()])
def test_singular_covariances_are_safe(detector):
    x, y = clean()
    dead = torch.cat([x, x[:, :2], torch.zeros(len(x), 3)], dim=1)  # copies and features that never vary
    odd = dead.clone()
    odd[:, -1] = 2.0
    fitted = detector.fit(dead, dead, y)
    assert fitted.score(dead, dead).isfinite().all()
    if isinstance(detector, Mahalanobis):
        assert fitted.score(odd, odd).median() > fitted.score(dead, dead).max()
    else:  # a feature that never varied is none that tells classes apart
        torch.testing.assert_close(fitted.score(odd, odd), fitted.score(dead, dead))


@pytest.mark.parametrize("detector", [Mahalanobis(), RelativeMahalanobis()])
@pytest.mark.parametrize("rows", [torch.ones(1, 4), torch.ones(5, 4), torch.zeros(5, 1)])
def test_rows_that_do_not_vary_give_the_plain_distance(detector, rows):
    fitted = detector.fit(rows, rows, torch.zeros(len(rows), dtype=torch.int64))
    score = fitted.score(rows + 2.0, rows)
    torch.testing.assert_close(score, torch.full((len(rows),), 4.0 * rows.shape[1]))


def test_one_class_does_not_turn_the_relative_distance_into_a_constant():
    """Minus the distance to the whole, the score of every row would be 0: a detector that sees nothing."""
    (x, _), (near, _) = clean(), clean(100, seed=1)
    one = torch.zeros(len(x), dtype=torch.int64)
    relative = RelativeMahalanobis().fit(x, x, one)
    assert relative.name == "relative-mahalanobis"
    torch.testing.assert_close(relative.score(near), Mahalanobis().fit(x, x, one).score(near))


def test_classes_may_have_any_numbers_and_labels_default_to_predictions():
    x, y = clean()
    names = torch.tensor([7, 100, 3])[y]
    torch.testing.assert_close(
        Mahalanobis().fit(x, x, names).score(x, x), Mahalanobis().fit(x, x, y).score(x, x), rtol=1e-9, atol=1e-9
    )
    logits = torch.nn.functional.one_hot(y, 3).double()
    torch.testing.assert_close(
        Mahalanobis().fit(x, logits).score(x, x), Mahalanobis().fit(x, x, y).score(x, x), rtol=1e-9, atol=1e-9
    )


def test_a_covariance_that_no_memory_holds_is_refused():
    with pytest.raises(ConfigurationError, match="1 to 10000 features"):
        Mahalanobis().fit(torch.zeros(2, 10_001), torch.zeros(2, 2))


@pytest.mark.parametrize("detector", [Mahalanobis(), RelativeMahalanobis(), ViM()], ids=repr)
def test_features_whose_squares_are_no_numbers_are_refused_with_the_cure(detector):
    """Planted violation: an error of the linear algebra, which names neither the argument nor a cure."""
    features = 1e200 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(ConfigurationError, match=r"at most 1e\+150.*NearestNeighbours"):
        detector.fit(features, features)
    near = features / 1e51
    assert bool(torch.isfinite(detector.fit(near, near / 1e149).score(near, near / 1e149)).all())
