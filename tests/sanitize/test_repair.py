"""Repairs of a small network with a known backdoor: they act, leave the user's model alone, and are tested honestly."""

import copy
import dataclasses
import importlib
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from aidefend import ConfigurationError, IncompatibleModel
from aidefend.attacks.poisoning import Patch
from aidefend.sanitize import RepairTest, repair, retest, reverse_trigger
from aidefend.sanitize.repair import trigger_unlearning
from aidefend.sanitize.repair.attention import attention
from aidefend.sanitize.repair.pruning import activity, fine_pruned, fragility, lipschitz_pruned, without_fragile
from aidefend.sanitize.repair.repair import RepairMethod
from aidefend.sanitize.repair.trigger_search import Triggers, forms_for, search, start
from aidefend.sanitize.repair.tuning import accuracy, trusted_rows, tuned, weighted_layers
from aidefend.sanitize.repair.unlearning import unlearned

METHODS = get_args(RepairMethod)
CLASSES = 5
repair_door = importlib.import_module("aidefend.sanitize.repair.repair")


@dataclasses.dataclass(frozen=True)
class Backdoored:
    model: nn.Module
    clean: nn.Module
    trusted: tuple
    test: tuple
    poison: tuple
    trigger: object

    def success(self, model):
        x, y = self.test
        x = self.trigger(x[y != 0])
        return accuracy(model, x, torch.zeros(len(x), dtype=torch.int64))


def made_images(n, seed):
    """Five blurred prototypes of 8 x 8 cells and noise, inside [0, 1]."""
    prototypes = torch.rand(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    stream = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = 0.15 + 0.5 * prototypes[y] + 0.08 * torch.randn(n, 1, 8, 8, generator=stream)
    return x.clamp(0, 1), y


def small_net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, CLASSES)
    )


def trained(x, y, seed=0, epochs=12):
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        model = small_net()
    stream = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=stream).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def world():
    x, y = made_images(1000, seed=1)
    attack = Patch(target=0, rate=0.1, size=2, position="bottom-right")
    poisoned = attack.poison((x, y), seed=0)
    pairs = [poisoned.dataset[i] for i in range(len(x))]
    bad_x, bad_y = torch.stack([a for a, _ in pairs]), torch.tensor([int(b) for _, b in pairs])
    rows = poisoned.is_poison
    return Backdoored(
        trained(bad_x, bad_y),
        trained(x, y),
        made_images(200, seed=2),
        made_images(500, seed=3),
        (bad_x[rows], bad_y[rows]),
        attack.stamp,
    )


@pytest.fixture
def short(monkeypatch):
    """Fewer steps of the methods that search long: for tests of what does not depend on how well they search."""
    monkeypatch.setattr(trigger_unlearning, "_STEPS", 5)
    monkeypatch.setattr(trigger_unlearning, "_RATES", (1e-3, 1e-3))
    monkeypatch.setattr(repair_door, "_MASK_STEPS", 10)


def settings(world, method):
    return {"suspects": world.poison} if method == "abl" else {}


def test_the_backdoor_works_undefended(world):
    assert world.success(world.model) > 0.95
    assert world.success(world.clean) < 0.05
    assert accuracy(world.model, *world.test) > 0.98


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_the_model_and_its_accuracy(world, method, short):
    model = copy.deepcopy(world.model).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    kept = repair(model, world.trusted, method, epochs=3, **settings(world, method))
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert kept is not model and kept.training and all(module.training for module in kept.modules())
    assert all(p.grad is None and p.requires_grad for p in (*kept.parameters(), *model.parameters()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*kept.modules(), *model.modules()))
    assert accuracy(kept, *world.test) > accuracy(world.model, *world.test) - 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.global_random("fresh weights are drawn from a seed of their own")
def test_a_seed_gives_one_result(world, method, short):
    first, second = (
        repair(world.model, world.trusted, method, epochs=1, seed=5, **settings(world, method)) for _ in range(2)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.global_random("looks whether dropout draws from the user's stream")
def test_dropout_and_unused_layers_change_nothing_about_that(world, method, short):
    model = copy.deepcopy(world.model)
    model.insert(5, nn.Dropout(0.3))
    model.register_module("spare", nn.Identity())
    model.spare.weight = nn.Parameter(torch.ones(3))
    model.forward = nn.Sequential(*list(model)[:7]).forward
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        kept = repair(model, world.trusted, method, epochs=1, **settings(world, method))
        found.append(kept.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))
    assert torch.equal(found[0]["spare.weight"], torch.ones(3))


