"""Entropy, GEN, ViM and LID against the formulas of their papers written out, and against degenerate rows."""

import math

import pytest
import torch
from scipy.stats import entropy
from torch import nn

from aidefend import ConfigurationError
from aidefend.validate import GEN, Entropy, LocalDimension, MaxSoftmax, ViM

NONE = torch.zeros(5, 0)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(k=12):
    return 4 * torch.randn(5, k, generator=stream(), dtype=torch.float64)


def naive_gen(row, gamma, top):
    p = sorted(row.softmax(dim=0).tolist(), reverse=True)[:top]
    return sum(q**gamma * (1 - q) ** gamma for q in p)


def test_entropy_equals_that_of_scipy():
    expected = entropy(logits().softmax(dim=1).numpy(), axis=1)
    torch.testing.assert_close(Entropy().score(NONE, logits()), torch.from_numpy(expected))


@pytest.mark.parametrize(("gamma", "top"), [(0.1, 100), (0.5, 4), (0.1, 1)])
def test_gen_equals_the_formula(gamma, top):
    expected = torch.tensor([naive_gen(row, gamma, top) for row in logits()], dtype=torch.float64)
    torch.testing.assert_close(GEN(gamma, top).score(NONE, logits()), expected)


@pytest.mark.parametrize("detector", [Entropy(), GEN(), MaxSoftmax()])
def test_sure_rows_do_not_tie_in_single_precision(detector):
    """softmax rounds to one from a gap of 17 on: a plain 1 - p is 0 there, and every such row looks the same."""
    sure = torch.tensor([[20.0, 0.0, 0.0], [40.0, 0.0, 0.0], [80.0, 0.0, 0.0]])
    score = detector.score(torch.zeros(3, 0), sure)
    assert bool((score.diff() < 0).all()) and bool((score > 0).all())


@pytest.mark.parametrize("k", [2, 3, 50])
def test_a_uniform_row_has_the_largest_entropy(k):
    flat = torch.zeros(1, k)
    assert Entropy().score(torch.zeros(1, 0), flat).item() == pytest.approx(math.log(k), rel=1e-5)
    assert bool((Entropy().score(NONE, logits(k)) <= math.log(k)).all())


def linear_world(n=300, d=10, seed=0):
    """Features near a 4-dimensional subspace, off the origin, and a linear head on them."""
    generator = stream(seed)
    basis = torch.randn(4, d, generator=stream(9), dtype=torch.float64)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64) @ basis + 0.3
    x = x + 0.1 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, d, generator=stream(7), dtype=torch.float64)
    head = nn.utils.skip_init(nn.Linear, d, 3).double()
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    return x, head(x).detach(), head


def naive_vim(fit, queries, dimension):
    """The paper's steps with numpy's names: origin, principal space by singular vectors, scale, virtual logit."""
    x, out, head = fit
    origin = -torch.linalg.pinv(head.weight) @ head.bias
    right = torch.linalg.svd(x - origin).Vh[dimension:]
    norm = lambda rows: ((rows - origin) @ right.T).norm(dim=1)  # noqa: E731
    alpha = out.amax(dim=1).sum() / norm(x).sum()
    return (alpha * norm(queries) - head(queries).logsumexp(dim=1)).detach()


@pytest.mark.parametrize("given", [True, False])
def test_vim_equals_the_formula_with_the_head_and_without(given):
    fit, (queries, out, head) = linear_world(), linear_world(40, seed=1)
    fitted = ViM(dimension=4, head=head if given else None).fit(fit[0], fit[1])
    torch.testing.assert_close(fitted.score(queries, out), naive_vim(fit, queries, 4), rtol=1e-8, atol=1e-8)


