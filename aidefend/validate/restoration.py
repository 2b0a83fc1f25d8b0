"""Ways to take small changes out of an input: fewer grey levels, medians, blocks of cosines, smooth surfaces."""

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from aidefend._core.checks import check_int, check_number, check_range, check_tensor, refuse

_LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)


@dataclasses.dataclass(frozen=True)
class BitDepth:
    """Rounds every value to one of 2^bits levels. For inputs of any shape; its gradient is zero.

    Args:
        bits: 1 to 16; 1 is black and white.
        bounds: Range of the inputs, (low, high); values beyond it are clipped.
    Source: Xu, Evans, Qi 2018, section III-A.
    Example:
        >>> BitDepth(1)(torch.tensor([[0.2, 0.6]])).tolist()
        [[0.0, 1.0]]
    """

    bits: int = 5
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_int(self.bits, "bits", 1, 16)
        object.__setattr__(self, "bounds", check_range(self.bounds))

    def __call__(self, x: Tensor) -> Tensor:
        """The rows x (N, ...) on the coarser scale."""
        check_tensor(x, "x", floating=True)
        low, high = self.bounds
        levels = 2**self.bits - 1
        share = (x.clamp(low, high) - low) / (high - low)
        restored: Tensor = (share * levels).round() / levels * (high - low) + low
        return restored


