"""Shifted copies of clean inputs: inside their range, none of the clean rows, the same for the same seed."""

import pytest
import torch

from aidefend import ConfigurationError
from aidefend.validate import Shifts

OF_ALL = {"inverted", "noisy", "mixed", "columns", "shuffled"}
OF_PICTURES = OF_ALL | {"turned", "zoomed", "blurred", "jigsaw"}


def inputs(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 3 - 1


@pytest.mark.parametrize("shape", [(30, 5), (30, 2, 9), (30, 3, 12, 16), (30, 2, 4, 4), (30, 2, 8, 8, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8])
def test_every_kind_stays_in_the_range_and_is_another_row(shape, dtype):
    x = (inputs(*shape) * 40 + 50).to(dtype)
    before, state = x.clone(), torch.get_rng_state()
    shifted = Shifts()(x)
    assert set(shifted) == (OF_PICTURES if shape[1:] == (3, 12, 16) else OF_ALL)
    over = (0, *range(2, x.ndim))
    low, high = x.double().amin(dim=over, keepdim=True), x.double().amax(dim=over, keepdim=True)
    for z in shifted.values():
        assert z.shape == x.shape and z.dtype == x.dtype
        assert bool(((z.double() >= low - 0.01) & (z.double() <= high + 0.01)).all())
        assert float((z != x).flatten(1).any(dim=1).double().mean()) > 0.75  # a row may be shuffled into itself
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides():
    x = inputs(10, 1, 8, 8)
    one, again, other = Shifts()(x), Shifts()(x), Shifts(seed=1)(x)
    assert all(torch.equal(one[kind], again[kind]) for kind in one)
    assert not any(torch.equal(one[kind], other[kind]) for kind in OF_PICTURES - {"inverted", "blurred"})


def test_what_each_kind_keeps():
    x = inputs(20, 2, 8, 12)
    shifted = Shifts()(x)
    low, high = (getattr(x, name)(dim=(0, 2, 3), keepdim=True) for name in ("amin", "amax"))
    torch.testing.assert_close(shifted["inverted"], low + high - x)
    tiles = lambda z: z.flatten(2).sort().values  # noqa: E731 - the values of each channel, at whatever place
    torch.testing.assert_close(tiles(shifted["jigsaw"]), tiles(x))
    table = inputs(50, 3)
    for column, own in zip(Shifts(["columns"])(table)["columns"].T, table.T, strict=True):
        assert bool(((column[:, None] - own).abs().amin(dim=1) < 1e-5).all())
    mixed = Shifts(["mixed"])(table)["mixed"]
    assert float(mixed.std()) < 0.9 * float(table.std())
    flat = x[:, :1].expand(-1, 2, -1, -1)[:, :1]
    torch.testing.assert_close(
        Shifts(["shuffled"])(flat)["shuffled"].flatten(1).sort().values, flat.flatten(1).sort().values
    )


@pytest.mark.parametrize("n", [2, 3, 4, 31])
def test_no_row_is_mixed_with_itself_and_each_is_mixed_in_once(n):
    x = torch.cat([torch.eye(n), torch.zeros(1, n)])  # the last row has no mark of its own
    partners = set()
    for seed in range(30):
        mixed = Shifts(["mixed"], seed=seed)(x)["mixed"]
        own, other = mixed[:n].diagonal(), mixed * (1 - torch.eye(n + 1, n))
        assert bool(((own > 0.29) & (own < 0.71)).all())
        assert bool(((other > 0).sum(dim=0) == 1).all()) and int((other > 0).sum(dim=1).max()) == 1
        partners.add(tuple(other.argmax(dim=0).tolist()))
    assert len(partners) > 1
    assert torch.equal(Shifts(["mixed"])(x[:1])["mixed"], x[:1])  # alone there is nobody to mix with


def test_a_turn_and_a_zoom_keep_what_looks_the_same_from_everywhere():
    place = torch.arange(16) - 7.5
    disc = (place[:, None] ** 2 + place**2 < 30).float().expand(12, 1, 16, 16)
    shifted = Shifts(["turned", "zoomed"])(torch.cat([disc, 0 * disc]))
    assert float((shifted["turned"][:12] - disc).abs().mean()) < 0.06
    assert float((shifted["zoomed"][:12] - disc).abs().mean()) > 0.1


def test_places_that_never_vary_are_shifted_and_columns_that_never_vary_are_not():
    picture, table = inputs(10, 1, 8, 8), inputs(10, 3)
    picture[:, :, 0], table[:, 0] = -1.0, 2.0
    assert bool((Shifts(["inverted"])(picture)["inverted"][:, :, 0] > 1.5).all())
    assert all(bool((z[:, 0] == 2.0).all()) for z in Shifts(["inverted", "noisy", "mixed"])(table).values())


def test_what_cannot_be_shifted_is_refused():
    for kinds in ([], ["rotated"], [{}], "noisy", 3):
        with pytest.raises(ConfigurationError, match="kinds"):
            Shifts(kinds)
    with pytest.raises(ConfigurationError, match="seed"):
        Shifts(seed=-1)
    for x in (inputs(5), inputs(5, 3)):
        with pytest.raises(ConfigurationError, match="inputs"):
            Shifts(["turned"])(x)
