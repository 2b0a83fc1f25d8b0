"""Feature extraction: row i is sample i, the model is left as it was, and bad rows never enter it."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from aidefend import ConfigurationError, IncompatibleModel
from aidefend.sanitize import ConfidentLearning, FeatureStore, SpectralSignature, extract_features, screen


class Net(nn.Module):
    """The head is defined before the body; dropout and BatchNorm show whether eval mode was on."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5))
        self.body[0].weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(x))


def data(n=23):
    return torch.randn(n, 4), torch.arange(n) % 3


def reference(model, x):
    model = model.eval()
    with torch.no_grad():
        return model.body(x), model(x)


@pytest.mark.parametrize("batch_size", [1, 7, 23, 512])
def test_row_i_is_sample_i_for_any_batch_size_with_a_partial_last_batch(batch_size):
    x, y = data()
    model = Net()
    found = extract_features((x, y), model, batch_size=batch_size)
    features, logits = reference(model, x)
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(found.losses, nn.functional.cross_entropy(logits, y, reduction="none"))
    assert torch.equal(found.labels, y) and len(found) == len(found.ids) == 23


def test_a_shuffling_loader_is_read_in_the_order_of_its_data_set():
    x, y = data()
    model = Net()
    stream = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, drop_last=True, generator=stream)
    assert extract_features(loader, model).ids == extract_features((x, y), model).ids


def test_nothing_of_the_model_or_the_world_is_changed():
    x, y = data()
    model = Net().train()
    model.body[1].eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)

    def state():
        return (
            [(k, v.tolist()) for k, v in model.state_dict().items()],
            [m.training for m in model.modules()],
            [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
            [len(m._forward_pre_hooks) for m in model.modules()],
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            random.getstate(),
        )

    before = state()
    extract_features((x, y), model)
    with pytest.raises(IncompatibleModel):
        extract_features((torch.randn(9, 3), y[:9]), model)  # breaks inside the forward pass
    assert state() == before


def test_layers_by_name_module_callable_and_tensor():
    x, y = data()
    model = Net().eval()
    own = torch.randn(23, 2)
    assert torch.equal(extract_features((x, y), model, layer="body.0").features, x)
    assert torch.equal(extract_features((x, y), model, layer=model.body).features, x)
    assert torch.equal(extract_features((x, y), model, layer=lambda rows: 2 * rows).features, 2 * x)
    assert torch.equal(extract_features((x, y), model, layer=own).features, own)
    torch.testing.assert_close(extract_features((x, y), lambda rows: rows[:, :3]).features, x[:, :3])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_rows_never_reach_the_model(bad):
    x, y = data()
    x[3, 1] = bad
    seen = []

    def model(rows):
        seen.append(bool(torch.isfinite(rows).all()))
        return rows[:, :3]

    found = extract_features((x, y), model)
    assert all(seen) and found.usable.tolist() == [i != 3 for i in range(23)]
    assert bool(found.features[3].isnan().all()) and bool(found.losses[3].isnan())


def test_rows_for_which_the_model_returns_nan_are_marked():
    x, y = data()
    found = extract_features((x, y), lambda rows: torch.where(rows[:, :1] > 0, torch.nan, rows[:, :3]))
    assert torch.equal(found.usable, x[:, 0] <= 0)


def test_blocks_cover_all_rows_once_and_carry_what_detectors_need():
    x, y = data()
    found = extract_features((x, y), Net())
    blocks = list(found.blocks(size=10, view=x))
    assert [len(block["ids"]) for block in blocks] == [10, 10, 3]
    assert torch.equal(torch.cat([block["view"] for block in blocks]), x)
    assert set(blocks[0]) == {"ids", "features", "labels", "logits", "losses", "x", "view"}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: extract_features(torch.randn(4, 4), Net()), "samples"),
        (lambda: extract_features((torch.randn(4), torch.zeros(4, dtype=torch.int64)), Net()), "at least one feature"),
        (lambda: extract_features(data(), Net(), layer="absent"), "layer to be a module"),
        (lambda: extract_features(data(), Net(), layer=torch.randn(5, 2)), "23 row"),
        (lambda: extract_features(data(), lambda x: x[:, :1]), "logits"),
        (lambda: extract_features(data(), lambda x: x, layer="name"), "layer"),
        (lambda: extract_features(data(), Net(), batch_size=0), "batch_size"),
    ],
)
def test_malformed_calls_name_argument_and_cure(call, match):
    with pytest.raises(ConfigurationError, match=match):
        call()


