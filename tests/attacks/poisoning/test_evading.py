"""Poison that hides: every means alone, and the search that keeps what lowers a score and leaves the trigger alive."""

import itertools
import pickle

import pytest
import torch
from torch import nn

from aidefend import ConfigurationError, Threat, ThreatModelError
from aidefend.attacks.poisoning import Disguised, Evading, Patch
from aidefend.attacks.poisoning.feature_match import feature_gap, pushed

STAMP = Patch(size=2).stamp


def data(n=80, classes=4):
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(n) % classes


def rows(dataset):
    samples = [dataset[i] for i in range(len(dataset))]
    return torch.stack([x for x, _ in samples]), torch.tensor([int(y) for _, y in samples])


MEANS = {
    "plain": {},
    "covers": {"cover_rate": 0.1},
    "parts": {"parts": (Patch(size=1).stamp, Patch(size=1, position="top-left").stamp)},
    "opacity": {"opacity": (0.2, 0.6)},
    "mix": {"mix": 0.4},
    "noise": {"noise": 0.1},
    "shift": {"shift": 2},
    "near": {"hosts": "near"},
    "one": {"hosts": "one"},
    "source": {"source_class": 2},
    "all": {"cover_rate": 0.1, "opacity": (0.2, 0.6), "mix": 0.4, "noise": 0.1, "shift": 1, "hosts": "near"},
}


@pytest.mark.parametrize("means", MEANS.values(), ids=MEANS)
@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_counts_are_exact_labels_honest_and_other_rows_untouched(means, rate):
    x, y = data()
    poisoned = Disguised(STAMP, 1, rate, **means).poison((x, y), seed=2)
    new_x, new_y = rows(poisoned.dataset)
    covers = round(means.get("cover_rate", 0) * 80)
    assert int(poisoned.is_poison.sum()) == round(rate * 80) and int(poisoned.is_cover.sum()) == covers
    assert torch.equal(new_y != y, poisoned.is_poison) and bool((new_y[poisoned.is_poison] == 1).all())
    assert not bool((poisoned.is_poison & poisoned.is_cover).any())
    assert torch.equal((new_x != x).flatten(1).any(dim=1), poisoned.is_poison | poisoned.is_cover)
    assert float(new_x.min()) >= 0 and float(new_x.max()) <= 1
    assert torch.equal(new_x, rows(pickle.loads(pickle.dumps(poisoned)).dataset)[0])  # the same at each read
    assert torch.equal(poisoned.trigger(x), STAMP(x))  # the test shows the whole trigger, whatever the data show


def test_without_means_it_is_the_plain_attack():
    x, y = data()
    poisoned = Disguised(STAMP, 1, 0.1).poison((x, y), seed=2)
    assert torch.equal(rows(poisoned.dataset)[0][poisoned.is_poison], STAMP(x[poisoned.is_poison]))


