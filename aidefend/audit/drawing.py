"""Pictures of results, as PNG bytes for the page. Needs the extra `report`."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from aidefend._core.checks import check_int, refuse
from aidefend._core.errors import MissingExtra
from aidefend.audit.page import Figure
from aidefend.audit.robustness_result import Robustness

COLOURS = ("#c2410c", "#0369a1", "#4d7c0f", "#7c3aed", "#0f766e", "#be185d")


def plot_robustness(results: Mapping[str, Robustness]) -> Figure:
    """Accuracy over eps with 95 % intervals, one curve for each evaluation; a dashed curve is not trustworthy.

    Args:
        results: Name in the legend -> result of `evaluate_robustness` with a curve, at most six.
    Returns: Figure, as `render_page` and `AuditReport.to_html` take it; `.png` holds the bytes.
    Raises: ConfigurationError: no results, too many, or one without a curve. MissingExtra: matplotlib is missing.
    Example:
        >>> import torch
        >>> from aidefend import Threat
        >>> from aidefend.audit import evaluate_robustness
        >>> data = (torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1]))
        >>> result = evaluate_robustness(torch.nn.Identity(), data, Threat("linf", 0.1), "quick")
        >>> plot_robustness({"identity": result}).alt
        'Accuracy under attack over eps (linf): identity.'
    """
    if not results or len(results) > len(COLOURS) or not all(result.curve for result in results.values()):
        rule = f"1 to {len(COLOURS)} results with a curve"
        raise refuse(rule, "results", list(results), "Evaluate with one eps and finite bounds, or pass curve=")
    figure, axes = canvas(1, 1, (5.2, 3.2))
    axis = axes[0][0]
    for (name, result), colour in zip(results.items(), COLOURS, strict=False):
        radii = [point.eps for point in result.curve]
        style, doubt = ("-", "") if result.trustworthy else ("--", " (not trustworthy)")
        accuracies = [point.accuracy for point in result.curve]
        axis.plot(radii, accuracies, style, label=name + doubt, color=colour, linewidth=2)
        lows, highs = [point.low for point in result.curve], [point.high for point in result.curve]
        axis.fill_between(radii, lows, highs, color=colour, alpha=0.15, linewidth=0)
    norms = sorted({result.threat.norm for result in results.values()})
    dress(axis, (f"eps ({', '.join(norms)})", "accuracy"))
    axis.set_ylim(-0.02, 1.02)
    return drawn(figure, f"Accuracy under attack over eps ({', '.join(norms)}): {', '.join(results)}.")


def plot_examples(x: Tensor, results: Mapping[str, Robustness], count: int = 8) -> Figure:
    """Images above the worst points that each evaluation found for them.

    Args:
        x: (N, C, H, W) the images that were evaluated, in the same order, C 1 or 3, values in [0, 1].
        results: Name -> result of `evaluate_robustness` on x.
        count: Columns: the first images.
    Returns: Figure; see `plot_robustness`.
    Raises: ConfigurationError: shapes differ. MissingExtra: matplotlib is missing.
    Example:
        >>> import torch
        >>> from aidefend import Threat
        >>> from aidefend.audit import evaluate_robustness
        >>> x = torch.full((2, 1, 2, 2), 0.5)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity())
        >>> result = evaluate_robustness(model, (x, torch.tensor([0, 1])), Threat("linf", 0.1), "quick")
        >>> plot_examples(x, {"identity": result}).alt
        'Images; below them the worst points found for identity.'
    """
    check_int(count, "count")
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise refuse("images (N, 1 or 3, H, W)", "x", x, "Plot other data yourself")
    if not results or any(result.x_adv.shape != x.shape for result in results.values()):
        raise refuse(f"results for images {tuple(x.shape)}", "results", list(results), "Pass the evaluated images")
    rows = [x[:count], *(result.x_adv[:count] for result in results.values())]
    return images(rows, f"Images; below them the worst points found for {', '.join(results)}.")


def images(rows: Sequence[Tensor], caption: str) -> Figure:
    """A grid: each tensor (N, C, H, W) with values in [0, 1] is one row of pictures."""
    widest = max(len(row) for row in rows)
    figure, axes = canvas(len(rows), widest, (0.8 * widest, 0.85 * len(rows)))
    for line, row in zip(axes, rows, strict=True):
        for place, axis in enumerate(line):
            axis.axis("off")
            if place < len(row):
                picture = row[place].detach().float().cpu().clamp(0, 1)
                axis.imshow(
                    (picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)).numpy(), cmap="gray", vmin=0, vmax=1
                )
    return drawn(figure, caption)


def canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A drawing and its axes, without touching the state of matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Drawing
    except ImportError as error:
        raise MissingExtra("matplotlib", "report") from error
    figure = Drawing(figsize=size, dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def dress(axis: Any, labels: tuple[str, str]) -> None:
    """Labels of both axes, a light grid, a legend."""
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def drawn(figure: Any, caption: str) -> Figure:
    """The drawing as PNG: the same bytes for the same drawing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Figure(buffer.getvalue(), caption, caption)