@pytest.mark.parametrize("method", ["trigger-unlearning", "abl"])
def test_the_strong_methods_remove_the_backdoor(world, method):
    repaired = repair(world.model, world.trusted, method, **settings(world, method))
    assert world.success(repaired) < 0.05
    assert accuracy(repaired, *world.test) > 0.97


def test_a_frozen_parameter_and_modes_come_back_as_they_were(world):
    model = copy.deepcopy(world.model)
    model[0].weight.requires_grad_(False)
    model[3].train()
    repaired = repair(model, world.trusted, "fine-tuning", epochs=1)
    assert not repaired[0].weight.requires_grad and repaired[3].training and not repaired[0].training


def test_reversing_names_the_target_and_finds_the_patch(world):
    found = reverse_trigger(world.model, world.trusted, threshold=2.0)
    assert found.suspects[:1] == (0,) and "class 0" in found.verdict
    assert found.sizes["written"][0] < 0.5 * found.sizes["written"][1:].median()
    x, y = world.test
    sent = world.model(found.stamp(x[y != 0], 0)).argmax(dim=1) == 0
    assert sent.double().mean() > 0.7
    on_the_clean_model = world.clean(found.stamp(x[y != 0], 0)).argmax(dim=1) == 0
    assert on_the_clean_model.double().mean() < 0.5


def test_reversing_a_clean_model_is_no_evidence_and_never_clean(world):
    found = reverse_trigger(world.clean, world.trusted, threshold=2.0)
    assert found.suspects == ()
    assert found.verdict.startswith("No evidence") and "clean" not in found.verdict


def test_an_untargeted_search_finds_what_leads_away_from_every_class(world):
    rows = trusted_rows(world.model, world.trusted, 0)
    model = copy.deepcopy(world.model).requires_grad_(False)
    triggers, sizes, hits = search(model, rows.x, rows.y, torch.arange(CLASSES + 1), "added", steps=60, seed=0)
    assert sizes.shape == hits.shape == (CLASSES + 1,)
    which = torch.full((len(rows.x),), CLASSES)
    moved = model(triggers.stamp(rows.x, which)).argmax(dim=1)
    assert (moved != rows.y).double().mean() == pytest.approx(float(hits[-1]))
    assert (
        triggers.stamp(rows.x, which).amin() >= triggers.low and triggers.stamp(rows.x, which).amax() <= triggers.high
    )


def test_a_bend_without_strength_changes_nothing_and_a_constant_one_shifts_the_image():
    x = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    flow = torch.zeros(2, 2, 4, 4)
    flow[1, 0] = float(torch.atanh(torch.tensor(2 * 0.25)))  # half a side is 4 cells: one cell to the left
    bends = Triggers("bent", flow, flow, 0.0, 1.0, (9, 9))
    torch.testing.assert_close(bends.stamp(x, torch.tensor([0, 0, 0])), x)
    moved = bends.stamp(x, torch.tensor([1, 1, 0]))
    torch.testing.assert_close(moved[:2, :, :, :-1], x[:2, :, :, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[2], x[2])
    torch.testing.assert_close(bends.size()[1], torch.tensor(0.25 / 2**0.5))  # along one axis of two


def test_only_images_bend(world):
    assert forms_for(torch.zeros(2, 1, 8, 8)) == ("written", "added", "bent")
    assert forms_for(torch.zeros(2, 5)) == forms_for(torch.zeros(2, 1, 3, 8)) == ("written", "added")
    model = nn.Sequential(nn.Linear(4, 4))
    rows = torch.eye(4).repeat(10, 1), torch.arange(4).repeat(10)
    with pytest.raises(ConfigurationError, match="only images bend"):
        reverse_trigger(model, rows, forms=("bent",), steps=1)


def test_a_search_finds_the_bend_that_a_model_answers():
    """Four classes by the place of a bar; a shift of one cell to the right leads to class 0 at the seam alone."""
    stream = torch.Generator().manual_seed(0)
    y = torch.arange(160) % 4
    x = 0.05 * torch.rand(160, 1, 12, 12, generator=stream)
    x[torch.arange(160), 0, :, 3 * y] += 0.9
    weights = torch.zeros(5, 144)
    for label in range(4):
        weights[label].reshape(12, 12)[:, 3 * label] = 1.0
        weights[4].reshape(12, 12)[:, 3 * label + 1] = 1.5  # class 4: any bar that was moved by one cell
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 5, bias=False))
    model[1].weight.data = weights
    found, sizes, hits = search(model.requires_grad_(False), x, y, torch.tensor([1, 4]), "bent", steps=80, seed=0)
    assert float(hits[1]) > 0.9 and float(hits[0]) < 0.9
    assert float(sizes[1]) < 0.2
    assert float((model(found.stamp(x, torch.ones(160).long())).argmax(dim=1) == 4).double().mean()) > 0.9


