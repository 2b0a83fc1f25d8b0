"""The differentiable view: its last class is the guard's refusal, and its gradient is what an adaptive attack needs."""

import math

import pytest
import torch

from aidefend import ConfigurationError
from aidefend.validate import Energy, Guard, InputSpec, LabelOnly, Mahalanobis, MaxSoftmax, NearestNeighbours
from aidefend.validate.attackable import _refusal
from tests.validate.small_world import Recorder, model, rows, strange

FIT, CALIBRATION = rows(200, 1), rows(300, 2)
MIXED = torch.cat([rows(60, 3)[0], strange(5), rows(60, 4)[0] * 1.5])


TWO = (Energy(), NearestNeighbours(k=5))


def guard_of(detectors=TWO, **options):
    return Guard.calibrate(model(), CALIBRATION, detectors=list(detectors), alpha=0.05, fit=FIT, **options)


@pytest.mark.parametrize(
    "detectors",
    [(Energy(),), TWO, (MaxSoftmax(), NearestNeighbours(k=5), Mahalanobis())],
)
def test_the_last_class_wins_exactly_where_the_guard_refuses(detectors):
    x = MIXED.clone()
    x[3], x[9, 0] = math.nan, 1e6
    guard = guard_of(detectors)
    decision, logits = guard(x), guard.attackable()(x)
    assert logits.shape == (len(x), 4) and not decision.accepted.all() and decision.accepted.any()
    assert torch.equal(logits.argmax(dim=1) == 3, ~decision.accepted)
    kept = decision.accepted
    torch.testing.assert_close(logits[kept, :3], decision.outputs[kept])
    assert logits[3].tolist() == logits[9].tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_margin_is_lost_beside_large_logits(dtype):
    """Planted violation: in half precision a logit of 50 swallows most margins, and refused rows look accepted."""
    network = model().to(dtype)
    with torch.no_grad():
        network[2].bias += 50
    spec = InputSpec((6,), dtype, -30.0, 30.0)
    data, fit = rows(300, 2)[0].to(dtype), rows(200, 1)[0].to(dtype)
    guard = Guard.calibrate(network, data, spec, [Energy(), NearestNeighbours(k=5)], 0.1, fit)
    x = rows(1000, 7)[0].to(dtype).requires_grad_()
    joined = guard.attackable()(x)
    refused = joined.argmax(dim=1) == 3
    assert torch.equal(refused, ~guard(x.detach()).accepted) and 50 < refused.sum() < 500
    assert joined.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    joined[:, -1].sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any(dim=1).all()


def test_a_margin_below_rounding_and_of_zero_falls_on_its_side():
    top = torch.tensor([50.0, 50.0, 50.0, 0.0, -50.0])
    margin = torch.tensor([1e-9, 0.0, -1e-9, 1e-50, 1e4], dtype=torch.float64).requires_grad_()
    refusal = _refusal(top, margin)
    assert (refusal > top).tolist() == [True, False, False, True, True] and not (refusal == top).any()
    refusal.sum().backward()
    assert margin.grad.tolist() == [1.0] * 5


def test_its_gradient_leads_strange_rows_past_the_detectors():
    """An attack that knows the guard passes it: the naive view of its strength must not be the only one."""
    guard = guard_of()
    view, x = guard.attackable(), strange(5)
    assert not guard(x).accepted.any()
    for _ in range(400):
        x = x.detach().requires_grad_()
        logits = view(x)
        (gradient,) = torch.autograd.grad((logits[:, 3] - logits[:, :3].amax(dim=1)).sum(), x)
        x = (x - 0.1 * gradient / gradient.norm(dim=1, keepdim=True)).clamp(-6, 8)
    assert bool(guard(x.detach()).accepted.all())


def test_the_margin_has_the_gradient_of_finite_differences():
    data, fit = CALIBRATION[0].double(), FIT[0].double()
    guard = Guard.calibrate(model().double(), data, detectors=[*TWO, Mahalanobis()], alpha=0.05, fit=fit)
    x = rows(4, 5)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: guard.attackable()(rows)[:, 3], (x,), eps=1e-7, atol=1e-4)


def test_nothing_is_logged_charged_or_hardened():
    recorder = Recorder()
    guard = guard_of(output=LabelOnly(), **recorder.all())
    assert guard.attackable()(MIXED).is_floating_point() and recorder.calls == []


def test_malformed_batches_are_all_refused_and_malformed_calls_raise():
    view = guard_of().attackable()
    for x in (MIXED.double(), MIXED[:, :5], torch.full((2, 6), math.nan), MIXED[:0]):
        logits = view(x)
        assert logits.shape == (len(x), 4) and bool((logits.argmax(dim=1) == 3).all())
    with pytest.raises(ConfigurationError, match=r"torch\.Tensor"):
        view("text")


def test_clipping_is_part_of_the_view():
    guard = guard_of(spec=InputSpec((6,), low=-3.0, high=7.0, out_of_range="clip"))
    x = rows(3, 6)[0] + torch.tensor([20.0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(guard.attackable()(x), guard.attackable()(x.clamp(-3, 7)))


def test_it_is_a_module_that_stays_in_eval_mode_and_moves_with_its_guard():
    view = guard_of().attackable()
    view.train()
    assert not any(module.training for module in view.guard.modules())
    view.double()
    assert {buffer.dtype for buffer in view.guard.calibration.buffers()} == {torch.float64, torch.int64}
    assert view.state_dict()["guard.detector_nearest-neighbours.bank"].dtype == torch.float32
