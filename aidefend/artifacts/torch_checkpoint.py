"""Checkpoints of torch.save: planned from the bytes, loaded by torch from the same bytes, compared with the plan."""

import io
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aidefend.artifacts.allowed import Ordered
from aidefend.artifacts.files import shorten, unsafe
from aidefend.artifacts.formats import ZIP, classify_zip, refuse_format
from aidefend.artifacts.limits import Limits
from aidefend.artifacts.pickle_plan import plan_pickle
from aidefend.artifacts.tensor_plan import StoragePlan, TensorPlan
from aidefend.artifacts.zip_archive import open_zip, read_members

_SMALL = {
    "version": re.compile(rb"[0-9]{1,4}\n?"),
    "byteorder": re.compile(rb"little"),
    ".format_version": re.compile(rb"[0-9]{1,4}"),
    ".storage_alignment": re.compile(rb"[1-9][0-9]{0,7}"),
    ".data/serialization_id": re.compile(rb"[0-9]{1,64}"),
}
_DATA = re.compile(r"data/(0|[1-9][0-9]{0,17})")
_BLOCK = 2**24
_ALTERED = "Save it again with torch.save of a current torch, on a little-endian machine"


class Checkpoint(NamedTuple):
    """What a checkpoint describes (TensorPlans in the place of tensors), and its stored bytes by key."""

    plan: Any
    storages: Mapping[str, memoryview]


def read_checkpoint(data: bytes, limits: Limits, path: str = "file") -> Checkpoint:
    """Check the archive, its members and its pickle. Nothing is built."""
    archive = open_zip(data, limits)
    found = classify_zip(archive.names)
    if found != ZIP:
        raise refuse_format(found, path)
    inner = _strip_prefix(read_members(data, archive, limits))
    storages: dict[str, memoryview] = {}
    for name, content in inner.items():
        if match := _DATA.fullmatch(name):
            storages[match[1]] = content
        elif name != "data.pkl":
            _check_small(name, content)
    pickle = inner["data.pkl"]
    if len(pickle) > limits.max_header_bytes:
        cure = "Raise Limits(max_header_bytes=...) if this is right"
        raise unsafe(f"a data.pkl of at most {limits.max_header_bytes} bytes", "bytes", len(pickle), cure)
    plan = plan_pickle(pickle, {key: len(content) for key, content in storages.items()}, limits)
    return Checkpoint(plan, storages)


def load_checkpoint(data: bytes, checkpoint: Checkpoint, limits: Limits) -> Any:
    """Let torch load the same bytes with weights_only=True, and compare what it built with the plan."""
    _check_torch(limits)
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        shown = f"{type(error).__name__}: {str(error)[:200]}"
        raise unsafe("a checkpoint that torch loads with weights_only=True", "torch.load", shown, _ALTERED) from error
    _Comparison(checkpoint.storages).check(checkpoint.plan, loaded)
    return loaded


def _strip_prefix(members: Mapping[str, memoryview]) -> dict[str, memoryview]:
    """Members without the folder that torch puts around them; it must be the same for all."""
    prefixes = {name.partition("/")[0] for name in members}
    if len(prefixes) != 1:
        raise unsafe("one folder around all members", "folders", sorted(prefixes)[:5], _ALTERED)
    return {name.partition("/")[2]: content for name, content in members.items()}


def _check_small(name: str, content: memoryview) -> None:
    pattern = _SMALL.get(name)
    if pattern is None:
        raise unsafe("only the members that torch.save writes", "member", name, _ALTERED)
    if len(content) > 64 or not pattern.fullmatch(bytes(content)):
        raise unsafe(f"{name} as torch.save writes it", name, bytes(content[:64]), _ALTERED)


def _check_torch(limits: Limits) -> None:
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if version < limits.min_torch:
        floor = ".".join(map(str, limits.min_torch))
        cure = "Upgrade torch, or use safetensors, which torch does not parse"
        raise unsafe(f"torch >= {floor} to parse torch checkpoints", "torch", torch.__version__, cure)


class _Comparison:
    """Walks through plan and result together: types, keys, views, shared storages, stored bytes."""

    def __init__(self, storages: Mapping[str, memoryview]) -> None:
        self.storages = storages
        self.places: dict[str, int] = {}

    def check(self, plan: Any, loaded: Any) -> None:
        kind = type(plan)
        if kind is TensorPlan:
            self._check_tensor(plan, loaded)
        elif kind is Ordered:
            _same(OrderedDict, type(loaded))
            self._check_dict(plan, loaded)
            self.check(plan.metadata, getattr(loaded, "_metadata", None))
            _same([] if plan.metadata is None else ["_metadata"], list(vars(loaded)))
        elif kind in (dict, Counter):
            _same(kind, type(loaded))
            self._check_dict(plan, loaded)
        elif kind in (list, tuple):
            _same((kind, len(plan)), (type(loaded), len(loaded)))
            for planned, value in zip(plan, loaded, strict=True):
                self.check(planned, value)
        else:
            _same((kind, _shown(plan)), (type(loaded), _shown(loaded)))

    def _check_dict(self, plan: Mapping[Any, Any], loaded: Mapping[Any, Any]) -> None:
        _same(list(plan), list(loaded))
        for key, planned in plan.items():
            self.check(planned, loaded[key])

    def _check_tensor(self, plan: TensorPlan, loaded: Any) -> None:
        _same(torch.nn.Parameter if plan.parameter else Tensor, type(loaded))
        seen = TensorPlan(
            plan.storage,
            loaded.dtype,
            loaded.storage_offset(),
            tuple(loaded.shape),
            tuple(loaded.stride()),
            loaded.requires_grad,
            loaded.is_conj(),
            loaded.is_neg(),
            plan.parameter,
        )
        _same(plan, seen)
        _same((torch.strided, "cpu"), (loaded.layout, loaded.device.type))
        self._check_storage(plan.storage, loaded.untyped_storage())

    def _check_storage(self, plan: StoragePlan, storage: torch.UntypedStorage) -> None:
        _same(plan.nbytes, storage.nbytes())
        if plan.key in self.places:
            _same(self.places[plan.key], storage.data_ptr())
        elif plan.nbytes:
            self.places[plan.key] = storage.data_ptr()
            flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
            _check_bytes(flat.numpy(), np.frombuffer(self.storages[plan.key], np.uint8))


def _check_bytes(loaded: Any, stored: Any) -> None:
    for start in range(0, len(stored), _BLOCK):
        _same(True, bool(np.array_equal(loaded[start : start + _BLOCK], stored[start : start + _BLOCK])))


def _same(planned: Any, loaded: Any) -> None:
    if planned != loaded:
        rule = f"torch to build what the bytes describe, {shorten(planned)}"
        raise unsafe(rule, "loaded", loaded, "Report this file: two parsers read it differently")


def _shown(value: Any) -> Any:
    """Numbers by their text, so that NaN equals NaN and 0.0 differs from -0.0."""
    return repr(value) if type(value) in (float, complex) else value
