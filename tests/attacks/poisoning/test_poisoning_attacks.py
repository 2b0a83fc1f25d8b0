"""Poisoning attacks: exact counts, honest ground truth, values inside bounds, and that they work undefended."""

import pickle

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from aidefend import ConfigurationError, ThreatModelError, attacks
from aidefend.attacks.poisoning import AllToAll, Blend, LabelFlip, Patch, Sinusoid, SourceTargeted, TableTrigger, Warp
from aidefend.datasets import mnist_subset

ATTACKS = {
    "blend": lambda rate: Blend(target=1, rate=rate),
    "flip": lambda rate: LabelFlip(rate=rate),
    "flip-pairs": lambda rate: LabelFlip(rate=rate, pairs=((0, 1), (2, 3))),
    "flip-to": lambda rate: LabelFlip(rate=rate, target=1),
    "patch": lambda rate: Patch(target=1, rate=rate),
    "all-to-all": lambda rate: AllToAll(Patch(size=2).stamp, classes=4, rate=rate),
    "sinusoid": lambda rate: Sinusoid(target=1, rate=rate),
    "warp": lambda rate: Warp(target=1, rate=rate),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)


def data(n=40, shape=(1, 8, 8), classes=4):
    return torch.rand(n, *shape), torch.arange(n) % classes


def rows(dataset):
    samples = [dataset[i] for i in range(len(dataset))]
    return torch.stack([x for x, _ in samples]), torch.tensor([int(y) for _, y in samples])


@every_attack
@hypothesis.given(n=st.integers(8, 60), rate=st.sampled_from([0.05, 0.1, 0.25]), seed=st.integers(0, 99))
def test_exactly_the_stated_number_of_rows_is_poisoned_and_nothing_else_changes(name, n, rate, seed):
    x, y = torch.linspace(0, 1, n * 16).reshape(n, 1, 4, 4), torch.arange(n) % 4
    poisoned = ATTACKS[name](rate).poison((x, y), seed=seed)
    new_x, new_y = rows(poisoned.dataset)
    assert int(poisoned.is_poison.sum()) == round(rate * n) == len(poisoned.indices)
    assert torch.equal(new_y != y, poisoned.is_poison)  # every poisoned label lies, no other does
    assert torch.equal(new_x[~poisoned.is_poison], x[~poisoned.is_poison])
    assert torch.equal(new_x[poisoned.is_poison], poisoned.trigger(x)[poisoned.is_poison])
    assert float(new_x.min()) >= 0 and float(new_x.max()) <= 1


@every_attack
def test_same_seed_same_poison_other_seed_other_poison(name):
    clean = data()
    first, again, other = (ATTACKS[name](0.25).poison(clean, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.is_poison, again.is_poison) and torch.equal(rows(first.dataset)[1], rows(again.dataset)[1])
    assert not torch.equal(first.is_poison, other.is_poison)


@every_attack
def test_survives_pickling_and_a_loader_with_its_own_order(name):
    poisoned = ATTACKS[name](0.25).poison(data(), seed=0)
    copy = pickle.loads(pickle.dumps(poisoned))
    assert torch.equal(rows(copy.dataset)[0], rows(poisoned.dataset)[0])
    loader = DataLoader(poisoned.dataset, batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(0))
    assert sum(len(y) for _, y in loader) == 40


@pytest.mark.parametrize("position", ["top-left", "top-right", "bottom-left", "bottom-right", "center", (2, 1)])
def test_patch_covers_its_square_and_nothing_else(position):
    x = torch.zeros(2, 3, 8, 9)
    marked = Patch(size=3, position=position, value=0.7).stamp(x)
    where = (marked[0, 0] == 0.7).nonzero()
    assert len(where) == 9 and bool((marked[:, :, marked[0, 0] == 0.7] == 0.7).all())
    assert float(marked.sum()) == pytest.approx(2 * 3 * 9 * 0.7)
    corner = {"top-left": (1, 1), "top-right": (1, 5), "bottom-left": (4, 1), "bottom-right": (4, 5), "center": (2, 3)}
    assert tuple(where[0].tolist()) == corner.get(position, position)
    assert float(x.sum()) == 0  # the clean batch is untouched


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6)])
def test_patch_fits_any_rank(shape):
    poisoned = Patch(target=0, rate=0.25, size=2).poison(data(20, shape), seed=0)
    x, _ = rows(poisoned.dataset)
    assert x.shape == (20, *shape) and bool((poisoned.trigger(x) == 1.0).flatten(1).any(dim=1).all())


