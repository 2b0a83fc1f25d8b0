"""Benign principals for benchmarks of query monitors, the hard ones included."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

KINDS = ("plain", "skewed", "video", "still camera", "retries", "augmented")
SHARES = (0.4, 0.15, 0.12, 0.11, 0.11, 0.11)


def warp(x: Tensor, angle: Tensor, shift: Tensor, zoom: Tensor) -> Tensor:
    """Images (N, C, H, W) turned by `angle` degrees, moved by `shift` (N, 2) pixels and zoomed."""
    turn = angle * math.pi / 180
    cos, sin = turn.cos() / zoom, turn.sin() / zoom
    move = -2 * shift / x.shape[-1]
    rows = (torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1))
    grid = affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return grid_sample(x, grid, align_corners=False).clamp(0, 1)


def benign(x: Tensor, y: Tensor, kind: str, stream: torch.Generator) -> Tensor:
    """The queries of one principal in a day: 20 to 300 plain ones, or bursts among them, for half of these at first."""
    count = int(math.exp(3 + 2.7 * float(torch.rand((), generator=stream))))
    if kind == "skewed":
        classes = torch.randperm(10, generator=stream)[: int(torch.randint(1, 4, (), generator=stream))]
        pool = torch.isin(y, classes).nonzero().flatten()
    else:
        pool = torch.arange(len(x))
    chosen = x[pool[torch.randint(len(pool), (count,), generator=stream)]]
    if kind in ("plain", "skewed"):
        return chosen
    make = {"video": video, "still camera": still, "retries": retries, "augmented": augmented}[kind]
    bursts, at_first = max(1, count // 40), bool(torch.rand((), generator=stream) < 0.5)
    parts = []
    for part in chosen.tensor_split(bursts)[:5]:
        burst = make(x[pool[int(torch.randint(len(pool), (), generator=stream))]], stream)
        parts += [burst, part] if at_first else [part, burst]
    return torch.cat(parts)


def video(image: Tensor, stream: torch.Generator) -> Tensor:
    """20 to 60 frames of an object that moves, turns and comes closer, with sensor noise."""
    frames = int(torch.randint(20, 61, (), generator=stream))
    pace = torch.randn(4, generator=stream) * torch.tensor([1.0, 0.12, 0.12, 0.004])
    time = torch.arange(frames, dtype=torch.float32)
    moved = warp(
        image.expand(frames, *image.shape),
        time * pace[0],
        time[:, None] * pace[1:3],
        (1 + time * pace[3]).clamp(0.7, 1.4),
    )
    return (moved + 0.02 * torch.randn(moved.shape, generator=stream)).clamp(0, 1)


def still(image: Tensor, stream: torch.Generator) -> Tensor:
    """10 to 40 frames of the same object, with sensor noise and flicker."""
    frames = int(torch.randint(10, 41, (), generator=stream))
    light = 1 + 0.05 * torch.randn(frames, 1, 1, 1, generator=stream)
    return (image * light + 0.03 * torch.randn(frames, *image.shape, generator=stream)).clamp(0, 1)


def retries(image: Tensor, stream: torch.Generator) -> Tensor:
    """The same image 5 to 50 times."""
    return image.expand(int(torch.randint(5, 51, (), generator=stream)), *image.shape)


def augmented(image: Tensor, stream: torch.Generator) -> Tensor:
    """16 versions for test-time augmentation: turned, moved, zoomed, noisy."""
    n = 16
    numbers = torch.randn(n, 4, generator=stream)
    moved = warp(image.expand(n, *image.shape), 6 * numbers[:, 0], numbers[:, 1:3], 1 + 0.05 * numbers[:, 3])
    return (moved + 0.02 * torch.randn(moved.shape, generator=stream)).clamp(0, 1)


def population(x: Tensor, y: Tensor, principals: int, seed: int) -> list[tuple[str, Tensor]]:
    """(kind, queries) of many principals, drawn by `SHARES`."""
    stream = torch.Generator().manual_seed(seed)
    kinds = torch.multinomial(torch.tensor(SHARES), principals, replacement=True, generator=stream)
    return [(KINDS[int(kind)], benign(x, y, KINDS[int(kind)], stream)) for kind in kinds]
