"""Use a model without leaving a trace, and read the features inside it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aidefend._core.checks import expected, refuse
from aidefend._core.errors import AidefendError, IncompatibleModel, Offender

Model = Callable[..., Any]
_HOOKS = tuple(
    name
    for name in vars(nn.Module())
    if "hooks" in name and not name.startswith(("_state_dict", "_load_state_dict", "_non_persistent"))
)


@contextmanager
def preserve(model: Model) -> Iterator[None]:
    """Restore on exit, also after an exception, everything a forward, a backward or a mode switch can change.

    Guarantee: each module's own train/eval flag; each parameter's requires_grad and .grad (the same object with the
        same content, or None); each buffer (the same object, content and key); hooks; the random streams of torch (CPU
        and CUDA), numpy and random. Parameter values are not touched. For a plain callable the streams alone.
    Args:
        model: A module, or any callable. Inside the context every .grad is None.
    Cost: One copy of the buffers; no pass through the model.
    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> with preserve(model):
        ...     _ = model(torch.ones(4, 2)).sum().backward()
        >>> model[1].num_batches_tracked.item(), model[0].weight.grad
        (0, None)
    """
    modules = _modules(model)
    restore = [
        _keep_parameters(modules),
        _keep_buffers(modules),
        _keep_flags_and_hooks(modules),
        _keep_random_streams(),
    ]
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter.grad = None
    try:
        yield
    finally:
        for undo in restore:
            undo()


def freeze(model: Model) -> None:
    """Inside `preserve`: no parameter asks for a gradient, so that a backward pass reaches the input only."""
    for module in _modules(model):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def evaluate(model: Model) -> None:
    """Inside `preserve`: every module in eval mode."""
    if isinstance(model, nn.Module):
        model.eval()


@contextmanager
def naming_the_model(x: Tensor) -> Iterator[None]:
    """Around a pass over x: turn whatever a model raises into an error that names it and keeps the cause."""
    try:
        yield
    except (AidefendError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found, cure = f"{type(error).__name__}: {error}", f"Call model(x) on rows of shape {tuple(x.shape)}"
        raise IncompatibleModel(expected("a model that runs on the data", "model", found, cure)) from error


def _modules(model: Model) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _keep_parameters(modules: list[nn.Module]) -> Callable[[], None]:
    unique = {id(p): p for module in modules for p in module.parameters(recurse=False)}
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in unique.values()]

    def undo() -> None:
        for parameter, requires_grad, grad in kept:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = grad

    return undo


def _keep_buffers(modules: list[nn.Module]) -> Callable[[], None]:
    kept = [(module, dict(module._buffers)) for module in modules]
    unique = {id(b): b for _, buffers in kept for b in buffers.values() if b is not None}
    content = [(buffer, buffer.detach().clone()) for buffer in unique.values()]

    def undo() -> None:
        for module, buffers in kept:
            if isinstance(module._buffers, dict):  # a TorchScript module has a fixed set of them
                module._buffers.clear()
                module._buffers.update(buffers)
        for buffer, value in content:
            if buffer.shape != value.shape:
                buffer.data.resize_(value.shape)
            buffer.data.copy_(value)  # .data: a graph of the user's that waits for its backward pass stays valid

    return undo


def _keep_flags_and_hooks(modules: list[nn.Module]) -> Callable[[], None]:
    kept = [
        (
            module,
            getattr(module, "training", None),  # a frozen TorchScript module has no such flag
            {name: dict(getattr(module, name)) for name in _HOOKS if getattr(module, name)},
        )
        for module in modules
    ]

    def undo() -> None:
        for module, training, hooks in kept:
            if training is not None:
                module.training = training
            for name in _HOOKS:
                if getattr(module, name) or name in hooks:
                    getattr(module, name).clear()
                    getattr(module, name).update(hooks.get(name, {}))

    return undo


def _keep_random_streams() -> Callable[[], None]:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def undo() -> None:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002 - the user's own legacy stream is what is put back
        random.setstate(python_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return undo


def find_module(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    """The submodule with this dotted name, or the given one if it belongs to the model."""
    named: dict[str, nn.Module] = dict(model.named_modules())
    if isinstance(layer, str) and layer in named:
        return named[layer]
    if isinstance(layer, nn.Module) and any(layer is module for module in named.values()):
        return layer
    names = [name for name in named if name][:20]
    raise refuse(f"layer to be a module of the model, such as {names}", "layer", layer, "Use a name of named_modules()")


def last_linear(model: nn.Module, x: Tensor) -> nn.Module:
    """The `nn.Linear` that runs last on x (by execution, not by definition): its input is the penultimate feature.

    Raises: IncompatibleModel: the model runs no Linear; name the layer yourself.
    """
    order: list[nn.Module] = []
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if linears:  # else there is nothing to find, nor a pass that a form without modules could refuse
        with preserve(model), torch.no_grad():
            for module in linears:
                module.register_forward_pre_hook(lambda module, _: order.append(module))
            model.eval()
            with naming_the_model(x[:1]):
                model(x[:1])
    if not order:
        cure = "Pass layer= with the name of the module whose input is the feature vector; TorchScript takes no hooks"
        raise IncompatibleModel(
            "Expected a model whose last step is an nn.Linear.", [Offender("", "no Linear ran", cure)]
        )
    return order[-1]


class InputCapture:
    """Keeps the input of one module during forward passes: `.features` (N, d) of the latest pass, gradient attached."""

    def __init__(self, module: nn.Module) -> None:
        self.features: Tensor | None = None
        self._handle = module.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.features = inputs[0].flatten(1)

    def take(self) -> Tensor:
        """The features of the latest pass; raises if the module did not run."""
        if self.features is None:
            reason = Offender("", "the chosen layer did not run in the forward pass", "Pass another layer=")
            raise IncompatibleModel("Expected features from the chosen layer.", [reason])
        features, self.features = self.features, None
        return features

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def __enter__(self) -> "InputCapture":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def device_of(model: Model, default: torch.device | str = "cpu") -> torch.device:
    """The device of the first parameter or buffer."""
    if isinstance(model, nn.Module):
        for tensor in [*model.parameters(), *model.buffers()][:1]:
            return tensor.device
    return torch.device(default)


def training_layers(model: Model) -> list[Offender]:
    """Modules in train mode whose output then depends on batch mates or on chance (BatchNorm, dropout, their kin)."""
    if not isinstance(model, nn.Module):
        return []
    found = [
        (name, _kind(module))
        for name, module in model.named_modules()
        if getattr(module, "training", False) and _matters(module)
    ]
    return [Offender(name, f"{kind} is in train mode", "Call model.eval() first") for name, kind in found]


def _kind(module: nn.Module) -> str:
    """The name of its class; of a TorchScript module that of the class that was scripted or traced."""
    return str(getattr(module, "original_name", type(module).__name__))


def _matters(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return any(word in _kind(module) for word in ("BatchNorm", "Dropout", "InstanceNorm"))
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def looks_like_probabilities(outputs: Tensor) -> bool:
    """Whether every row is non-negative and sums to one: a softmax was applied, which starves gradients."""
    if len(outputs) == 0:
        return False
    wide = outputs.detach().double()
    return bool((wide >= 0).all()) and bool(((wide.sum(dim=1) - 1).abs() < 1e-3).all())
