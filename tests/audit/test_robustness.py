"""evaluate_robustness where the true worst case is known, on any order and batch size, without a trace."""

import pickle
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aidefend import AidefendError, ConfigurationError, Evidence, Severity, Threat
from aidefend.audit.cascade import Cascade
from aidefend.audit.effort import EFFORTS
from aidefend.audit.robustness import _more_steps, evaluate_robustness
from aidefend.audit.robustness_bench import Bench
from tests.worlds import linear_world

FREE = (-10.0, 10.0)


@pytest.fixture(scope="module")
def world():
    return linear_world(n=60, dtype=torch.float32)


def middle_eps(world, norm):
    needed = world.flipping_eps(norm)
    return float(needed[needed > 0].median()) * 1.0001


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("budget", ["quick", "standard"])
def test_exact_on_a_linear_model(world, norm, budget):
    eps = middle_eps(world, norm)
    result = evaluate_robustness(world.model, (world.x, world.y), Threat(norm, eps, FREE), budget)
    stands = world.worst_margin(norm, eps) <= 0
    assert torch.equal(result.robust, stands)
    assert result.clean_accuracy == pytest.approx((world.clean_margin <= 0).float().mean().item())
    assert result.robust_accuracy == pytest.approx(stands.float().mean().item())
    assert result.interval.low < result.robust_accuracy < result.interval.high and result.n == 60
    assert result.trustworthy, result.summary()


def test_the_points_prove_it(world):
    threat = Threat("linf", middle_eps(world, "linf"), FREE)
    result = evaluate_robustness(world.model, (world.x, world.y), threat, "quick")
    assert threat.contains(result.x_adv, world.x).all()
    wrong = world.model(result.x_adv).argmax(1) != world.y
    assert torch.equal(wrong, ~result.robust)
    clean_wrong = world.clean_margin > 0
    assert torch.equal(result.x_adv[clean_wrong], world.x[clean_wrong])


def test_stages_add_up(world):
    result = evaluate_robustness(
        world.model, (world.x, world.y), Threat("linf", middle_eps(world, "linf"), FREE), "quick"
    )
    names = [stage.name for stage in result.stages]
    assert names[:5] == ["clean", "FGSM", "PGD-10", "APGD-CE-20", "APGD-margin-30"]
    assert sum(stage.broken for stage in result.stages) == int((~result.robust).sum())
    assert result.stages[1].attacked == 60 - result.stages[0].broken
    for before, after in zip(result.stages, result.stages[1:], strict=False):
        assert after.accuracy == pytest.approx(before.accuracy - after.broken / 60)
    assert result.stages[1].forwards == 2 * result.stages[1].attacked and result.stages[1].backwards > 0


def test_same_result_for_any_order_batch_size_and_container(world):
    """In float64: in float32 the machine's arithmetic for passes of other sizes moves the points by 2e-5 on some."""
    model, x = deepcopy(world.model).double(), world.x.double()
    threat = Threat("l2", middle_eps(world, "l2"), FREE)
    whole = evaluate_robustness(model, (x, world.y), threat, "quick", seed=3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x[order], world.y[order]), batch_size=9)
    other = evaluate_robustness(model, loader, threat, "quick", seed=3, batch_size=7)
    assert other.ids == tuple(whole.ids[i] for i in order)
    torch.testing.assert_close(other.x_adv, whole.x_adv[order], atol=1e-5, rtol=0)
    assert torch.equal(other.robust, whole.robust[order])
    assert other.to_evidence().digest == whole.to_evidence().digest
    again = evaluate_robustness(model, (x, world.y), threat, "quick", seed=3)
    assert torch.equal(again.x_adv, whole.x_adv)
    assert not torch.equal(evaluate_robustness(model, (x, world.y), threat, "quick", seed=4).x_adv, whole.x_adv)


def test_radius_by_sample(world):
    eps = torch.where(torch.arange(60) % 2 == 0, 0.0, 5.0)
    result = evaluate_robustness(world.model, (world.x, world.y), Threat("linf", eps, FREE), "quick", batch_size=13)
    assert torch.equal(result.robust, (world.clean_margin <= 0) & (eps == 0))


