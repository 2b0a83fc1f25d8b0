"""Every room that exists: what it exports is sorted, importable and documented."""

import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from enum import Enum

import pytest
from torch import nn

import aidefend

ROOMS = sorted(
    module.name
    for module in pkgutil.iter_modules(aidefend.__path__)
    if module.ispkg and not module.name.startswith("_") and module.name != "demo"
)
EXPORTS = [("aidefend", name) for name in aidefend.__all__ if name not in ROOMS and name != "__version__"] + [
    (f"aidefend.{room}", name) for room in ROOMS for name in importlib.import_module(f"aidefend.{room}").__all__
]


def returns(value):
    """What a function, or each method of a class, is annotated to return."""
    members = vars(value).values() if inspect.isclass(value) else [value]
    functions = [getattr(member, "__func__", member) for member in members]
    return [str(member.__annotations__.get("return")) for member in functions if inspect.isfunction(member)]


RETURNS = [
    (value, annotation)
    for module, name in EXPORTS
    for value in [getattr(importlib.import_module(module), name)]
    for annotation in returns(value)
]


def rank(name):
    """Ruff's order: constants, then classes, then the rest. A computed `__all__` has plain order."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def problems(value):
    """What the docstring of an exported function or class lacks; a record or a result needs its line only."""
    document = inspect.cleandoc(value.__doc__ or "")
    if not document or document.startswith(f"{value.__name__}("):  # what dataclass writes by itself
        return ["a docstring"]
    if inspect.isclass(value) and not has_behaviour(value):
        return []
    needed = {"Example:"} | ({"Args:"} if takes_arguments(value) else set())
    if inspect.isclass(value) and is_a_result(value):
        needed = set()
    makers = [member.__doc__ for member in vars(value).values() if isinstance(member, classmethod)]
    lines = "\n".join(text for text in [document, *makers] if text).splitlines()
    return sorted(needed - {line.strip().split(" ")[0].replace("Attributes:", "Args:") for line in lines})


def has_behaviour(value):
    """Whether a user's object of this class does something: methods beyond those that describe it."""
    if issubclass(value, BaseException | Enum) or getattr(value, "_is_protocol", False):
        return False
    inherited = {name for parent in (nn.Module, tuple) for name in vars(parent)} - {"__call__", "forward"}
    own = {name for name, member in vars(value).items() if inspect.isfunction(member)} - inherited
    return bool({name for name in own if not name.startswith(("_", "to_"))} | (own & {"__call__", "forward"}))


def is_a_result(value):
    """Whether exported functions or other classes return it: users read it and do not build it."""
    return any(re.search(rf"\b{value.__name__}\b", annotation) for owner, annotation in RETURNS if owner is not value)


def takes_arguments(value):
    try:
        return bool(inspect.signature(value).parameters)
    except ValueError:  # an Enum of old Python, a class without a signature
        return False


def test_the_rooms_are_found():
    assert {"attacks", "datasets", "monitor"} <= set(ROOMS)
    assert set(ROOMS) <= set(aidefend.__all__), "Expected every room to be a name of aidefend."


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_exports_are_sorted_unique_and_importable(room):
    module = importlib.import_module(f"aidefend.{room}".rstrip("."))
    names = [name for name in module.__all__ if name != "__version__"]
    assert len(set(names)) == len(names)
    assert names in (sorted(names, key=rank), sorted(names))
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize(("module", "name"), EXPORTS, ids=lambda text: text.removeprefix("aidefend."))
def test_exports_are_documented(module, name):
    value = getattr(importlib.import_module(module), name)
    if callable(value):
        assert problems(value) == []


def test_bare_functions_records_and_classes_are_seen():
    def bare(x):
        """Does it."""

    @dataclass
    class Bare:
        x: int

    class Worker:
        """Works."""

        def __init__(self, x): ...
        def work(self): ...

    assert problems(bare) == ["Args:", "Example:"]
    assert problems(Worker) == ["Args:", "Example:"]
    assert problems(Bare) == ["a docstring"]
