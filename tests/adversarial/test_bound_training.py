"""Training on bounds: the loss by hand, what it reduces to, schedules, BatchNorm, and nets that can be verified."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from aidefend import AidefendError, IncompatibleModel, Threat
from aidefend.adversarial import (
    SABR,
    BoundSchedule,
    CrownIBPTraining,
    EpsWarmup,
    IBPTraining,
    PGDTraining,
    certify_bounds,
)
from aidefend.attacks import PGD

FREE = (-10.0, 10.0)


def world(n=12):
    x = torch.rand(n, 4, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def test_the_loss_of_intervals_by_hand():
    model, (x, y), eps = net(), world(), 0.1
    (w1, b1), (w2, b2) = [(m.weight, m.bias) for m in model if isinstance(m, nn.Linear)]
    centre, radius = x @ w1.T + b1, eps * w1.abs().sum(dim=1)
    low, high = (centre - radius).relu(), (centre + radius).relu()
    rows = []
    for row in range(len(x)):
        form = w2[y[row]] - w2  # (3, 16): logit y less each other one
        worst = form.clamp(min=0) @ low[row] + form.clamp(max=0) @ high[row] + b2[y[row]] - b2
        rows.append(-worst)
    by_hand = 0.3 * cross_entropy(model(x), y, reduction="none")
    by_hand = by_hand + 0.7 * cross_entropy(torch.stack(rows), y, reduction="none")
    ours = IBPTraining(Threat("linf", eps, FREE), kappa=0.3).per_example(model, x, y)
    torch.testing.assert_close(ours, by_hand)
    expected = torch.autograd.grad(by_hand.mean(), [*model.parameters()])
    for mine, theirs in zip(torch.autograd.grad(ours.mean(), [*model.parameters()]), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_ends_of_kappa_beta_and_share():
    model, (x, y) = net(), world()
    threat = Threat("linf", 0.1, FREE)
    clean = cross_entropy(model(x), y, reduction="none")
    torch.testing.assert_close(IBPTraining(threat, kappa=1.0).per_example(model, x, y), clean)
    torch.testing.assert_close(IBPTraining(Threat("linf", 0.0), kappa=0.0).per_example(model, x, y), clean)
    ibp = IBPTraining(threat, kappa=0.5).per_example(model, x, y)
    torch.testing.assert_close(CrownIBPTraining(threat, 0.5, 0.0).per_example(model, x, y), ibp)
    half = CrownIBPTraining(threat, 0.0, 0.5).per_example(model, x, y)
    assert not torch.allclose(half, IBPTraining(threat, 0.0).per_example(model, x, y))
    whole = SABR(PGD(threat, 3), share=1.0, kappa=0.5).per_example(model, x, y)
    torch.testing.assert_close(whole, ibp)


def test_linear_bounds_are_sound_and_tighter_where_it_counts():
    """The worst logits of CROWN-IBP bound every attack; a smaller loss than with intervals on this net."""
    model, (x, y) = net().eval(), world()
    threat = Threat("linf", 0.05, FREE)
    straight = PGD(threat, 20, random_start=False)
    attacked = PGDTraining(straight).per_example(model, x, y)
    for objective in (IBPTraining(threat, 0.0), CrownIBPTraining(threat, 0.0, 1.0)):
        assert (objective.per_example(model, x, y) >= attacked - 1e-6).all()
    small = SABR(straight, share=1e-3).per_example(model, x, y)
    torch.testing.assert_close(small, attacked, atol=5e-3, rtol=5e-3)


def test_small_boxes_stay_inside_the_threat():
    objective = SABR(PGD(Threat("linf", 0.2), 3), share=0.3)
    x = torch.tensor([[0.05, 0.5, 0.99, 0.5]])
    region = objective.region(x, torch.tensor([[0.0, 0.7, 1.0, 0.5]]))
    low, high = (x - 0.2).clamp(min=0), (x + 0.2).clamp(max=1)
    assert (region.box.lower >= low - 1e-6).all() and (region.box.upper <= high + 1e-6).all()
    torch.testing.assert_close(region.box.upper[0, 1], torch.tensor(0.7))
    torch.testing.assert_close(region.box.upper - region.box.lower, 0.3 * (high - low))


def test_batch_norm_takes_the_statistics_of_the_clean_batch_once():
    model, (x, y) = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), world()
    IBPTraining(Threat("linf", 0.1), 0.5)(model, x, y)
    assert model[1].num_batches_tracked == 1
    twin = nn.BatchNorm1d(8)
    twin(model[0](x))
    torch.testing.assert_close(model[1].running_mean, twin.running_mean)
    still = IBPTraining(Threat("linf", 0.0), 0.0).per_example(model, x, y)
    torch.testing.assert_close(still, cross_entropy(model(x), y, reduction="none"), atol=1e-5, rtol=1e-5)


def test_the_schedule():
    schedule = BoundSchedule(EpsWarmup(10), kappa=(1.0, 0.5), beta=(1.0, 0.0))
    objective = CrownIBPTraining(Threat("linf", 0.2))
    found = [schedule.objective_at(objective, step) for step in (0, 5, 10, 99)]
    assert [(o.threat.eps, o.kappa, o.beta) for o in found] == [
        (0, 1, 1),
        (0.1, 0.75, 0.5),
        (0.2, 0.5, 0),
        (0.2, 0.5, 0),
    ]
    sabr = schedule.objective_at(SABR(PGD(Threat("linf", 0.2), 2)), 5)
    assert sabr.attack.threat.eps == 0.1 and sabr.kappa == 0.75
    with pytest.raises(AidefendError, match="kappa"):
        schedule.objective_at(PGDTraining(PGD(Threat("linf", 0.2))), 5)
    with pytest.raises(AidefendError, match="kappa"):
        BoundSchedule(EpsWarmup(10), kappa=0.5)


def test_what_cannot_be_bounded_is_refused():
    (x, y) = world()
    with pytest.raises(IncompatibleModel, match="Dropout"):
        IBPTraining(Threat("linf", 0.1))(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), x, y)
    with pytest.raises(AidefendError, match=r"nn\.Module"):
        IBPTraining(Threat("linf", 0.1))(lambda x: x[:, :3] * 1.0, x, y)
    with pytest.raises(AidefendError, match="y"):
        IBPTraining(Threat("linf", 0.1))(net(), x, torch.rand(12, 3))
    with pytest.raises(AidefendError, match="linf threat"):
        SABR(PGD(Threat("l2", 0.1)))


@pytest.mark.parametrize(
    "objective",
    [
        IBPTraining(Threat("linf", 0.1, FREE)),
        CrownIBPTraining(Threat("linf", 0.1, FREE)),
        SABR(PGD(Threat("linf", 0.1, FREE), 3), 0.6),
    ],
    ids=["ibp", "crown-ibp", "sabr"],
)
def test_trained_nets_are_verified_where_plain_ones_are_not(objective):
    """The planted no-op is plain training on the same data: far less of it is verified."""
    x = torch.rand(400, 4, generator=torch.Generator().manual_seed(0))
    top = x[:, :3].topk(2, dim=1).values
    x = x[top[:, 0] - top[:, 1] > 0.25]
    y = x[:, :3].argmax(1)
    verified = {}
    for name in ("plain", "bounds"):
        model, schedule, stream = net(1), BoundSchedule(EpsWarmup(150)), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for step in range(300):
            optimizer.zero_grad()
            own = schedule.objective_at(objective, step)
            loss = cross_entropy(model(x), y) if name == "plain" else own(model, x, y, generator=stream)
            loss.backward()
            optimizer.step()
        verified[name] = certify_bounds(model.eval(), x, y, Threat("linf", 0.1, FREE), "ibp").accuracy.value
    assert verified["bounds"] > 0.85 and verified["bounds"] > verified["plain"] + 0.2, verified
