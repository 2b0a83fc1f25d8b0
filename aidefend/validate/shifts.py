"""Shifted copies of clean inputs: stand-ins for the strange rows that nobody has yet."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, pad

from aidefend._core.checks import check_int, check_not_empty, check_tensor, refuse

Draw = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Shifts:
    """Each clean input in several forms that are none of the clean data, with every value inside their range.

    Of any rank: "inverted", "noisy", "mixed" (with another row, never itself; each is mixed into one other), "columns"
    (each value from a row of its own), "shuffled" (positions). Of images (N, C, H, W), sides of at least 8: also
    "turned", "zoomed", "blurred", "jigsaw".
    Args:
        kinds: Names of those to make; None = all that the rank allows.
        seed: Of the draws; the same rows and seed give the same shifts.
    Cost: Of the order of a copy for each kind.
    Example:
        >>> shifted = Shifts()(torch.rand(8, 3, 16, 16))
        >>> sorted(shifted)
        ['blurred', 'columns', 'inverted', 'jigsaw', 'mixed', 'noisy', 'shuffled', 'turned', 'zoomed']
    """

    kinds: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_int(self.seed, "seed", 0)
        if self.kinds is None:
            return
        names = isinstance(self.kinds, list | tuple) and all(isinstance(kind, str) for kind in self.kinds)
        if not names or not self.kinds or not set(self.kinds) <= set(_KINDS):
            raise refuse(f"some of {sorted(_KINDS)}", "kinds", self.kinds, "Pass a list of names, or None for all")
        object.__setattr__(self, "kinds", tuple(self.kinds))

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """The shifted rows by kind, each of the shape, dtype and device of x (N, ...).

        Args:
            x: (N, ...), finite, N >= 1; of whole numbers the shifts are rounded.
        Raises: ConfigurationError: no kind is left for inputs of this rank.
        """
        check_not_empty(check_tensor(x, "x").numel(), "x")
        pictures = x.ndim == 4 and min(x.shape[2:]) >= 8
        wanted = [name for name in self.kinds or _KINDS if pictures or name not in _OF_PICTURES]
        if not wanted or x.ndim < 2:
            raise refuse("inputs (N, ...) that these kinds can shift", "x", x, "Pass kinds=None, or no shifts")
        # The range of each channel, or of each column of a table: a place of an image that never varies has no range.
        over = (0, *range(2, x.ndim))
        values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        low, high = values.amin(dim=over, keepdim=True), values.amax(dim=over, keepdim=True)
        return {name: self._made(name, values, low, high, x) for name in wanted}

    def _made(self, name: str, values: Tensor, low: Tensor, high: Tensor, x: Tensor) -> Tensor:
        stream = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, normal: bool = False) -> Tensor:
            return (torch.randn if normal else torch.rand)(shape, generator=stream).to(values)

        unit = (values - low) / (high - low).clamp(min=1e-12)
        made = torch.minimum(low + _KINDS[name](unit, draw).clamp(0, 1) * (high - low), high)
        return (made if x.is_floating_point() else made.round()).to(x.dtype)


def _row(draw: Draw, x: Tensor) -> Tensor:
    """One draw for each row, to multiply x with."""
    return draw(len(x)).view(-1, *[1] * (x.ndim - 1))


def _noisy(x: Tensor, draw: Draw) -> Tensor:
    return x + (0.1 + 0.4 * _row(draw, x)) * draw(*x.shape, normal=True)


def _mixed(x: Tensor, draw: Draw) -> Tensor:
    """Each row with the one after it in a random circle of all rows: never with itself where there is another."""
    share = 0.3 + 0.4 * _row(draw, x)
    circle = draw(len(x)).argsort()
    return share * x + (1 - share) * x[torch.empty_like(circle).scatter(0, circle, circle.roll(-1))]


def _columns(x: Tensor, draw: Draw) -> Tensor:
    return x.gather(0, (draw(*x.shape) * len(x)).long())


def _shuffled(x: Tensor, draw: Draw) -> Tensor:
    flat = x.flatten(1)
    return flat.gather(1, draw(*flat.shape).argsort(dim=1)).view_as(x)


def _affine(x: Tensor, scale: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    rows = [(scale * angle.cos(), -scale * angle.sin()), (scale * angle.sin(), scale * angle.cos())]
    matrix = torch.stack([torch.stack([*row, shift[:, i]], dim=1) for i, row in enumerate(rows)], dim=1)
    grid = affine_grid(matrix, list(x.shape), align_corners=False)
    return grid_sample(x, grid, padding_mode="border", align_corners=False)


def _turned(x: Tensor, draw: Draw) -> Tensor:
    angle = math.pi * (30 + 300 * draw(len(x))) / 180
    return _affine(x, torch.ones_like(angle), angle, angle.new_zeros(len(x), 2))


def _zoomed(x: Tensor, draw: Draw) -> Tensor:
    scale = 0.4 + 0.3 * draw(len(x))
    return _affine(x, scale, torch.zeros_like(scale), (1 - scale)[:, None] * (2 * draw(len(x), 2) - 1))


def _blurred(x: Tensor, draw: Draw) -> Tensor:
    return avg_pool2d(pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


def _jigsaw(x: Tensor, draw: Draw) -> Tensor:
    """The 16 largest equal tiles, at places of each other; what is left at the lower and right edge stays."""
    n, c, (h, w) = len(x), x.shape[1], (side // 4 for side in x.shape[2:])
    tiles = x[:, :, : 4 * h, : 4 * w].reshape(n, c, 4, h, 4, w).permute(0, 2, 4, 1, 3, 5).reshape(n, 16, -1)
    order = draw(n, 16).argsort(dim=1)
    moved = tiles.gather(1, order[:, :, None].expand_as(tiles)).view(n, 4, 4, c, h, w).permute(0, 3, 1, 4, 2, 5)
    found = x.clone()
    found[:, :, : 4 * h, : 4 * w] = moved.reshape(n, c, 4 * h, 4 * w)
    return found


_OF_PICTURES = {"turned": _turned, "zoomed": _zoomed, "blurred": _blurred, "jigsaw": _jigsaw}
_KINDS: dict[str, Callable[[Tensor, Draw], Tensor]] = {
    "inverted": lambda x, _: 1 - x,
    "noisy": _noisy,
    "mixed": _mixed,
    "columns": _columns,
    "shuffled": _shuffled,
    **_OF_PICTURES,
}
