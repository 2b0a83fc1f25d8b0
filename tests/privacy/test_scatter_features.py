"""Scattering against a twin that convolves in space, and the properties that make it a feature map."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aidefend import ConfigurationError
from aidefend.privacy import ScatterFeatures
from aidefend.privacy.scatter_features import mirrored
from aidefend.privacy.wavelets import gain_squared, make_bank

FEW = settings(max_examples=12, deadline=None)


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# A twin in space: formulas of the filters in pixels, sums over all pixels of a ring, every pixel of every path.


def on_ring(formula, height, width):
    """A filter given for all pixels of the plane, summed over the copies of a ring."""
    total = torch.zeros(height, width, dtype=torch.complex128)
    for down in range(-4, 5):
        for across in range(-4, 5):
            rows = (torch.arange(height, dtype=torch.float64) + down * height)[:, None]
            columns = (torch.arange(width, dtype=torch.float64) + across * width)[None, :]
            total += formula(rows, columns)
    return total


def twin_wavelet(height, width, scale, angle, angles):
    sigma, xi, slant = 0.8 * 2**scale, 3 * math.pi / 4 / 2**scale, min(1.0, 4 / angles)
    cosine, sine = math.cos(math.pi * angle / angles), math.sin(math.pi * angle / angles)

    def envelope(rows, columns):
        along, across = cosine * columns + sine * rows, cosine * rows - sine * columns
        size = torch.exp(-(along**2 + slant**2 * across**2) / (2 * sigma**2)) * slant / (2 * math.pi * sigma**2)
        return along, size

    def wave(rows, columns):
        along, size = envelope(rows, columns)
        return size * torch.exp(1j * xi * along)

    waves, bumps = on_ring(wave, height, width), on_ring(lambda r, c: envelope(r, c)[1] + 0j, height, width)
    return waves - waves.sum() / bumps.sum() * bumps


def twin_average(height, width, scale):
    sigma = 0.8 * 2 ** (scale - 1)
    found = on_ring(lambda r, c: torch.exp(-(r**2 + c**2) / (2 * sigma**2)) + 0j, height, width)
    return found / found.sum()


def convolved(image, kernel, step):
    """Direct sums over the ring, at every `step`-th pixel."""
    height, width = image.shape
    found = torch.zeros(height // step, width // step, dtype=torch.complex128)
    for row in range(0, height, step):
        for column in range(0, width, step):
            rows = (row - torch.arange(height)) % height
            columns = (column - torch.arange(width)) % width
            found[row // step, column // step] = (image * kernel[rows][:, columns]).sum()
    return found


def twin_features(image, scales, angles):
    """One image (H, W), without the factor of the outputs."""
    height, width = image.shape
    padded = torch.from_numpy(np.pad(image.numpy(), 2**scales, mode="reflect"))

    def average(x, at):
        low = convolved(x, twin_average(*x.shape, scales - at), 2 ** (scales - at)).real
        return low[1 : 1 + height // 2**scales, 1 : 1 + width // 2**scales]

    first = [
        (j, convolved(padded, twin_wavelet(*padded.shape, j, k, angles), 2**j).abs())
        for j in range(scales)
        for k in range(angles)
    ]
    second = [
        (j, convolved(x, twin_wavelet(*x.shape, j - i, k, angles), 2 ** (j - i)).abs())
        for i, x in first
        for j in range(i + 1, scales)
        for k in range(angles)
    ]
    return torch.stack([average(padded, 0), *(average(x, j) for j, x in [*first, *second])])


@pytest.mark.parametrize(("size", "scales", "angles"), [((12, 8), 2, 3), ((8, 6), 1, 2), ((8, 16), 3, 1)])
def test_equals_direct_convolution(size, scales, angles):
    x = images(2, 1, *size, dtype=torch.float64)
    ours = ScatterFeatures(scales, angles)(x)
    for row in range(2):
        twin = twin_features(x[row, 0], scales, angles)
        factor = float((ours[row] * twin).sum() / twin.square().sum())
        assert factor > 0.3
        assert ours.shape[1:] == twin.shape
        torch.testing.assert_close(_sorted(ours[row], factor), _sorted(twin, 1.0), rtol=1e-9, atol=1e-11)
        if scales < 3:  # further down the twin lists the same paths in another order
            torch.testing.assert_close(ours[row] / factor, twin, rtol=1e-9, atol=1e-11)


def _sorted(features, factor):
    return (features / factor).flatten(1).sum(1).sort().values


@pytest.mark.parametrize(("scales", "angles", "channels"), [(2, 8, 81), (1, 8, 9), (3, 4, 61), (2, 1, 4)])
def test_number_of_channels(scales, angles, channels):
    features = ScatterFeatures(scales, angles)
    assert features.channels == channels
    assert features(images(2, 3, 16, 24)).shape == (2, 3 * channels, 16 // 2**scales, 24 // 2**scales)
    assert not list(features.parameters()) and not features.state_dict()


def test_a_28_by_28_image_has_3969_features():
    assert ScatterFeatures()(images(1, 1, 28, 28)).flatten(1).shape == (1, 3969)


@FEW
@given(
    size=st.tuples(st.integers(4, 17), st.integers(4, 17)),
    scales=st.integers(1, 2),
    angles=st.integers(1, 8),
    seed=st.integers(0, 99),
    nearness=st.sampled_from([1.0, 0.01]),
)
def test_distances_never_grow(size, scales, angles, seed, nearness):
    x = images(4, 2, *size, seed=seed, dtype=torch.float64)
    x[0] = 1.0  # flat images keep most of their energy
    y = x + nearness * images(4, 2, *size, seed=seed + 1, dtype=torch.float64)
    y[0] = 3.0
    features = ScatterFeatures(scales, angles)
    moved = (features(x) - features(y)).flatten(1).norm(dim=1)
    assert (moved <= (x - y).flatten(1).norm(dim=1) * (1 + 1e-9)).all()


def test_the_bound_is_reached_within_reason():
    """A bound that divides everything away would be worthless: a worst image comes within a factor of four."""
    features = ScatterFeatures()
    x = torch.zeros(1, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    weights = images(1, 81, 7, 7, dtype=torch.float64)
    direction = torch.ones(1, 1, 28, 28, dtype=torch.float64)
    gain = features(direction).norm() / direction.norm()
    assert 0.25 < float(gain) <= 1
    assert torch.autograd.grad((features(x + 1e-3) * weights).sum(), x)[0].isfinite().all()


def test_gain_is_the_norm_of_the_operator():
    """Against the largest singular value of the whole matrix, aliases and real images included."""
    filters = make_bank((8, 8), 2, 3).wavelets[1, 0]
    basis = torch.eye(64, dtype=torch.float64).reshape(64, 8, 8)
    outputs = torch.fft.ifft2(torch.fft.fft2(basis)[:, None] * filters)[..., ::2, ::2]
    matrix = torch.view_as_real(outputs).flatten(1)
    assert gain_squared(filters, 2) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)) ** 2, rel=1e-9)


def test_planted_wider_gain_is_caught(monkeypatch):
    """Without the factor of the padding and the filters, a smooth image near a corner grows."""
    features = ScatterFeatures(1, 8)
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    features(x)
    key, prepared = next(iter(features._prepared.items()))
    features._prepared[key] = prepared._replace(scale=8 * prepared.scale)
    assert features(x + 1.0).norm() > 8.0


def test_translations_move_the_features_less_than_the_pixels():
    x = torch.zeros(1, 1, 32, 32)
    x[:, :, 10:22, 14:17] = 1.0
    features = ScatterFeatures(3, 8)
    for shift in (1, 2):
        y = x.roll(shift, 3)
        pixels = (x - y).norm() / x.norm()
        moved = (features(x) - features(y)).norm() / features(x).norm()
        assert moved < 0.4 * pixels


def test_a_constant_image_has_its_mean_and_no_waves():
    found = ScatterFeatures()(torch.full((1, 1, 16, 16), 2.0, dtype=torch.float64))
    assert found[:, 1:].abs().max() < 1e-12
    assert float(found[:, 0].std()) < 1e-12 < 0.5 < float(found[0, 0, 0, 0])


def test_rows_and_channels_are_independent_of_their_neighbours_and_of_blocks(monkeypatch):
    x = images(7, 3, 12, 12)
    features = ScatterFeatures(2, 4)
    whole = features(x)
    monkeypatch.setattr("aidefend.privacy.scatter_features._BLOCK_NUMBERS", 5000)
    torch.testing.assert_close(features(x), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(features(x[4:5, 1:2])[0], whole[4, features.channels : 2 * features.channels])
    assert torch.equal(features(x), features(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(dtype):
    x = images(2, 1, 12, 12).to(dtype)
    found = ScatterFeatures(2, 4)(x)
    assert found.dtype == dtype
    wide = ScatterFeatures(2, 4)(x.double())
    torch.testing.assert_close(found.double(), wide, rtol=0, atol=4 * torch.finfo(dtype).eps * float(wide.abs().max()))


def test_sizes_that_do_not_divide_and_empty_batches():
    features = ScatterFeatures(2, 2)
    assert features(images(2, 1, 13, 6)).shape == (2, 9, 4, 2)
    assert features(images(0, 3, 8, 8)).shape == (0, 27, 2, 2)
    assert features(images(2, 1, 12, 12)[:, :, ::2, ::2]).shape == (2, 9, 2, 2)


def test_mirrored_edges_are_those_of_torch():
    line = torch.arange(8.0)[None, None]
    assert torch.equal(line[0, 0, mirrored(8, 2)], nn.functional.pad(line, (4, 4), mode="reflect")[0, 0])
    assert set(mirrored(4, 2).tolist()) == {0, 1, 2, 3}


def test_gradients_flow_and_copies_work():
    features = ScatterFeatures(2, 2)
    x = images(2, 1, 8, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(features, (x,))
    for other in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        assert torch.equal(other(x), features(x))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ScatterFeatures(0), "scales"),
        (lambda: ScatterFeatures(2, 0), "angles"),
        (lambda: ScatterFeatures(2.0), "scales"),
        (lambda: ScatterFeatures()(torch.zeros(1, 28, 28)), "dimension"),
        (lambda: ScatterFeatures()(torch.zeros(1, 1, 3, 28)), "4 x 4"),
        (lambda: ScatterFeatures()(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), "float"),
    ],
)
def test_refusals(make, word):
    with pytest.raises(ConfigurationError, match=word):
        make()
