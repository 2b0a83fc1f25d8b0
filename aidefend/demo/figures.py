"""Pictures for the page, as PNG bytes. Needs the extra `report`."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aidefend._core.errors import MissingExtra
from aidefend.audit import Figure

_COLOURS = ("#c2410c", "#0369a1", "#4d7c0f", "#7c3aed")


def images(rows: Sequence[Tensor], caption: str) -> Figure:
    """A grid: each tensor (N, C, H, W) with values in [0, 1] is one row of pictures."""
    widest = max(len(row) for row in rows)
    figure, axes = _canvas(len(rows), widest, (0.8 * widest, 0.85 * len(rows)))
    for line, row in zip(axes, rows, strict=True):
        for place, axis in enumerate(line):
            axis.axis("off")
            if place < len(row):
                picture = row[place].detach().float().clamp(0, 1)
                axis.imshow(
                    (picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)).numpy(), cmap="gray", vmin=0, vmax=1
                )
    return _drawn(figure, caption)


def maps(pictures: Tensor, values: Tensor, caption: str) -> Figure:
    """Pictures (N, 1, H, W) above their attributions, red raising and blue lowering the class."""
    figure, axes = _canvas(2, len(pictures), (0.8 * len(pictures), 1.7))
    for place in range(len(pictures)):
        axes[0][place].imshow(pictures[place, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        span = float(values[place].abs().max()) or 1.0
        axes[1][place].imshow(values[place].sum(dim=0).numpy(), cmap="RdBu_r", vmin=-span, vmax=span)
        axes[0][place].axis("off")
        axes[1][place].axis("off")
    return _drawn(figure, caption)


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str],
    caption: str,
    *,
    diagonal: bool = False,
) -> Figure:
    """Curves by name: (x values, y values)."""
    figure, axes = _canvas(1, 1, (5.2, 3.2))
    axis = axes[0][0]
    for (name, (x, y)), colour in zip(curves.items(), _COLOURS, strict=False):
        axis.plot(x, y, label=name, color=colour, linewidth=2)
    if diagonal:
        axis.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":")
    _dress(axis, labels)
    axis.set_ylim(-0.02, 1.02)
    return _drawn(figure, caption)


def histogram(values: Mapping[str, Tensor], labels: tuple[str, str], caption: str) -> Figure:
    """Shares of values in [0, 1], by name."""
    figure, axes = _canvas(1, 1, (5.2, 3.2))
    axis = axes[0][0]
    for (name, row), colour in zip(values.items(), _COLOURS, strict=False):
        weights = torch.full((len(row),), 1 / max(1, len(row)))
        axis.hist(row.numpy(), bins=20, range=(0, 1), weights=weights.numpy(), label=name, color=colour, alpha=0.55)
    _dress(axis, labels)
    return _drawn(figure, caption)


def roc(positive: Tensor, negative: Tensor) -> tuple[list[float], list[float]]:
    """False- and true-positive rates over all thresholds."""
    scores = torch.cat([positive, negative]).double()
    truth = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])[scores.argsort(descending=True)]
    hits = torch.cat([torch.zeros(1), truth.cumsum(0)]) / max(1, len(positive))
    alarms = torch.cat([torch.zeros(1), (1 - truth).cumsum(0)]) / max(1, len(negative))
    return alarms.tolist(), hits.tolist()


def _canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Drawing
    except ImportError as error:
        raise MissingExtra("matplotlib", "report") from error
    figure = Drawing(figsize=size, dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _dress(axis: Any, labels: tuple[str, str]) -> None:
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def _drawn(figure: Any, caption: str) -> Figure:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Figure(buffer.getvalue(), caption, caption)
