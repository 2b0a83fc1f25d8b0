"""Exact neighbours: the search by groups of columns, digits, and precisions."""

import pytest
import torch

from aidefend._core.neighbours import k_nearest


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("n", "k"), [(700, 3), (1000, 10), (1000, 16), (130, 2), (1029, 5)])
def test_many_columns_are_searched_by_groups_and_nothing_is_lost(metric, n, k):
    """Wide blocks look at the groups with the smallest minima only; the naive search looks at everything."""
    stream = torch.Generator().manual_seed(n + k)
    bank, queries = torch.randn(n, 6, generator=stream).double(), torch.randn(40, 6, generator=stream).double()
    bank[n // 2 :: 7] = bank[0]  # ties inside and between groups
    distances, rows = k_nearest(queries, bank, k, metric=metric)
    if metric == "euclidean":
        naive = (queries[:, None] - bank[None]).norm(dim=2)
    else:
        naive = 1 - torch.nn.functional.cosine_similarity(queries[:, None], bank[None], dim=2)
    torch.testing.assert_close(distances, naive.sort(dim=1).values[:, :k])
    torch.testing.assert_close(naive.gather(1, rows), distances)
    assert all(len(set(row)) == k for row in rows.tolist())


def test_near_rows_far_from_the_origin_keep_their_digits():
    bank = 1e4 + torch.arange(200.0).unsqueeze(1).repeat(1, 4) * 1e-2
    distances, rows = k_nearest(bank, bank, 1, exclude_self=True)
    assert bool(((rows[:, 0] - torch.arange(200)).abs() == 1).all())
    torch.testing.assert_close(distances[:, 0].double(), torch.full((200,), 2e-2).double(), rtol=0.1, atol=0)


def test_half_precision_and_mixed_precision_are_taken():
    stream = torch.Generator().manual_seed(0)
    bank, queries = 300 * torch.randn(90, 8, generator=stream), 300 * torch.randn(5, 8, generator=stream)
    expected = k_nearest(queries, bank, 2)[1]
    for queried, banked in ((torch.float16, torch.float16), (torch.float64, torch.float32)):
        distances, rows = k_nearest(queries.to(queried), bank.to(banked), 2)
        assert distances.dtype == queried and bool(torch.isfinite(distances).all())
        assert torch.equal(rows, expected)
