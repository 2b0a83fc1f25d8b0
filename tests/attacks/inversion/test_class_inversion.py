"""Class inversion on models whose most typical input is known: by gradients, by probes, with nothing to follow."""

import pickle

import pytest
import torch
from torch import nn

from aidefend._core.errors import AidefendError, ConfigurationError, ThreatModelError
from aidefend.attacks.inversion import ClassInversion


class Centres(nn.Module):
    """Class k is most likely at its own centre: the answer of the inversion is known."""

    def __init__(self, centres, rounding=None):
        super().__init__()
        self.centres, self.rounding = nn.Parameter(centres), rounding

    def forward(self, x):
        distance = (x[:, None] - self.centres).flatten(2).square().mean(dim=2)
        logits = -20 * distance
        return logits if self.rounding is None else self.rounding(logits)


def centres(k=3, shape=(6,), seed=0):
    return torch.rand(k, *shape, generator=torch.Generator().manual_seed(seed))


def corner(weights):
    """Where a linear class score is largest in the unit box."""
    return (weights > 0).float()


def test_a_linear_class_is_reconstructed_at_its_corner_of_the_box():
    model = nn.Linear(6, 2, bias=False)
    attack = ClassInversion(steps=300, total_variation=0.0, l2=0.0)
    result = attack(model, torch.tensor([0, 1]), shape=(6,), seed=0)
    difference = (model.weight[0] - model.weight[1]).detach()
    assert torch.allclose(result.x[0], corner(difference), atol=0.02)
    assert torch.allclose(result.x[1], corner(-difference), atol=0.02)
    assert result.method == "gradient" and result.status == "measured" and result.backwards > 0


def test_the_prior_decides_where_the_model_is_indifferent():
    """The model reads one pixel; total variation pulls the others along, the l2 prior pulls them to the start."""

    class OnePixel(nn.Module):
        def forward(self, x):
            return torch.stack([8 * x[:, 0, 2, 2], torch.zeros(len(x))], dim=1)

    y = torch.zeros(1, dtype=torch.int64)
    smooth = ClassInversion(steps=150, total_variation=2.0, l2=0.0)(OnePixel(), y, shape=(1, 5, 5), seed=0)
    rough = ClassInversion(steps=150, total_variation=0.0, l2=5.0, start_noise=0.0)(
        OnePixel(), y, shape=(1, 5, 5), seed=0
    )
    assert smooth.x.std() < 0.5 * rough.x.std()
    outside = torch.ones(5, 5, dtype=torch.bool)
    outside[2, 2] = False
    assert torch.allclose(rough.x[0, 0][outside], torch.tensor(0.5), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "rounding", "method"),
    [
        ("probabilities", lambda z: z.softmax(1), "gradient"),
        ("rounded", lambda z: z.softmax(1).mul(20).round().div(20), "estimate"),
        ("detached", lambda z: z.detach(), "estimate"),
        ("labels", lambda z: z.argmax(1), "estimate"),
    ],
)
def test_hardened_outputs_still_lead_to_the_class(name, rounding, method):
    means = torch.tensor([[0.9, 0.9, 0.1], [0.1, 0.1, 0.9]])
    model = Centres(means, rounding)
    attack = ClassInversion(steps=80, total_variation=0.0, l2=0.0, probe=0.3, directions=24)
    result = attack(model, torch.tensor([0, 1]), shape=(3,), seed=1)
    assert result.method == method and result.status == "measured"
    assert Centres(means)(result.x).argmax(dim=1).tolist() == [0, 1]
    if name != "labels":  # labels are as happy anywhere inside the class
        assert (result.x - means).abs().mean() < (0.5 - means).abs().mean()


def test_probes_stay_inside_the_bounds():
    seen = []

    def model(x):
        seen.append((float(x.detach().min()), float(x.detach().max())))
        return torch.stack([x.sum(1), -x.sum(1)], dim=1).detach()

    ClassInversion(steps=3, probe=3.0, bounds=(-1.0, 2.0))(model, torch.tensor([0]), shape=(4,), seed=0)
    assert min(low for low, _ in seen) >= -1 and max(high for _, high in seen) <= 2


def test_nothing_to_follow_is_not_shown_and_never_safe():
    result = ClassInversion(steps=2)(lambda x: torch.ones(len(x), 2), torch.tensor([0, 1]), shape=(3,), seed=0)
    assert result.status == "not shown" and result.method == "none"


def test_no_trace_repeatable_and_picklable():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    model[0].weight.grad = torch.ones(4, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attack = pickle.loads(pickle.dumps(ClassInversion(steps=4)))
    y = torch.tensor([0, 1, 1])
    with torch.no_grad():
        attack(model, y, shape=(4,), seed=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model[0].weight.requires_grad and bool((model[0].weight.grad == 1).all())
    model.eval()
    runs = [attack(model, y, shape=(4,), seed=seed).x for seed in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    start = torch.full((4,), 0.25)
    near = ClassInversion(steps=1, start_noise=0.0, step_size=0.01)(model, y, start=start, seed=0)
    assert (near.x - 0.25).abs().max() < 0.02


def test_bad_input_is_refused():
    model, y = nn.Linear(4, 2), torch.tensor([0])
    for call, error, match in [
        (lambda: ClassInversion(steps=0), ConfigurationError, "steps"),
        (lambda: ClassInversion(l2=-1.0), ConfigurationError, "l2"),
        (lambda: ClassInversion(bounds=(1.0, 1.0)), ThreatModelError, "low < high"),
        (lambda: ClassInversion()(model, y), ConfigurationError, "exactly one"),
        (lambda: ClassInversion()(model, y, shape=(4,), start=torch.zeros(4)), ConfigurationError, "exactly one"),
        (lambda: ClassInversion()(model, y[:0], shape=(4,)), ConfigurationError, "at least one sample"),
        (lambda: ClassInversion()(model, y + 2, shape=(4,)), ConfigurationError, "num_classes"),
        (lambda: ClassInversion()(model, y, start=torch.full((4,), 2.0)), ThreatModelError, "inside the bounds"),
        (lambda: ClassInversion()(model, y, shape=(5,)), AidefendError, "to accept x of shape"),
    ]:
        with pytest.raises(error, match=match):
            call()
