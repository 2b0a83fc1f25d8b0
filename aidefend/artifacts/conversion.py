"""Converting checkpoints to safetensors, in a process that can do nothing else."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from aidefend._core.checks import check_choice, check_kind, check_number, check_path, refuse
from aidefend._core.errors import UnsafeArtifact
from aidefend._core.storage import atomic_path
from aidefend.artifacts.files import read_file, unsafe
from aidefend.artifacts.formats import SAFETENSORS, ZIP, check_extension, describe_unreadable, refuse_format, sniff
from aidefend.artifacts.limits import GIB, Limits
from aidefend.artifacts.loading import check_arguments, safe_load
from aidefend.artifacts.safetensors_format import storable
from aidefend.artifacts.tensor_plan import TensorPlan
from aidefend.artifacts.torch_checkpoint import read_checkpoint

_WORKER = Path(__file__).with_name("conversion_worker.py")
_BASE_MEMORY = 8 * GIB
_MAX_ERROR = 4000


def convert(
    path: str | os.PathLike[str],
    to: Literal["safetensors"] = "safetensors",
    output: str | os.PathLike[str] | None = None,
    *,
    entry: str | None = None,
    limits: Limits | None = None,
    timeout: float = 300.0,
) -> Path:
    """Write the tensors of a torch.save checkpoint as safetensors.

    Guarantee: as `safe_load`; and torch parses the file only in a fresh interpreter without environment, arguments,
        standard input beyond the file's bytes, or the right to open a file, a socket or a process, with limits on
        memory, processor time and output. What it wrote is read back here with `safe_load` against the names, shapes
        and types that the checks saw, before it appears under its name.
    Args:
        path: A checkpoint of torch.save (torch 1.6 or later). Legacy pickles are refused; the message says how to save
            them again in a sandbox.
        to: "safetensors".
        output: Where to write; default the same name with .safetensors. An existing file is replaced, never a link.
        entry: For checkpoints with several parts, the entry that holds the state dict, for example "model".
        limits: Bounds; default Limits().
        timeout: Seconds that the conversion may take.
    Returns: The path written. Tied tensors are written once for each name; parameters become plain tensors; the order
        of names is kept; `_metadata` (layer versions) is not.
    Raises: UnsafeArtifact: the file is refused, holds more than a flat dict of tensors, or the process was stopped.
    Cost: One interpreter with torch (1-3 s), up to six times the file in memory.
    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(torch.nn.Linear(2, 1).state_dict(), f"{folder}/model.pt")
        ...     convert(f"{folder}/model.pt").name
        'model.safetensors'
    """
    limits = check_arguments(path, limits)
    check_choice(to, ("safetensors",), "to")
    check_number(timeout, "timeout", 0, 86_400, open_low=True)
    check_kind(entry, (str, type(None)), "entry", "Name the entry that holds the tensors, such as 'model'")
    source = Path(path)
    target = check_path(output, "output") if output is not None else source.with_suffix(".safetensors")
    if target.is_symlink() or target.is_dir() or target.absolute() == source.absolute():
        raise refuse("output to be a file of its own", "output", str(target), "Pass another path")
    data = read_file(source, limits).data
    wanted = _plan_flat(data, source.name, entry, limits)
    with atomic_path(target) as temporary:
        _run_worker(data, temporary, {"name": source.name, "entry": entry}, limits, timeout)
        safe_load(temporary, expect=wanted, limits=limits)
    return target


def _plan_flat(data: bytes, name: str, entry: str | None, limits: Limits) -> dict[str, Any]:
    """Names, shapes and types of the tensors to write; refuses what safetensors cannot hold."""
    found = sniff(data)
    check_extension(name, found)
    if found == SAFETENSORS:
        raise refuse("a checkpoint of torch.save", "path", f"{name} (safetensors)", "It needs no conversion")
    if found != ZIP:
        raise refuse_format(describe_unreadable(name, found), name, data)
    plan = read_checkpoint(data, limits, name).plan
    return {key: (tensor.shape, tensor.dtype) for key, tensor in pick_entry(plan, entry, TensorPlan).items()}


def pick_entry(state: Any, entry: str | None, kind: type[Any]) -> dict[str, Any]:
    """The flat dict of tensors in a checkpoint."""
    part = state
    if entry is not None:
        if not isinstance(state, dict) or entry not in state:
            names = list(state)[:10] if isinstance(state, dict) else type(state).__name__
            raise unsafe(f"an entry {entry!r}", "entries", names, "Name one of these with entry=")
        part = state[entry]
    if not isinstance(part, dict):
        raise unsafe("a dict of tensors", "content", type(part).__name__, "Save a state dict")
    for name, tensor in part.items():
        if type(name) is not str or not (isinstance(tensor, kind) and storable(tensor.dtype)):
            shown = f"{name}: {getattr(tensor, 'dtype', type(tensor).__name__)}"
            cure = 'Name the part to convert, for example entry="model", or save the state dict alone'
            raise unsafe("texts as names and tensors of a safetensors type", "item", shown, cure)
    return part


def _run_worker(data: bytes, output: Path, job: dict[str, Any], limits: Limits, timeout: float) -> None:
    order = {
        **job,
        "paths": [os.path.abspath(item) for item in sys.path],  # noqa: PTH100  # "" is the current folder
        "memory": _BASE_MEMORY + 6 * len(data),
        "seconds": int(timeout) + 1,
        "bytes": limits.max_file_bytes,
        "limits": _limits_as_json(limits),
    }
    command = [sys.executable, "-I", "-B", str(_WORKER), json.dumps(order)]
    with output.open("wb") as file, tempfile.TemporaryFile() as errors:
        try:
            code = subprocess.run(  # noqa: S603  # our own interpreter and file; no shell
                command, input=data, stdout=file, stderr=errors, env={}, cwd="/", timeout=timeout, check=False
            ).returncode
        except subprocess.TimeoutExpired as error:
            rule = f"a conversion within {timeout} s"
            raise unsafe(rule, "time", f"> {timeout} s", "Raise timeout= if the file is large") from error
        if code:
            errors.seek(0)
            raise _worker_error(code, errors.read(_MAX_ERROR).decode("utf-8", "replace"))


def _worker_error(code: int, text: str) -> UnsafeArtifact:
    """The refusal of the worker as its own words; anything else as the way in which it ended."""
    if code == 3:
        return UnsafeArtifact(text.strip())
    ending = f"signal {-code}" if code < 0 else f"exit code {code}"
    found = f"{ending} {text.strip()[-200:]}".strip()
    return unsafe("a conversion that finishes", "worker", found, "It ran out of memory or time, or torch failed")


def _limits_as_json(limits: Limits) -> dict[str, Any]:
    names = ("max_file_bytes", "max_total_bytes", "max_header_bytes", "max_members", "max_items", "finite")
    numbers = {name: getattr(limits, name) for name in (*names, "max_compression_ratio", "max_view_ratio")}
    dtypes = None if limits.dtypes is None else sorted(str(dtype).removeprefix("torch.") for dtype in limits.dtypes)
    return {**numbers, "min_torch": list(limits.min_torch), "dtypes": dtypes}
