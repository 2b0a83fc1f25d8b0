"""Bounds as a training loss: the worst logits that the bounds of a region allow, differentiable in the weights."""

from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_labels, check_logits, refuse
from aidefend._core.modules import Model, preserve
from aidefend.adversarial.bound_graph import BoundGraph
from aidefend.adversarial.certify_bounds import margin_forms
from aidefend.adversarial.crafting import PerExampleLoss, bare, losses_of, outputs_of
from aidefend.adversarial.linear_bounds import Region, lowest, lowest_from_box


def bound_losses(
    model: Model, x: Tensor, y: Tensor, region: Region, criterion: PerExampleLoss, kappa: float, beta: float
) -> Tensor:
    """Kappa times the criterion at x and 1 - kappa times that at the worst logits of the region: (N,).

    Args:
        model: Called once at x, through its data-parallel wrapper; the bounds read the weights of the module inside.
        x: (N, ...).
        y: (N,) class labels.
        region: Where the bounds hold.
        criterion: (outputs, y) -> (N,).
        kappa: In [0, 1].
        beta: Share of the linear bounds, in [0, 1]; the rest are intervals.
    """
    check_labels(y, len(x))
    graph = None if kappa == 1.0 else _graph(model)  # before the pass of the model, so that nothing is half done
    clean = check_logits(outputs_of(model, x), len(x))
    check_labels(y, len(x), clean.shape[1])
    natural = losses_of(criterion, clean, y, len(x))
    if graph is None:
        return natural
    worst = worst_logits(graph, region, y, clean.shape[1], beta)
    return kappa * natural + (1 - kappa) * losses_of(criterion, worst, y, len(x))


def worst_logits(graph: BoundGraph, region: Region, y: Tensor, classes: int, beta: float) -> Tensor:
    """Logits whose every difference to that of y is the largest that the bounds allow: (N, K), 0 at y."""
    boxes = graph.boxes(region.box)
    form = margin_forms(y, classes, region.x.dtype)
    margins = lowest_from_box(graph, boxes, form) if beta < 1 else torch.zeros((), device=y.device)
    if beta > 0:
        linear = lowest(graph, boxes, len(graph.nodes) - 1, form, region)
        margins = (1 - beta) * margins + beta * linear
    return -margins


def _graph(model: Model) -> BoundGraph:
    inner: Any = bare(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, nn.Module):
        raise refuse("an nn.Module", "model", model, "Bounds read the layers: wrap the callable in a module")
    with preserve(inner):  # a trace runs the model's own code
        return BoundGraph.of(inner)
