"""Wavelet scattering: features of images that nobody had to train: a private model then needs a linear layer only."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_int, check_tensor, refuse
from aidefend.privacy.wavelets import Bank, make_bank

_BLOCK_NUMBERS = 1 << 19  # complex numbers of the largest intermediate tensor: it stays in the processor's cache


class _Prepared(NamedTuple):
    """What one image size needs: where padded pixels come from, the filters, and the factor of the outputs."""

    rows: Tensor
    columns: Tensor
    bank: Bank
    scale: float


class ScatterFeatures(nn.Module):
    """Two layers of wavelets, each followed by a modulus, and a local average: no parameters, nothing learned.

    Guarantee: ||S(x) - S(y)|| <= ||x - y|| for all images (the outputs are divided by a bound that is computed from the
        filters and the padding), so an image with a bounded norm has features with that bound. Row i of the features
        comes from row i of the images alone: they cost no privacy.
    Args:
        scales: J >= 1; averages reach over about 2**J pixels, and one feature remains for each 2**J x 2**J of them.
        angles: L >= 1 orientations of the wavelets.
    Returns: For images (N, C, H, W) of any floating type, C and size: (N, C * channels, ceil(H / 2**J),
        ceil(W / 2**J)), where channels = 1 + J * L + L**2 * J * (J - 1) / 2. Edges are mirrored.
    Raises: ConfigurationError: scales or angles out of range; images of another rank, or smaller than 2**J.
    Cost: About one Fourier transform of the padded image for each channel; 0.8 ms for a 28 x 28 image with J = 2,
        L = 8 on one core. Intermediate results are held for some dozens of images at a time.

    Source: Mallat 2012; Bruna, Mallat 2013 (Morlet wavelets, two layers, paths of growing scale); widths of the filters
        as in Oyallon, Mallat 2015. For private learning: Tramèr, Boneh 2021. Differs: the scale of the outputs.

    Example:
        >>> features = ScatterFeatures(scales=2, angles=8)
        >>> features.channels, features(torch.rand(3, 1, 28, 28)).shape
        (81, torch.Size([3, 81, 7, 7]))
    """

    def __init__(self, scales: int = 2, angles: int = 8) -> None:
        super().__init__()
        self.scales = check_int(scales, "scales", 1, 10)
        self.angles = check_int(angles, "angles", 1, 64)
        self._prepared: dict[Any, _Prepared] = {}

    @property
    def channels(self) -> int:
        """Output channels for each input channel."""
        return 1 + self.scales * self.angles + self.angles**2 * self.scales * (self.scales - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        """The features (N, C * channels, H', W') of images (N, C, H, W)."""
        self._check(x)
        n, channels, height, width = x.shape
        low = [-(-size // 2**self.scales) for size in (height, width)]
        if n == 0:
            return x.new_zeros(0, channels * self.channels, *low)
        prepared = self._prepare(x)
        numbers = len(prepared.rows) * len(prepared.columns) * self.angles
        blocks = x.reshape(n * channels, height, width).split(max(1, _BLOCK_NUMBERS // numbers))
        found = torch.cat([self._scatter(block, prepared) for block in blocks])
        return found[..., : low[0], : low[1]].reshape(n, channels * self.channels, *low)

    def extra_repr(self) -> str:
        """Its two settings."""
        return f"scales={self.scales}, angles={self.angles}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}

    def _scatter(self, planes: Tensor, prepared: _Prepared) -> Tensor:
        """(n, channels, ...) of images (n, H, W); the outputs of the mirrored edge are cut off at its start."""
        wide = planes.double() if planes.dtype == torch.float64 else planes.float()
        images = wide[:, prepared.rows][:, :, prepared.columns]
        spectrum, bank = torch.fft.fft2(images), prepared.bank
        outputs, deeper = [bank.averages[0](images)[:, None]], []
        for scale in range(self.scales):
            first = _moduli(spectrum[:, None], bank.wavelets[scale, 0], 2**scale)
            outputs.append(bank.averages[scale](first))
            if scale + 1 < self.scales:
                spectra = torch.fft.fft2(first)
            for angle, following in itertools.product(range(self.angles), range(scale + 1, self.scales)):
                wavelets = bank.wavelets[following, scale]
                second = _moduli(spectra[:, angle, None], wavelets, 2 ** (following - scale))
                deeper.append(bank.averages[following](second))
        found = torch.cat([*outputs, *deeper], dim=1) * prepared.scale
        return found[..., 1:, 1:].to(planes.dtype)

    def _prepare(self, x: Tensor) -> _Prepared:
        """The filters for this image size, made once."""
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (tuple(x.shape[2:]), precise, x.device)
        if key not in self._prepared:
            rows, columns = (mirrored(size, self.scales) for size in x.shape[2:])
            bank = make_bank((len(rows), len(columns)), self.scales, self.angles)
            repeats = int(rows.bincount().max() * columns.bincount().max())
            scale = 1 / math.sqrt(repeats * bank.bound_squared)
            self._prepared[key] = _Prepared(rows.to(x.device), columns.to(x.device), bank.to(x.device, precise), scale)
        return self._prepared[key]

    def _check(self, x: Tensor) -> None:
        check_tensor(x, "x", ndim=4, floating=True, finite=False)
        if min(x.shape[2:]) < 2**self.scales or x.shape[1] < 1:
            cure = "Use fewer scales or larger images"
            raise refuse(f"images of at least {2**self.scales} x {2**self.scales} pixels", "x", x, cure)


def mirrored(size: int, scales: int) -> Tensor:
    """Which pixel of a row of `size` each pixel of the padded row shows: 2**scales more at each end, mirrored."""
    step = 2**scales
    places = torch.arange(-step, -(-size // step) * step + step)
    period = max(1, 2 * (size - 1))
    mirror: Tensor = (size - 1) - ((places % period) - (size - 1)).abs()
    return mirror


def _moduli(spectrum: Tensor, wavelets: Tensor, step: int) -> Tensor:
    """|x * wavelet| for each wavelet, at every `step`-th pixel."""
    moduli: Tensor = torch.fft.ifft2(_folded(spectrum, wavelets, step)).abs()
    return moduli


def _folded(spectrum: Tensor, filters: Tensor, step: int) -> Tensor:
    """The spectrum of the filtered image at every `step`-th pixel: the mean of its aliases."""
    height, width = (size // step for size in spectrum.shape[-2:])
    aliases = []
    for a, b in itertools.product(range(step), repeat=2):
        block = (..., slice(a * height, (a + 1) * height), slice(b * width, (b + 1) * width))
        aliases.append(spectrum[block] * (filters[block] / step**2))
    total: Tensor = functools.reduce(torch.add, aliases)
    return total
