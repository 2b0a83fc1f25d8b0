"""The suspect model: the user's own, or a small network trained on the data as it is, so that a shortcut shows."""

import itertools
import math
from typing import cast

import torch
from torch import Tensor, nn

from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.bend import Bend

_LARGEST = 4096


class Scaled(nn.Module):
    """Inputs as rows of at most 4,096 scaled numbers; larger ones are averaged over neighbouring cells first."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        rows = compact(x)
        flat = x.ndim == 2  # columns of a table have units of their own, pixels share one
        mean = rows.mean(dim=0) if flat else rows.mean()
        spread = rows.std(dim=0, correction=0) if flat else rows.std(correction=0)
        self.register_buffer("mean", mean)
        self.register_buffer("spread", torch.where(spread > 0, spread, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) to (N, d <= 4096) float32."""
        return (compact(x) - cast("Tensor", self.mean)) / cast("Tensor", self.spread)


def compact(x: Tensor) -> Tensor:
    """(N, ...) to (N, d <= 4096) float32: flattened, averaged over neighbouring cells where it is larger."""
    rows = x.float()
    size = math.prod(x.shape[1:])
    if size > _LARGEST and x.ndim >= 4 and x.shape[-3] * 4 <= _LARGEST:
        side = max(1, math.isqrt(_LARGEST // x.shape[-3]))
        pooled = (min(side, x.shape[-2]), min(side, x.shape[-1]))
        rows = nn.functional.adaptive_avg_pool2d(rows.reshape(len(x), math.prod(x.shape[1:-2]), *x.shape[-2:]), pooled)
        size = math.prod(rows.shape[1:])
    rows = rows.flatten(1) if len(x) else rows.reshape(0, size)
    return nn.functional.adaptive_avg_pool1d(rows, _LARGEST) if size > _LARGEST else rows


_BATCH = 64
_STEPS = 500


def train_suspect(x: Tensor, labels: Tensor, seed: int = 0, epochs: int | None = None) -> nn.Sequential:
    """A small network that was trained on the rows as they are, poison included: what `screen` uses without model.

    Pictures (N, C, H, W) of at least 8 x 8 get two convolutions: a trigger in a spot, in parts or here and there, is a
    shortcut for them, where a dense network would learn whole pictures by heart. All else gets two dense layers.

    Guarantee: deterministic in (x, labels, seed); no global random stream is touched.
    Args:
        x: (N, ...) finite inputs of any shape.
        labels: (N,) int64 >= 0.
        seed: Initial weights and order.
        epochs: Passes over the data. None: ten; for rows of a table as many more as make 500 steps.
    Returns: A model in eval mode from x to logits.
    Cost: these passes of a network with 256 + 64 hidden units, or of two convolutions with stride 2 and 64 hidden
        units; about 3 s and 10 s for 6,000 images of 28 x 28.
    """
    if epochs is None:
        epochs = max(10, math.ceil(_STEPS / math.ceil(len(x) / _BATCH))) if x.ndim == 2 else 10
    stream = make_generator(seed=derive_seed(seed, "suspect") % 2**63)
    scaled = Scaled(x)
    rows = scaled(x)
    classes = max(2, int(labels.max()) + 1)
    shape = _picture(x, rows.shape[1])
    layers = _dense(rows.shape[1], classes, stream) if shape is None else _convolutional(shape, classes, stream)
    with torch.enable_grad():
        _fit(nn.Sequential(*layers), rows, labels, epochs, stream)
    return nn.Sequential(scaled, *layers).requires_grad_(False).eval()


def _picture(x: Tensor, size: int) -> tuple[int, int, int] | None:
    """Channels, height and width of the rows of `Scaled`, None where they are no pictures."""
    if not Bend.possible(x):
        return None
    channels, height, width = x.shape[1:]
    if size < channels * height * width:  # averaged to squares by `compact`
        height = width = math.isqrt(size // channels)
    return (channels, height, width) if channels * height * width == size else None


def _dense(inputs: int, classes: int, stream: torch.Generator) -> list[nn.Module]:
    first, second, last = (
        _started(nn.Linear, stream, *pair) for pair in itertools.pairwise((inputs, 256, 64, classes))
    )
    return [first, nn.ReLU(), second, nn.ReLU(), last]


def _convolutional(shape: tuple[int, int, int], classes: int, stream: torch.Generator) -> list[nn.Module]:
    """5 x 5 windows, each second place: 16, then 32 maps; then 64 hidden units."""
    channels, *sides = shape
    height, width = ((side + 3) // 4 for side in sides)
    return [
        nn.Unflatten(1, shape),
        _started(nn.Conv2d, stream, channels, 16, 5, 2, 2),
        nn.ReLU(),
        _started(nn.Conv2d, stream, 16, 32, 5, 2, 2),
        nn.ReLU(),
        nn.Flatten(),
        _started(nn.Linear, stream, 32 * height * width, 64),
        nn.ReLU(),
        _started(nn.Linear, stream, 64, classes),
    ]


def _fit(model: nn.Module, rows: Tensor, labels: Tensor, epochs: int, stream: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(rows), generator=stream).split(_BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(rows[batch]), labels[batch]).backward()
            optimizer.step()


def _started(kind: type[nn.Linear | nn.Conv2d], stream: torch.Generator, *sizes: int) -> nn.Module:
    """A layer with weights of variance 1 / fan-in, drawn from the stream."""
    layer: nn.Module = nn.utils.skip_init(kind, *sizes)
    weight, bias = (cast("Tensor", getattr(layer, name)) for name in ("weight", "bias"))
    with torch.no_grad():
        weight.copy_((torch.rand(weight.shape, generator=stream) * 2 - 1) * math.sqrt(3 / weight[0].numel()))
        bias.zero_()
    return layer
