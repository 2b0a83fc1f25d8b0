"""One file with weights, optimizer state and the steps that are spent: safetensors, never a pickle, never a stream."""

import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_path, expected, refuse
from aidefend._core.errors import PrivacyError
from aidefend._core.storage import atomic_path, canonical_json

_SCHEMA = "aidefend.private-run/1"


def save_run(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write everything, or nothing."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": _own(value, name) for name, value in model.state_dict().items()}
    state = optimizer.state_dict()
    numbers: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = _own(value, name)
            else:
                numbers[f"{index}.{name}"] = _json(value, name)
    groups = [{key: _json(value, key) for key, value in group.items()} for group in state["param_groups"]]
    header = {"schema": _SCHEMA, "facts": facts, "numbers": numbers, "groups": groups}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"aidefend": canonical_json(header)})


def read_facts(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and all tensors of a saved run."""
    from safetensors import SafetensorError, safe_open

    file = check_path(path)
    if not file.is_file():
        raise refuse("path to be a file of private.save", "path", str(path), "Check the path")
    try:
        with safe_open(str(file), framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get("aidefend", "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, OSError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(header, dict) or header.get("schema") != _SCHEMA:
        raise _damaged(path, "no header of a private run")
    return header, tensors


def load_run(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, header: Any, tensors: Any
) -> None:
    """Put weights and optimizer state back; the model is untouched if anything does not fit."""
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    now = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    if now != {name: (value.shape, value.dtype) for name, value in weights.items()}:
        raise _damaged(path, "weights of another model")
    try:
        state = _optimizer_state(optimizer, header, tensors)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise _damaged(path, "state of another optimizer") from error
    optimizer.load_state_dict(state)
    model.load_state_dict(weights)


def _optimizer_state(optimizer: torch.optim.Optimizer, header: Any, tensors: Any) -> dict[str, Any]:
    current = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in header["groups"]] != [group["params"] for group in current]:
        raise ValueError("parameter groups")
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".", 2)
            state.setdefault(int(index), {})[entry] = value
    for name, value in header["numbers"].items():
        index, entry = name.split(".", 1)
        state.setdefault(int(index), {})[entry] = value
    groups = [_like(saved, now) for saved, now in zip(header["groups"], current, strict=True)]
    return {"state": state, "param_groups": groups}


def _like(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples and no tensors: they become again what the optimizer has."""
    group = dict(saved)
    for key, value in saved.items():
        if isinstance(now.get(key), tuple):
            group[key] = tuple(value)
        elif isinstance(now.get(key), Tensor):
            group[key] = torch.as_tensor(value, dtype=now[key].dtype)
    return group


def _own(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        cure = "Keep extra state of modules in tensors"
        raise refuse("state of tensors", name, type(value).__name__, cure)
    return value.detach().cpu().contiguous().clone()


def _json(value: Any, name: str) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_json(item, name) for item in value]
    raise refuse("optimizer settings of numbers and texts", name, type(value).__name__, "Use a plain torch optimizer")


def _damaged(path: str | os.PathLike[str], found: str) -> PrivacyError:
    cure = "Resume with the model, optimizer and configuration that wrote it"
    return PrivacyError(expected("a file of private.save for this run", "path", f"{path}: {found}", cure))