@dataclasses.dataclass(frozen=True)
class MedianFilter:
    """Replaces every value by the median of its window; windows reach over the edge by reflection.

    Args:
        size: Side of the window, >= 2. An even one takes in one more value before than behind, and the upper median.
    Cost: A sort of size^2 values for each value.
    Source: Xu, Evans, Qi 2018, section III-B.
    Example:
        >>> MedianFilter(3)(torch.tensor([[[0.0, 0.0, 9.0, 0.0, 0.0]]])).tolist()
        [[[0.0, 0.0, 0.0, 0.0, 0.0]]]
    """

    size: int = 2

    def __post_init__(self) -> None:
        check_int(self.size, "size", 2, 31)

    def __call__(self, x: Tensor) -> Tensor:
        """The rows x: images (N, C, H, W) or sequences (N, C, L)."""
        _check_grid(x, self.size, images_only=False)
        before, behind = self.size // 2, (self.size - 1) // 2
        windows = pad(x, [before, behind] * (x.ndim - 2), mode="reflect")
        for axis in range(2, x.ndim):
            windows = windows.unfold(axis, self.size, 1)
        values = windows.flatten(x.ndim)
        return values.sort(dim=-1).values[..., values.shape[-1] // 2]


@dataclasses.dataclass(frozen=True)
class NonLocalMeans:
    """Averages every pixel with those nearby whose surroundings look alike.

    Args:
        search: Side of the square in which alike pixels are looked for, odd, >= 3.
        patch: Side of the surroundings that are compared, odd, >= 1.
        strength: Difference, in the units of x, at which the weight of a pixel is 1/e.
    Cost: search^2 passes over the image.
    Source: Buades, Coll, Morel 2005, in the setting 11-3-4 (of 255) of Xu, Evans, Qi 2018.
    Example:
        >>> x = torch.zeros(1, 1, 8, 8)
        >>> bool((NonLocalMeans()(x) == x).all())
        True
    """

    search: int = 11
    patch: int = 3
    strength: float = 4 / 255

    def __post_init__(self) -> None:
        check_int(self.search, "search", 3, 31)
        check_int(self.patch, "patch", 1, 15)
        for name in ("search", "patch"):
            if getattr(self, name) % 2 == 0:
                raise refuse(f"{name} to be odd", name, getattr(self, name), "Add one")
        object.__setattr__(self, "strength", check_number(self.strength, "strength", 0.0, open_low=True))

    def __call__(self, x: Tensor) -> Tensor:
        """The images x (N, C, H, W)."""
        _check_grid(x, max(self.search, self.patch), images_only=True)
        reach, height, width = self.search // 2, x.shape[2], x.shape[3]
        around = pad(x, [reach] * 4, mode="reflect")
        total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for down in range(self.search):
            for right in range(self.search):
                other = around[:, :, down : down + height, right : right + width]
                gap = (x - other).square().mean(dim=1, keepdim=True)
                near = avg_pool2d(gap, self.patch, 1, self.patch // 2, count_include_pad=False)
                weight = (-near / self.strength**2).exp()
                total, weights = total + weight * other, weights + weight
        return total / weights


@dataclasses.dataclass(frozen=True)
class TotalVariation:
    """The image next to x with little total variation: argmin over u of |u - x|^2 / 2 + weight TV(u), by channel.

    Args:
        weight: In the units of x; flat parts move by about this much.
        steps: Of the dual projection.
    Cost: steps passes over the image.
    Source: Rudin, Osher, Fatemi 1992; algorithm of Chambolle 2004, step 1/4.
    Example:
        >>> TotalVariation(weight=1.0, steps=200)(torch.tensor([[[[0.0, 10.0]]]])).round(decimals=2).tolist()
        [[[[1.0, 9.0]]]]
    """

    weight: float = 0.1
    steps: int = 50

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", check_number(self.weight, "weight", 0.0, open_low=True))
        check_int(self.steps, "steps", 1, 10_000)

    def __call__(self, x: Tensor) -> Tensor:
        """The images x (N, C, H, W)."""
        _check_grid(x, 1, images_only=True)
        down = right = torch.zeros_like(x)
        for _ in range(self.steps):
            field = _divergence(down, right) - x / self.weight
            lower = pad(field.diff(dim=2), [0, 0, 0, 1])
            across = pad(field.diff(dim=3), [0, 1])
            length = 1 + 0.25 * (lower.square() + across.square() + torch.finfo(x.dtype).tiny).sqrt()
            down, right = (down + 0.25 * lower) / length, (right + 0.25 * across) / length
        return x - self.weight * _divergence(down, right)


@dataclasses.dataclass(frozen=True)
class JPEGLike:
    """Blocks of 8 x 8 pixels with their cosines rounded as JPEG does; every channel as luminance, nothing packed.

    Args:
        quality: 1 to 100, in the scale of libjpeg.
        bounds: Range of the inputs, (low, high).
    Cost: Two 8 x 8 products for each row and column of a block. Its gradient is zero.
    Source: ITU-T T.81, annexes A and K.1; as a defence Das et al. 2017. Differs: no colour transform, no subsampling.
    Example:
        >>> x = torch.full((1, 1, 8, 8), 128 / 255)
        >>> bool(((JPEGLike(50)(x) - x).abs() < 1e-6).all())
        True
    """

    quality: int = 75
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_int(self.quality, "quality", 1, 100)
        object.__setattr__(self, "bounds", check_range(self.bounds))

    def __call__(self, x: Tensor) -> Tensor:
        """The images x (N, C, H, W), of any height and width."""
        _check_grid(x, 1, images_only=True)
        if len(x) == 0:
            return x.clone()
        low, high = self.bounds
        height, width = x.shape[2:]
        values = (x.clamp(low, high) - low) / (high - low) * 255 - 128
        whole = pad(values, [0, -width % 8, 0, -height % 8], mode="replicate")
        blocks = whole.unfold(2, 8, 8).unfold(3, 8, 8)
        cosines, table = _cosines().to(x), self._table().to(x)
        kept = ((cosines @ blocks @ cosines.T) / table).round() * table
        back = (cosines.T @ kept @ cosines).permute(0, 1, 2, 4, 3, 5).reshape(whole.shape)[:, :, :height, :width]
        return ((back + 128).clamp(0, 255) / 255) * (high - low) + low

    def _table(self) -> Tensor:
        scale = 5000 // self.quality if self.quality < 50 else 200 - 2 * self.quality
        return ((torch.tensor(_LUMINANCE).reshape(8, 8) * scale + 50) // 100).clamp(1, 255)


def _cosines() -> Tensor:
    """The orthonormal cosine transform of eight values."""
    place = torch.arange(8, dtype=torch.float64)
    rows = torch.cos((2 * place[None] + 1) * place[:, None] * math.pi / 16) / 2
    rows[0] /= math.sqrt(2)
    return rows


def _divergence(down: Tensor, right: Tensor) -> Tensor:
    """Minus the adjoint of the forward differences whose last row and column are zero."""
    rows = torch.cat([down[:, :, :1], down[:, :, 1:].sub(down[:, :, :-1])], dim=2)
    columns = torch.cat([right[..., :1], right[..., 1:].sub(right[..., :-1])], dim=3)
    return rows + columns


def _check_grid(x: Tensor, size: int, *, images_only: bool) -> None:
    """Images (N, C, H, W), or sequences too, larger than half a window."""
    check_tensor(x, "x", floating=True)
    if x.ndim != 4 and (images_only or x.ndim != 3):
        rule = "images (N, C, H, W)" + ("" if images_only else " or sequences (N, C, L)")
        raise refuse(rule, "x", x, "For other inputs take BitDepth")
    if min(x.shape[2:]) <= size // 2:
        raise refuse(f"inputs wider than {size // 2}, half of the window", "x", x, "Take a smaller window")
