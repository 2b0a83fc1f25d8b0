"""What is audited: a model as given, and the samples it is judged on."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aidefend._core.batches import content_ids, gather_labelled, input_id
from aidefend._core.checks import check_int, check_labels, check_not_empty, refuse
from aidefend._core.errors import IncompatibleModel
from aidefend._core.evidence import Finding, Severity, Status
from aidefend._core.modules import Model, training_layers
from aidefend._core.random import derive_seed
from aidefend._core.stats import Interval, wilson
from aidefend.attacks.membership import ask
from aidefend.audit.mapping import references


class Samples(NamedTuple):
    """Inputs (N, ...) and labels (N,) int64."""

    x: Tensor
    y: Tensor

    def rows(self, index: Tensor) -> "Samples":
        """The chosen samples."""
        return Samples(self.x[index], self.y[index])


def samples_of(data: Any, name: str) -> Samples:
    """All samples of any data, with labels; refuses data that is empty or has none."""
    x, y = gather_labelled(data, name)
    return Samples(x, check_labels(y, check_not_empty(len(x), name)))


def draw(data: Samples, count: int | None, seed: int, name: str) -> Samples:
    """At most `count` samples, chosen by the seed, in the order of the data; all of them for None."""
    n = len(data.x)
    if count is None or check_int(count, "samples") >= n:
        return data
    stream = torch.Generator().manual_seed(derive_seed(seed, "draw", name))
    return data.rows(torch.randperm(n, generator=stream)[:count].sort().values)


def check_model(model: Any, name: str = "model") -> Model:
    """A callable whose answers do not depend on batch mates or chance."""
    if not callable(model):
        raise refuse(f"{name} to be callable", name, type(model).__name__, "Pass a module or a function of x")
    if offenders := training_layers(model):
        raise IncompatibleModel(f"Expected {name} in eval mode: its answers depend on the batch otherwise.", offenders)
    checked: Model = model
    return checked


def predictions(model: Model, x: Tensor) -> Tensor:
    """Top class of each row (N,) int64, on the CPU."""
    return ask(model, x).argmax(dim=1)


def share(hits: Tensor) -> Interval:
    """Share of True with its Wilson interval."""
    return wilson(int(hits.sum()), len(hits))


def without(data: Samples, others: Samples) -> Samples:
    """The samples whose inputs do not occur among the others (a leak between training and test data)."""
    known = {input_id(row_id) for row_id in content_ids(others.x)}
    keep = torch.tensor([input_id(row_id) not in known for row_id in content_ids(data.x)], dtype=torch.bool)
    return data.rows(keep.nonzero().flatten())


def found(
    finding_id: str,
    title: str,
    value: Any = None,
    *,
    interval: Interval | None = None,
    n: int | None = None,
    severity: Severity = Severity.INFO,
    setting: Mapping[str, Any] | None = None,
    threat: str = "",
    limits: str = "",
    status: Status = "measured",
    deterministic: bool = True,
) -> Finding:
    """A finding with its catalogue entries."""
    low, high = (interval.low, interval.high) if interval else (None, None)
    return Finding(
        finding_id,
        title,
        severity,
        interval.value if interval else value,
        low,
        high,
        n,
        dict(setting or {}),
        threat,
        limits,
        references(finding_id),
        status,
        deterministic,
    )


def model_digest(model: Any) -> str | None:
    """SHA-256 over names, types, shapes and bytes of a module's state; None for other callables."""
    if not isinstance(model, nn.Module):
        return None
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous()
            total.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
            total.update(array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return total.hexdigest()


def data_digest(data: Samples) -> str:
    """SHA-256 over the content ids, in any order."""
    return hashlib.sha256("\n".join(sorted(content_ids(data.x, data.y))).encode()).hexdigest()