def test_vim_finds_rows_off_the_subspace_that_the_logits_do_not_show():
    x, out, head = linear_world()
    hidden = torch.linalg.svd(head.weight.detach()).Vh[-1]  # a direction that the head does not see
    fitted = ViM(dimension=4).fit(x, out)
    assert bool((fitted.score(x + 30 * hidden, out) > fitted.score(x, out) + 1).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_vim_keeps_its_polarity_where_all_logits_are_negative(sign):
    x, out, _ = linear_world()
    shifted = out + sign * 50
    fitted = ViM(dimension=4).fit(x, shifted)
    far = x + 8 * torch.linalg.svd(x - x.mean(dim=0)).Vh[-1]
    assert bool((fitted.score(far, shifted) > fitted.score(x, shifted)).all())


@pytest.mark.parametrize("rows", [torch.zeros(4, 6), torch.ones(1, 6), torch.eye(6)[:2].repeat(9, 1), torch.ones(9, 1)])
def test_vim_is_finite_where_features_do_not_vary(rows):
    fitted = ViM().fit(rows, torch.ones(len(rows), 3))
    assert fitted.score(rows, torch.ones(len(rows), 3)).isfinite().all()
    assert fitted.score(rows + 1, torch.ones(len(rows), 3)).isfinite().all()


def low_rank_world():
    """Rows of three dimensions about the origin of the head, in ten features of single precision."""
    x, _, head = linear_world()
    flat = (x[:, :2] @ torch.randn(2, 10, generator=stream(3), dtype=torch.float64)).float()
    return flat, head(flat.double()).detach().float(), head.float()


@pytest.mark.parametrize("dimension", [None, 3, 5, 9])
def test_vim_cuts_the_space_that_clean_rows_fill_where_its_dimension_leaves_them_nothing(dimension):
    x, out, head = low_rank_world()
    fitted = ViM(dimension, head).fit(x[:200], out[:200])
    expected = naive_vim((x[:200].double(), out[:200].double(), head.double()), x[200:].double(), 1)
    torch.testing.assert_close(fitted.score(x[200:], out[200:]).double(), expected, rtol=1e-3, atol=1e-3)
    assert fitted.directions.shape == (10, 9)


def test_a_residual_of_rounding_alone_would_rule_the_score():
    """Planted: the formula as it stands, with a dimension that holds all clean rows, in two precisions."""
    x, out, head = low_rank_world()
    noise = 1 + 1e-7 * torch.randn(x.shape, generator=stream(4), dtype=torch.float64)
    fit = (x.double(), out.double(), head.double())
    one, other = (naive_vim(fit, x.double() * factor, 5) for factor in (1, noise))
    assert float((one - other).abs().max()) > 1
    kept = ViM(5, head).fit(*fit[:2])
    change = kept.score(x.double() * noise, out.double()) - kept.score(x.double(), out.double())
    assert float(change.abs().max()) < 1e-4


def test_vim_refuses_what_cannot_be():
    with pytest.raises(ConfigurationError, match="dimension below the 10 features"):
        ViM(dimension=10).fit(*linear_world()[:2])
    with pytest.raises(ConfigurationError, match="head from 10 features to 3 logits"):
        ViM(head=nn.utils.skip_init(nn.Linear, 4, 3)).fit(*linear_world()[:2])
    with pytest.raises(ConfigurationError, match="1 to 10000 features"):
        ViM().fit(torch.zeros(3, 0), torch.zeros(3, 2))


def test_local_dimension_equals_the_estimator_written_out():
    bank = torch.randn(200, 4, generator=stream(), dtype=torch.float64)
    queries = torch.randn(15, 4, generator=stream(1), dtype=torch.float64)
    expected = []
    for query in queries:
        r = sorted((row - query).norm().item() for row in bank)[:20]
        expected.append(-1 / (sum(math.log(value / r[-1]) for value in r) / 20))
    torch.testing.assert_close(LocalDimension(k=20).fit(bank).score(queries), torch.tensor(expected).double())


@pytest.mark.parametrize("dimension", [1, 3, 6])
def test_local_dimension_finds_the_dimension_of_a_cube(dimension):
    bank = torch.zeros(20_000, 8)
    bank[:, :dimension] = torch.rand(20_000, dimension, generator=stream())
    centre = torch.zeros(30, 8)
    centre[:, :dimension] = 0.5 + 0.1 * torch.rand(30, dimension, generator=stream(1))
    score = LocalDimension(k=100).fit(bank).score(centre)
    assert float(score.mean()) == pytest.approx(dimension, rel=0.15)


def test_local_dimension_survives_copies_zero_vectors_and_far_rows():
    fitted = LocalDimension(k=3).fit(torch.zeros(9, 4))
    scores = fitted.score(torch.tensor([[0.0] * 4, [1.0] * 4, [1e20] * 4]))
    assert scores.isfinite().all() and scores[0] < 0.1
    assert scores.tolist()[1:] == [1e6, 1e6]


def test_local_dimension_needs_k_rows():
    with pytest.raises(ConfigurationError, match=r"at least k=20 rows.*smaller k"):
        LocalDimension().fit(torch.eye(4))
    with pytest.raises(ConfigurationError, match="k to be an integer >= 2"):
        LocalDimension(k=1)
