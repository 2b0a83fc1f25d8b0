"""Backward linear bounds (CROWN): a linear form of one layer, pushed back to the input and minimised there."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.projection import by_row
from aidefend._core.threat import Threat
from aidefend.adversarial.bound_graph import BoundGraph, Node
from aidefend.adversarial.bound_operations import Box, Weighted


@dataclasses.dataclass(frozen=True)
class Region:
    """The inputs that a bound is about: the threat around x, and the box that holds it."""

    x: Tensor
    threat: Threat
    box: Box
    slack: float = 0.0

    @classmethod
    def around(cls, x: Tensor, threat: Threat, *, slack: float = 0.0, clean: bool = False) -> "Region":
        """All points of the threat; with `slack` also those that `contains` forgives for their rounding."""
        low, high = threat.limits(x)
        reach = threat.reach(x) * (1 + slack)
        reach = torch.where(threat.changeable(x), reach, 0)
        lower = torch.maximum(x - reach, torch.minimum(low, x))
        upper = torch.minimum(x + reach, torch.maximum(high, x))
        lower, upper = lower - slack * lower.abs(), upper + slack * upper.abs()
        lower, upper = torch.minimum(lower, x - slack * x.abs()), torch.maximum(upper, x + slack * x.abs())
        return cls(x, threat, Box(lower, upper, x if clean else None), slack)

    def lowest(self, form: Tensor) -> Tensor:
        """A lower bound of the form over the region: (N, S) from (N, S, ...). The better of box and ball."""
        form, x = form.flatten(2), self.x.flatten(1)[:, None]
        lower, upper = (part.flatten(1)[:, None] for part in (self.box.lower, self.box.upper))
        drop = torch.maximum(form * (x - lower), form * (x - upper))  # >= 0: what each feature can take off
        centre = (form * x).sum(dim=2)
        by_box = drop.sum(dim=2)
        if self.threat.norm == "linf" or (self.threat.norm == "l0" and self.threat.groups is not None):
            return centre - by_box  # in l0 a changed group counts as one, though it moves two features
        return centre - torch.minimum(by_box, self._by_ball(form, drop))

    def _by_ball(self, form: Tensor, drop: Tensor) -> Tensor:
        """What the ball can take off: radius times dual norm; l0: the largest drops of single features."""
        x, threat = self.x, self.threat
        eps = by_row(threat.radius(x), x)
        if threat.norm == "l0":
            rank = torch.arange(drop.shape[2], device=drop.device)
            largest = drop.sort(dim=2, descending=True).values
            return torch.where(rank < eps.floor()[:, None], largest, 0).sum(dim=2) + self._blur(form)
        form = torch.where(threat.changeable(x).expand_as(x).flatten(1)[:, None], form, 0)
        form = form / threat.priced(torch.ones_like(x)).flatten(1)[:, None]
        dual = torch.linalg.vector_norm(form, ord=2.0 if threat.norm == "l2" else torch.inf, dim=2)
        found: Tensor = eps * (1 + self.slack) * dual + self._blur(form)
        return found

    def _blur(self, form: Tensor) -> Tensor:
        """What the rounding of x itself can take off."""
        size = torch.maximum(self.box.lower.abs(), self.box.upper.abs()).flatten(1)[:, None]
        return 4 * self.slack * (form.abs() * size).sum(dim=2)


def lowest(
    graph: BoundGraph, boxes: list[Box], place: int, form: Tensor, region: Region, *, unit: float = 0.0
) -> Tensor:
    """A lower bound of a linear form of node `place`: (N, S) from (N, S, ...), by substitution back to the input."""
    forms: dict[int, Tensor] = {place: form}
    constant = form.new_zeros(form.shape[:2])
    for at in range(place, 0, -1):
        own = forms.pop(at, None)
        if own is None:
            continue
        parts, rest = _through(graph.nodes[at], boxes, own, unit)
        constant = constant + rest
        for i, part in zip(graph.nodes[at].inputs, parts, strict=True):
            forms[i] = forms[i] + part if i in forms else part
    return constant + region.lowest(forms[0])


def lowest_from_box(graph: BoundGraph, boxes: list[Box], form: Tensor, *, unit: float = 0.0) -> Tensor:
    """A lower bound of a form of the logits from the boxes alone: back through the last affine layers, then the box."""
    place, constant = len(graph.nodes) - 1, form.new_zeros(form.shape[:2])
    while place > 0:
        node = graph.nodes[place]
        if not node.operation.affine or len(node.inputs) != 1:
            break
        (form,), rest = _through(node, boxes, form, unit)
        constant, place = constant + rest, node.inputs[0]
    box = boxes[place]
    middle = (form * box.middle[:, None]).flatten(2).sum(dim=2)
    return constant + middle - (form.abs() * box.radius[:, None]).flatten(2).sum(dim=2)


def _through(node: Node, boxes: list[Box], form: Tensor, unit: float) -> tuple[list[Tensor], Tensor]:
    """One node back: forms over its inputs and what is constant, the rounding of the model in the node included."""
    inputs = [boxes[i] for i in node.inputs]
    parts, constant = node.operation.back(form, inputs)
    error = node.operation.rounding(inputs, unit) if unit else None
    if error is not None:
        constant = constant - (form.abs() * error[:, None]).flatten(2).sum(dim=2)
    return parts, constant


def crown_boxes(graph: BoundGraph, region: Region, *, unit: float = 0.0, block: int = 256) -> list[Box]:
    """Boxes of all nodes where those in front of a bend come from backward bounds: `block` features at a time."""
    bends = {i for node in graph.nodes if not node.operation.affine for i in node.inputs}
    direct = _first_layers(graph)

    def refine(place: int, boxes: list[Box]) -> Box | None:
        if place not in bends or place == 0 or (place in direct and region.threat.norm == "linf"):
            return None
        like = boxes[place].lower
        n, features = len(like), like[0].numel()
        lower, upper = [], []
        for first in range(0, features, block):
            count = min(block, features - first)
            form = like.new_zeros(n, count, features)
            form[:, torch.arange(count), first + torch.arange(count)] = 1.0
            form = form.reshape(n, count, *like.shape[1:])
            lower.append(lowest(graph, boxes, place, form, region, unit=unit))
            upper.append(-lowest(graph, boxes, place, -form, region, unit=unit))
        return Box(torch.cat(lower, dim=1).reshape(like.shape), torch.cat(upper, dim=1).reshape(like.shape))

    return graph.boxes(region.box, unit=unit, refine=refine)


def _first_layers(graph: BoundGraph) -> set[int]:
    """Nodes whose box is exact for a box of inputs: the first weights, and what keeps values apart after and before."""
    exact = {0}
    for place, node in enumerate(graph.nodes[1:], 1):
        weighted = isinstance(node.operation, Weighted)
        if node.operation.affine and not weighted and set(node.inputs) <= exact:
            exact.add(place)
    return exact | {
        place
        for place, node in enumerate(graph.nodes)
        if isinstance(node.operation, Weighted) and set(node.inputs) <= {0}
    }
