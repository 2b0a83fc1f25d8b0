"""Morlet wavelets and Gaussian averages in the Fourier domain, with the largest gain of what is built from them."""

import dataclasses
import math

import torch
from torch import Tensor

_WIDTH = 0.8  # standard deviation of the envelope at the finest scale, in pixels
_FREQUENCY = 3 * math.pi / 4  # of the finest wavelet, in radians a pixel
_SLANT = 4.0  # over the number of angles, at most one: the envelope is longer along the wave fronts
_COPIES = 3  # periods that are summed on each side: the filters are smooth, further ones are below rounding


@dataclasses.dataclass(frozen=True)
class Average:
    """A Gaussian average that keeps every `step`-th pixel: separable, so one matrix (H', H) and one (W', W)."""

    rows: Tensor
    columns: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """(..., H, W) to (..., H', W')."""
        return self.rows @ (images @ self.columns.mT)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Average":
        """The matrices elsewhere."""
        return Average(self.rows.to(device, dtype), self.columns.to(device, dtype))


@dataclasses.dataclass(frozen=True)
class Bank:
    """Spectra of all filters for one padded size.

    Attributes:
        wavelets: By (scale, resolution at which it is applied): (angles, H, W) of that resolution, real.
        averages: By resolution: down to the resolution of the outputs.
        bound_squared: Square of a Lipschitz bound of the whole transform, before any factor.
    """

    wavelets: dict[tuple[int, int], Tensor]
    averages: dict[int, Average]
    bound_squared: float

    def to(self, device: torch.device, dtype: torch.dtype) -> "Bank":
        """The filters elsewhere."""
        return Bank(
            {key: value.to(device, dtype) for key, value in self.wavelets.items()},
            {key: value.to(device, dtype) for key, value in self.averages.items()},
            self.bound_squared,
        )


def make_bank(size: tuple[int, int], scales: int, angles: int) -> Bank:
    """All filters that a transform of two layers over images of this padded size (a multiple of 2**scales) applies."""
    wavelets, averages, gains = {}, {}, {}
    slant = min(1.0, _SLANT / angles)
    for resolution in range(scales):
        height, width = size[0] >> resolution, size[1] >> resolution
        lines = [_average_spectrum(length, scales - resolution) for length in (height, width)]
        averages[resolution] = Average(*(_average_matrix(line, 2 ** (scales - resolution)) for line in lines))
        gains[resolution] = gain_squared(torch.outer(*lines)[None], 2 ** (scales - resolution))
        grid = _frequencies(height)[:, None, :, None], _frequencies(width)[None, :, None, :]
        for scale in range(resolution + (resolution > 0), scales):
            turned = [_wavelet(grid, scale - resolution, math.pi * k / angles, slant) for k in range(angles)]
            wavelets[scale, resolution] = torch.stack(turned)
    return Bank(wavelets, averages, _bound_squared(wavelets, gains, scales))


def _bound_squared(wavelets: dict[tuple[int, int], Tensor], average: dict[int, float], scales: int) -> float:
    """The sum over all paths of the squared gains of their steps; a modulus never enlarges a difference."""
    wavelet = {(j, r): gain_squared(filters, 2 ** (j - r)) for (j, r), filters in wavelets.items()}
    total = average[0]
    for first in range(scales):
        second = sum(wavelet[j, first] * average[j] for j in range(first + 1, scales))
        total += wavelet[first, 0] * (average[first] + second)
    return total


def gain_squared(filters: Tensor, step: int) -> float:
    """Largest energy that filters (F, H, W), then every `step`-th pixel, give to a real image of energy one.

    A real image has the same energy at a frequency and at its mirror: filters count half at each. Frequencies that
    share an alias form one small matrix, whose largest singular value is the exact gain there.
    """
    mirror = filters.flip(-2, -1).roll((1, 1), (-2, -1))
    both = torch.cat([filters, mirror]) / math.sqrt(2)
    height, width = (size // step for size in filters.shape[-2:])
    aliases = both.reshape(len(both), step, height, step, width).permute(2, 4, 0, 1, 3).flatten(3)
    gains = torch.linalg.matrix_norm(aliases.flatten(0, 1), ord=2)
    return float(gains.max()) ** 2 / step**2


def _frequencies(length: int) -> Tensor:
    """Frequencies of a grid in radians a pixel, with their periods: (P, length)."""
    periods = 2 * math.pi * torch.arange(-_COPIES, _COPIES + 1, dtype=torch.float64)
    frequencies: Tensor = periods[:, None] + 2 * math.pi * torch.fft.fftfreq(length, dtype=torch.float64)
    return frequencies


def _average_spectrum(length: int, scale: int) -> Tensor:
    """Of a Gaussian along one line, with sum one."""
    width = _WIDTH * 2 ** (scale - 1)
    spectrum: Tensor = torch.exp(-(width**2) / 2 * _frequencies(length) ** 2).sum(dim=0)
    average: Tensor = spectrum / spectrum[0]
    return average


def _average_matrix(spectrum: Tensor, step: int) -> Tensor:
    """(length / step, length): row k averages around pixel k * step of a line that is closed to a ring."""
    line: Tensor = torch.fft.ifft(spectrum).real
    places = torch.arange(0, len(line), step)[:, None] - torch.arange(len(line))
    return line[places % len(line)]


def _wavelet(grid: tuple[Tensor, Tensor], scale: int, angle: float, slant: float) -> Tensor:
    """A Gaussian around the wavelet's frequency, minus one around zero such that a constant image gives nothing."""
    width, frequency = _WIDTH * 2**scale, _FREQUENCY / 2**scale
    along = math.cos(angle) * grid[1] + math.sin(angle) * grid[0]
    across = math.cos(angle) * grid[0] - math.sin(angle) * grid[1]

    def bump(centre: float) -> Tensor:
        return torch.exp(-(width**2) / 2 * ((along - centre) ** 2 + (across / slant) ** 2)).sum(dim=(0, 1))

    around, middle = bump(frequency), bump(0.0)
    wavelet: Tensor = around - around[0, 0] / middle[0, 0] * middle
    return wavelet
