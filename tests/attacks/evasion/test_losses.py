"""Losses against slow twins, and their gradients where others starve."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aidefend import ConfigurationError, Threat
from aidefend.attacks.evasion import PGD, cross_entropy, dlr, margin
from aidefend.attacks.evasion.losses import hits_target, misclassified


@given(st.integers(2, 6), st.integers(0, 1000))
def test_margin_dlr_and_cross_entropy_against_loops(classes, seed):
    stream = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(5, classes, generator=stream, dtype=torch.float64)
    y = torch.randint(0, classes, (5,), generator=stream)
    for row in range(5):
        scores, label = z[row].tolist(), int(y[row])
        gap = max(s for k, s in enumerate(scores) if k != label) - scores[label]
        ordered = sorted(scores, reverse=True)
        assert margin(z, y)[row].item() == pytest.approx(gap)
        ratio = gap / (ordered[0] - ordered[2]) if classes > 2 else gap
        assert dlr(z, y)[row].item() == pytest.approx(ratio)
        expected = torch.logsumexp(z[row], 0).item() - scores[label]
        assert cross_entropy(z, y)[row].item() == pytest.approx(expected)
    assert torch.equal(misclassified(z, y), margin(z, y) > 0)


def test_dlr_ignores_shift_and_scale():
    z, y = torch.tensor([[3.0, 1.0, 0.5, -2.0]]), torch.tensor([1])
    torch.testing.assert_close(dlr(7 * z + 3, y), dlr(z, y))


def test_margin_has_a_gradient_where_cross_entropy_has_none():
    z, y = torch.tensor([[300.0, 0.0, 1.0]], requires_grad=True), torch.tensor([0])
    assert torch.autograd.grad(cross_entropy(z, y).sum(), z)[0].abs().max() == 0
    assert torch.autograd.grad(margin(z, y).sum(), z)[0].abs().max() == 1


def test_nan_logits_are_wrong_and_hit_no_target():
    z, y = torch.tensor([[9.0, torch.nan], [9.0, 0.0]]), torch.tensor([0, 0])
    assert misclassified(z, y).tolist() == [True, False]
    assert hits_target(z, torch.tensor([1, 0])).tolist() == [False, True]


def test_half_precision_logits_are_widened():
    z = torch.tensor([[10.0, 0.0]], dtype=torch.bfloat16)
    assert cross_entropy(z, torch.tensor([0])).item() == pytest.approx(4.54e-5, rel=1e-2)


@pytest.mark.parametrize("loss", ["hinge", 3, None])
def test_unknown_loss_is_refused(loss):
    with pytest.raises(ConfigurationError, match="loss"):
        PGD(Threat(), loss=loss)


def test_a_loss_that_takes_the_mean_is_refused():
    attack = PGD(Threat(), loss=torch.nn.CrossEntropyLoss())
    with pytest.raises(ConfigurationError, match="reduction"):
        attack(torch.nn.Linear(2, 2), torch.rand(3, 2), torch.zeros(3, dtype=torch.int64))
