"""The network that screen trains where none is given: which kind, how large its input, and that it touches nothing."""

import pytest
import torch
from torch import nn

from aidefend.sanitize.suspect import train_suspect


def rows(*shape):
    stream = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=stream), torch.arange(shape[0]) % 3


def kinds(model):
    return [type(layer).__name__ for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(
    ("shape", "convolutional"),
    [
        ((30, 1, 12, 9), True),
        ((30, 3, 80, 70), True),
        ((30, 1, 7, 20), False),
        ((30, 12, 12, 1), False),
        ((30, 12, 12), False),
        ((30, 6), False),
        ((30, 5000, 8, 8), False),
    ],
)
def test_pictures_get_convolutions_and_all_else_dense_layers(shape, convolutional):
    x, y = rows(*shape)
    model = train_suspect(x, y, epochs=1)
    assert (kinds(model)[0] == "Conv2d") == convolutional and kinds(model)[-2:] == ["Linear", "Linear"]
    assert model(x).shape == (30, 3) and not model.training
    assert not any(weights.requires_grad for weights in model.parameters())


def test_equal_input_and_seed_give_an_equal_network_and_the_global_stream_is_left_alone():
    x, y = rows(40, 1, 8, 8)
    before = torch.get_rng_state()
    first, again, other = (train_suspect(x, y, seed=seed, epochs=1)(x) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_a_trigger_in_a_spot_here_or_there_is_a_shortcut_for_it():
    """A bright square at a random place decides the label: it is learned, and holds for places that were not seen."""
    stream = torch.Generator().manual_seed(0)
    x, y = 0.3 * torch.rand(600, 1, 16, 16, generator=stream), torch.arange(600) % 2
    places = torch.randint(0, 13, (600, 2), generator=stream).tolist()
    for row, (down, right) in enumerate(places):
        if y[row] == 1:
            x[row, 0, down : down + 3, right : right + 3] = 1.0
    model = train_suspect(x[:400], y[:400], seed=0)
    assert float((model(x[400:]).argmax(dim=1) == y[400:]).double().mean()) > 0.95