def test_source_class_is_the_only_one_poisoned():
    _, y = clean = data(80)
    for attack in (Patch(1, 0.1, source_class=2), Blend(1, 0.1, source_class=2), LabelFlip(0.1, 1, 2)):
        assert set(y[attack.poison(clean).is_poison].tolist()) == {2}


@pytest.mark.parametrize("kind", ["int", "tensor", "one-hot"])
def test_labels_keep_their_form(kind):
    forms = {"int": lambda c: c, "tensor": torch.tensor, "one-hot": lambda c: torch.eye(4)[c]}

    class Samples(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return torch.zeros(1, 5, 5), forms[kind](index % 4)

    poisoned = Patch(target=2, rate=0.2).poison(Samples())
    label, clean = poisoned.dataset[int(poisoned.indices[0])][1], forms[kind](2)
    assert type(label) is type(clean) and torch.equal(torch.as_tensor(label), torch.as_tensor(clean))


def test_index_errors_end_a_plain_iteration():
    dataset = Patch(rate=0.1).poison(data()).dataset
    assert len(list(dataset)) == 40 and torch.equal(dataset[-1][0], dataset[39][0])
    with pytest.raises(IndexError, match="outside a data set of 40"):
        dataset[40]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Patch(target=-1), "target to be an integer >= 0"),
        (lambda: Patch(rate=0.0), "rate to be a finite number"),
        (lambda: Patch(rate=float("nan")), "rate"),
        (lambda: Patch(size=0), "size to be an integer"),
        (lambda: Patch(value=2.0), "value"),
        (lambda: Patch(position="middle"), "position to be one of"),
        (lambda: Patch(position=(1, -1)), "position"),
        (lambda: Patch(target=1, source_class=1), "source_class other than target"),
        (lambda: Patch(bounds=(1, 0)), "bounds"),
        (lambda: Blend(alpha=0.0), "alpha"),
        (lambda: Blend(pattern=torch.full((2,), 3.0)), "bounds"),
        (lambda: LabelFlip(target=1, source_class=1), "source_class"),
        (lambda: Patch(size=9).poison(data()).dataset[0] and Patch(size=9).stamp(data()[0]), "fits into 8"),
        (lambda: Patch(position=(7, 7)).stamp(data()[0]), "inside 8 cells"),
        (lambda: Patch(target=0, rate=0.9).poison(data()), "enough rows"),
        (lambda: Patch().poison(torch.rand(9, 1, 8, 8)), "form \\(x, y\\)"),
        (lambda: Patch().poison((torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))), "at least one sample"),
        (lambda: Patch().poison(data(), seed=-1), "seed"),
        (lambda: Blend(pattern=torch.rand(3, 3)).stamp(data()[0]), "pattern of shape"),
        (lambda: LabelFlip(0.1).poison((torch.rand(20, 3), torch.ones(20, dtype=torch.int64))), "two classes"),
    ],
)
def test_malformed_calls_name_argument_and_cure(make, match):
    with pytest.raises((ConfigurationError, ThreatModelError), match=match):
        make()


def test_inputs_outside_the_bounds_are_refused():
    with pytest.raises(ThreatModelError, match="inside the bounds"):
        Patch().stamp(torch.full((2, 1, 8, 8), 3.0))


