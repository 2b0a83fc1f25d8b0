"""Which model a guard was calibrated for: a digest of its structure and one of its weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from aidefend._core.checks import refuse
from aidefend._core.modules import Model
from aidefend._core.storage import canonical_json

_COMPILED = "_orig_mod."


def uncompiled(model: Model) -> Model:
    """The module inside `torch.compile(module)`, or the model itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if callable(inner) else model


def identify(model: Model) -> dict[str, str]:
    """SHA-256 of the structure (module names and types; names, dtypes and shapes of the state) and of the weights.

    A compiled model has the identity of the model inside. A plain callable has none: both are empty.
    """
    inner = uncompiled(model)
    if not isinstance(inner, nn.Module):
        return {"structure": "", "weights": ""}
    modules = [[name.replace(_COMPILED, ""), type(module).__qualname__] for name, module in inner.named_modules()]
    state = {
        name.replace(_COMPILED, ""): value for name, value in inner.state_dict().items() if isinstance(value, Tensor)
    }
    entries = [[name, str(value.dtype), list(value.shape)] for name, value in state.items()]
    structure = hashlib.sha256(canonical_json([modules, entries]).encode())
    weights = hashlib.sha256(structure.digest())
    for value in state.values():
        weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"structure": structure.hexdigest(), "weights": weights.hexdigest()}


def check_identity(model: Model, known: Mapping[str, str]) -> None:
    """Refuse a model that is not the one that was calibrated, and say in what it differs."""
    found = identify(model)
    if found["structure"] != known["structure"]:
        rule = "the model that the guard was calibrated for (its modules or shapes differ)"
        raise refuse(rule, "model", found["structure"][:16], "Load the guard with that model, or calibrate again")
    if found["weights"] != known["weights"]:
        rule = "the weights that the guard was calibrated for (the structure is the same)"
        raise refuse(rule, "model", found["weights"][:16], "Load those weights first, or calibrate again")
