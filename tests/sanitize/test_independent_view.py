"""The independent view: principal directions against numpy, p-values that are uniform, a filter that finds patterns."""

import numpy as np
import pytest
import torch
from scipy import stats

from aidefend.sanitize.suspect import Scaled, compact, train_suspect
from aidefend.sanitize.view import Conformity, IndependentView, p_values


def test_coordinates_are_principal_components():
    x = torch.randn(300, 10) @ torch.diag(torch.arange(10, 0, -1).float())
    view = IndependentView(x, dimensions=3)
    scaled = ((x - x.mean(dim=0)) / x.std(dim=0, correction=0)).numpy()
    _, values, rows = np.linalg.svd(scaled - scaled.mean(axis=0), full_matrices=False)
    ours = view.coordinates(x).numpy()
    for i in range(3):
        assert abs(np.corrcoef(ours[:, i], scaled @ rows[i])[0, 1]) > 0.95
    assert ours.std(axis=0)[0] == pytest.approx(values[0] / 300**0.5, rel=1e-2)


def test_members_of_a_class_have_uniform_p_values():
    points, labels = torch.randn(2000, 4), torch.arange(2000) % 2
    points[labels == 1] += 6
    conformity = Conformity(points, labels)
    fresh = torch.randn(2000, 4) + 6
    best, which = conformity.others(fresh, label=0)
    assert set(which.tolist()) == {1}
    assert stats.kstest(best.numpy(), "uniform").pvalue > 0.001  # false failure rate .001
    strange, _ = conformity.others(torch.randn(200, 4) + 30, label=0)
    assert float(strange.max()) == pytest.approx(1 / 1001)


def test_p_values_equal_the_definition():
    usual = torch.tensor([1.0, 2.0, 2.0, 5.0])
    for distance, at_least in ((0.5, 4), (2.0, 3), (2.5, 1), (9.0, 0)):
        assert float(p_values(torch.tensor([distance]), usual)) == pytest.approx((1 + at_least) / 5)


def test_the_filter_finds_a_pattern_that_natural_variation_hides():
    x = torch.randn(800, 60)
    x[:, 0] *= 30  # loud natural variation
    image = x.reshape(800, 1, 6, 10)
    pattern = torch.zeros(1, 6, 10)
    pattern[0, 5, 5:] = 3.0
    pattern[0, 0, 0] = 6.0  # what matching noise leaves in the loud direction
    has = torch.arange(800) < 80
    image[has, 0, 5, 5:] += 3.0
    view = IndependentView(image)
    amount = view.amount(image, pattern)
    plain = image.flatten(1) @ pattern.flatten()
    separation = [float((s[has].mean() - s[~has].mean()) / s[~has].std()) for s in (amount, plain.double())]
    assert separation[0] > 4 > 2 > separation[1]
    assert torch.equal(view.amount(image, torch.zeros_like(pattern)), torch.zeros(800).double())


@pytest.mark.parametrize("shape", [(5,), (3, 40), (1, 8, 8), (3, 96, 96), (9000,), (2, 4, 5, 6), (7000, 2, 2)])
def test_any_shape_becomes_at_most_4096_numbers(shape):
    assert compact(torch.rand(4, *shape)).shape[1] <= 4096
    scaled = Scaled(torch.rand(4, *shape))(torch.rand(2, *shape))
    assert scaled.shape[0] == 2 and bool(torch.isfinite(scaled).all())
    assert compact(torch.rand(0, *shape)).shape[0] == 0


def test_columns_of_a_table_are_scaled_one_by_one_and_pixels_together():
    table = torch.randn(100, 2) * torch.tensor([1.0, 1000.0])
    assert Scaled(table)(table).std(dim=0, correction=0).tolist() == pytest.approx([1.0, 1.0], rel=1e-4)
    image = table.reshape(100, 1, 1, 2)
    assert Scaled(image)(image).std(dim=0, correction=0)[0] < 0.01


def test_the_suspect_is_deterministic_and_learns():
    x, y = torch.randn(400, 6), torch.zeros(400, dtype=torch.int64)
    y[x[:, 0] > 0] = 1
    first, second, other = (train_suspect(x, y, seed=s) for s in (1, 1, 2))
    assert torch.equal(first(x), second(x)) and not torch.equal(first(x), other(x))
    assert float((first(x).argmax(dim=1) == y).float().mean()) > 0.95
    assert not first.training and not any(p.requires_grad for p in first.parameters())