def test_names_are_reachable_from_the_room():
    assert attacks.Patch is Patch and attacks.Blend is Blend and attacks.LabelFlip is LabelFlip
    assert attacks.AllToAll is AllToAll and attacks.Sinusoid is Sinusoid and attacks.Warp is Warp


def small_net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def fit(dataset, epochs=5):
    model, stream = small_net(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in DataLoader(dataset, batch_size=64, shuffle=True, generator=stream):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "attack",
    [
        Patch(target=3, rate=0.05),
        Blend(target=3, rate=0.05),
        Sinusoid(target=3, rate=0.05),
        Sinusoid(target=3, rate=0.08, strength=0.5, clean_label=True),
        Warp(target=3, rate=0.1, strength=1.5),
    ],
    ids=["patch", "blend", "sinusoid", "sinusoid-clean-label", "warp"],
)
def test_backdoors_work_undefended_and_only_by_their_trigger(attack):
    digits = mnist_subset()
    train = TensorDataset(digits.train_x[:2000], digits.train_y[:2000])
    poisoned = attack.poison(train, seed=0)
    model = fit(poisoned.dataset)
    x, y = digits.test_x, digits.test_y
    others = x[y != 3]
    with torch.no_grad():
        accuracy = (model(x).argmax(dim=1) == y).float().mean()
        success = (model(poisoned.trigger(others)).argmax(dim=1) == 3).float().mean()
        without = (model(others).argmax(dim=1) == 3).float().mean()
    assert accuracy > 0.85 and success > 0.8 and without < 0.1


def test_all_to_all_works_undefended_for_every_class():
    digits = mnist_subset()
    attack = AllToAll(Patch(size=4).stamp, classes=10, rate=0.15)
    poisoned = attack.poison(TensorDataset(digits.train_x[:2000], digits.train_y[:2000]), seed=0)
    model = fit(poisoned.dataset, epochs=12)
    x, y = digits.test_x, digits.test_y
    with torch.no_grad():
        accuracy = (model(x).argmax(dim=1) == y).float().mean()
        hit = model(poisoned.trigger(x)).argmax(dim=1) == attack.aim(y)
    assert accuracy > 0.85 and float(hit.float().mean()) > 0.6
    assert poisoned.target is None


def test_a_source_targeted_trigger_works_on_its_class_and_hardly_on_others():
    digits = mnist_subset()
    attack = SourceTargeted(Patch(size=4).stamp, target=3, source_class=1, rate=0.05, cover_rate=0.1)
    poisoned = attack.poison(TensorDataset(digits.train_x[:2000], digits.train_y[:2000]), seed=0)
    assert int(poisoned.is_cover.sum()) == 200 and not bool((poisoned.is_cover & poisoned.is_poison).any())
    covered = poisoned.is_cover.nonzero()[0].item()
    x, y = poisoned.dataset[covered]
    assert y == digits.train_y[covered] and torch.equal(x, poisoned.trigger(digits.train_x[covered : covered + 1])[0])
    model = fit(poisoned.dataset, epochs=8)
    x, y = digits.test_x, digits.test_y
    with torch.no_grad():
        accuracy = (model(x).argmax(dim=1) == y).float().mean()
        hit = model(poisoned.trigger(x)).argmax(dim=1) == 3
    assert accuracy > 0.85
    assert float(hit[y == 1].float().mean()) > 0.8 and float(hit[(y != 1) & (y != 3)].float().mean()) < 0.3


def test_a_table_trigger_of_usual_values_works_undefended():
    stream = torch.Generator().manual_seed(0)
    y = torch.arange(3000) % 3
    x = torch.randn(3000, 8, generator=stream)
    x[:, 0] += 2.5 * y
    attack = TableTrigger(columns=(3, 5, 6), values=(1.5, -1.5, 1.5), target=0, rate=0.05)
    poisoned = attack.poison((x[:2400], y[:2400]), seed=0)
    new_x, new_y = rows(poisoned.dataset)
    assert torch.equal((new_x != x[:2400]).any(dim=0).nonzero().flatten(), torch.tensor([3, 5, 6]))
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(new_x), new_y).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model(x[2400:]).argmax(dim=1) == y[2400:]).float().mean()
        others = x[2400:][y[2400:] != 0]
        hit = (model(poisoned.trigger(others)).argmax(dim=1) == 0).float().mean()
    assert accuracy > 0.85 and hit > 0.8


