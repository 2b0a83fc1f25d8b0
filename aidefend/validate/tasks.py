"""What a model under guard answers: logits of classes, or numbers."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_logits, refuse
from aidefend.validate.keyed_noise import KeyedNoise
from aidefend.validate.outputs import LabelOnly, Output, Rounded, Tempered, TopK
from aidefend.validate.reverse_sigmoid import ReverseSigmoid

Task = Literal["classification", "regression"]
TASKS = ("classification", "regression")
_OF_CLASSES = (LabelOnly, TopK, Rounded, Tempered, ReverseSigmoid, KeyedNoise)


def check_answers(outputs: Any, n: int, task: Task) -> Tensor:
    """Outputs of a model for n rows: logits (n, K >= 2), or for "regression" numbers (n,) or (n, K >= 1)."""
    numbers = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.shape[:1] == (n,)
    if task == "classification":
        if numbers and (outputs.ndim == 1 or outputs.shape[1:] == (1,)):
            cure = "For a model that returns numbers pass task='regression'; for two classes return both logits"
            raise refuse(f"model(x) to be logits of shape ({n}, K >= 2)", "model(x)", outputs, cure)
        return check_logits(outputs, n)
    if not numbers or outputs.ndim > 2 or 0 in outputs.shape[1:]:
        cure = "Wrap the model so that it returns one row of numbers for each sample"
        raise refuse(f"model(x) to be floating point ({n},) or ({n}, K >= 1)", "model(x)", outputs, cure)
    found: Tensor = outputs
    return found


def check_task(task: Task, promise: str, detectors: Iterable[Any]) -> None:
    """Refuse, before any pass, what a model without classes cannot have."""
    check_choice(task, TASKS, "task")
    if task == "classification":
        return
    if promise == "class-conditional":
        raise refuse("a promise without classes", "promise", promise, "For a regression model take 'marginal'")
    if names := sorted({name for detector in detectors for name in _readers_of_logits(detector)}):
        cure = "For a regression model take detectors of features or inputs, such as NearestNeighbours()"
        raise refuse("detectors that need no logits", "detectors", ", ".join(names), cure)


def check_company(task: Task, output: Output | None, queries: Any) -> None:
    """Refuse hardening and monitors that read logits behind a model that has none."""
    if task == "regression" and isinstance(output, _OF_CLASSES):
        cure = "Pass a callable from the numbers to what clients see, or None"
        raise refuse("an output for numbers", "output", type(output).__name__, cure)
    if task == "regression" and queries is not None:
        raise refuse("no query monitor behind a regression model", "queries", queries, "It reads classes: leave it out")


def blank_answer(width: int, dtype: torch.dtype) -> Tensor:
    """Zeros in the form of one answer: (1, width), or (1,) for width 0."""
    return torch.zeros((1, width) if width else (1,), dtype=dtype)


def _readers_of_logits(detector: Any) -> list[str]:
    members = getattr(detector, "detectors", None)
    if members is not None:
        return [name for member in members for name in _readers_of_logits(member)]
    return [type(detector).__name__] if getattr(detector, "uses_logits", False) else []