def test_curve_is_exact_and_falls(world):
    eps = middle_eps(world, "linf")
    radii = (0.0, eps / 2, 2 * eps)
    result = evaluate_robustness(world.model, (world.x, world.y), Threat("linf", eps, FREE), "quick", curve=radii)
    assert [point.eps for point in result.curve] == [0.0, eps / 2, eps, 2 * eps]
    for point in result.curve:
        expected = (world.worst_margin("linf", point.eps) <= 0).float().mean().item()
        assert point.accuracy == pytest.approx(expected) and point.low <= point.accuracy <= point.high
    accuracies = [point.accuracy for point in result.curve]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > accuracies[-1]


def test_images_with_frozen_and_training_layers_leave_no_trace():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.3), nn.Linear(12, 5))
    model[1].eval()
    x, y = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 5
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags, stream = [module.training for module in model], torch.get_rng_state()
    evaluate_robustness(model, (x, y), Threat("linf", 0.1), "quick")
    assert [module.training for module in model] == flags and torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_nan_outputs_are_wrong(world):
    class Poisoned(nn.Module):
        def forward(self, x):
            outputs = world.model(x)
            return torch.where(x[:, :1] > world.x[:, 0].median(), torch.nan, 1.0) * outputs

    result = evaluate_robustness(Poisoned(), (world.x, world.y), Threat("linf", 0.0, FREE), "quick")
    expected = (world.clean_margin <= 0) & (world.x[:, 0] <= world.x[:, 0].median())
    assert torch.equal(result.robust, expected)


def test_evidence_and_summary(world):
    threat = Threat("linf", middle_eps(world, "linf"), FREE)
    result = evaluate_robustness(world.model, (world.x, world.y), threat, "quick", curve=[0.01])
    evidence = result.to_evidence()
    finding = evidence["evasion.robust_accuracy"]
    assert (finding.value, finding.n, finding.status) == (result.robust_accuracy, 60, "measured")
    assert finding.low == result.interval.low and finding.severity >= Severity.MEDIUM
    assert "evasion.masking.zero_gradients" in evidence and "evasion.curve.0" in evidence
    assert Evidence.from_dict(evidence.to_dict()).digest == evidence.digest
    assert result.summary().startswith("Threat: linf")
    assert "FGSM" in result.summary()
    assert pickle.loads(pickle.dumps(result)).summary() == result.summary()


def test_a_row_never_broken_by_anything_but_all_stages_is_met_by_all(world):
    result = evaluate_robustness(world.model, (world.x, world.y), Threat("linf", 1e-6, FREE), "quick")
    met = [stage.attacked for stage in result.stages[1:5]]
    assert met == [met[0]] * 4 and met[0] == int(result.robust.sum())
    assert result.masking["noise_beats_gradient"].outcome == "not shown"
    assert "Not shown: " in result.summary()


def test_bad_input(world):
    data, threat = (world.x, world.y), Threat("linf", 0.1, FREE)
    cases = [
        (((world.x[:0], world.y[:0]), threat, {}), "at least one sample"),
        ((world.x, threat, {}), "labels"),
        (((world.x, world.y + 9), threat, {}), "labels >= 0 and < 2"),
        (((world.x, -1 - world.y), threat, {}), "labels >= 0"),
        (((world.x * torch.nan, world.y), threat, {}), "finite"),
        ((data, Threat("linf", 0.1, (0.45, 0.55)), {}), "inside the bounds"),
        ((data, 0.1, {}), "Threat"),
        ((data, threat, {"budget": "huge"}), "budget"),
        ((data, threat, {"seed": -1}), "seed"),
        ((data, threat, {"batch_size": 0}), "batch_size"),
        ((data, threat, {"curve": [-0.1]}), "curve"),
        ((data, threat, {"curve": 0.1}), "curve"),
        ((data, Threat("linf", torch.ones(60, 1), FREE), {"curve": [0.1]}), "one eps"),
    ]
    for (bad_data, bad_threat, options), rule in cases:
        with pytest.raises(AidefendError, match=rule):
            evaluate_robustness(world.model, bad_data, bad_threat, **options)
    with pytest.raises(ConfigurationError, match="logits of shape"):
        evaluate_robustness(nn.Linear(12, 1), data, threat)
    with pytest.raises(AidefendError, match="model="):
        evaluate_robustness(nn.Linear(5, 2), data, threat)


