"""Which model a guard was calibrated for, whatever is wrapped round it: a digest of structure and of weights."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import refuse
from aidefend._core.modules import Model, find_module
from aidefend._core.storage import canonical_json
from aidefend.validate.purify import PurifiedModel

_REPLICAS = (nn.parallel.DistributedDataParallel, nn.parallel.DataParallel)


def served(model: Model) -> Model:
    """What a guard runs: the module inside a replica of data parallelism, or the model itself.

    A replica adds collective calls (of buffers, in every pass), for which the other processes would have to answer as
    many requests. A replica that was compiled as a whole is served without compilation: compile what is inside it.
    """
    if isinstance(model, _REPLICAS):
        return served(model.module)
    inner = getattr(model, "_orig_mod", None)
    return served(inner) if isinstance(inner, _REPLICAS) else model


def unwrapped(model: Model) -> Model:
    """The module that `torch.compile` and data parallelism were applied to, or the model itself."""
    inner = _inside(model)
    return model if inner is None else unwrapped(inner)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by the names that they have where nothing is wrapped; wrappers are left out."""
    raw = dict(model.named_modules())
    wrappers = {name for name, module in raw.items() if _inside(module) is not None}
    return {_plain(name, wrappers): module for name, module in raw.items() if name not in wrappers}


def layer_of(model: Model, name: str | None) -> nn.Module | None:
    """The module with this plain name; None without a name, and for a plain callable."""
    inner = unwrapped(model)
    if name is None or not isinstance(inner, nn.Module):
        return None
    return find_module(inner, plain_modules(inner).get(name, name))


def identify(model: Model) -> dict[str, str]:
    """SHA-256 of the structure (module names and types; names, dtypes and shapes of the state) and of the weights.

    The steps of a `PurifiedModel` are part of the structure.

    A compiled model and a replica have the identity of the model inside. A plain callable has none: both are empty.
    Nor has frozen TorchScript weights of its own: they are constants of its code.
    """
    inner = unwrapped(model)
    if not isinstance(inner, nn.Module):
        return {"structure": "", "weights": ""}
    modules = [
        [name, type(module).__qualname__, *(module.settings if isinstance(module, PurifiedModel) else ())]
        for name, module in plain_modules(inner).items()
    ]
    wrappers = {name for name, module in inner.named_modules() if _inside(module) is not None}
    state = {
        _plain(name, wrappers) + part: array
        for name, value in inner.state_dict().items()
        for part, array in _arrays(value)
    }
    entries = [[name, str(value.dtype), list(value.shape)] for name, value in state.items()]
    structure = hashlib.sha256(canonical_json([modules, entries]).encode())
    weights = hashlib.sha256(structure.digest())
    for value in state.values():
        weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"structure": structure.hexdigest(), "weights": weights.hexdigest()}


def _arrays(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of an entry of a state: a quantised layer packs its own into tuples."""
    if isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from _arrays(part, f"{place}/{i}")
    elif isinstance(value, Tensor) and value.is_quantized:
        by_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
        scale = value.q_per_channel_scales() if by_channel else torch.tensor(value.q_scale(), dtype=torch.float64)
        zero = value.q_per_channel_zero_points() if by_channel else torch.tensor(value.q_zero_point())
        yield from ((f"{place}/{i}", part) for i, part in enumerate((value.int_repr(), scale, zero)))
    elif isinstance(value, Tensor):
        yield place, value


def check_identity(model: Model, known: Mapping[str, str]) -> None:
    """Refuse a model that is not the one that was calibrated, and say in what it differs."""
    found = identify(model)
    if found["structure"] != known["structure"]:
        rule = "the model that the guard was calibrated for (its modules or shapes differ)"
        raise refuse(rule, "model", found["structure"][:16], "Load the guard with that model, or calibrate again")
    if found["weights"] != known["weights"]:
        rule = "the weights that the guard was calibrated for (the structure is the same)"
        raise refuse(rule, "model", found["weights"][:16], "Load those weights first, or calibrate again")


def _inside(model: Any) -> Any:
    """What a wrapper wraps, or None."""
    inner = model.module if isinstance(model, _REPLICAS) else getattr(model, "_orig_mod", None)
    return inner if callable(inner) else None


def _plain(name: str, wrappers: set[str]) -> str:
    """A dotted name without the steps that lead into a wrapper."""
    found, raw = [], ""
    for step in name.split("."):
        if raw not in wrappers:
            found.append(step)
        raw = f"{raw}.{step}" if raw else step
    return ".".join(found)