class Shaking(Dataset):
    """Samples (x, y); `shakes` says whether the transform of training is on."""

    def __init__(self, shakes):
        self.rows, self.shakes = data(60), shakes

    def __len__(self):
        return 60

    def __getitem__(self, row):
        x, y = self.rows[0][row], int(self.rows[1][row])
        return (x.flip(0) if self.shakes and random.random() < 0.5 else x), y


@pytest.mark.global_random("the data set draws from the global stream, as augmentation does")
def test_augmentation_that_is_on_is_refused_wherever_features_are_taken(tmp_path):
    model = Net()
    calls = (
        lambda rows: extract_features(rows, model),
        lambda rows: extract_features(DataLoader(rows, 7), model),
        lambda rows: screen(rows, model),
        lambda rows: FeatureStore.write(rows, model, tmp_path / str(rows.shakes)),
    )
    for call in calls:
        assert len(call(Shaking(False))) == 60
        with pytest.raises(ConfigurationError, match=r"same at each read.*Turn augmentation off"):
            call(Shaking(True))


def test_features_of_the_user_need_no_model():
    x, y = data()
    features = torch.randn(23, 6)
    features[4] = torch.nan
    for given in (features, features.numpy()):
        found = extract_features((x, y), None, layer=given)
        assert (
            torch.equal(found.features[:4], features[:4]) and found.logits.isnan().all() and found.losses.isnan().all()
        )
        assert found.usable.tolist() == [row != 4 for row in range(23)]
        (block,) = found.blocks()
        scores = SpectralSignature().partial_fit(block).score(block)
        assert bool(scores[found.usable].isfinite().all())
        assert bool(ConfidentLearning().partial_fit(block).score(block).isnan().all())
        beside = extract_features((x, y), Net(), layer=given)
        assert torch.equal(beside.features[:4], features[:4]) and bool(beside.losses[:4].isfinite().all())
    for layer in (None, "head", lambda rows: rows):
        with pytest.raises(ConfigurationError, match="layer=features"):
            extract_features((x, y), None, layer=layer)


def test_a_model_without_a_linear_names_the_cure():
    with pytest.raises(IncompatibleModel, match="layer="):
        extract_features(data(), nn.ReLU())


@pytest.mark.parametrize("layer", [-1, 0.5, object(), ["head"], {}])
def test_a_layer_that_is_none_is_refused_and_never_falls_back_to_the_logits(layer):
    with pytest.raises(ConfigurationError, match="layer to be a name, a module, a function or a tensor"):
        extract_features((torch.rand(6, 4), torch.arange(6) % 2), nn.Linear(4, 2), layer=layer)


def test_a_label_below_0_costs_its_row_alone():
    found = extract_features((torch.randn(4, 4), torch.tensor([0, 1, -1, 0])), Net())
    assert found.usable.tolist() == [True, True, False, True] and "below 0" in found.broken[0][1]
    with pytest.raises(ConfigurationError, match="below 0"):
        extract_features((torch.randn(4, 4), torch.full((4,), -1)), Net())


def test_gradient_parts_are_the_factors_of_the_gradient_by_the_last_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 7])
    errors, inputs = extract_features((x, y), model).gradient_parts()
    for row in range(4):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[row : row + 1]), y[row : row + 1]).backward()
        outer = torch.outer(errors[row], inputs[row])
        assert torch.allclose(outer[:, :-1], model[2].weight.grad, atol=1e-6)
        assert torch.allclose(outer[:, -1], model[2].bias.grad, atol=1e-6)
    assert bool(errors[4].isnan().all())  # the model has no such class
