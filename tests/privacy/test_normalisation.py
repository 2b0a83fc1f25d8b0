"""fix(model): batch normalisation gives way to normalisation of each row, rows stay apart, and every change is told."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from aidefend import ConfigurationError, IncompatibleModel
from aidefend.privacy import Change, Fixed, check_private_ready, fix, normalisation
from tests.privacy.private_worlds import cross_entropy, images, one_step, private_run, quiet, rows

FEW = hypothesis_settings(max_examples=20, deadline=None)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the stream is put back on leaving
        return make()


def spread(model, x):
    """How far outputs of different rows lie apart, beside their size."""
    outputs = model(x).detach()
    return float((outputs - outputs.mean(0)).norm() / outputs.norm())


def table_net(width=32):
    return seeded(lambda: nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)))


def image_net(channels=16):
    layers = [nn.Conv2d(1, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten()]
    return seeded(lambda: nn.Sequential(nn.Sequential(*layers), nn.Linear(64 * channels, 3)))


def test_the_fix_of_others_kills_the_model_and_ours_does_not():
    """One group for each feature of a table: the output of every row is the same (Opacus issues 567, 587)."""
    x, _ = rows()
    model = table_net()
    dead = copy.deepcopy(model)
    dead[1] = nn.GroupNorm(32, 32)
    assert spread(dead, x) < 1e-3
    fixed = fix(model)
    assert spread(fixed.model, x) > 0.1
    assert isinstance(fixed.model[1], nn.GroupNorm) and fixed.model[1].num_groups == 1
    torch.testing.assert_close(fixed.model[1](model[0](x)), nn.functional.layer_norm(model[0](x), (32,)))


def test_says_what_it_did():
    fixed = fix(nn.Sequential(image_net(), nn.Identity()))
    assert isinstance(fixed, Fixed) and len(fixed.changes) == 1
    change = fixed.changes[0]
    assert isinstance(change, Change) and change.path == "0.0.1"
    assert change.before.startswith("BatchNorm2d(16") and change.after.startswith("GroupNorm(4, 16")
    assert "mixes the examples" in change.why


@pytest.mark.parametrize(("make", "data"), [(table_net, rows), (image_net, images)])
def test_the_result_trains_privately(make, data):
    model = make()
    batch = tuple(part[:4] for part in data())
    assert [problem.name for problem in check_private_ready(model, cross_entropy, batch)] == ["batch-normalisation"]
    fixed = fix(model, data()[0][:4]).model
    assert check_private_ready(fixed, cross_entropy, batch) == []
    before = fixed(data()[0]).detach()
    one_step(private_run(fixed, data(), quiet()))
    assert not torch.equal(before, fixed(data()[0]))


def test_the_model_itself_is_left_as_it_was():
    model = image_net()
    kept, text, stream = copy.deepcopy(model.state_dict()), repr(model), torch.get_rng_state()
    fixed = fix(model, images()[0])
    assert repr(model) == text and all(torch.equal(v, model.state_dict()[name]) for name, v in kept.items())
    assert torch.equal(stream, torch.get_rng_state()) and fixed.model[1].weight is not model[1].weight


def test_scale_shift_type_mode_and_trainability_are_kept():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, eps=1e-3)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(8.0))
        model[1].bias.fill_(2.0)
    model[1].bias.requires_grad_(False)
    model.eval()
    norm = fix(model).model[1]
    assert torch.equal(norm.weight, model[1].weight) and torch.equal(norm.bias, model[1].bias)
    assert norm.weight.dtype == torch.float64 and norm.eps == 1e-3 and not norm.training
    assert norm.weight.requires_grad and not norm.bias.requires_grad
    plain = fix(nn.BatchNorm2d(8, affine=False)).model
    assert isinstance(plain, nn.GroupNorm) and plain.weight is None


@FEW
@given(kind=st.sampled_from([nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]), channels=st.integers(1, 300))
def test_groups_are_sensible(kind, channels):
    norm = fix(kind(channels)).model
    assert isinstance(norm, nn.GroupNorm)
    assert channels % norm.num_groups == 0 and norm.num_groups <= 32
    assert channels // norm.num_groups >= min(channels, 4)
    if channels % 16 == 0 and channels <= 128:
        assert norm.num_groups == channels // 4


@FEW
@given(width=st.integers(1, 70), seed=st.integers(0, 9))
def test_tables_of_any_width_keep_their_rows_apart(width, seed):
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(seed))
    fixed = fix(nn.BatchNorm1d(width))
    outputs = fixed.model(x)
    distinct = torch.unique((outputs * 1e5).round(), dim=0)
    assert len(distinct) == 16 and spread(fixed.model, x) > 0.1


@pytest.mark.parametrize("width", [1, 2, 3])
def test_few_features_are_not_normalised_at_all(width):
    """A normalised row of one feature is nothing, of two a sign, of three an angle."""
    fixed = fix(nn.BatchNorm1d(width))
    assert isinstance(fixed.model, nn.Identity) and "erase" in fixed.changes[0].why


def test_signals_are_told_from_tables_by_the_rows_given():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(18, 8), nn.BatchNorm1d(8))
    x = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0))
    fixed = fix(model, x).model
    assert isinstance(fixed[1], nn.GroupNorm) and isinstance(fixed[4], nn.GroupNorm)
    assert isinstance(fix(model).model[1], nn.Identity)
    wide = fix(nn.Sequential(nn.Conv1d(2, 64, 3), nn.BatchNorm1d(64)), x).model
    assert wide[1].num_groups == 16


def test_frozen_batch_normalisation_stays_and_other_layers_too():
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False).eval()
    lstm, attention = nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)
    model = nn.ModuleList([body, lstm, attention, nn.LayerNorm(4), nn.InstanceNorm2d(4), nn.BatchNorm1d(8)])
    fixed = fix(model)
    assert [change.path for change in fixed.changes] == ["5"]
    for index, kind in ((1, nn.LSTM), (2, nn.MultiheadAttention), (3, nn.LayerNorm), (4, nn.InstanceNorm2d)):
        assert type(fixed.model[index]) is kind
    assert isinstance(fixed.model[0][1], nn.BatchNorm2d)
    assert [change.path for change in fix(model.train()).changes] == ["0.1", "5"]


def test_statistics_of_instance_normalisation_go():
    model = nn.Sequential(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    fixed = fix(model)
    assert len(fixed.changes) == 1 and not fixed.model[0].track_running_stats and not list(fixed.model.buffers())
    x = images()[0].expand(-1, 4, -1, -1)
    torch.testing.assert_close(fixed.model.eval()(x), nn.functional.instance_norm(x))


class Own(nn.BatchNorm2d):
    pass


def test_subclasses_shared_layers_and_clean_models():
    norm = Own(8)
    fixed = fix(nn.ModuleList([norm, norm]))
    assert fixed.model[0] is fixed.model[1] and len(fixed.changes) == 1 and "Own" in fixed.changes[0].why
    clean = fix(nn.Sequential(nn.Linear(6, 3)), rows()[0])
    assert clean.changes == () and isinstance(clean.model[0], nn.Linear)


def test_planted_wrong_groups_are_caught(monkeypatch):
    """One group for each feature, as others do it: the check of the rows finds it, by the layer and by the model."""
    honest = normalisation._like
    monkeypatch.setattr(normalisation, "_like", lambda module, groups: honest(module, module.num_features))
    x, _ = rows()
    with pytest.raises(IncompatibleModel, match=r"1: GroupNorm\(32, 32"):
        fix(table_net())
    monkeypatch.setattr(normalisation, "_norm_tells_apart", lambda module, positions: True)
    with pytest.raises(IncompatibleModel, match="same output for all rows of x"):
        fix(table_net(), x)


def test_a_scale_that_begins_at_zero_is_no_dead_layer():
    model = image_net()
    nn.init.zeros_(model[0][1].weight)
    assert len(fix(model).changes) == 1


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: fix("model"), ConfigurationError, "model"),
        (lambda: fix(table_net(), rows(1)[0]), ConfigurationError, "two rows"),
        (lambda: fix(table_net(), [1, 2]), ConfigurationError, "x"),
        (lambda: fix(nn.Sequential(nn.LazyBatchNorm1d())), IncompatibleModel, "no shape yet"),
        (lambda: fix(table_net(), torch.zeros(4, 6)), IncompatibleModel, "same output"),
        (lambda: fix(table_net(), torch.zeros(4, 7)), IncompatibleModel, "model"),
    ],
)
def test_refusals(call, error, word):
    with pytest.raises(error, match=word):
        call()
