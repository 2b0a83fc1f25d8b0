"""A net as a list of operations that bounds can pass through, read by tracing; what is unknown is refused by name."""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from aidefend._core.errors import IncompatibleModel, Offender
from aidefend.adversarial.bound_operations import (
    RISING,
    Averaged,
    Bent,
    Box,
    Normalised,
    Operation,
    Reshaped,
    Rising,
    Scaled,
    Summed,
    Weighted,
)
from aidefend.adversarial.max_pool_bounds import Largest

_IN_PLACE = ("iadd", "isub", "imul", "itruediv")
_FUNCTIONS: tuple[Any, ...] = (
    torch.relu, torch.relu_, functional.relu, functional.leaky_relu, torch.sigmoid, functional.sigmoid, torch.tanh,
    functional.tanh, torch.flatten, torch.reshape, functional.avg_pool2d, functional.adaptive_avg_pool2d,
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub, operator.imul,
    operator.itruediv, torch.add, torch.sub, torch.mul, torch.div,
)  # fmt: skip
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
    traced: fx.GraphModule = dataclasses.field(repr=False, compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> "BoundGraph":
        """Trace a model.

        Raises: IncompatibleModel: it cannot be traced, or has operations without a bound: all are listed.
        """
        if not isinstance(model, nn.Module):
            cause = f"Expected an nn.Module, got {type(model).__name__}. Wrap the callable in one."
            raise IncompatibleModel(cause)
        inner = getattr(model, "_orig_mod", model)  # a compiled model holds the one it was made from
        changed = _changed_from_outside(inner)
        if changed:
            raise IncompatibleModel("Expected a model whose layers do what their classes say.", changed)
        try:
            alone = type(inner).__module__.startswith("torch.nn.") and not list(inner.children())
            root = nn.Sequential(inner) if alone else inner
            traced = fx.GraphModule(root, _Tracer().trace(root))
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
        if not any(isinstance(node.operation, Normalised) for node in self.nodes):
            box = dataclasses.replace(box, clean=None)  # nothing asks for the clean values
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


class _Proxy(fx.Proxy):
    """Reads `h += 1` as the change in place that it is; torch.fx itself reads h + 1."""


def _augmented(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _augmented(_name))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Reader:
    """Turns a traced model into nodes; gathers what it cannot read."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced, self.offenders = traced, list[Offender]()
        self.nodes: list[Node] = []
        self.place: dict[fx.Node, int] = {}
        self.constant: dict[fx.Node, Callable[[], Tensor]] = {}
        self.sizes: set[fx.Node] = set()  # the number of rows, or what leads to it

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
        return BoundGraph(tuple(self.nodes[: last + 1]), self.traced)

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
        if _is_row_count(node):
            self.sizes.add(node)
            return
        inputs = [arg for arg in node.all_input_nodes if arg not in self.constant and arg not in self.sizes]
        if not inputs:
            self._refuse(node, f"{_title(node)} on constants alone", "Compute it once and register it as a buffer")
            return
        if any(arg not in self.place for arg in inputs):
            return  # it hangs on something that was refused
        if self._overwrites_what_is_read_again(node):
            cure = "Use the form that is not in place"
            self._refuse(node, f"{_title(node)} changes in place what is read elsewhere", cure)
            return
        if node.op == "call_module":
            operation = _of_module(self.traced.get_submodule(str(node.target)))
        else:
            operation = self._of_function(node)
        if operation is None:
            called = self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None
            kind = _title(node) if called is None else type(called).__name__
            self._refuse(node, f"no bound is known for {kind}", _CURE)
            return
        self._add(node, operation, tuple(self.place[arg] for arg in _tensors(node) if arg in self.place))

    def _overwrites_what_is_read_again(self, node: fx.Node) -> bool:
        """Whether an operation in place changes a tensor, or a view of one, that has another reader."""
        if not self._in_place(node):
            return False
        source = node.args[0]
        while isinstance(source, fx.Node):
            if len([user for user in source.users if user not in self.sizes]) > 1:
                return True
            if not self._shares_memory(source):
                return False
            source = source.args[0]
        return False

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.traced.get_submodule(str(node.target)), "inplace", False))
        name = _title(node)
        said = bool(node.kwargs.get("inplace")) or any(arg is True for arg in node.args)  # 1 == True, but says nothing
        return said or name.endswith("_") or name in _IN_PLACE

    def _shares_memory(self, node: fx.Node) -> bool:
        """Whether the output may be its input's own memory."""
        if node.op == "call_module":
            module = self.traced.get_submodule(str(node.target))
            alike = isinstance(module, nn.Flatten | nn.Identity | nn.modules.dropout._DropoutNd)
            return alike or self._in_place(node)
        return node.op != "placeholder" and (_title(node) in ("flatten", "view", "reshape") or self._in_place(node))

    def _of_function(self, node: fx.Node) -> Operation | None:
        target, args = node.target, node.args
        if node.op == "call_function" and target not in _FUNCTIONS:
            return None
        name = _title(node).rstrip("_")
        if name == "relu":
            return Bent(0.0)
        if name == "leaky_relu":
            slope = args[1] if len(args) > 1 else node.kwargs.get("negative_slope", 0.01)
            return _bent(slope)
        if name in ("sigmoid", "tanh"):
            return Rising(torch.sigmoid if name == "sigmoid" else torch.tanh)
        if name in ("flatten", "view", "reshape"):
            return _reshaped(node)
        if name in ("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "div"):
            return self._arithmetic(name.removeprefix("i"), node)
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
    if (isinstance(module, nn.ELU) and module.alpha < 0) or (isinstance(module, nn.Softplus) and module.beta <= 0):
        return None  # it falls somewhere
    return Rising(RISING[type(module)](module)) if type(module) in RISING else None


def _bent(slope: Any) -> Operation | None:
    return Bent(float(slope)) if isinstance(slope, int | float) and 0 <= slope < 1 else None


def _reshaped(node: fx.Node) -> Operation | None:
    """flatten(1), and view or reshape to (N, -1); the batch dimension must stay."""
    rest: Sequence[Any] = node.args[1:]
    if _title(node) == "flatten":
        start = rest[0] if rest else node.kwargs.get("start_dim", 0)
        end = rest[1] if len(rest) > 1 else node.kwargs.get("end_dim", -1)
        return Reshaped(lambda x: x.flatten(1)) if (start, end) == (1, -1) else None
    shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    rows = bool(shape) and (shape[0] == -1 or _is_row_count(shape[0]))
    if len(shape) == 2 and shape[1] == -1 and (rows or isinstance(shape[0], int)):
        return Reshaped(lambda x: x.flatten(1))
    fixed = list(shape[1:])
    if rows and all(isinstance(size, int) and size > 0 for size in fixed):
        return Reshaped(lambda x: _viewed(x, fixed))
    return None


def _viewed(x: Tensor, shape: list[int]) -> Tensor:
    if x[:1].numel() != math.prod(shape) * len(x[:1]):
        what = f"Expected a view that keeps the rows apart, got shape={(-1, *shape)} for rows of {tuple(x.shape[1:])}."
        raise IncompatibleModel(f"{what} Keep the first dimension.")
    return x.reshape(len(x), *shape)


def _is_row_count(node: Any) -> bool:
    """x.size(0), x.shape[0], and the x.shape before it."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method":
        return node.target == "size" and node.args[1:] == (0,)
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] == "shape" and all(_is_row_count(user) for user in node.users)
    shape = node.args[0] if node.args else None
    from_shape = isinstance(shape, fx.Node) and shape.target is getattr and shape.args[1] == "shape"
    return bool(node.target is operator.getitem and from_shape and node.args[1] == 0)


def _changed_from_outside(model: nn.Module) -> list[Offender]:
    """Layers that a trace would read wrongly: hooks, and a forward put on the object."""
    cure = "Remove the hooks, or write what they do as a layer"
    shared = torch.nn.modules.module
    found = [Offender("", "hooks on all modules", cure)] if (
        shared._global_forward_hooks or shared._global_forward_pre_hooks
    ) else []  # fmt: skip
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            found.append(Offender(path, "forward hooks can change its values", cure))
        if "forward" in vars(module):
            found.append(Offender(path, "its forward was replaced on the object", "Write it as a class"))
    return found


def _tensors(node: fx.Node) -> list[fx.Node]:
    """Arguments that are nodes, in order, repeated ones too (x + x)."""
    return [arg for arg in node.args if isinstance(arg, fx.Node)]


def _reader_of(traced: fx.GraphModule, path: str) -> Callable[[], Tensor]:
    """The parameter or buffer behind a path, read when it is used."""
    return lambda: operator.attrgetter(path)(traced)


def _title(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
