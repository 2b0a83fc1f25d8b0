"""Restorations against other programs, naive twins and closed forms; and what a purified model is."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.fft import dctn, idctn
from torch import nn

from aidefend import ConfigurationError
from aidefend.validate import BitDepth, JPEGLike, MedianFilter, NonLocalMeans, Purify, TotalVariation

ALL = [BitDepth(3), MedianFilter(2), MedianFilter(3), NonLocalMeans(5, 3, 0.2), TotalVariation(0.1, 30), JPEGLike(40)]
every_restoration = pytest.mark.parametrize("restore", ALL, ids=repr)


def images(n=3, channels=2, height=13, width=10, dtype=torch.float64):
    stream = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, height, width, generator=stream, dtype=torch.float64).to(dtype)


@every_restoration
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_range_stay(restore, dtype):
    x = images(dtype=dtype)
    before = x.clone()
    restored = restore(x)
    assert restored.shape == x.shape and restored.dtype == dtype and torch.equal(x, before)
    assert float(restored.min()) >= -1e-6 and float(restored.max()) <= 1 + 1e-6
    assert not torch.equal(restored, x)


@every_restoration
def test_each_row_is_restored_by_itself(restore):
    x = images()
    torch.testing.assert_close(torch.cat([restore(row[None]) for row in x]), restore(x))
    assert restore(x[:0]).shape == (0, 2, 13, 10)


@every_restoration
def test_a_constant_image_hardly_changes(restore):
    flat = torch.full((1, 1, 16, 16), 128 / 255, dtype=torch.float64)
    atol = 0.5 / 7 if isinstance(restore, BitDepth) else 1e-9
    torch.testing.assert_close(restore(flat), flat, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_the_median_is_that_of_scipy(size):
    x = images()
    expected = [[ndimage.median_filter(c.numpy(), size=size, mode="mirror") for c in image] for image in x]
    torch.testing.assert_close(MedianFilter(size)(x), torch.from_numpy(np.array(expected)))


def test_the_median_of_a_sequence():
    x = images()[:, :, 0]
    expected = [[ndimage.median_filter(c.numpy(), size=3, mode="mirror") for c in row] for row in x]
    torch.testing.assert_close(MedianFilter(3)(x), torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 6.0)])
def test_bit_depth_has_its_levels_and_the_nearest_one(bounds):
    low, high = bounds
    x = low + (high - low) * images()
    levels = torch.linspace(low, high, 8, dtype=torch.float64)
    nearest = levels[(x[..., None] - levels).abs().argmin(dim=-1)]
    torch.testing.assert_close(BitDepth(3, bounds)(x), nearest)
    torch.testing.assert_close(BitDepth(3, bounds)(x + 100), torch.full_like(x, high))


def naive_mean(x, search, patch, strength):
    """One pixel at a time, with windows cut by hand."""
    _, channels, height, width = x.shape
    s, p = search // 2, patch // 2
    around = nn.functional.pad(x, [s] * 4, mode="reflect")[0]
    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            total, weights = torch.zeros(channels, dtype=x.dtype), 0.0
            for a in range(-s, s + 1):
                for b in range(-s, s + 1):
                    gaps = [
                        (x[0, :, u, v] - around[:, u + s + a, v + s + b]).square().mean()
                        for u in range(max(0, i - p), min(height, i + p + 1))
                        for v in range(max(0, j - p), min(width, j + p + 1))
                    ]
                    weight = torch.exp(-torch.stack(gaps).mean() / strength**2)
                    total, weights = total + weight * around[:, i + s + a, j + s + b], weights + weight
            out[0, :, i, j] = total / weights
    return out


def test_non_local_means_equals_the_loop():
    x = images(1, 2, 6, 5)
    torch.testing.assert_close(NonLocalMeans(5, 3, 0.3)(x), naive_mean(x, 5, 3, 0.3))


def test_non_local_means_smooths_noise_and_keeps_an_edge():
    clean = torch.zeros(1, 1, 24, 24)
    clean[..., 12:] = 1.0
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    smooth = NonLocalMeans(11, 3, 0.2)(noisy)
    assert float((smooth - clean).square().mean()) < 0.3 * float((noisy - clean).square().mean())


def energy(u, x, weight):
    down = nn.functional.pad(u.diff(dim=2), [0, 0, 0, 1])
    right = nn.functional.pad(u.diff(dim=3), [0, 1])
    return 0.5 * (u - x).square().sum() + weight * (down.square() + right.square()).sqrt().sum()


def test_total_variation_finds_the_minimum():
    """The energy is convex: no random or scaled neighbour of the minimum may lie lower."""
    x, weight = images(1, 1, 8, 9), 0.15
    best = TotalVariation(weight, 3000)(x)
    lowest, stream = energy(best, x, weight), torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-2):
        for _ in range(50):
            step = size * torch.randn(x.shape, generator=stream, dtype=x.dtype)
            assert energy(best + step, x, weight) > lowest
    for share in (0.02, 0.2, 0.5):
        assert energy(best + share * (x - best), x, weight) > lowest
        assert energy(best + share * (x.mean() - best), x, weight) > lowest


@pytest.mark.parametrize(("gap", "weight", "expected"), [(10.0, 1.0, 8.0), (10.0, 4.0, 2.0), (1.0, 4.0, 0.0)])
def test_total_variation_of_two_pixels_in_closed_form(gap, weight, expected):
    u = TotalVariation(weight, 3000)(torch.tensor([[[[0.0, gap]]]], dtype=torch.float64))
    assert float(u.diff()) == pytest.approx(expected, abs=1e-3) and float(u.mean()) == pytest.approx(gap / 2)


@pytest.mark.parametrize("quality", [5, 50, 90])
def test_jpeg_equals_the_transform_of_scipy(quality):
    x = images(1, 1, 16, 8)
    restore = JPEGLike(quality)
    table, expected = restore._table().numpy(), torch.zeros_like(x)
    for top in (0, 8):
        block = x[0, 0, top : top + 8].numpy() * 255 - 128
        kept = (dctn(block, norm="ortho") / table).round() * table
        expected[0, 0, top : top + 8] = torch.from_numpy((idctn(kept, norm="ortho") + 128).clip(0, 255) / 255)
    torch.testing.assert_close(restore(x), expected)


def test_jpeg_quality_and_odd_sizes():
    x = images(1, 3, 21, 11)
    loss = [float((JPEGLike(quality)(x) - x).square().mean()) for quality in (100, 90, 50, 10)]
    assert loss == sorted(loss) and loss[0] < 1e-5
    assert JPEGLike()._table()[0, 0] == 8 and int(JPEGLike(100)._table().max()) == 1


def test_what_has_no_window_is_refused():
    for restore in (NonLocalMeans(), TotalVariation(), JPEGLike(), MedianFilter()):
        with pytest.raises(ConfigurationError, match="images"):
            restore(torch.zeros(3, 4))
    with pytest.raises(ConfigurationError, match="half of the window"):
        NonLocalMeans(11)(torch.zeros(1, 1, 5, 5))
    with pytest.raises(ConfigurationError, match="search to be odd"):
        NonLocalMeans(search=4)


def test_purify_is_a_chain_and_a_module():
    x = images(4, 1, 8, 8, torch.float32)
    purify = Purify([MedianFilter(3), BitDepth(2)])
    torch.testing.assert_close(purify(x), BitDepth(2)(MedianFilter(3)(x)))
    model = nn.Sequential(nn.Flatten(), nn.utils.skip_init(nn.Linear, 64, 3)).eval()
    nn.init.constant_(model[1].weight, 0.1)
    nn.init.zeros_(model[1].bias)
    whole = purify.around(model)
    assert torch.equal(whole(x), model(purify(x)))
    assert set(whole.state_dict()) == {"model.1.weight", "model.1.bias"}
    assert Purify()(x).shape == x.shape
    smooth = Purify([TotalVariation(0.1, 5), NonLocalMeans(3, 3, 0.1)]).around(model)
    x.requires_grad_()
    smooth(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_purify_refuses_steps_that_are_none():
    for steps in ([], BitDepth(), [3]):
        with pytest.raises(ConfigurationError, match="steps"):
            Purify(steps)
    with pytest.raises(ConfigurationError, match="keeps the shape"):
        Purify([lambda x: x[:1]])(images())


def test_purify_takes_a_small_perturbation_away():
    """A checkerboard of 8 of 255 moves a linear model of high frequencies; a smooth surface does not."""
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    x = torch.full((1, 1, 8, 8), 0.5)
    attacked = x + 8 / 255 * board
    answer = lambda z: (z * board).sum()  # noqa: E731
    assert float(answer(attacked)) > 1.9
    assert abs(float(answer(Purify([TotalVariation(0.1)])(attacked)))) < 0.05
