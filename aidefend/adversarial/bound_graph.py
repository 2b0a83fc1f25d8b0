"""A net as a list of operations that bounds can pass through, read by tracing; what is unknown is refused by name."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from aidefend._core.errors import IncompatibleModel, Offender
from aidefend.adversarial.bound_operations import (
    RISING,
    Averaged,
    Bent,
    Box,
    Largest,
    Normalised,
    Operation,
    Reshaped,
    Rising,
    Scaled,
    Summed,
    Weighted,
)

_CURE = "Use Linear, Conv1d/2d, pooling, BatchNorm, ReLU and its kin, additions and flatten, or take the layer out"
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation, the places of its inputs in the list, and its name in the model."""

    operation: Operation
    inputs: tuple[int, ...]
    name: str


@dataclasses.dataclass(frozen=True)
class BoundGraph:
    """Operations in the order of the forward pass; the first node is the input, the last one the logits.

    Weights are read from the live model at each use. The operation of the input itself does nothing.
    """

    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "BoundGraph":
        """Trace a model.

        Raises: IncompatibleModel: it cannot be traced, or has operations without a bound: all are listed.
        """
        if not isinstance(model, nn.Module):
            cause = f"Expected an nn.Module, got {type(model).__name__}. Wrap the callable in one."
            raise IncompatibleModel(cause)
        inner = getattr(model, "_orig_mod", model)  # a compiled model holds the one it was made from
        try:
            alone = type(inner).__module__.startswith("torch.nn.") and not list(inner.children())
            traced = fx.symbolic_trace(nn.Sequential(inner) if alone else inner)
        except Exception as error:
            found = f"{type(model).__name__}: {type(error).__name__}: {error}"
            what = f"Expected a model that torch.fx can trace, got model={found}."
            raise IncompatibleModel(f"{what} Take branches on values out of forward.") from error
        return _Reader(traced).read()

    def boxes(
        self, box: Box, *, unit: float = 0.0, refine: Callable[[int, list[Box]], Box | None] | None = None
    ) -> list[Box]:
        """Boxes of all nodes for a box of inputs; one for each node.

        Args:
            box: Of the input.
            unit: Unit roundoff of the model's own arithmetic, whose error widens every box; 0 in training.
            refine: Gives a second box for a node before it is used, or None; the intersection is taken.
        """
        found: list[Box] = [box]
        for place, node in enumerate(self.nodes[1:], 1):
            inputs = [found[i] for i in node.inputs]
            own = node.operation.forward(inputs)
            error = node.operation.rounding(inputs, unit) if unit else None
            own = own if error is None else Box(own.lower - error, own.upper + error, own.clean)
            better = None if refine is None else refine(place, [*found, own])
            if better is not None:
                own = Box(torch.maximum(own.lower, better.lower), torch.minimum(own.upper, better.upper), own.clean)
            found.append(own)
        return found