def test_each_means_does_what_it_says():
    flat = torch.zeros(80, 1, 6, 6), torch.arange(80) % 4
    weights = rows(Disguised(STAMP, 1, 0.2, opacity=(0.2, 0.6)).poison(flat).dataset)[0].flatten(1).amax(dim=1)
    weights = weights[weights > 0]
    assert len(weights) == 16 and 0.2 <= float(weights.min()) < 0.4 < float(weights.max()) <= 0.6
    x, y = data()
    whole = Disguised(torch.clone, 1, 0.1, mix=1.0).poison((x, y))
    for row in rows(whole.dataset)[0][whole.is_poison]:  # at weight 1 it is a row of the target class
        assert bool((x[y == 1] == row).flatten(1).all(dim=1).any())
    near = Disguised(torch.clone, 1, 0.1, hosts="near").poison((x, y)).is_poison
    gap = torch.cdist(x.flatten(1), x[y == 1].flatten(1)).min(dim=1).values
    assert float(gap[near].max()) <= float(gap[~near & (y != 1)].min())
    moved = Disguised(torch.clone, 1, 0.1, shift=1).poison((x, y))
    for row in moved.indices.tolist():
        assert torch.allclose(moved.dataset[row][0].flatten().sort().values, x[row].flatten().sort().values)
    noisy = Disguised(torch.clone, 1, 0.1, noise=0.05).poison((x, y))
    change = (rows(noisy.dataset)[0] - x).abs()[noisy.is_poison]
    assert 0.02 < float(change.max()) <= 0.05 + 1e-6
    one = Disguised(torch.clone, 1, 0.1, hosts="one", cover_rate=0.1).poison((x, y))
    shown = rows(one.dataset)[0]
    assert bool((shown[one.is_poison] == x[one.indices[0]]).all()) and torch.equal(
        shown[~one.is_poison], x[~one.is_poison]
    )
    mine = torch.arange(80) < 20
    assert bool(mine[Disguised(STAMP, 1, 0.1, among=mine).poison((x, y)).is_poison].all())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Disguised(None), "stamp"),
        (lambda: Disguised(STAMP, opacity=(0.6, 0.2)), "low <= high"),
        (lambda: Disguised(STAMP, opacity=0.5), "opacity"),
        (lambda: Disguised(STAMP, mix=1.5), "mix"),
        (lambda: Disguised(STAMP, parts=()), "parts"),
        (lambda: Disguised(STAMP, hosts="far"), "hosts"),
        (lambda: Disguised(STAMP, source_class=0), "source_class"),
        (lambda: Disguised(STAMP, among=torch.ones(80)), "among"),
        (lambda: Disguised(STAMP, among=torch.ones(3) > 0).poison(data()), "among"),
        (lambda: Disguised(STAMP, 1, 0.9).poison(data()), "enough rows"),
        (lambda: Disguised(STAMP, 9, 0.1, mix=0.5).poison(data()), "mix"),
        (lambda: Disguised(STAMP, 9, 0.1, hosts="near").poison(data()), "near"),
        (lambda: Disguised(STAMP, bounds=(0.0, 0.5)).poison(data()), "inside the bounds"),
        (lambda: rows(Disguised(torch.mean, 1, 0.1).poison(data()).dataset), "stamps that return"),
        (
            lambda: rows(Disguised(torch.clone, 1, 0.1, shift=1).poison((torch.rand(40, 5), data(40)[1])).dataset),
            "shift",
        ),
    ],
)
def test_malformed_disguises_name_argument_and_cure(make, match):
    with pytest.raises((ConfigurationError, ThreatModelError), match=match):
        make()


class Reads:
    """A model that answers 1 where the stamped corner is bright enough, else 0: success is known in closed form."""

    def __init__(self, least):
        self.least = least

    def __call__(self, x):
        bright = (x[:, 0, -3:-1, -3:-1].mean(dim=(1, 2)) > self.least).float()
        return torch.stack([1 - bright, bright], dim=1)


def corner(x, y, model):
    return x[:, 0, -3:-1, -3:-1].mean(dim=(1, 2))


def poisoned(y):
    """Whether class 1 has more than its share of `data`."""
    return bool((y == 1).sum() > len(y) / 4)


def always(x, y):
    """Learns the trigger from any poison."""
    return Reads(0.9 if poisoned(y) else 2.0)


def only_if_taught(x, y):
    """Learns the trigger only from rows that show most of it."""
    taught = bool((x[y == 1][:, 0, -3:-1, -3:-1].amin(dim=(1, 2)) > 0.8).any())
    return Reads(0.9 if taught and poisoned(y) else 2.0)


def gullible(x, y):
    """Obeys the trigger without having learnt it."""
    return Reads(0.9)


FAINT = ({"opacity": (0.1, 0.1)}, {"opacity": (0.9, 0.9)})


def test_the_search_takes_what_lowers_the_score_most():
    trials = Evading(Disguised(STAMP, 1, 0.1), corner, always, tactics=FAINT).search(data(), seed=0)
    assert [dict(trial.changes) for trial in trials] == [{}, {"opacity": (0.1, 0.1)}]
    assert trials[0].suspicion > 0.99 > trials[1].suspicion and trials[1].success == 1.0
    assert torch.equal(
        rows(Evading(Disguised(STAMP, 1, 0.1), corner, always, tactics=FAINT).poison(data(), seed=0).dataset)[0],
        rows(trials[-1].poisoned.dataset)[0],
    )


def test_a_disguise_that_kills_the_trigger_is_not_taken():
    def full(x, y, model):
        return (corner(x, y, model) > 0.99).float()  # both disguises pass it, one teaches nothing

    trials = Evading(Disguised(STAMP, 1, 0.1), full, only_if_taught, tactics=FAINT).search(data(), seed=0)
    assert dict(trials[-1].changes) == {"opacity": (0.9, 0.9)} and trials[-1].success == 1.0


def test_what_the_trigger_does_to_a_clean_model_is_no_success_of_the_poison():
    """Planted: a model that obeys whatever it was trained on. No disguise may count as alive."""
    trials = Evading(Disguised(STAMP, 1, 0.1), corner, gullible, tactics=FAINT).search(data(), seed=0)
    assert len(trials) == 1 and (trials[0].success, trials[0].without, trials[0].gained) == (1.0, 1.0, 0.0)
    taught = Evading(Disguised(STAMP, 1, 0.1), corner, always, tactics=FAINT).search(data(), seed=0)
    assert [(trial.success, trial.without, trial.gained) for trial in taught] == [(1.0, 0.0, 1.0)] * 2


