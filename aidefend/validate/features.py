"""One forward pass that gives logits and features, safe when several threads use the same model."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aidefend._core.errors import IncompatibleModel, Offender
from aidefend._core.modules import Model
from aidefend.validate.tasks import Task, check_answers


class Outputs(NamedTuple):
    """Logits (N, K) as the model gave them and features (N, d) of the same pass, gradients attached.

    Of a regression model, `logits` are its numbers, (N,) or (N, K): for clients, never for a detector.
    """

    logits: Tensor
    features: Tensor


def healthy_rows(features: Tensor, answers: Tensor) -> Tensor:
    """(N,) bool: every feature (N, d) and every answer (N,) or (N, K) of the row is finite."""
    return torch.isfinite(features).all(dim=1) & torch.isfinite(answers.reshape(len(answers), -1)).all(dim=1)


class PassCapture:
    """Reads the input of one module during the passes that ask for it, and holds nothing between them.

    A hook belongs to the model, a pass to a thread: each pass records under its own thread's number, so that passes
    that run at the same time do not see each other's features.
    """

    def __init__(self, model: Model, layer: nn.Module | None, task: Task = "classification") -> None:
        self.task: Task = task
        self._passes: dict[int, list[Tensor]] = {}
        hook = torch.compiler.disable(self._record) if _is_compiled(model) else self._record
        self._handle = None if layer is None else _hooked(layer, hook)

    def _record(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        passes = self._passes.get(threading.get_ident())
        if passes is not None and inputs and isinstance(inputs[0], Tensor):
            passes.append(inputs[0])

    @contextmanager
    def _recording(self) -> Iterator[list[Tensor]]:
        thread = threading.get_ident()
        outer = self._passes.get(thread)
        found: list[Tensor] = []
        self._passes[thread] = found
        try:
            yield found
        finally:
            if outer is None:
                self._passes.pop(thread, None)
            else:
                self._passes[thread] = outer

    def run(self, model: Model, x: Tensor) -> Outputs:
        """One pass over x (N, ...), N >= 1.

        Raises: IncompatibleModel: the layer did not run, or gave no row of features for each row of x.
            ConfigurationError: the outputs are not logits (N, K >= 2), or not numbers.
        """
        with self._recording() as found:
            logits = check_answers(model(x), len(x), self.task)
        if self._handle is None:
            return Outputs(logits, logits.new_zeros(len(x), 0))
        if not found:
            cure = "Name another layer; if the model is compiled and ran before, call torch.compiler.reset() first"
            raise IncompatibleModel(_EXPECTED, [Offender("", "the layer did not run where hooks see it", cure)])
        features = found[-1]
        if features.ndim < 2 or len(features) != len(x) or not features.is_floating_point():
            reason = f"the layer's input has shape {tuple(features.shape)} for {len(x)} rows"
            raise IncompatibleModel(_EXPECTED, [Offender("", reason, "Name a layer whose input is (N, d)")])
        return Outputs(logits, features.flatten(1))

    def close(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()


_EXPECTED = "Expected one row of features for each sample from the chosen layer."


def _hooked(layer: nn.Module, hook: Any) -> Any:
    try:
        return layer.register_forward_pre_hook(hook)
    except RuntimeError as error:  # TorchScript
        cure = "Guard the module before it is scripted, or use detectors of logits and inputs"
        raise IncompatibleModel("Expected a layer that takes a hook.", [Offender("", f"{error}", cure)]) from error


def _is_compiled(model: Model) -> bool:
    """Whether any part was compiled: its graph must break at the hook. Deciding this late keeps dynamo unloaded."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules)
