"""Every public attack on training data has a test that it works where nobody defends; the table says which."""

import ast
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from aidefend.attacks import poisoning
from aidefend.attacks.poisoning import LabelFlip
from aidefend.datasets import mnist_subset

NO_ATTACKS = {"Poisoned", "PoisonedDataset", "PoisonedTexts", "Trial"}  # what attacks return
TESTS = {
    "AdaptiveBlend": ("test_adaptive_poisoning", "test_adaptive_backdoors_work_undefended_and_only_by_their_trigger"),
    "AdaptivePatch": ("test_adaptive_poisoning", "test_adaptive_backdoors_work_undefended_and_only_by_their_trigger"),
    "AllToAll": ("test_poisoning_attacks", "test_all_to_all_works_undefended_for_every_class"),
    "Blend": ("test_poisoning_attacks", "test_backdoors_work_undefended_and_only_by_their_trigger"),
    "Disguised": ("test_adaptive_per_detector", "test_the_disguise_lowers_the_score_and_the_backdoor_stays"),
    "Evading": ("test_adaptive_per_detector", "test_the_search_evades_a_defender_with_a_model_of_his_own"),
    "FeatureCollision": ("test_right_label_attacks", "test_collisions_turn_victims_in_the_transfer_setting"),
    "GradientMatching": (
        "test_right_label_attacks",
        "test_gradient_matching_turns_a_victim_of_a_training_from_scratch",
    ),
    "LabelConsistent": (
        "test_right_label_attacks",
        "test_label_consistent_poison_works_undefended_and_better_than_its_trigger_alone",
    ),
    "LabelFlip": ("test_every_attack_works", "test_flipped_labels_are_learnt_undefended"),
    "Patch": ("test_poisoning_attacks", "test_backdoors_work_undefended_and_only_by_their_trigger"),
    "SanitizerAware": (
        "test_sanitizer_aware",
        "test_it_works_undefended_and_through_the_filters_where_flipped_labels_do_not",
    ),
    "Sinusoid": ("test_poisoning_attacks", "test_backdoors_work_undefended_and_only_by_their_trigger"),
    "SourceTargeted": (
        "test_poisoning_attacks",
        "test_a_source_targeted_trigger_works_on_its_class_and_hardly_on_others",
    ),
    "TableTrigger": ("test_poisoning_attacks", "test_a_table_trigger_of_usual_values_works_undefended"),
    "TextTrigger": ("test_text_trigger", "test_it_works_undefended"),
    "Warp": ("test_poisoning_attacks", "test_backdoors_work_undefended_and_only_by_their_trigger"),
}
REACHED_THROUGH = {"Disguised": "cases", "Evading": "adapted", "GradientMatching": "turned", "TextTrigger": "KINDS"}


def test_the_table_names_every_public_attack():
    assert set(poisoning.__all__) - NO_ATTACKS == set(TESTS)


@pytest.mark.parametrize("name", TESTS)
def test_the_named_test_is_there_uses_the_attack_and_asserts(name):
    module, wanted = TESTS[name]
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
    test = next((part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name == wanted), None)
    assert test is not None, wanted
    assert any(isinstance(part, ast.Assert) for part in ast.walk(test))
    names = {part.id for part in ast.walk(test) if isinstance(part, ast.Name)}
    names |= {part.arg for part in ast.walk(test) if isinstance(part, ast.arg)}
    fixtures = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name in names]
    names |= {part.id for fixture in fixtures for part in ast.walk(fixture) if isinstance(part, ast.Name)}
    decorators = {part.id for mark in test.decorator_list for part in ast.walk(mark) if isinstance(part, ast.Name)}
    kinds = {"every_kind"} & decorators
    assert {name, REACHED_THROUGH.get(name, name)} & (names | decorators | ({"KINDS"} if kinds else set())), names


def test_flipped_labels_are_learnt_undefended():
    """Four fifths of the threes are called fives: a linear model does so too, one of the clean labels not."""
    digits = mnist_subset()
    x, y = digits.train_x[:2000], digits.train_y[:2000]
    share = 0.8 * float((y == 3).double().mean())
    poisoned = LabelFlip(rate=share, pairs=((3, 5),)).poison((x, y), seed=0)
    labels = torch.tensor([int(poisoned.dataset[i][1]) for i in range(len(y))])
    threes = digits.test_x[digits.test_y == 3].flatten(1)
    called_five = []
    for given in (y, labels):
        weights = torch.zeros(784, 10, requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            cross_entropy(x.flatten(1) @ weights, given).backward()
            optimizer.step()
        called_five.append(float(((threes @ weights).argmax(dim=1) == 5).double().mean()))
    assert called_five[0] < 0.15 and called_five[1] > 0.6, called_five


def test_symmetric_flips_harm_a_learner_that_believes_its_labels():
    """Four in ten labels become any other: whoever answers as the nearest row is wrong about as often."""
    digits = mnist_subset()
    x, y = digits.train_x[:2000].flatten(1), digits.train_y[:2000]
    poisoned = LabelFlip(rate=0.4).poison((x, y), seed=0)
    labels = torch.tensor([int(poisoned.dataset[i][1]) for i in range(len(y))])
    wrong = labels != y
    assert torch.equal(wrong, poisoned.is_poison) and len(labels[wrong].unique()) == 10
    nearest = torch.cdist(digits.test_x.flatten(1), x).argmin(dim=1)
    accuracy = [float((given[nearest] == digits.test_y).double().mean()) for given in (y, labels)]
    assert accuracy[0] > 0.85 and accuracy[1] < accuracy[0] - 0.25, accuracy
