"""The window that suspects share and ordinary samples do not have."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from aidefend.collaborate.fingerprints import Place, as_planes
from aidefend.collaborate.fingerprints import window as window_of

_CHUNK = 64
_SHARED, _ORDINARY = 0.5, 0.01


class Window(NamedTuple):
    """Where it is, and what the suspects have there, (C, height, width)."""

    place: Place
    content: Tensor


def common_window(suspects: Tensor, reference: Tensor, size: int) -> Window | None:
    """The window with the same content in more than half of the suspects and in at most 1 % of the reference.

    More than half share a window's content only if more than half share each of its pixels, so the middle value of each
    pixel is the only candidate. Among the windows that qualify, the one wins whose pixels are least likely on the
    reference, taken one by one: the whole patch before its edge with background around.

    Args:
        suspects: (N, ...) levels.
        reference: (M, ...) levels.
        size: Side of the window, cut to the sample.
    """
    marks, ordinary = as_planes(suspects), as_planes(reference)
    common = marks.sort(dim=0).values[(len(marks) - 1) // 2]
    side = (min(size, marks.shape[2]), min(size, marks.shape[3]))
    here, _ = _agreement(marks, common, side)
    elsewhere, by_pixel = _agreement(ordinary, common, side)
    surprise = -torch.log((by_pixel + 1) / (len(ordinary) + 2)).sum(dim=0)
    surprise = functional.avg_pool2d(surprise[None, None], side, stride=1)[0, 0]
    fits = (here > _SHARED * len(marks)) & (elsewhere <= _ORDINARY * len(ordinary))
    if not bool(fits.any()):
        return None
    best = int((here / len(marks) * surprise).where(fits, -1.0).argmax())
    place = (best // fits.shape[1], best % fits.shape[1], *side)
    return Window(place, window_of(common[None], place)[0])


def _agreement(rows: Tensor, common: Tensor, side: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How many rows have the common content in each window (H', W'), and in each pixel (C, H, W)."""
    windows, pixels = [], torch.zeros(common.shape, dtype=torch.float64)
    for part in rows.split(_CHUNK):
        wrong = part != common
        pixels += (~wrong).sum(dim=0)
        worst = functional.max_pool2d(wrong.any(dim=1, keepdim=True).float(), side, stride=1)
        windows.append((worst[:, 0] == 0).sum(dim=0))
    return torch.stack(windows).sum(dim=0), pixels