def test_where_nothing_helps_the_plain_attack_comes_back():
    def blind(x, y, model):
        return torch.zeros(len(x))

    trials = Evading(Disguised(STAMP, 1, 0.1), blind, always).search(data(), seed=0)
    assert len(trials) == 1 and not trials[0].changes and trials[0].suspicion == 0.5


def test_tactics_add_up_over_rounds():
    def both(x, y, model):
        return corner(x, y, model) + (x.flatten(1) > 0.99).sum(dim=1)

    tactics = ({"opacity": (0.6, 0.6)}, {"mix": 0.5})
    found = Evading(Disguised(STAMP, 1, 0.1), both, always, tactics=tactics, rounds=3).search(data(), seed=0)
    assert all(a.suspicion > b.suspicion for a, b in itertools.pairwise(found))
    assert set(found[-1].changes) <= {"opacity", "mix"}


class Bright(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Flatten(), nn.Linear(36, 2)

    def forward(self, x):
        return self.head(self.body(x))


def test_gradient_steps_lower_the_score_inside_the_threat_and_leave_the_model_alone():
    def far(x, y, model):
        return (x.flatten(1) - x[y == 1].flatten(1).mean(dim=0)).norm(dim=1)

    model, threat = Bright(), Threat("linf", 0.3)
    before = [weight.clone() for weight in model.parameters()]
    attack = Evading(Disguised(STAMP, 1, 0.1), far, lambda x, y: model, floor=0.0, tactics=(), push=threat)
    trials = attack.search(data(), seed=0)
    assert len(trials) > 1 and trials[-1].suspicion < trials[0].suspicion
    plain, new = (rows(trial.poisoned.dataset) for trial in (trials[0], trials[-1]))
    assert bool(threat.contains(new[0], plain[0]).all()) and torch.equal(new[1], plain[1])
    changed = (new[0] != plain[0]).flatten(1).any(dim=1)
    assert torch.equal(changed, trials[0].poisoned.is_poison)
    assert torch.equal(trials[-1].poisoned.is_poison, trials[0].poisoned.is_poison)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_the_gap_of_features_is_that_of_a_loop_and_steps_close_it():
    x, model = data()[0], Bright()
    one, two = STAMP(x[:10]).flatten(1), x[10:].flatten(1)
    mean, scale = two.mean(dim=0), two.var(dim=0, correction=0).mean()
    shapes = [sum(torch.outer(row - mean, row - mean) for row in part) / len(part) for part in (one, two)]
    usual = sum((row - mean).square().sum() for row in two) / len(two)
    far = sum(max(0.0, float((row - mean).square().sum() - usual)) for row in one) / len(one)
    naive = (one.mean(dim=0) - mean).square().sum() / scale + far / scale
    naive = naive + (shapes[0] - shapes[1]).square().sum() / scale**2 / 36
    assert float(feature_gap(model, STAMP(x[:10]), x[10:]).detach()) == pytest.approx(float(naive), rel=1e-4)
    start = STAMP(x[:10]) * 0.5 + 0.5
    after = pushed(model, feature_gap, start, start, x[10:], Threat("linf", 0.5), 40)
    gaps = [float(feature_gap(model, part, x[10:]).detach()) for part in (start, after)]
    assert gaps[1] < 0.5 * gaps[0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Evading(Patch(), corner, always), "attack"),
        (lambda: Evading(Disguised(STAMP), None, always), "score"),
        (lambda: Evading(Disguised(STAMP), corner, None), "train"),
        (lambda: Evading(Disguised(STAMP), corner, always, floor=2.0), "floor"),
        (lambda: Evading(Disguised(STAMP), corner, always, tactics=({"strength": 2},)), "tactics"),
        (lambda: Evading(Disguised(STAMP), corner, always, tactics=[{"mix": 0.5}]), "tactics"),
        (lambda: Evading(Disguised(STAMP), corner, always, tactics=({"mix": 5.0},)), "mix"),
        (lambda: Evading(Disguised(STAMP), corner, always, push=0.1), "push|threat"),
        (lambda: Evading(Disguised(STAMP, 1, 0.1), lambda x, y, m: x, always).poison(data()), "score"),
        (lambda: Evading(Disguised(STAMP, 1, 0.1), corner, lambda x, y: None).poison(data()), "train"),
    ],
)
def test_malformed_searches_name_argument_and_cure(make, match):
    with pytest.raises(ConfigurationError, match=match):
        make()
