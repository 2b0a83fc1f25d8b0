"""Distances to the k-th row of each class against a naive twin; copies of a row; rare classes."""

import pytest
import torch

from aidefend.sanitize import NeighbourDisagreement
from aidefend.sanitize.neighbour_disagreement import kth_distance


def naive_score(features, labels, k):
    """Row by row, with sorted lists."""

    def kth(i, rows):
        gaps = sorted(float((features[i] - features[j]).norm()) for j in rows if j != i)
        return gaps[min(k, len(rows) - 1) - 1]

    classes = {int(c): (labels == c).nonzero().flatten().tolist() for c in labels.unique()}
    usual = {c: torch.tensor([kth(i, rows) for i in rows]).median() for c, rows in classes.items()}
    scores = []
    for i, own in enumerate(labels.tolist()):
        ratio = {c: torch.log(torch.tensor(kth(i, rows)) / usual[c]) for c, rows in classes.items()}
        scores.append(float(ratio.pop(own) - min(ratio.values())))
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_equals_the_naive_twin(k):
    features, labels = torch.randn(40, 4).double(), torch.arange(40) % 3
    block = {"ids": tuple(map(str, range(40))), "features": features, "labels": labels}
    scores = NeighbourDisagreement(k=k).partial_fit(block).score(block)
    torch.testing.assert_close(scores, naive_score(features, labels, k), rtol=1e-5, atol=1e-5)


def test_the_independent_view_is_used_where_a_block_carries_it():
    view, labels = torch.cat([torch.randn(20, 2), torch.randn(20, 2) + 9]), torch.arange(40) // 20
    labels[0] = 1  # lies with class 0 in the view; the features cannot tell
    block = {"ids": tuple(map(str, range(40))), "features": torch.randn(40, 3), "labels": labels, "view": view}
    assert NeighbourDisagreement(k=3).partial_fit(block).score(block).argmax() == 0
    del block["view"]
    assert NeighbourDisagreement(k=3).partial_fit(block).score(block)[0] < 3


def test_a_rare_class_is_not_outvoted():
    features = torch.cat([torch.randn(300, 2), torch.randn(6, 2) + 7])
    labels = torch.tensor([0] * 300 + [1] * 6)
    block = {"ids": tuple(map(str, range(306))), "features": features, "labels": labels}
    assert bool((NeighbourDisagreement(k=10).partial_fit(block).score(block)[300:] < 0).all())


def test_a_row_is_not_its_own_neighbour_but_its_copy_is():
    bank = torch.tensor([[0.0], [0.0], [5.0], [9.0]])
    assert kth_distance(bank, bank, 1, torch.arange(4)).tolist() == [0.0, 0.0, 4.0, 4.0]
    assert kth_distance(bank[2:3], bank, 1, torch.tensor([-1])).tolist() == [0.0]


def test_rows_that_lie_together_vouch_for_each_other_up_to_k():
    """Feature collisions, twenty rows beside one of another class: the tenth neighbour is one of them, the 30th not."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 2
    features = torch.randn(600, 6, generator=stream) + 8.0 * labels[:, None]
    features[:40:2] = features[1] + 0.05 * torch.randn(20, 6, generator=stream)  # labelled 0, beside a row of class 1
    block = {"ids": tuple(map(str, range(600))), "features": features, "labels": labels}
    few, many = (NeighbourDisagreement(k=k).partial_fit(block).score(block) for k in (10, 30))
    assert bool((few[:40:2] < 0).all()) and bool((many[:40:2] > 0).all())
    assert float((many[40:] > 0).double().mean()) < 0.01
