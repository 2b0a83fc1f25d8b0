"""What a checkpoint would build, worked out without building it.

The opcodes are run on harmless stand-ins: a call to an allowed function becomes a description of its result
(`TensorPlan`, a dict, a dtype, ...) whose arguments have been checked, and a call to anything else is refused. So every
storage, shape, stride and key is known and judged before torch sees a byte.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from aidefend.artifacts.allowed import GLOBALS, Global, Ordered, call, check_key, refuse_global
from aidefend.artifacts.files import shorten, unsafe
from aidefend.artifacts.limits import Limits
from aidefend.artifacts.pickle_stream import operations
from aidefend.artifacts.tensor_plan import StoragePlan, TensorPlan, read_storage

_OPCODES_AN_ITEM = 8
_MAX_DEPTH = 100
_CURE = "Save tensors and plain containers with torch.save, or use safetensors"
_VERSIONS = (str, int, float, bool, type(None))
_LEAVES = (str, int, float, bool, complex, bytes, bytearray, type(None), torch.Size, torch.device, torch.dtype)


def plan_pickle(data: bytes | memoryview, sizes: Mapping[str, int], limits: Limits) -> Any:
    """The result that data.pkl describes, with a TensorPlan in the place of each tensor.

    Args:
        data: The pickle.
        sizes: Bytes of each stored array, by its key.
        limits: Bounds on the number of items.
    Returns: Plain containers, scalars, dtypes, sizes, devices and TensorPlans; nothing else can occur.
    Raises: UnsafeArtifact: a name, an opcode or a structure outside the closed set.
    """
    machine = _Machine(sizes)
    for operation in operations(data, limits.max_items * _OPCODES_AN_ITEM):
        try:
            machine.run(operation.name, operation.argument)
        except (IndexError, KeyError) as error:
            where = f"{operation.name} at byte {operation.position}"
            raise unsafe("values on the stack for each opcode", "opcode", where, _CURE) from error
    check_items(machine.result, limits)
    return machine.result


class _Machine:
    """A stack machine whose values are stand-ins."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.storages: dict[str, StoragePlan] = {}
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def run(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _VALUES:
            self.stack.append(argument)
        else:
            _ACTIONS[name](self, argument)

    def mark(self, _: Any) -> None:
        if len(self.marks) >= _MAX_DEPTH:
            raise unsafe(f"at most {_MAX_DEPTH} nested levels", "levels", f"> {_MAX_DEPTH}", _CURE)
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_of_mark(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def tuple_of(self, length: int) -> None:
        if len(self.stack) < length:
            raise IndexError
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        self.extend([item])

    def appends(self, _: Any) -> None:
        self.extend(self.pop_mark())

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise unsafe("items appended to lists", "target", _name(self.stack[-1]), _CURE)
        self.stack[-1].extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key, value])

    def set_items(self, _: Any) -> None:
        self.fill(self.pop_mark())

    def fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, Ordered, Counter) or len(items) % 2:
            raise unsafe("pairs set in dicts", "target", _name(target), _CURE)
        if type(target) is Ordered and target.used_as_hooks:
            raise unsafe("tensors without hooks", "hooks", items[0], _CURE)
        for key, value in zip(items[::2], items[1::2], strict=True):
            check_key(key)
            if key in target:
                raise unsafe("one value a key", "key", key, _CURE)
            target[key] = value

    def put(self, index: int) -> None:
        if index in self.memo:
            raise unsafe("a memo slot written once", "slot", index, _CURE)
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def find(self, names: tuple[str, str]) -> None:
        module, name = names
        known = Global(*names)
        if known not in GLOBALS:
            raise refuse_global(module, name)
        self.stack.append(GLOBALS[known])

    def reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if type(arguments) is not tuple:
            raise unsafe("arguments in a tuple", "arguments", _name(arguments), _CURE)
        self.stack.append(call(function, arguments))

    def build(self, _: Any) -> None:
        """Only the version table that state_dict() hangs on an OrderedDict."""
        state, target = self.stack.pop(), self.stack[-1]
        fits = type(target) is Ordered and not target.used_as_hooks and target.metadata is None
        if not fits or type(state) is not dict or list(state) != ["_metadata"]:
            raise unsafe("_metadata set on a state dict", "state", _name(state), _CURE)
        target.metadata = state["_metadata"]

    def load_storage(self, _: Any) -> None:
        storage = read_storage(self.stack.pop(), self.sizes)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise unsafe("one type and size a storage", f"storage {storage.key}", storage, _CURE)
        self.stack.append(storage)

    def stop(self, _: Any) -> None:
        if len(self.stack) != 1 or self.marks:
            raise unsafe("one value at STOP", "values", len(self.stack), _CURE)
        if unused := sorted(set(self.sizes) - set(self.storages)):
            raise unsafe("only data that the checkpoint uses", "unused data", unused[:5], _CURE)
        self.result = self.stack.pop()


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_VALUES = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"})
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_of_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.find,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.load_storage,
    "STOP": _Machine.stop,
}


def check_items(result: Any, limits: Limits) -> None:
    """Walk every path through the result: bounded depth and count end cycles and doubled tuples."""
    left = limits.max_items
    pending = [(result, 0)]
    while pending:
        value, depth = pending.pop()
        children = _children(value)
        left -= len(children)
        if left < 0:
            cure = "Raise Limits(max_items=...) if this is right"
            raise unsafe(f"at most {limits.max_items} items", "items", f"> {limits.max_items}", cure)
        if depth > _MAX_DEPTH:
            raise unsafe(f"containers at most {_MAX_DEPTH} deep", "depth", depth, _CURE)
        pending += [(child, depth + 1) for child in children]


def _children(value: Any) -> list[Any]:
    kind = type(value)
    if kind in (dict, Ordered, Counter):
        if kind is Ordered:
            _check_metadata(value.metadata)
        return list(value.values())
    if kind in (list, tuple, set):
        return list(value)
    if kind in _LEAVES or kind is TensorPlan:
        return []
    raise unsafe("tensors, numbers, texts and plain containers", "value", _name(value), _CURE)


def _check_metadata(metadata: Any) -> None:
    """The versions of the layers of a state dict: {layer: {name: number or text}}."""
    tables = (dict, Ordered)
    fits = metadata is None or (type(metadata) in tables and all(type(table) in tables for table in metadata.values()))
    if not fits:
        raise unsafe("_metadata of tables", "_metadata", metadata, _CURE)
    for table in (metadata or {}).values():
        if wrong := [value for value in table.values() if type(value) not in _VERSIONS]:
            raise unsafe("_metadata of numbers and texts", "_metadata", wrong[0], _CURE)


def _name(value: Any) -> str:
    return f"{type(value).__name__} {shorten(value)}" if type(value) in (*_LEAVES, Global) else type(value).__name__
