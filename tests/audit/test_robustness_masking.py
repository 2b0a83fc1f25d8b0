"""Every masking check catches the model that was built to fool it, and lets the honest twin pass."""

import pytest
import torch
from torch import nn

from aidefend import Severity, Threat
from aidefend.audit.masking import check_black_box, check_flat_curve, check_noise, check_steps
from aidefend.audit.robustness import evaluate_robustness
from aidefend.audit.robustness_result import CurvePoint
from tests.worlds import linear_world

FREE = (-10.0, 10.0)
WORLD = linear_world(n=60, dtype=torch.float32)
EPS = float(WORLD.flipping_eps("linf").quantile(0.9))


def judge(model, eps=EPS, bounds=FREE, **options):
    return evaluate_robustness(model, (WORLD.x, WORLD.y), Threat("linf", eps, bounds), "quick", **options)


def failed(result):
    return {check.name for check in result.failed_checks}


class Wrapped(nn.Module):
    """The honest linear model behind a change of its input or output."""

    def __init__(self, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.model, self.before, self.after = WORLD.model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


class Misleading(torch.autograd.Function):
    """Identity whose gradient points the wrong way, except (with `honest_at`) at the given points."""

    @staticmethod
    def forward(ctx, x, honest_at):
        known = torch.zeros(len(x), dtype=torch.bool)
        if honest_at is not None:
            known = (x[:, None] == honest_at[None]).all(dim=2).any(dim=1)
        ctx.save_for_backward(known)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (known,) = ctx.saved_tensors
        return torch.where(known[:, None], grad, -grad), None


def test_the_honest_model_is_trusted():
    result = judge(WORLD.model)
    assert result.trustworthy and failed(result) == set()
    open_checks = {check.name for check in result.masking.values() if check.outcome == "not shown"}
    assert open_checks <= {"black_box_beats_white_box", "flat_curve"}
    assert 0 < result.robust_accuracy < 0.3


def test_rounded_inputs_give_zero_gradients_and_queries_find_the_truth():
    result = judge(Wrapped(before=lambda x: (x * 512).round() / 512))
    assert {"zero_gradients", "black_box_beats_white_box"} <= failed(result)
    names = [stage.name.split("-")[0] for stage in result.stages]
    assert names.index("Square") == names.index("PGD") + 1  # where gradients vanish, queries come early
    assert names[names.index("Square") + 1] == "APGD"  # gradients go on from where the queries stand
    by_gradient = next(stage for stage in result.stages if stage.name.startswith("PGD")).accuracy
    truth = judge(WORLD.model).robust_accuracy
    assert by_gradient > truth + 0.05 >= result.robust_accuracy
    assert not result.trustworthy
    first, evidence = result.summary().splitlines()[0], result.to_evidence()
    assert first.startswith("NOT TRUSTWORTHY: ")
    assert evidence["evasion.robust_accuracy"].status == "not shown"
    assert evidence["evasion.masking.zero_gradients"].severity == Severity.HIGH


def test_no_graph_at_all_gives_zero_gradients():
    assert "zero_gradients" in failed(judge(Wrapped(after=lambda z: z.detach())))


def test_scaled_logits_saturate_cross_entropy_but_not_the_margin():
    result = judge(Wrapped(after=lambda z: 1e4 * z))
    assert "saturated_loss" in failed(result) and "zero_gradients" not in failed(result)
    assert result.robust_accuracy == judge(WORLD.model).robust_accuracy


def test_misleading_gradients_lose_to_noise_and_leave_accuracy_at_any_eps():
    result = judge(Wrapped(before=lambda x: Misleading.apply(x, None)))
    assert {"noise_beats_gradient", "large_eps_leaves_accuracy"} <= failed(result)


def test_a_first_step_that_beats_many_steps():
    result = judge(Wrapped(before=lambda x: Misleading.apply(x, WORLD.x)))
    assert "iterative_weaker_than_single_step" in failed(result)
    assert result.stages[1].broken > 10


def test_random_outputs():
    result = judge(Wrapped(after=lambda z: z + 0.2 * torch.randn_like(z)))
    assert "randomised_outputs" in failed(result)
    assert result.masking["batch_mates"].outcome == "not shown"


def test_probabilities():
    assert "probability_outputs" in failed(judge(Wrapped(after=lambda z: z.softmax(dim=1))))
    assert "probability_outputs" not in failed(judge(Wrapped(after=lambda z: z.log_softmax(dim=1))))


def test_where_a_check_fails_the_search_by_queries_goes_deeper():
    def depths(result):
        return [stage.name for stage in result.stages if stage.name.startswith("Square")]

    assert depths(judge(WORLD.model)) == ["Square-100"]
    assert depths(judge(Wrapped(after=lambda z: z.softmax(dim=1)))) == ["Square-100", "Square-1000"]


def test_train_mode_layers_and_batch_mates():
    model = nn.Sequential(nn.BatchNorm1d(12), WORLD.model)
    model[0].train()
    result = judge(model)
    assert {"train_mode_layers", "batch_mates"} <= failed(result)
    assert "'0'" in result.masking["train_mode_layers"].detail or " 0:" in result.masking["train_mode_layers"].detail
    assert model[0].num_batches_tracked == 0
    model[0].eval()
    assert not {"train_mode_layers", "batch_mates"} & failed(judge(model))


def test_batch_mates_without_any_flag():
    assert "batch_mates" in failed(judge(Wrapped(before=lambda x: x - 0.2 * x.mean(dim=0))))


def test_large_eps_is_not_shown_without_finite_bounds():
    result = judge(WORLD.model, bounds=(-torch.inf, torch.inf))
    assert result.masking["large_eps_leaves_accuracy"].outcome == "not shown"


@pytest.mark.parametrize(
    ("noise", "gradient", "outcome"),
    [
        ([1, 1, 0, 0], [1, 1, 1, 0], "pass"),
        ([1, 1, 0, 0], [1, 1, 0, 0], "fail"),
        ([0, 0, 0, 0], [0, 0, 0, 0], "not shown"),
        ([1, 1, 0, 0], [0, 0, 1, 1], "fail"),
        ([0, 0, 0, 0], [1, 0, 0, 0], "pass"),
    ],
)
def test_noise_rule(noise, gradient, outcome):
    assert check_noise(torch.tensor(noise).bool(), torch.tensor(gradient).bool()).outcome == outcome


def test_more_steps_rule():
    assert check_steps(0.8, 0.77, tested=100, broken=1).outcome == "pass"
    assert check_steps(0.8, 0.77, tested=100, broken=10).outcome == "fail"
    assert check_steps(0.8, 0.798, tested=1000, broken=4).outcome == "pass"
    assert check_steps(0.0, 0.0, tested=0, broken=0).outcome == "pass"


def test_flat_curve_rule():
    def outcome(*accuracies):
        radii = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
        return check_flat_curve(
            [CurvePoint(*pair, 0.0, 1.0, 100) for pair in zip(radii, accuracies, strict=True)]
        ).outcome

    assert outcome(0.97, 0.9, 0.6, 0.5, 0.12, 0.0) == "pass"
    assert outcome(0.97, 0.6, 0.6, 0.597, 0.597, 0.5) == "fail"
    assert outcome(0.97, 0.96, 0.96, 0.96, 0.96, 0.95) == "not shown"
    assert outcome(0.97, 0.0, 0.0, 0.0, 0.0, 0.0) == "not shown"
    assert check_flat_curve([]).outcome == "not shown"


def test_black_box_rule():
    assert [check_black_box(broken, 1000).outcome for broken in (0, 1, 2, 3)] == ["pass", "pass", "pass", "fail"]
    assert [check_black_box(broken, 50).outcome for broken in (1, 2)] == ["pass", "fail"]
    assert [check_black_box(1, 1000, deeper).outcome for deeper in (3, 4, 5)] == ["pass", "pass", "fail"]


def test_lucky_flips_of_random_outputs_do_not_count():
    honest = evaluate_robustness(WORLD.model, (WORLD.x, WORLD.y), Threat("linf", 0.0, FREE), "quick")
    flips = Wrapped(after=lambda z: torch.where(torch.rand(len(z), 1) < 0.1, z.flip(1), z))
    result = judge(flips, eps=1e-6)
    assert "randomised_outputs" in failed(result)
    assert result.robust_accuracy > 0.8 * honest.clean_accuracy