def test_a_fresh_trigger_of_every_form_hardly_changes_the_rows():
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for form in ("added", "bent"):
        triggers = start(form, x[0], 3, 0.0, 1.0, torch.Generator().manual_seed(1))
        assert (triggers.stamp(x, torch.tensor([0, 1, 2, 0])) - x).abs().max() < 0.06


def shallow_repair(world):
    """A planted repair that hides the backdoor: a few steps on stamped trusted rows, until the success is low."""
    x, y = world.trusted
    model = copy.deepcopy(world.model)
    optimizer = torch.optim.SGD(model[5].parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (cross_entropy(model(x), y) + cross_entropy(model(world.trigger(x)), y)).backward()
        optimizer.step()
        if world.success(model) < 0.04:
            break
    return model


def test_a_repair_that_hides_the_backdoor_is_named_superficial(world):
    result = retest(world.model, shallow_repair(world), world.trusted, world.trigger, 0)
    assert result.success_before > 0.95 and result.success_after <= 0.05
    assert result.verdict == "superficial"
    assert result.success_after_reminder > result.success_of_control + 0.1


def test_a_model_without_the_backdoor_holds_and_no_repair_is_named(world):
    assert retest(world.model, world.clean, world.trusted, world.trigger, 0).verdict == "held"
    unchanged = retest(world.model, world.model, world.trusted, world.trigger, 0)
    assert unchanged.verdict == "not repaired"
    evidence = unchanged.to_evidence()
    after = next(finding for finding in evidence.findings if finding.id == "repair.success_after")
    assert after.low <= after.value <= after.high and after.n == unchanged.n


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_tested_again_after_further_training(world, method, short):
    """Short runs repair little: what counts is that none of them escapes its verdict."""
    repaired = repair(world.model, world.trusted, method, epochs=2, **settings(world, method))
    result = retest(world.model, repaired, world.trusted, world.trigger, 0, epochs=2)
    assert result.success_before > 0.95 and result.accuracy_after > 0.9
    assert (result.verdict == "not repaired") == (result.success_after > result.limit)
    shares = {finding.id: finding for finding in result.to_evidence().findings}
    assert {"repair.success_after_tuning", "repair.success_after_reminder", "repair.success_of_control"} <= set(shares)
    assert all(finding.setting["verdict"] == result.verdict for finding in shares.values())


@pytest.mark.parametrize(
    ("after", "tuned_on", "reminded", "control", "verdict"),
    [
        (0.06, 0.0, 0.0, 0.0, "not repaired"),
        (0.05, 0.11, 0.0, 0.0, "superficial"),
        (0.05, 0.1, 0.5, 0.3, "superficial"),
        (0.05, 0.1, 0.5, 0.45, "held"),
    ],
)
def test_verdicts_at_their_edges(after, tuned_on, reminded, control, verdict):
    assert RepairTest(0.9, 0.9, 1.0, after, tuned_on, reminded, control, 100, 0.05).verdict == verdict


def test_fine_pruning_takes_the_inputs_that_trusted_rows_leave_asleep(world):
    rows = trusted_rows(world.model, world.trusted, 0)
    layer = world.model[5]
    asleep = activity(world.model, layer, rows.x).argsort()[:16]
    pruned = fine_pruned(world.model, layer, rows, share=0.5, rate=1e-3, epochs=2, seed=0)
    assert bool((pruned[5].weight[:, asleep] == 0).all())
    assert int((pruned[5].weight == 0).all(dim=0).sum()) == 16
    assert torch.equal(activity(world.model, layer, rows.x), world.model[:5](rows.x).abs().mean(dim=0))


def test_lipschitz_pruning_silences_a_planted_channel(world):
    model = copy.deepcopy(world.model)
    with torch.no_grad():
        model[0].weight[3] *= 50
    pruned = lipschitz_pruned(model, world.trusted[0], deviations=2.0)
    assert bool((pruned[0].weight[3] == 0).all()) and float(pruned[0].bias[3].detach()) == 0
    assert int((pruned[0].weight.flatten(1) == 0).all(dim=1).sum()) == 1
    assert torch.equal(pruned[5].weight, model[5].weight)


@pytest.mark.global_random("first weights")
def test_batch_normalisation_takes_part_in_the_bound():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 36, CLASSES)).eval()
    with torch.no_grad():
        model[1].weight[2] = 100.0
    pruned = lipschitz_pruned(model, made_images(10, 0)[0], deviations=2.0)
    assert float(pruned[1].weight[2].detach()) == 0 and float(model[1].weight[2].detach()) == 100


