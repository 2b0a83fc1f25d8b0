"""What attacks share that compute poisoned inputs one by one: kept inputs, rows in memory, traceless gradients."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from aidefend._core.batches import as_dataset, gather
from aidefend._core.checks import check_int, check_kind, check_labels, check_number, check_tensor, expected, refuse
from aidefend._core.errors import AidefendError, IncompatibleModel
from aidefend._core.modules import Model, freeze, preserve
from aidefend._core.threat import Threat
from aidefend.attacks.poisoning.poisoned import Change, Poisoned, PoisonedDataset


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """Rows that hold inputs made beforehand, whatever the data set holds there."""

    inputs: Tensor
    place: dict[int, int]

    def __call__(self, x: Tensor, row: int) -> Tensor:
        """`inputs[place[row]]` as a batch of one."""
        return self.inputs[self.place[row]].to(x).reshape(x.shape)


def plant_inputs(
    base: Dataset[Any], n: int, rows: Tensor, inputs: Tensor, labels: Tensor, target: int | None, stamp: Change | None
) -> Poisoned:
    """These rows hold these inputs (P, ...) under these labels (P,); all others are as they were."""
    kept = Kept(inputs, {row: place for place, row in enumerate(rows.tolist())})
    is_poison = torch.zeros(n, dtype=torch.bool)
    is_poison[rows] = True
    data = PoisonedDataset(base, dict(zip(rows.tolist(), labels.tolist(), strict=True)), None, kept)
    return Poisoned(data, is_poison, target, stamp)


def rows_in_memory(dataset: Any) -> tuple[Dataset[Any], Tensor, Tensor]:
    """The data set, and its inputs and labels in memory."""
    base = as_dataset(dataset)
    batch = gather(base)
    if batch.y is None:
        raise refuse("samples of the form (x, y)", "dataset", "samples without labels", "Give every sample a label")
    return base, batch.x, check_labels(batch.y, len(batch.ids))


def read_rows(dataset: Any, threat: Threat) -> tuple[Dataset[Any], Tensor, Tensor]:
    """As `rows_in_memory`, with inputs inside the bounds of the threat."""
    base, x, y = rows_in_memory(dataset)
    threat.check(x[:1], "dataset")  # which rows are poisoned is not known yet: a radius for each row fits none
    return base, threat.check(x, "dataset"), y


def check_threat(threat: Any) -> Threat:
    """A threat of linf or l2 whose steps follow the sign of a gradient."""
    check_kind(threat, Threat, "threat", 'Pass Threat("linf", 0.1)')
    if threat.norm not in ("linf", "l2"):
        raise refuse("a threat of linf or l2", "threat", str(threat), 'Pass Threat("linf", 0.1)')
    return threat  # type: ignore[no-any-return]  # checked above


def check_victims(victims: Any, threat: Threat) -> Tensor:
    """Inputs (V, ...), at least one."""
    check_tensor(victims, "victims", floating=True)
    if victims.ndim < 2 or not len(victims):
        raise refuse("victims of shape (V >= 1, ...)", "victims", victims, "Pass at least one input, as a batch")
    return threat.check(victims, "victims")


def check_crafted(victims: Any, threat: Any, target: Any, rate: Any, steps: Any) -> None:
    """What attacks on single victims ask of their fields."""
    check_victims(victims, check_threat(threat))
    check_int(target, "target", 0)
    check_number(rate, "rate", 0, 1, open_low=True, open_high=True)
    check_int(steps, "steps")


@contextmanager
def traceless(model: Model, *, weights: bool = False) -> Iterator[None]:
    """The model in the mode in which it is given, every trace undone; gradients reach the input, or the weights too."""
    with torch.inference_mode(False), torch.enable_grad(), preserve(model):
        if not weights:
            freeze(model)
        yield


def called(model: Callable[..., Any], x: Tensor, name: str) -> Tensor:
    """What the model says of a batch: a floating tensor (n, ...); what it raises names it."""
    try:
        outputs = model(x)
    except (AidefendError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found, cure = f"{type(error).__name__}: {error}", f"Call it on x of shape {tuple(x.shape)} to see the cause"
        raise IncompatibleModel(expected(f"{name} that takes the rows", name, found, cure)) from error
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or len(outputs) != len(x):
        raise refuse(f"{name}(x) to be a floating tensor with {len(x)} rows", name, outputs, "Return one row for each")
    return outputs


def slope(loss: Tensor, at: Tensor, name: str) -> Tensor:
    """Gradient of a loss by the inputs; refuses what cannot be differentiated, as the attack would do nothing."""
    found = torch.autograd.grad(loss, at, allow_unused=True)[0] if loss.requires_grad else None
    if found is None:
        raise refuse(f"{name} that is differentiable in x", name, "no gradient", "Leave out detach, argmax, no_grad")
    return found.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
