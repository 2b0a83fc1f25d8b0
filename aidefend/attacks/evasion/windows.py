"""Windows of features: rectangles of an image, runs of anything else, at places that are drawn for each row."""

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rows as (channels, height, width): images as they are, (N, C, L) with height 1, all else as one line."""

    channels: int
    height: int
    width: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> "Grid":
        """The grid of rows like these."""
        shape = tuple(x.shape[1:])
        if len(shape) == 3:
            return cls(shape[0], shape[1], shape[2], shape)
        if len(shape) == 2:
            return cls(shape[0], 1, shape[1], shape)
        return cls(1, 1, math.prod(shape), shape)

    @property
    def numbers(self) -> int:
        """Uniforms that one proposal takes: two places, a sign for each channel, one for the orientation."""
        return 5 + self.channels

    def image(self, x: Tensor) -> Tensor:
        """(N, channels, height, width)."""
        return x.reshape(-1, self.channels, self.height, self.width)

    def flat(self, x: Tensor) -> Tensor:
        """(N, channels, height * width)."""
        return x.reshape(-1, self.channels, self.height * self.width)

    def original(self, x: Tensor) -> Tensor:
        """Back in the shape of the data."""
        return x.reshape(-1, *self.shape)

    def size(self, share: float, *, odd: bool = False) -> tuple[int, int]:
        """Height and width of a window with about this share of the features; `odd`: both odd, >= 3 where it fits."""
        area = share * self.height * self.width
        height = _side(math.sqrt(area), self.height, odd=odd)
        return height, _side(area / height, self.width, odd=odd)

    def window(self, numbers: Tensor, height: int, width: int) -> Tensor:
        """Places (N, channels, height * width) of a window whose corner is drawn with numbers[:, 0] and [:, 1]."""
        top = (numbers[:, 0] * (self.height - height + 1)).long().clamp(max=self.height - height)
        left = (numbers[:, 1] * (self.width - width + 1)).long().clamp(max=self.width - width)
        rows = top[:, None] + torch.arange(height, device=numbers.device)
        columns = left[:, None] + torch.arange(width, device=numbers.device)
        places = (rows[:, :, None] * self.width + columns[:, None, :]).flatten(1)
        return places[:, None].expand(-1, self.channels, -1)


def opposed_hills(height: int, width: int, *, along_rows: bool) -> Tensor:
    """Two hills of opposite sign side by side, Euclidean length one: (height, width) float32.

    Args:
        height: Rows.
        width: Columns.
        along_rows: One above the other, else one beside the other; where that dimension is 1, one hill.
    Source: Andriushchenko et al. 2020, section 3.3: a hill is the sum of centred rectangles with weights 1 / i^2.
    """
    if along_rows and height > 1:
        half = height // 2
        pattern = torch.cat([_hill(half, width), -_hill(height - half, width)])
    elif not along_rows and width > 1:
        half = width // 2
        pattern = torch.cat([_hill(height, half), -_hill(height, width - half)], dim=1)
    else:
        pattern = _hill(height, width)
    length: Tensor = pattern.norm()
    return pattern / length


def _hill(height: int, width: int) -> Tensor:
    hill = torch.zeros(height, width)
    middle = (height - 1) // 2, (width - 1) // 2
    for ring in range(max(height, width) // 2 + 1):
        rows = slice(max(0, middle[0] - ring), middle[0] + ring + 1 + (1 - height % 2))
        columns = slice(max(0, middle[1] - ring), middle[1] + ring + 1 + (1 - width % 2))
        hill[rows, columns] += 1 / (ring + 1) ** 2
    return hill


def _side(size: float, limit: int, *, odd: bool) -> int:
    side = max(1, round(size))
    if odd:
        side = max(3, side) + (max(3, side) + 1) % 2
    return min(limit, side)
