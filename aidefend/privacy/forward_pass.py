"""One forward pass of the private model, as the backward pass needs it: which layers ran, on what, and where."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from aidefend.privacy.decomposed import Product
from aidefend.privacy.layer_gradients import Call, Summed, summed
from aidefend.privacy.step_book import Ticket, refused


class Tap:
    """One run of one layer inside a forward pass."""

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        output: Tensor,
        product: Product | None = None,
        by_row: tuple[bool, ...] | None = None,
    ) -> None:
        self.path, self.edge, self._product, self._by_row = path, get_gradient_edge(output), product, by_row
        self._layer: Any = layer
        self._inputs = tuple(value.detach() if isinstance(value, Tensor) else value for value in inputs)
        self._versions = self._now()
        self._summed: Summed | None = None

    def arrive(self, gradient: Tensor) -> None:
        """The gradient of a normalisation's output is there: it is done with now, its inputs are not kept."""
        call = self.call(gradient)
        if isinstance(call, Call):
            self._summed, self._inputs = summed(self._layer, call), ()

    def call(self, gradient: Tensor) -> Call | Summed:
        """The run with the gradient of its output; refuses inputs that have changed since."""
        if self._summed is not None:
            return self._summed
        if self._now() != self._versions:
            cure = "Replace the in-place operation that follows the use of this tensor"
            rule = f"inputs of {self.path or 'the model'} unchanged until backward"
            raise refused(rule, "versions", self._now(), cure)
        return Call(self._inputs, gradient.detach(), self._product, self._by_row)

    @property
    def lengths(self) -> tuple[int | None, ...]:
        """Of its inputs, where they are tensors."""
        return lengths_of(self._inputs)

    def _now(self) -> tuple[int, ...]:
        return tuple(value._version for value in self._inputs if isinstance(value, Tensor))


class Deferred(NamedTuple):
    """A pass that ran without a graph, in blocks of rows; the backward pass runs each block again."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    streams: list[tuple[slice, Any]]
    output: Tensor
    versions: tuple[int, ...]
    autocast: tuple[bool, torch.dtype]

    def check(self) -> None:
        """Refuse inputs that have changed since the first run."""
        if versions_of(self.args, self.kwargs) != self.versions:
            cure = "Leave the inputs of private.model as they are until backward"
            raise refused("inputs of the model unchanged until backward", "inputs", "changed in place", cure)


class ForwardPass:
    """One call of the private model while a batch is open."""

    def __init__(self, ticket: Ticket, rows: int) -> None:
        self.ticket, self.rows = ticket, rows
        self.taps: list[Tap] = []
        self.deferred: Deferred | None = None
        self.consumed: GradientEdge | None = None

    def consume(self) -> None:
        """Another backward pass ran through: give the activations back, keep one place to notice a second use."""
        if self.taps:
            self.consumed = self.taps[-1].edge
            self.taps = []

    @property
    def edges(self) -> list[Any]:
        """Where the gradients of this pass arise."""
        kept: list[Any] = [tap.edge for tap in self.taps]
        if self.deferred is not None:
            kept.append(self.deferred.output)
        return kept


def versions_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """How often each tensor among the arguments of a model was changed in place."""
    return tuple(value._version for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def lengths_of(inputs: tuple[Any, ...]) -> tuple[int | None, ...]:
    """Of the inputs of a layer, None for what is no tensor or has no dimension."""
    return tuple(len(value) if isinstance(value, Tensor) and value.ndim else None for value in inputs)
