"""Objectives for randomised smoothing against the papers' formulas, sample by sample, and what they train."""

import math

import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.nn.functional import cross_entropy

from aidefend import AidefendError, Threat
from aidefend._core.random import normal
from aidefend.adversarial import MACER, Consistency, EpsWarmup, Gaussian, SmoothAdv, SmoothedModel
from aidefend.attacks import PGD

SIGMA = 0.3


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def world(n=7):
    x = torch.rand(n, 4, generator=stream(1), dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def noise_of(x, samples):
    """The draw that an objective makes first."""
    return SIGMA * normal((samples, *x.shape), stream(5), x)


def by_hand(name, model, x, y):
    """The formula of the paper for each sample."""
    samples = 5
    noise, rows = noise_of(x, samples), []
    for i in range(len(x)):
        logits = torch.stack([model(x[i] + noise[k, i]) for k in range(samples)])
        target = y[i].repeat(samples)
        probabilities = logits.softmax(1)
        mean = probabilities.mean(0)
        natural = cross_entropy(logits, target)
        if name == "gaussian":
            rows.append(natural)
        elif name == "consistency":
            divergences = [(mean * (mean / probabilities[k]).log()).sum() for k in range(samples)]
            entropy = -(mean * mean.log()).sum()
            rows.append(natural + 3.0 * sum(divergences) / samples + 0.7 * entropy)
        else:
            soft = (2.0 * logits).softmax(1).mean(0)
            radius = torch.zeros((), dtype=torch.float64)
            if int(soft.argmax()) == int(y[i]):
                other = soft[torch.arange(3) != y[i]].max()
                gap = torch.special.ndtri(soft[y[i]]) - torch.special.ndtri(other)
                radius = SIGMA / 2 * (1.5 - gap).clamp(min=0)
            rows.append(-mean[y[i]].log() + 4.0 * radius)
    return torch.stack(rows)


OURS = {
    "gaussian": Gaussian(SIGMA, 5),
    "consistency": Consistency(SIGMA, 5, weight=3.0, entropy_weight=0.7),
    "macer": MACER(SIGMA, 5, weight=4.0, gamma=1.5, inverse_temperature=2.0),
}


@pytest.mark.parametrize("name", OURS)
def test_values_and_gradients_are_those_of_the_paper(name):
    model, (x, y) = net(), world()
    ours = OURS[name].per_example(model, x, y, generator=stream(5))
    expected = by_hand(name, model, x, y)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-7)
    gradients = [torch.autograd.grad(losses.mean(), [*model.parameters()]) for losses in (ours, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-6)


def test_the_soft_radius_of_known_logits():
    """All copies answer log(0.8, 0.15, 0.05): the radius is sigma / 2 * (quantile of 0.8 - quantile of 0.15)."""
    logits = torch.tensor([0.8, 0.15, 0.05], dtype=torch.float64).log()

    class Constant(nn.Module):
        def forward(self, x):
            return logits.expand(len(x), 3)

    x = torch.rand(2, 4, dtype=torch.float64, generator=stream())
    objective = MACER(0.5, 3, weight=1.0, gamma=8.0, inverse_temperature=1.0)
    found = objective.per_example(Constant(), x, torch.tensor([0, 1]))
    radius = 0.5 / 2 * (norm.ppf(0.8) - norm.ppf(0.15))
    assert float(found[0]) == pytest.approx(-math.log(0.8) + 0.5 / 2 * 8 - radius)
    assert float(found[1]) == pytest.approx(-math.log(0.15))  # a wrong sample has no radius to enlarge


def test_without_noise_they_are_the_criterion():
    model, (x, y) = net(), world()
    plain = cross_entropy(model(x), y, reduction="none")
    torch.testing.assert_close(Gaussian(0.0, 3).per_example(model, x, y), plain)
    still = Consistency(0.0, 3, entropy_weight=0.0).per_example(model, x, y)
    torch.testing.assert_close(still, plain)
    none = SmoothAdv(PGD(Threat("l2", 0.0), 2), 0.0).per_example(model, x, y)
    torch.testing.assert_close(none, plain)


def test_noise_is_neither_cut_nor_shared_between_samples():
    seen = []

    class Watching(nn.Module):
        def forward(self, x):
            seen.append(x.detach())
            return x[:, :3]

    x = torch.zeros(500, 4)
    Gaussian(0.5, 2).per_example(Watching(), x, torch.zeros(500, dtype=torch.long))
    assert len(seen) == 1 and seen[0].shape == (1000, 4)
    assert abs(float(seen[0].std()) - 0.5) < 0.03 and float(seen[0].min()) < -0.5
    assert len(seen[0].unique(dim=0)) == 1000


def test_smooth_adv_attacks_the_mean_answer_with_the_noise_of_training():
    model, (x, y) = net(), world()
    objective = SmoothAdv(PGD(Threat("l2", 0.3, (-5.0, 5.0)), 5), SIGMA, 5)
    noise = noise_of(x, 5)
    generator = stream(5)
    losses = objective.per_example(model, x, y, generator=generator)
    again = stream(5)
    normal((5, *x.shape), again, x)
    x_adv = objective.craft(model, x, y, noise, generator=again)

    def soft(points):
        copies = model((points[None] + noise).flatten(0, 1)).reshape(5, len(x), 3).softmax(2).mean(0)
        return -copies.gather(1, y[:, None])[:, 0].log()

    assert (soft(x_adv) > soft(x) + 0.01).all()
    assert Threat("l2", 0.3, (-5.0, 5.0)).contains(x_adv, x).all()
    expected = torch.stack([cross_entropy(model(x_adv + noise[k]), y, reduction="none") for k in range(5)]).mean(0)
    torch.testing.assert_close(losses, expected)
    half = EpsWarmup(10).objective_at(objective, 5)
    assert half.attack.threat.eps == pytest.approx(0.15)


def test_bad_fields_are_refused():
    for make in (
        lambda: Gaussian(-1.0),
        lambda: Gaussian(0.1, 0),
        lambda: Consistency(0.1, 1),
        lambda: Consistency(0.1, weight=-1),
        lambda: MACER(0.0),
        lambda: MACER(0.1, gamma=0),
        lambda: MACER(0.1, gamma=12),
        lambda: MACER(0.1, criterion=3),
        lambda: SmoothAdv(lambda model, x, y: x, 0.1),
        lambda: SmoothAdv(PGD(Threat("l2", 0.1), targeted=True), 0.1),
    ):
        with pytest.raises(AidefendError):
            make()
    model, (x, y) = net(), world()
    with pytest.raises(AidefendError, match="class indices"):
        MACER(0.1).per_example(model, x, torch.rand(7, 3))
    for objective in (Gaussian(0.1), SmoothAdv(PGD(Threat("l2", 0.1), 1), 0.1)):
        with pytest.raises(AidefendError, match="model"):
            objective(lambda x: x[:, 0] * 1.0, x, y)
    with pytest.raises(AidefendError, match="labels"):
        MACER(0.1).per_example(model, x, y + 3)


@pytest.mark.parametrize(
    "objective",
    [
        Gaussian(0.5, 2),
        Consistency(0.5, 2, weight=5.0),
        MACER(0.5, 8, weight=2.0, gamma=4.0, inverse_temperature=4.0),
        SmoothAdv(PGD(Threat("l2", 0.3, (-9.0, 9.0)), 2), 0.5),
    ],
    ids=["gaussian", "consistency", "macer", "smooth-adv"],
)
def test_the_smoothed_net_has_larger_radii_than_one_trained_without_noise(objective):
    """The planted no-op is the same loop on the plain criterion, on data where it learns a wiggly boundary."""
    g = stream(2)
    x = torch.randn(200, 2, generator=g)
    y = (x[:, 0] > 0).long()
    x[:, 0] += (2 * y - 1) * 0.6
    flip = torch.rand(200, generator=g) < 0.15
    noisy_labels = torch.where(flip, 1 - y, y)
    radii = {}
    for name in ("plain", "noise"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        optimizer, own = torch.optim.Adam(model.parameters(), 0.01), stream(3)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (
                cross_entropy(model(x), noisy_labels)
                if name == "plain"
                else objective(model, x, noisy_labels, generator=own)
            )
            loss.backward()
            optimizer.step()
        smoothed = SmoothedModel(model.eval(), 0.5, 2, batch_size=4096)
        radii[name] = smoothed.certify(x[:60], n0=100, n=1000, generator=stream(4)).average_radius(y[:60])
    assert radii["noise"] > 1.05 * radii["plain"], radii