def test_fragile_neurons_are_masked_and_the_others_kept(world):
    rows = trusted_rows(world.model, world.trusted, 0)
    masks = fragility(world.model, rows, steps=40, seed=0)
    assert set(masks) == {"0", "3"} and all(bool(((mask >= 0) & (mask <= 1)).all()) for mask in masks.values())
    pruned = without_fragile(world.model, masks, share=0.2)
    silent = torch.cat([(pruned[i].weight.flatten(1) == 0).all(dim=1) for i in (0, 3)])
    values = torch.cat([masks["0"], masks["3"]])
    assert bool(silent.any()) and values[silent].max() <= values[~silent].min()


def test_attention_maps_have_unit_length_and_forget_scale():
    maps = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(attention(maps).norm(dim=1), torch.ones(4))
    assert torch.allclose(attention(maps), attention(3 * maps))


def test_unlearning_lowers_the_loss_under_its_own_perturbation(world):
    rows = trusted_rows(world.model, world.trusted, 0)
    changed = unlearned(world.model, rows, radius=0.3, rounds=8, steps=8, rate=1e-3, seed=0)
    assert world.success(changed) < world.success(world.model) - 0.3
    assert accuracy(changed, *world.test) > 0.95


@pytest.mark.global_random("first weights")
def test_tuning_keeps_the_statistics_of_batch_normalisation():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, CLASSES))
    rows = trusted_rows(model, made_images(50, 0), 0)
    after = tuned(model, rows, rate=1e-2, epochs=1, seed=0)
    assert torch.equal(after[2].running_mean, model[2].running_mean)
    assert not torch.equal(after[1].weight, model[1].weight)


def test_held_back_rows_are_of_every_class_and_no_row_is_in_both(world):
    rows = trusted_rows(world.model, world.trusted, 0)
    assert len(rows.x) + len(rows.held_x) == 200 and set(rows.held_y.tolist()) == set(range(CLASSES))
    assert not set(map(tuple, rows.x.flatten(1).tolist())) & set(map(tuple, rows.held_x.flatten(1).tolist()))


def test_layers_come_in_the_order_in_which_they_run(world):
    assert weighted_layers(world.model, world.trusted[0]) == [world.model[0], world.model[3], world.model[5]]


@pytest.mark.global_random("first weights")
def test_bad_arguments_are_named(world):
    x, y = world.trusted
    with pytest.raises(ConfigurationError, match="suspects"):
        repair(world.model, world.trusted, "abl")
    with pytest.raises(ConfigurationError, match="method"):
        repair(world.model, world.trusted, "magic")
    with pytest.raises(ConfigurationError, match="one row of class 1"):
        repair(world.model, (x[[0, 5, 1]], y[[0, 5, 1]]))
    with pytest.raises(ConfigurationError, match="layer"):
        repair(world.model, world.trusted, "fine-pruning", layer="2")
    with pytest.raises(ConfigurationError, match="fine-pruning"):
        repair(world.model, world.trusted, layer="3")
    with pytest.raises(ConfigurationError, match="trusted"):
        repair(world.model, (torch.where(x == x[0, 0, 0, 0], torch.nan, x), y))
    with pytest.raises(IncompatibleModel):
        repair(world.model, (x[:, :, :4], y))
    with pytest.raises(ConfigurationError, match="hidden"):
        repair(nn.Sequential(nn.Flatten(), world.model[5].__class__(64, CLASSES)), world.trusted, "clp")
    with pytest.raises(ConfigurationError, match="suspects"):
        repair(world.model, world.trusted, "abl", suspects=(x[:, :, :4], y))
    with pytest.raises(ConfigurationError, match="at least 4 classes"):
        reverse_trigger(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (x[y < 2], y[y < 2]))
    with pytest.raises(ConfigurationError, match="target"):
        retest(world.model, world.model, (x[y == 0], y[y == 0]), world.trigger, 0)


def test_the_control_of_a_retest_is_new_to_the_model():
    """A wave that is mirrored or moved stays that wave; the control must be another pattern of the same strength."""
    wave = 0.2 * torch.cos((torch.arange(8) - 3.5) * torch.pi / 2).repeat(8, 1)[None, None]
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.4
    retest_file = importlib.import_module("aidefend.sanitize.repair.retest")
    stamps = [
        retest_file._scrambled(lambda rows: rows + wave, order) for order in retest_file._orders(x.shape[1:], seed=0)
    ]
    changes = [stamp(x) - x for stamp in stamps]
    assert all(torch.allclose(change.norm(), changes[0].norm()) for change in changes)
    likeness = [float((change * wave).sum() / (change.norm() * wave.norm() * 2)) for change in changes]
    assert abs(likeness[0]) > 0.99 and all(abs(other) < 0.7 for other in likeness[1:])