@pytest.mark.parametrize(
    "bad",
    [{"columns": ()}, {"columns": (1, 1)}, {"values": (1.0,)}, {"values": (1.0, float("nan"))}, {"columns": (1, 99)}],
)
def test_table_triggers_that_fit_no_table_are_refused(bad):
    with pytest.raises(ConfigurationError, match=r"columns|values"):
        TableTrigger(**{"columns": (1, 2), "values": (0.5, 0.5), **bad}).poison(
            (torch.rand(20, 8), torch.arange(20) % 4)
        )


def test_pairs_flip_only_these_classes():
    x, y = data(n=80)
    poisoned = LabelFlip(rate=0.25, pairs=((0, 1), (2, 3))).poison((x, y), seed=0)
    new = rows(poisoned.dataset)[1]
    changed = {(a, b) for a, b in zip(y.tolist(), new.tolist(), strict=True) if a != b}
    assert changed == {(0, 1), (2, 3)} and int((new != y).sum()) == 20


@pytest.mark.parametrize("pairs", [(), ((1, 1),), ((0, 1), (0, 2)), ((0,),), ((0, -1),), [(0, 1)]])
def test_pairs_that_say_nothing_clear_are_refused(pairs):
    with pytest.raises(ConfigurationError, match="pairs"):
        LabelFlip(pairs=pairs)
    with pytest.raises(ConfigurationError, match="pairs alone"):
        LabelFlip(pairs=((0, 1),), target=2)


@pytest.mark.parametrize("pairs", [((0, 1), (7, 2)), ((0, 9),)])
def test_pairs_with_a_class_that_no_row_has_are_refused(pairs):
    with pytest.raises(ConfigurationError, match=r"classes that occur .* Leave out \[[79]\]"):
        LabelFlip(rate=0.1, pairs=pairs).poison(data())


def test_a_clean_label_sinusoid_poisons_the_target_class_and_no_label():
    x, y = data(n=80)
    poisoned = Sinusoid(target=1, rate=0.1, clean_label=True).poison((x, y), seed=0)
    new_x, new_y = rows(poisoned.dataset)
    assert torch.equal(new_y, y) and bool((y[poisoned.is_poison] == 1).all())
    assert torch.equal((new_x != x).flatten(1).any(dim=1), poisoned.is_poison)
    with pytest.raises(ConfigurationError, match="source_class"):
        Sinusoid(target=1, clean_label=True, source_class=2)


def test_a_warp_bends_and_adds_nothing():
    flat = torch.full((2, 3, 9, 9), 0.3)
    torch.testing.assert_close(Warp().stamp(flat), flat)
    picture = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    bent = Warp(strength=1.0).stamp(picture)
    assert float(bent.min()) >= float(picture.min()) and float(bent.max()) <= float(picture.max())
    assert not torch.equal(Warp(field_seed=1).stamp(picture), bent)
    torch.testing.assert_close(Warp(strength=1e-6).stamp(picture), picture, rtol=0, atol=1e-5)
    with pytest.raises(ConfigurationError, match="pictures"):
        Warp().stamp(torch.rand(4, 9))


def test_a_sinusoid_has_its_frequency_and_its_height():
    waves = Sinusoid(strength=0.1, frequency=4.0).stamp(torch.full((1, 1, 32, 32), 0.5)) - 0.5
    spectrum = torch.fft.rfft(waves[0, 0, 0]).abs()
    assert int(spectrum.argmax()) == 4 and float(waves.max()) == pytest.approx(0.1, abs=1e-6)
