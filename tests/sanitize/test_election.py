"""Certificates of elections, beside every attack there is on small ones."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from aidefend.sanitize.election import majority, run_off, spread_majority


def naive_run_off(logits):
    """Winner of one input from logits (M, K), written as the rules say."""
    classes = logits.shape[1]
    votes = torch.bincount(logits.argmax(dim=1), minlength=classes)
    first, second = sorted(range(classes), key=lambda c: (-int(votes[c]), c))[:2]
    for_first = sum(
        bool(row[first] > row[second]) or bool(row[first] == row[second] and first < second) for row in logits
    )
    rest = len(logits) - for_first
    return first if for_first > rest or (for_first == rest and first < second) else second


def changed(choices, classes, count):
    """Every way to give `count` of the models another vote."""
    for models in itertools.combinations(range(len(choices)), count):
        for votes in itertools.product(range(classes), repeat=count):
            other = choices.clone()
            other[list(models)] = torch.tensor(votes, dtype=torch.int64)
            yield other


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(choices=st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_no_attack_beats_the_majority_certificate_and_one_more_row_does(choices):
    choices = torch.tensor(choices)
    found = majority(choices[:, None], 3)
    winner, radius = int(found.prediction), int(found.radius)
    for count in range(radius + 1):
        assert all(int(majority(o[:, None], 3).prediction) == winner for o in changed(choices, 3, count))
    if radius < len(choices):
        assert any(int(majority(o[:, None], 3).prediction) != winner for o in changed(choices, 3, radius + 1))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    choices=st.lists(st.integers(0, 2), min_size=6, max_size=6), shifts=st.sampled_from([(0, 1), (0, 2), (0, 1, 3)])
)
def test_no_attack_beats_the_certificate_of_spread_parts(choices, shifts):
    choices = torch.tensor(choices)
    touched = (torch.arange(6)[:, None] + torch.tensor(shifts)[None, :]) % 6
    found = spread_majority(choices[:, None], 3, touched)
    winner, radius = int(found.prediction), int(found.radius)
    assert winner == int(majority(choices[:, None], 3).prediction)
    for count in range(min(radius, 2) + 1):
        for parts in itertools.combinations(range(6), count):
            models = sorted({model for part in parts for model in touched[part].tolist()})
            for votes in itertools.product(range(3), repeat=len(models)):
                other = choices.clone()
                other[models] = torch.tensor(votes, dtype=torch.int64)
                assert int(majority(other[:, None], 3).prediction) == winner


RANKINGS = [torch.tensor(order, dtype=torch.float64) for order in itertools.permutations(range(3))]


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(rankings=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_no_attack_beats_the_run_off_certificate(rankings):
    logits = torch.stack([RANKINGS[i] for i in rankings])
    found = run_off(logits[:, None])
    winner, radius = int(found.prediction), int(found.radius)
    assert winner == naive_run_off(logits) and radius >= 0
    for count in range(min(radius, 3) + 1):
        for models in itertools.combinations(range(len(logits)), count):
            for new in itertools.product(RANKINGS, repeat=count):
                other = logits.clone()
                for model, ranking in zip(models, new, strict=True):
                    other[model] = ranking
                assert naive_run_off(other) == winner


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6), models=st.integers(3, 9))
def test_run_off_with_four_classes_and_ties_of_logits_against_random_attacks(seed, models):
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 3, (models, 4), generator=stream).double()
    found = run_off(logits[:, None])
    winner, radius = int(found.prediction), int(found.radius)
    assert winner == naive_run_off(logits)
    for _ in range(400 if radius else 0):
        other = logits.clone()
        rows = torch.randperm(models, generator=stream)[:radius]
        other[rows] = torch.randint(0, 3, (len(rows), 4), generator=stream).double()
        assert naive_run_off(other) == winner


def test_a_run_off_certifies_more_where_models_that_vote_otherwise_prefer_the_winner():
    """40 for a, 30 for b, 30 for c, and who votes c prefers a to b, who votes b prefers a to c."""
    orders = [[2.0, 1.0, 0.0]] * 40 + [[1.0, 2.0, 0.0]] * 30 + [[1.0, 0.0, 2.0]] * 30
    logits = torch.tensor(orders)[:, None]
    assert int(run_off(logits).radius) > int(majority(logits.argmax(dim=2), 3).radius)


@pytest.mark.parametrize("wrong", ["optimistic tie", "one vote a model"])
def test_planted_errors_in_the_certificate_would_be_caught(wrong):
    """The certificates that the papers warn of: no tie rule, or a changed model that only takes a vote away."""
    choices = torch.tensor([1, 1, 0]) if wrong == "optimistic tie" else torch.tensor([0, 0, 0, 1])
    votes = torch.bincount(choices, minlength=2)
    winner = int(majority(choices[:, None], 2).prediction)
    gap = int(votes[winner] - votes[1 - winner])
    planted = (gap + 1) // 2 if wrong == "optimistic tie" else gap
    beaten = any(int(majority(o[:, None], 2).prediction) != winner for o in changed(choices, 2, planted))
    assert beaten and int(majority(choices[:, None], 2).radius) < planted


def test_two_classes_have_no_third_that_could_overtake():
    logits = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 2)[:, None]
    assert int(run_off(logits).radius) == int(majority(logits.argmax(dim=2), 2).radius) == 1
