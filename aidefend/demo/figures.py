"""Pictures for the page, as PNG bytes. Needs the extra `report`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aidefend.audit import Figure
from aidefend.audit.drawing import COLOURS, canvas, drawn, dress


def maps(pictures: Tensor, values: Tensor, caption: str) -> Figure:
    """Pictures (N, 1, H, W) above their attributions, red raising and blue lowering the class."""
    figure, axes = canvas(2, len(pictures), (0.8 * len(pictures), 1.7))
    for place in range(len(pictures)):
        axes[0][place].imshow(pictures[place, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        span = float(values[place].abs().max()) or 1.0
        axes[1][place].imshow(values[place].sum(dim=0).numpy(), cmap="RdBu_r", vmin=-span, vmax=span)
        axes[0][place].axis("off")
        axes[1][place].axis("off")
    return drawn(figure, caption)


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str],
    caption: str,
    *,
    diagonal: bool = False,
) -> Figure:
    """Curves by name: (x values, y values)."""
    figure, axes = canvas(1, 1, (5.2, 3.2))
    axis = axes[0][0]
    for (name, (x, y)), colour in zip(curves.items(), COLOURS, strict=False):
        axis.plot(x, y, label=name, color=colour, linewidth=2)
    if diagonal:
        axis.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":")
    dress(axis, labels)
    axis.set_ylim(-0.02, 1.02)
    return drawn(figure, caption)


def histogram(values: Mapping[str, Tensor], labels: tuple[str, str], caption: str) -> Figure:
    """Shares of values in [0, 1], by name."""
    figure, axes = canvas(1, 1, (5.2, 3.2))
    axis = axes[0][0]
    for (name, row), colour in zip(values.items(), COLOURS, strict=False):
        weights = torch.full((len(row),), 1 / max(1, len(row)))
        axis.hist(row.numpy(), bins=20, range=(0, 1), weights=weights.numpy(), label=name, color=colour, alpha=0.55)
    dress(axis, labels)
    return drawn(figure, caption)


def roc(positive: Tensor, negative: Tensor) -> tuple[list[float], list[float]]:
    """False- and true-positive rates over all thresholds."""
    scores = torch.cat([positive, negative]).double()
    truth = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])[scores.argsort(descending=True)]
    hits = torch.cat([torch.zeros(1), truth.cumsum(0)]) / max(1, len(positive))
    alarms = torch.cat([torch.zeros(1), (1 - truth).cumsum(0)]) / max(1, len(negative))
    return alarms.tolist(), hits.tolist()
