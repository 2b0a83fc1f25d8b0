"""Loading weights from files that may be hostile."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from aidefend._core.checks import refuse
from aidefend.artifacts.files import read_file, unsafe
from aidefend.artifacts.formats import SAFETENSORS, ZIP, check_extension, describe_unreadable, refuse_format, sniff
from aidefend.artifacts.limits import Limits
from aidefend.artifacts.safetensors_format import load_layout, read_layout
from aidefend.artifacts.tensor_checks import check_expected, check_layout, check_planned, check_values
from aidefend.artifacts.torch_checkpoint import load_checkpoint, read_checkpoint

if TYPE_CHECKING:
    from aidefend.artifacts.manifest import Manifest


def safe_load(
    path: str | os.PathLike[str],
    expect: "nn.Module | Mapping[str, Any] | None" = None,
    manifest: "Manifest | None" = None,
    limits: Limits | None = None,
    *,
    key: Any = None,
) -> dict[str, Any]:
    """Load the weights of a safetensors file or of a torch.save checkpoint, or refuse the file.

    Guarantee: nothing that the file names is imported, called or executed, and no other loader is tried. The file is
        opened once, without following links; the bytes that are hashed are the bytes that are parsed. A torch
        checkpoint must pass strict archive checks and a closed list of exact names before torch parses it with
        weights_only=True, and what torch builds must equal, byte for byte, what the checks saw. Every tensor is on the
        CPU, dense, inside its storage, and holds no element twice, so sizes are bounded by the file. Without
        `manifest` nothing is said about who made the weights or whether a bit was flipped; with or without it, nothing
        about backdoors in the weights. Voided by a flaw in the interpreter or in torch's own tensor code, and by an
        attacker who can already write into this process.
    Args:
        path: A file. Its content decides its format; an extension that claims another format is refused.
        expect: What must be in it, exactly: a module, its state_dict(), or {name: tensor | shape | (shape, dtype) |
            type | nested mapping}.
        manifest: A Manifest that lists this file; its digest must match the bytes read, before they are parsed.
        limits: Bounds; default Limits().
        key: The trusted key of a signed manifest: Ed25519 public key, or the bytes of an HMAC key.
    Returns: A dict with text keys: tensors, or for whole checkpoints nested dicts, lists, tuples, sets, numbers, texts,
        bytes, dtypes, sizes and devices. Tied tensors of torch checkpoints share memory, as saved.
    Raises: UnsafeArtifact: the file is refused; the message names the reason and the safe way out.
        ConfigurationError: an argument is malformed.
    Cost: Twice the file in memory; one pass each for checksums, comparison and finiteness, and for hashing with a
        manifest.
    Source: PyTorch's serialization notes; safetensors' format description. Differs: limits, no gaps, no duplicates.
    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(torch.nn.Linear(2, 1).state_dict(), f"{folder}/model.pt")
        ...     sorted(safe_load(f"{folder}/model.pt", expect=torch.nn.Linear(2, 1)))
        ['bias', 'weight']
    """
    limits = check_arguments(path, limits)
    _check_requests(expect, manifest, key)
    content = read_file(path, limits)
    if manifest is not None:
        manifest.check_content(path, len(content.data), content.sha256, key)
    state = load_bytes(content.data, Path(path).name, limits)
    if expect is not None:
        check_expected(expect, state)
    return state


def load_bytes(data: bytes, name: str, limits: Limits) -> dict[str, Any]:
    """The state dict in these bytes; `name` serves the extension check and the messages."""
    found = sniff(data)
    check_extension(name, found)
    if found == SAFETENSORS:
        layout = read_layout(data, limits)
        check_layout(layout, limits)
        state: Any = load_layout(data, layout)
    elif found == ZIP:
        checkpoint = read_checkpoint(data, limits, name)
        check_top(checkpoint.plan)
        stored = sum(len(part) for part in checkpoint.storages.values())
        check_planned(checkpoint.plan, stored, limits)
        state = load_checkpoint(data, checkpoint, limits)
    else:
        raise refuse_format(describe_unreadable(name, found), name, data)
    check_values(state, limits)
    checked: dict[str, Any] = state
    return checked


def _check_requests(expect: Any, manifest: Any, key: Any) -> None:
    if expect is not None and not isinstance(expect, nn.Module | Mapping):
        form = "Pass a module, its state_dict(), or {name: (shape, dtype)}"
        raise refuse("expect to be a module or a mapping", "expect", type(expect).__name__, form)
    cure = "Pass manifest=Manifest.load(...) or Manifest.of(...)"
    if manifest is None and key is not None:
        raise refuse("a manifest with the key", "manifest", None, cure)
    if manifest is not None and not hasattr(manifest, "check_content"):
        raise refuse("manifest to be a Manifest", "manifest", manifest, cure)


def check_top(plan: Any) -> None:
    """A state dict has text keys; bare tensors, lists and storages have nothing to check them by."""
    if not isinstance(plan, dict) or not all(type(name) is str for name in plan):
        cure = 'Save a dict with names, for example torch.save({"weights": tensor}, path)'
        raise unsafe("a dict with text keys", "content", type(plan).__name__, cure)


def check_arguments(path: Any, limits: Any) -> Limits:
    """The path and the limits of a public call."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise refuse("path to be a file name", "path", path, "Pass a str or a Path, not an open file or bytes")
    if limits is not None and not isinstance(limits, Limits):
        raise refuse("limits to be Limits(...)", "limits", limits, "Pass artifacts.Limits(...)")
    return limits or Limits()
