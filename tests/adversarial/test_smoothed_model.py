"""SmoothedModel against closed forms, a naive loop, and stopping rules that are known to be wrong."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from aidefend._core.errors import ConfigurationError, IncompatibleModel
from aidefend.adversarial import SmoothedModel
from aidefend.adversarial.smoothing_certificate import Ledger, Look, needed_probability, plan_looks

ROWS, ALPHA = 20_000, 0.05


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(weight=(3.0, -4.0), dtype=torch.float32):
    """Two classes, logits (w.x, -w.x): the true radius of a row is |w.x| / |w|."""
    model = nn.Linear(2, 2, bias=False, dtype=dtype).eval()
    w = torch.tensor(weight, dtype=dtype)
    model.weight.data = torch.stack([w, -w])
    return model


def points(n=300):
    x = torch.randn(n, 2, generator=stream(1))
    return x, (x @ torch.tensor([3.0, -4.0])).double() / 5


def run(looks, p, target=None, rows=ROWS):
    """Bounds and draws of simulated rows whose class has probability p."""
    ledger = Ledger(rows, looks, ALPHA, None if target is None else needed_probability(target, 1.0))
    rng, votes, drawn = np.random.default_rng(0), torch.zeros(rows, dtype=torch.int64), 0
    for look in looks:
        votes += torch.from_numpy(rng.binomial(look.samples - drawn, p, rows))
        drawn = look.samples
        if len(ledger.active):
            ledger.record(look, votes)
    return ledger


def holds(wrong):
    return int(wrong.sum()) <= ALPHA * ROWS + 4 * math.sqrt(ROWS * ALPHA * (1 - ALPHA))


@pytest.mark.parametrize("target", [None, 0.2, 0.5])
def test_claims_are_wrong_with_probability_alpha_at_most(target):
    p = 0.5 if target is None else needed_probability(target, 1.0) - 1e-4
    ledger = run(plan_looks(10_000, ALPHA, True, target), p, target)
    claimed = ledger.p_lower > 0.5
    assert holds(claimed & (ledger.p_lower > p))
    assert int((claimed & (ledger.p_lower > p)).sum()) > 0  # the worst case is near, the test can fail


def test_planted_full_alpha_at_each_look_is_caught():
    p = needed_probability(0.5, 1.0) - 1e-4
    wrong = run([Look(100, ALPHA), Look(1000, ALPHA), Look(10_000, ALPHA)], p, 0.5).p_lower > p
    assert not holds(wrong)


def test_planted_point_estimate_is_caught():
    p, n = 0.8, 10_000
    votes = np.random.default_rng(0).binomial(n, p, ROWS)
    assert not holds(torch.from_numpy(votes / n > p))
    assert holds(run(plan_looks(n, ALPHA, True, None), p).p_lower > p)


def test_early_looks_spend_only_with_a_target_and_never_more_than_alpha():
    assert plan_looks(10_000, 0.001, True, None) == (Look(100, 0.0), Look(1000, 0.0), Look(10_000, 0.001))
    assert plan_looks(10_000, 0.001, False, None) == (Look(10_000, 0.001),)
    for n in (20, 150, 10_000):
        assert sum(look.alpha for look in plan_looks(n, 0.001, True, 0.5)) <= 0.001 * (1 + 1e-12)


def test_hopeless_rows_stop_early_and_good_rows_do_not():
    looks = plan_looks(10_000, ALPHA, True, None)
    assert float(run(looks, 0.3).samples.double().mean()) < 300
    good = run(looks, 0.6)
    assert float((good.samples == 10_000).double().mean()) > 1 - 2 * ALPHA
    assert bool((run(looks, 1.0).samples == 10_000).all())
    assert bool((run(plan_looks(10_000, ALPHA, True, 0.5), 1.0, 0.5).samples == 100).all())


def test_linear_model_radius_is_below_the_truth_and_near_it():
    x, signed = points()
    certificate = SmoothedModel(linear(), 0.5, 2).certify(x, n=20_000, generator=stream())
    sure = certificate.prediction >= 0
    assert int(sure.sum()) > 280
    assert bool((certificate.radius <= signed.abs()).all())
    assert torch.equal(certificate.prediction[sure], (signed < 0).long()[sure])
    near = sure & (signed.abs() < 0.8)
    assert float((signed.abs() - certificate.radius)[near].max()) < 0.04
    assert bool((certificate.radius[~sure] == 0).all())


def test_bound_equals_clopper_pearson_of_the_exact_count():
    smoothed = SmoothedModel(lambda x: torch.stack([x[:, 0] * 0 + 1, x[:, 0] * 0], 1), 0.5, 2)
    certificate = smoothed.certify(torch.zeros(3, 4), n=500, generator=stream())
    torch.testing.assert_close(certificate.p_lower, torch.full((3,), 0.001 ** (1 / 500), dtype=torch.float64))
    assert float(certificate.radius[0]) == pytest.approx(0.5 * stats.norm.ppf(0.001 ** (1 / 500)))


def test_counts_have_the_distribution_of_the_naive_loop():
    x, signed = points(8)
    smoothed, noise = SmoothedModel(linear(), 0.5, 2), stream(3)
    naive = [int((linear()(row + 0.5 * torch.randn(4000, 2, generator=noise)).argmax(1) == 0).sum()) for row in x]
    ours = smoothed._votes(x, 4000, stream(4))
    truth = stats.norm.cdf(signed.numpy() / 0.5)
    spread = 4.5 * np.sqrt(4000 * truth * (1 - truth)) + 1
    assert bool((ours.sum(1) == 4000).all())
    assert (np.abs(np.array(naive) - 4000 * truth) <= spread).all()
    assert (np.abs(ours[:, 0].numpy() - 4000 * truth) <= spread).all()


@pytest.mark.parametrize("batch_size", [1, 7, 100, 250, 100_000])
def test_results_do_not_depend_on_batch_size_or_on_the_other_rows(batch_size):
    x, _ = points(5)
    expected = SmoothedModel(linear(), 1.0, 2).certify(x, n0=30, n=350, generator=stream())
    other = SmoothedModel(linear(), 1.0, 2, batch_size=batch_size).certify(x[:3], n0=30, n=350, generator=stream())
    for name in ("prediction", "radius", "p_lower", "samples"):
        assert torch.equal(getattr(other, name), getattr(expected, name)[:3])


def test_selection_draws_are_not_used_again_and_noise_is_not_clamped():
    seen = []

    def model(x):
        seen.append(x.clone())
        return torch.stack([x[:, 0] + 10, x[:, 0]], 1)

    SmoothedModel(model, 0.5, 2).certify(torch.full((1, 3), 0.5), n0=60, n=200, generator=stream())
    draws = torch.cat(seen)
    assert len(draws) == 260
    assert len(torch.unique(draws, dim=0)) == 260
    assert float(draws.min()) < 0
    assert float(draws.max()) > 1
    assert float(((draws - 0.5) / 0.5).std()) == pytest.approx(1, abs=0.1)


def test_nan_outputs_vote_for_nobody():
    def model(x):
        logits = torch.stack([x[:, 0] + 100, x[:, 0]], 1)
        return torch.where(x[:, :1] > 0, logits, torch.nan)

    counts = SmoothedModel(model, 1.0, 2)._votes(torch.zeros(1, 1), 2000, stream())
    assert 850 < int(counts[0, 0]) < 1150
    assert int(counts[0, 1]) == 0
    never = SmoothedModel(lambda x: torch.full((len(x), 2), torch.nan), 1.0, 2)
    assert never.predict(torch.zeros(2, 1)).tolist() == [-1, -1]
    assert never.certify(torch.zeros(2, 1), n=100).prediction.tolist() == [-1, -1]


def test_predict_abstains_on_the_boundary_and_is_right_elsewhere():
    smoothed = SmoothedModel(linear(), 0.5, 2)
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert smoothed.predict(x, generator=stream()).tolist() == [-1, 0, 1]


def test_predict_refuses_an_n_that_always_abstains():
    smoothed, x = SmoothedModel(linear(), 0.5, 2), torch.tensor([[99.0, 0.0]])
    with pytest.raises(ConfigurationError, match="n >= 11"):
        smoothed.predict(x, n=10)
    assert smoothed.predict(x, n=11).tolist() == [0]


def test_predict_is_wrong_with_probability_alpha_at_most():
    x = torch.tensor([[0.01, 0.0]])  # class 0 by a hair
    wrong = 0
    for seed in range(200):  # rows of one call share their noise: one call counts as one trial
        wrong += int(SmoothedModel(linear(), 0.5, 2).predict(x, n=60, alpha=ALPHA, generator=stream(seed)) == 1)
    assert wrong <= 200 * ALPHA + 4 * math.sqrt(200 * ALPHA)


def test_attackable_takes_an_empty_batch():
    assert SmoothedModel(linear(), 0.5, 2).attackable(2, seed=0)(torch.zeros(0, 2)).shape == (0, 2)


def test_plain_call_returns_log_frequencies():
    out = SmoothedModel(linear(), 0.5, 2)(torch.tensor([[0.3, 0.0], [9.0, 0.0]]))
    assert bool(out.isfinite().all())
    torch.testing.assert_close(out.exp().sum(1), torch.ones(2))
    assert float(out[0, 0].exp()) == pytest.approx(stats.norm.cdf(0.18 / 0.5), abs=0.08)


def test_attackable_is_differentiable_and_equals_the_mean_softmax():
    smoothed, x = SmoothedModel(linear(), 0.5, 2), torch.tensor([[0.1, 0.0]], requires_grad=True)
    out = smoothed.attackable(samples=4000, seed=0)(x)
    noisy = x.detach() + 0.5 * torch.randn(40_000, 2, generator=stream(5))
    torch.testing.assert_close(out.exp()[0], linear()(noisy).softmax(1).mean(0), atol=0.02, rtol=0)
    out[0, 0].backward()
    assert float(x.grad[0, 0]) > 0 > float(x.grad[0, 1])


def test_no_trace_is_left_also_after_an_exception():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    model[0].weight.grad = torch.ones(2, 2)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    SmoothedModel(model, 0.5, 2).certify(torch.zeros(2, 2), n=100)
    with pytest.raises(IncompatibleModel, match="num_classes=2"):
        SmoothedModel(model, 0.5, 3).certify(torch.zeros(2, 2), n=100)
    assert torch.equal(state, torch.get_rng_state())
    assert bool((model[0].weight.grad == 1).all())
    assert model[0].weight.requires_grad
    assert not model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_empty_batch(dtype):
    smoothed = SmoothedModel(linear(dtype=dtype), 0.25, 2)
    certificate = smoothed.certify(torch.ones(2, 2, dtype=dtype), n=200, generator=stream())
    assert certificate.radius.dtype == torch.float64
    assert certificate.prediction.tolist() == [1, 1] or -1 in certificate.prediction.tolist()
    empty = smoothed.certify(torch.zeros(0, 2, dtype=dtype))
    assert len(empty) == 0
    assert smoothed(torch.zeros(0, 2, dtype=dtype)).shape == (0, 2)


def test_state_dict_and_move():
    smoothed = SmoothedModel(linear(), 0.5, 2)
    other = SmoothedModel(linear((1.0, 1.0)), 0.5, 2)
    other.load_state_dict(smoothed.state_dict())
    assert torch.equal(other.model.weight, smoothed.model.weight)
    assert smoothed.to(torch.float64).certify(torch.ones(1, 2).double(), n=50).samples.tolist()[0] <= 50


def test_certificate_summaries():
    x, signed = points(40)
    certificate = SmoothedModel(linear(), 0.5, 2).certify(x, n=500, generator=stream())
    y = (signed < 0).long()
    values = [share.value for share in certificate.accuracy_at([0.0, 0.3, 99.0], y)]
    by_hand = [float(((certificate.radius > r) & (certificate.prediction == y)).double().mean()) for r in (0, 0.3)]
    assert values == [*by_hand, 0.0]
    assert certificate.average_radius(y) == pytest.approx(float(certificate.radius.mean()))
    assert certificate.average_radius(1 - y) == 0
    evidence = certificate.to_evidence(y)
    assert evidence["smoothing.certified_accuracy"].value == values[0]
    assert evidence["smoothing.average_certified_radius"].value == certificate.average_radius(y)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n": 9}, "n >= 10"),
        ({"n": 10}, None),
        ({"n0": 0}, "n0"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.0}, "alpha"),
        ({"target_radius": 0.0}, "target_radius"),
        ({"early_stop": 1}, "early_stop"),
    ],
)
def test_certify_refuses(arguments, match):
    smoothed = SmoothedModel(linear(), 0.5, 2)
    if match is None:
        assert float(smoothed.certify(torch.full((1, 2), 99.0), **arguments).radius[0]) > 0
        return
    with pytest.raises(ConfigurationError, match=match):
        smoothed.certify(torch.zeros(1, 2), **arguments)


def test_constructor_and_train_mode_are_refused():
    for sigma in (0, -1.0, math.nan):
        with pytest.raises(ConfigurationError, match="sigma"):
            SmoothedModel(linear(), sigma, 2)
    with pytest.raises(ConfigurationError, match="num_classes"):
        SmoothedModel(linear(), 0.5, 1)
    with pytest.raises(IncompatibleModel, match="BatchNorm1d is in train mode"):
        SmoothedModel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 0.5, 2).certify(torch.zeros(1, 2))
    with pytest.raises(ConfigurationError, match="x to be floating point"):
        SmoothedModel(linear(), 0.5, 2).predict(torch.zeros(1, 2).long())


def test_compiled_model_gives_the_same_certificate():
    x, _ = points(4)
    plain = SmoothedModel(linear(), 0.5, 2).certify(x, n=200, generator=stream())
    compiled = SmoothedModel(torch.compile(linear(), backend="eager"), 0.5, 2).certify(x, n=200, generator=stream())
    assert torch.equal(plain.radius, compiled.radius)
