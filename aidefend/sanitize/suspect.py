"""The suspect model: the user's own, or a small network trained on the data as it is, so that a shortcut shows."""

import itertools
import math
from typing import cast

import torch
from torch import Tensor, nn

from aidefend._core.random import derive_seed, make_generator

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
    """A two-layer network that was trained on the rows as they are, poison included: what `screen` uses without model.

    Guarantee: deterministic in (x, labels, seed); no global random stream is touched.
    Args:
        x: (N, ...) finite inputs of any shape.
        labels: (N,) int64 >= 0.
        seed: Initial weights and order.
        epochs: Passes over the data. None: ten; for rows of a table as many more as make 500 steps.
    Returns: A model in eval mode from x to logits.
    Cost: these passes of a network with 256 + 64 hidden units; about 3 s for 6,000 images of 28 x 28.
    """
    if epochs is None:
        epochs = max(10, math.ceil(_STEPS / math.ceil(len(x) / _BATCH))) if x.ndim == 2 else 10
    stream = make_generator(seed=derive_seed(seed, "suspect") % 2**63)
    scaled = Scaled(x)
    classes = max(2, int(labels.max()) + 1)
    widths = [scaled(x[:1]).shape[1], 256, 64, classes]
    layers = [_linear(a, b, stream) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(scaled, layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    rows = scaled(x)
    with torch.enable_grad():
        _fit(nn.Sequential(*list(model)[1:]), rows, labels, epochs, stream)
    return model.requires_grad_(False).eval()


def _fit(model: nn.Module, rows: Tensor, labels: Tensor, epochs: int, stream: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(rows), generator=stream).split(_BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(rows[batch]), labels[batch]).backward()
            optimizer.step()


def _linear(inputs: int, outputs: int, stream: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        bound = math.sqrt(6 / inputs)
        layer.weight.copy_((torch.rand(outputs, inputs, generator=stream) * 2 - 1) * bound / math.sqrt(2))
        layer.bias.zero_()
    return cast("nn.Linear", layer)
