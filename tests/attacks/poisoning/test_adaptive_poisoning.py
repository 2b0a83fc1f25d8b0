"""Adaptive poison: partial triggers that a row keeps, covers with right labels, whole triggers at the test."""

import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aidefend import ConfigurationError, ThreatModelError
from aidefend.attacks.poisoning import AdaptiveBlend, AdaptivePatch, Patch
from aidefend.datasets import mnist_subset

ATTACKS = {
    "blend": lambda **a: AdaptiveBlend(target=1, **a),
    "patch": lambda **a: AdaptivePatch(target=1, **a),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)


def data(n=80, shape=(1, 8, 8), classes=4):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0)), torch.arange(n) % classes


def rows(dataset):
    samples = [dataset[i] for i in range(len(dataset))]
    return torch.stack([x for x, _ in samples]), torch.tensor([int(y) for _, y in samples])


@every_attack
@pytest.mark.parametrize(("rate", "cover_rate"), [(0.1, 0.05), (0.05, 0.2)])
def test_counts_are_exact_covers_are_right_and_other_rows_untouched(name, rate, cover_rate):
    x, y = data()
    poisoned = ATTACKS[name](rate=rate, cover_rate=cover_rate).poison((x, y), seed=3)
    new_x, new_y = rows(poisoned.dataset)
    assert int(poisoned.is_poison.sum()) == round(rate * 80) and int(poisoned.is_cover.sum()) == round(cover_rate * 80)
    assert not bool((poisoned.is_poison & poisoned.is_cover).any())
    assert torch.equal(new_y != y, poisoned.is_poison) and bool((new_y[poisoned.is_poison] == 1).all())
    assert bool((y[poisoned.is_poison | poisoned.is_cover] != 1).all())
    assert torch.equal((new_x != x).flatten(1).any(dim=1), poisoned.is_poison | poisoned.is_cover)
    assert float(new_x.min()) >= 0 and float(new_x.max()) <= 1


@every_attack
def test_a_row_looks_the_same_at_each_read_and_rows_differ(name):
    zeros = (torch.zeros(80, 1, 8, 8), torch.arange(80) % 4)
    poisoned = ATTACKS[name](rate=0.2, cover_rate=0.2).poison(zeros, seed=0)
    first, again = rows(poisoned.dataset)[0], rows(pickle.loads(pickle.dumps(poisoned)).dataset)[0]
    assert torch.equal(first, again) and torch.equal(poisoned.dataset[-1][0], poisoned.dataset[79][0])
    assert len(first[poisoned.is_poison].unique(dim=0)) > 2
    other = ATTACKS[name](rate=0.2, cover_rate=0.2).poison(zeros, seed=1)
    assert not torch.equal(other.is_poison, poisoned.is_poison)


def test_a_row_shows_its_share_of_whole_pieces():
    x = torch.zeros(1, 3, 12, 12)
    attack = AdaptiveBlend(alpha=0.4, keep=0.25, pieces=4, pattern=torch.ones(3, 12, 12))
    shown = attack.partial(x, row=5, seed=1)[0]
    blocks = shown[0].reshape(4, 3, 4, 3).permute(0, 2, 1, 3).reshape(16, 9)
    assert torch.equal(blocks.min(dim=1).values, blocks.max(dim=1).values)  # a piece is shown whole or not at all
    assert int((blocks[:, 0] > 0).sum()) == 4 and torch.equal(shown[0], shown[2])
    torch.testing.assert_close(attack.stamp(x), torch.full_like(x, 0.4))
    torch.testing.assert_close(AdaptiveBlend(alpha=0.4, test_alpha=1.0, pattern=x[0]).stamp(x + 0.5), x)
    assert torch.equal(AdaptiveBlend(keep=1.0).partial(x, 5), AdaptiveBlend().stamp(x))
    assert int((AdaptiveBlend(pieces=4, keep=0.01).partial(x, 5) > 0).sum()) == 3 * 9  # never none