class _Reader:
    """Turns a traced model into nodes; gathers what it cannot read."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced, self.offenders = traced, list[Offender]()
        self.nodes: list[Node] = []
        self.place: dict[fx.Node, int] = {}
        self.constant: dict[fx.Node, Callable[[], Tensor]] = {}

    def read(self) -> BoundGraph:
        last = -1
        for node in self.traced.graph.nodes:
            if node.op == "output":
                last = self._last(node)
            elif node.op == "placeholder":
                self._input(node)
            elif node.op == "get_attr":
                self.constant[node] = _reader_of(self.traced, str(node.target))
            else:
                self._operation(node)
        if self.offenders:
            raise IncompatibleModel("Expected a model of operations with known bounds.", self.offenders)
        return BoundGraph(tuple(self.nodes[: last + 1]))

    def _input(self, node: fx.Node) -> None:
        if self.nodes:
            if not node.args:  # an input without a default
                self._refuse(node, "a second input", "Bind it before, for example in a wrapper module")
            return
        self._add(node, Reshaped(lambda x: x), ())

    def _last(self, node: fx.Node) -> int:
        value = node.args[0]
        if isinstance(value, fx.Node) and value in self.place:
            return self.place[value]
        if not self.offenders:
            self._refuse(node, "outputs that are not one tensor", "Return the logits alone")
        return -1

    def _operation(self, node: fx.Node) -> None:
        inputs = [arg for arg in node.all_input_nodes if arg not in self.constant]
        if not inputs:
            self._refuse(node, f"{_title(node)} on constants alone", "Compute it once and register it as a buffer")
            return
        if any(arg not in self.place for arg in inputs):
            return  # it hangs on something that was refused
        if node.op == "call_module":
            operation = _of_module(self.traced.get_submodule(str(node.target)))
        else:
            operation = self._of_function(node)
        if operation is None:
            kind = (
                type(self.traced.get_submodule(str(node.target))).__name__ if node.op == "call_module" else _title(node)
            )
            self._refuse(node, f"no bound is known for {kind}", _CURE)
            return
        self._add(node, operation, tuple(self.place[arg] for arg in _tensors(node) if arg in self.place))

    def _of_function(self, node: fx.Node) -> Operation | None:
        target, args = node.target, node.args
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        name = name.rstrip("_")
        if name in ("relu",):
            return Bent(0.0)
        if name == "leaky_relu":
            slope = args[1] if len(args) > 1 else node.kwargs.get("negative_slope", 0.01)
            return _bent(slope)
        if name in ("sigmoid", "tanh"):
            return Rising(torch.sigmoid if name == "sigmoid" else torch.tanh)
        if name in ("flatten", "view", "reshape"):
            return _reshaped(node)
        if name in ("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "div"):
            return self._arithmetic(name.removeprefix("i") if name != "itruediv" else "truediv", node)
        if name in ("avg_pool2d", "adaptive_avg_pool2d") and not isinstance(target, str):
            pool: Any = target
            rest, options = args[1:], dict(node.kwargs)
            return Averaged(lambda x: pool(x, *rest, **options))
        return None

    def _arithmetic(self, name: str, node: fx.Node) -> Operation | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        left, right = node.args
        if left in self.place and right in self.place:
            return {"add": Summed(1.0), "sub": Summed(-1.0)}.get(name)
        first = left in self.place
        value = self._value(right if first else left)
        if value is None:
            return None
        if name == "add":
            return Scaled(lambda: 1.0, value)
        if name == "sub":
            return Scaled(lambda: 1.0, lambda: -value()) if first else Scaled(lambda: -1.0, value)
        if name == "mul":
            return Scaled(value, lambda: 0.0)
        return Scaled(lambda: 1.0 / value(), lambda: 0.0) if first else None

    def _value(self, arg: Any) -> Callable[[], Tensor] | None:
        if isinstance(arg, int | float) and not isinstance(arg, bool):
            return lambda: torch.tensor(float(arg), dtype=torch.float64)
        return self.constant.get(arg) if isinstance(arg, fx.Node) else None

    def _add(self, node: fx.Node, operation: Operation, inputs: tuple[int, ...]) -> None:
        self.place[node] = len(self.nodes)
        self.nodes.append(Node(operation, inputs, str(node.target)))

    def _refuse(self, node: fx.Node, reason: str, cure: str) -> None:
        self.offenders.append(Offender(str(node.target) if node.op == "call_module" else node.name, reason, cure))


def _of_module(module: nn.Module) -> Operation | None:
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        plain = isinstance(module, nn.Linear) or (
            module.padding_mode == "zeros" and not isinstance(module.padding, str)
        )
        return Weighted(module) if plain else None
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return Normalised(module)
    if isinstance(module, nn.ReLU):
        return Bent(0.0)
    if isinstance(module, nn.LeakyReLU):
        return _bent(module.negative_slope)
    if isinstance(module, nn.Flatten):
        return Reshaped(module) if module.start_dim == 1 and module.end_dim == -1 else None
    if isinstance(module, nn.Identity) or (isinstance(module, nn.modules.dropout._DropoutNd) and not module.training):
        return Reshaped(lambda x: x)
    if isinstance(module, nn.MaxPool2d):
        return None if module.return_indices or module.ceil_mode else Largest(module)
    if isinstance(module, _AVERAGES):
        return Averaged(module)
    return Rising(RISING[type(module)](module)) if type(module) in RISING else None


def _bent(slope: Any) -> Operation | None:
    return Bent(float(slope)) if isinstance(slope, int | float) and 0 <= slope < 1 else None


def _reshaped(node: fx.Node) -> Operation | None:
    """flatten(1), and view or reshape to (N, -1); the batch dimension must stay."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    rest: Sequence[Any] = node.args[1:]
    if name == "flatten":
        start = rest[0] if rest else node.kwargs.get("start_dim", 0)
        end = rest[1] if len(rest) > 1 else node.kwargs.get("end_dim", -1)
        return Reshaped(lambda x: x.flatten(1)) if (start, end) == (1, -1) else None
    shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    if len(shape) == 2 and shape[1] == -1:
        return Reshaped(lambda x: x.flatten(1))
    fixed = list(shape[1:])
    if shape and shape[0] == -1 and all(isinstance(size, int) and size > 0 for size in fixed):
        return Reshaped(lambda x: x.reshape(len(x), *fixed))
    return None


def _tensors(node: fx.Node) -> list[fx.Node]:
    """Arguments that are nodes, in order, repeated ones too (x + x)."""
    return [arg for arg in node.args if isinstance(arg, fx.Node)]


def _reader_of(traced: fx.GraphModule, path: str) -> Callable[[], Tensor]:
    """The parameter or buffer behind a path, read when it is used."""
    return lambda: operator.attrgetter(path)(traced)


def _title(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