@pytest.mark.parametrize(("norm", "eps"), [("l1", 0.5), ("l0", 2)])
def test_norms_of_few_features_are_exact_on_a_linear_model(norm, eps):
    world = linear_world(n=40, shape=(30,))
    away = torch.linspace(0, 0.12, 40)[:, None] * world.slope.sign()
    world = replace(world, x=world.x - away, clean_margin=world.clean_margin - (away * world.slope).sum(dim=1))
    threat = Threat(norm, eps, (0.2, 0.8))
    result = evaluate_robustness(world.model, (world.x, world.y), threat, budget="standard")
    stands = world.worst_margin_of_few(norm, eps, 0.2, 0.8) < 0
    assert 5 < stands.sum() < 28
    assert torch.equal(result.robust, stands)
    assert threat.contains(result.x_adv, world.x).all() and result.trustworthy
    assert result.masking["black_box_beats_white_box"].outcome == "not shown"
    names = [stage.name for stage in result.stages]
    assert ("SigmaZero-100" in names) == (norm == "l0") and not any("Square" in name for name in names)


def test_a_table_with_whole_numbers_and_categories_is_judged_at_its_own_points():
    world = linear_world(n=30, shape=(7,), seed=3)
    x = world.x.clone()
    x[:, :3] = torch.randint(0, 4, (30, 3), generator=torch.Generator().manual_seed(0))
    x[:, 3:7] = torch.eye(4, dtype=x.dtype)[torch.arange(30) % 4]
    y = world.model(x).argmax(1)
    integer = torch.tensor([True] * 3 + [False] * 4)
    threat = Threat("linf", 1.0, (0.0, 4.0), integer=integer, groups=((3, 4, 5, 6),))
    result = evaluate_robustness(world.model, (x, y), threat, budget="quick")
    every = torch.cat(
        [
            torch.cartesian_prod(*[torch.arange(5)] * 3).repeat_interleave(4, dim=0).to(x),
            torch.eye(4, dtype=x.dtype).repeat(125, 1),
        ],
        dim=1,
    )
    wrong = world.model(every).argmax(1)
    stands = [
        bool((wrong[threat.contains(every, row.expand_as(every))] == label).all())
        for row, label in zip(x, y, strict=True)
    ]
    assert result.robust.tolist() == stands and 0 < sum(stands) < 30
    assert threat.contains(result.x_adv, x).all()


def test_the_thorough_budget_asks_for_decisions_too():
    """A model without any gradient and with logits that never change along a plateau: only decisions show the edge."""
    world = linear_world(n=8, shape=(6,))

    def steps(x):
        answer = (world.model(x).argmax(1, keepdim=True) == torch.arange(2)).double()
        return 10 * answer.detach()

    y = steps(world.x).argmax(1)
    result = evaluate_robustness(steps, (world.x, y), Threat("l2", 0.05), budget="thorough")
    stages = {stage.name: stage.broken for stage in result.stages}
    assert "HopSkipJump-20" in stages and not result.trustworthy


@pytest.mark.parametrize(("eps", "falls"), [(1.0, True), (1e-6, False)])
def test_what_more_steps_break_in_a_sample_is_tried_on_all_rows(eps, falls):
    world = linear_world(n=40)
    cascade = Cascade(Bench.of(world.model, (world.x, world.y), Threat("linf", eps, (-9.0, 9.0)), 0, 64))
    before = int(cascade.robust.sum())
    check = _more_steps(cascade, replace(EFFORTS["quick"], check_rows=5))
    assert before == 32 and int(cascade.robust.sum()) == (0 if falls else before)
    assert any(stage.name.endswith("(rest)") for stage in cascade.stages) == falls
    assert check.outcome == ("fail" if falls else "pass")