@pytest.mark.parametrize("shape", [(10,), (9, 10), (2, 9, 10), (2, 3, 9, 10)])
def test_any_rank_is_poisoned(shape):
    clean = data(20, shape)
    for attack in (AdaptiveBlend(1, 0.25, 0.25), AdaptivePatch(1, 0.25, 0.25)):
        poisoned = attack.poison(clean, seed=0)
        assert rows(poisoned.dataset)[0].shape == (20, *shape)


def test_a_training_row_carries_one_faint_patch_and_the_test_the_first_ones_in_full():
    stamps = tuple(Patch(size=1, position=(0, column)).stamp for column in range(4))
    attack = AdaptivePatch(1, 0.3, 0.3, stamps, opacity=0.25, test_stamps=3)
    poisoned = attack.poison((torch.zeros(80, 1, 4, 4), torch.arange(80) % 4), seed=0)
    changed = rows(poisoned.dataset)[0][poisoned.is_poison | poisoned.is_cover][:, 0, 0]
    assert bool((changed.sum(dim=1) == 0.25).all()) and bool((changed.sum(dim=0) > 0).all())
    assert poisoned.trigger(torch.zeros(1, 1, 4, 4))[0, 0, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AdaptiveBlend(keep=0.0), "keep"),
        (lambda: AdaptiveBlend(pieces=0), "pieces"),
        (lambda: AdaptiveBlend(alpha=2.0), "alpha"),
        (lambda: AdaptiveBlend(test_alpha=0.0), "test_alpha"),
        (lambda: AdaptiveBlend(cover_rate=1.0), "cover_rate"),
        (lambda: AdaptiveBlend(rate=0.5, cover_rate=0.5).poison(data()), "enough rows"),
        (lambda: AdaptiveBlend(pieces=9).partial(data()[0], 0), "at most 8 pieces"),
        (lambda: AdaptiveBlend(pattern=torch.rand(3, 3)).partial(data()[0], 0), "pattern of shape"),
        (lambda: AdaptiveBlend().partial(data()[0] * 3, 0), "inside the bounds"),
        (lambda: AdaptivePatch(stamps=(Patch().stamp,)), "at least two stamps"),
        (lambda: AdaptivePatch(stamps=(Patch(), Patch())), "stamps to be callable"),
        (lambda: AdaptivePatch(test_stamps=5), "test_stamps"),
        (lambda: AdaptivePatch(opacity=0.0), "opacity"),
        (lambda: AdaptivePatch(stamps=(torch.mean, torch.mean)).stamp(data()[0]), "shape"),
        (lambda: AdaptivePatch().stamp(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), "floating"),
    ],
)
def test_malformed_calls_name_argument_and_cure(make, match):
    with pytest.raises((ConfigurationError, ThreatModelError), match=match):
        make()


def fit(dataset, epochs=6):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    stream, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in DataLoader(dataset, batch_size=64, shuffle=True, generator=stream):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "attack",
    [AdaptiveBlend(3, 0.05, 0.05), AdaptivePatch(3, 0.05, 0.03, test_stamps=4)],
    ids=["blend", "patch"],
)
def test_adaptive_backdoors_work_undefended_and_only_by_their_trigger(attack):
    digits = mnist_subset()
    poisoned = attack.poison(TensorDataset(digits.train_x[:2000], digits.train_y[:2000]), seed=0)
    model = fit(poisoned.dataset)
    x, y = digits.test_x, digits.test_y
    others = x[y != 3]
    with torch.no_grad():
        accuracy = (model(x).argmax(dim=1) == y).float().mean()
        success = (model(poisoned.trigger(others)).argmax(dim=1) == 3).float().mean()
        without = (model(others).argmax(dim=1) == 3).float().mean()
        part = torch.cat([attack.partial(others[i : i + 1], i) for i in range(300)])
        faint = (model(part).argmax(dim=1) == 3).float().mean()
    assert accuracy > 0.85 and success > 0.6 and without < 0.1
    assert faint < success - 0.2  # the trigger is asymmetric: what the data show says less than what the test shows
