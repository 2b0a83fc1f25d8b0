"""Features of a whole data set in one pass through the suspect model, with everything keyed by content id."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from aidefend._core.batches import Batch, gather
from aidefend._core.checks import check_int, check_labels, check_logits, check_tensor, expected, refuse
from aidefend._core.errors import AidefendError, IncompatibleModel
from aidefend._core.frames import is_frame
from aidefend._core.modules import InputCapture, Model, device_of, evaluate, find_module, last_linear, preserve
from aidefend._core.naming import with_names
from aidefend._core.parts import is_map_style

Layer = str | nn.Module | Callable[[Tensor], Tensor] | Tensor | np.ndarray
_READ_TWICE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Row i belongs to sample i of the data set.

    Args:
        ids: Content ids.
        x: Inputs (N, ...), as they are in the data.
        labels: (N,) int64.
        features: (N, d) float32; NaN in rows that are not usable.
        logits: (N, K) float32, NaN likewise.
        losses: (N,) cross-entropy of the label, NaN likewise.
        usable: (N,) bool, False where the input or what the model made of it holds NaN or infinity, and where the
            sample could not be read.
        broken: (row, reason) of the samples that could not be read.
        texts: What x encodes, for data sets of texts.
    """

    ids: tuple[str, ...]
    x: Tensor
    labels: Tensor
    features: Tensor
    logits: Tensor
    losses: Tensor
    usable: Tensor
    broken: tuple[tuple[int, str], ...] = ()
    texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def gradient_parts(self) -> tuple[Tensor, Tensor]:
        """The two factors of each row's gradient of the loss by the last layer: errors (N, K) and inputs (N, d + 1).

        The gradient by (weights, bias) is `torch.outer(errors[i], inputs[i])`; inner products of rows i and j are
        `(errors[i] @ errors[j]) * (inputs[i] @ inputs[j])`, without the matrix. Right where `features` are what the
        last linear layer reads, as they are by default. NaN in rows that are not usable or whose label has no logit.
        """
        errors = torch.softmax(self.logits, dim=1)
        known = self.usable & (self.labels < self.logits.shape[1])
        errors[known, self.labels[known]] -= 1
        errors[~known] = torch.nan
        return errors, torch.cat([self.features, torch.ones(len(self), 1)], dim=1)

    def blocks(self, size: int = 1024, view: Tensor | None = None) -> Iterator[dict[str, Any]]:
        """The rows as blocks for detectors; `view` (N, v) goes along as an independent view."""
        check_int(size, "size")
        if view is not None:
            check_tensor(view, "view", ndim=2, finite=False, rows=len(self))
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            block = {
                "ids": self.ids[part],
                "features": self.features[part],
                "labels": self.labels[part],
                "logits": self.logits[part],
                "losses": self.losses[part],
                "x": self.x[part],
            }
            if self.texts is not None:
                block["text"] = list(self.texts[part])
            yield block if view is None else {**block, "view": view[part]}


def read_samples(dataset: Any) -> Batch:
    """All samples in memory, in the data set's own order (a DataLoader's shuffling is passed by).

    A sample that cannot be read keeps its row, see `Batch.broken`.
    Raises: ConfigurationError: no sample, no labels, labels below 0, samples without a feature, samples that change.
    """
    batch = gather(dataset, bad="mark")
    if batch.y is None:
        cure = 'Give every sample a label, or name the column that holds it: Samples(data, label="...")'
        raise refuse("a data set of (x, y) samples", "dataset", "inputs without labels", cure)
    check_still(dataset)
    if batch.x.ndim < 2 or not batch.x[0].numel():
        raise refuse("samples with at least one feature", "dataset", batch.x, "Give x the shape (features,) or more")
    return batch._replace(y=check_labels(batch.y, len(batch.ids), name="labels"))


def check_still(data: Any) -> None:
    """Refuse a data set whose samples change from read to read: what is judged would not be what is trained on.

    Sixteen samples, spread over the data, are read twice; forms that can be read once only, and arrays, are passed by.
    Raises: ConfigurationError: a sample changed.
    """
    names = with_names(data)
    rows: Any = names.data.dataset if isinstance(names.data, DataLoader) else names.data
    if not is_map_style(rows) or isinstance(rows, Tensor | np.ndarray | list | tuple | TensorDataset) or is_frame(rows):
        return
    some = torch.linspace(0, len(rows) - 1, min(_READ_TWICE, len(rows))).long().tolist()
    try:
        first, again = (gather(dataclasses.replace(names, data=Subset(rows, some)), bad="mark") for _ in range(2))
    except AidefendError:
        return  # not one of these can be read: there is nothing to compare
    changed = [row for row, before, after in zip(some, first.ids, again.ids, strict=True) if before != after]
    if changed:
        cure = "Turn augmentation off (the transform of the evaluation), or draw it from the number of the sample"
        raise refuse("samples that are the same at each read", "dataset", f"sample {changed[0]} changed", cure)


def finite_rows(x: Tensor) -> Tensor:
    """(N,) bool: rows without NaN or infinity."""
    flat = x.flatten(1)
    return torch.isfinite(flat).all(dim=1) if x.is_floating_point() else torch.ones(len(x), dtype=torch.bool)


def readable_rows(batch: Batch) -> Tensor:
    """(N,) bool: samples that could be read and hold neither NaN nor infinity."""
    readable = finite_rows(batch.x)
    readable[[row for row, _ in batch.broken]] = False
    return readable


def extract_features(samples: Any, model: Model | None, layer: Layer | None = None, batch_size: int = 512) -> Features:
    """Features, logits and losses of every sample: one pass in eval mode, without gradients, in the data's own order.

    Guarantee: the model is left as it was (see `_core.modules.preserve`); rows with NaN or infinity never enter it.
    Args:
        samples: A data set of (x, y) samples, in any form that `Samples` takes, or the `Batch` that `read_samples` made
            of it. Augmentation has to be off: sixteen samples of a data set are read twice.
        model: Module or callable from x to logits (N, K >= 2). None: there is none; `layer` then holds the features,
            and logits and losses are NaN, so that detectors which need them have no opinion.
        layer: Where features come from: None: the input of the `nn.Linear` that runs last (for a plain callable: its
            logits); a name of `named_modules()` or a module of the model: the input of that module, flattened; any
            other callable: `layer(x)`, flattened; a tensor or array (N, d): the features themselves.
        batch_size: Rows a pass.
    Raises: ConfigurationError: no labels, wrong shapes, unknown layer, samples that change from read to read, neither
        model nor features. IncompatibleModel: the model raises, or runs no
        Linear.
    Cost: one forward pass per sample (and one sample more to find the layer).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> found = extract_features((torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)), model)
        >>> found.features.shape, found.logits.shape
        (torch.Size([4, 3]), torch.Size([4, 2]))
    """
    check_int(batch_size, "batch_size")
    batch = samples if isinstance(samples, Batch) else read_samples(samples)
    labels = check_labels(batch.y, len(batch.ids), name="labels")
    usable = readable_rows(batch)
    layer = torch.from_numpy(layer) if isinstance(layer, np.ndarray) and layer.dtype.kind == "f" else layer
    if model is None and not isinstance(layer, Tensor):
        raise refuse("a model, or features in its place", "model", None, "Pass a model, or layer=features of (N, d)")
    if layer is not None and not isinstance(layer, str | Tensor) and not callable(layer):
        cure = "Name a module, or pass one, a function of x, or the features themselves"
        raise refuse("layer to be a name, a module, a function or a tensor", "layer", layer, cure)
    if model is None:
        width = max(2, int(labels.max()) + 1)
        features = logits = torch.full((int(usable.sum()), width), torch.nan)
    else:
        features, logits = _through(model, batch.x[usable], layer, batch_size)
    if isinstance(layer, Tensor):
        features = check_tensor(layer, "layer", ndim=2, floating=True, finite=False, rows=len(labels))[usable]
    features, logits = _spread(features, usable), _spread(logits, usable)
    answered = torch.isfinite(logits).all(dim=1) | (model is None)
    usable = usable & torch.isfinite(features).all(dim=1) & answered
    losses = torch.full((len(labels),), torch.nan)
    known = usable & (labels < logits.shape[1])
    losses[known] = nn.functional.cross_entropy(logits[known], labels[known], reduction="none")
    return Features(batch.ids, batch.x, labels, features, logits, losses, usable, batch.broken)


def _through(model: Model, x: Tensor, layer: Layer | None, batch_size: int) -> tuple[Tensor, Tensor]:
    """Features and logits of usable rows, on the CPU in float32."""
    if not len(x):
        return x.new_zeros(0, 1, dtype=torch.float32), x.new_zeros(0, 2, dtype=torch.float32)
    with preserve(model), torch.no_grad(), _named_failures():
        evaluate(model)
        module = _hooked(model, layer, x)
        outside = layer if callable(layer) and module is None else None
        parts = [_pass(model, module, outside, rows.to(device_of(model))) for rows in x.split(batch_size)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _pass(model: Model, module: nn.Module | None, outside: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    if module is None:
        logits = check_logits(model(rows), len(rows))
        features = logits if outside is None else check_tensor(outside(rows), "layer(x)", finite=False, rows=len(rows))
    else:
        with InputCapture(module) as capture:
            logits = check_logits(model(rows), len(rows))
            features = capture.take()
    return features.flatten(1).float().cpu(), logits.float().cpu()


def _hooked(model: Model, layer: Layer | None, x: Tensor) -> nn.Module | None:
    if not isinstance(model, nn.Module):
        if isinstance(layer, str):
            raise refuse("layer=None or a callable with a plain callable as model", "layer", layer, "Pass a function")
        return None
    if layer is None:
        return last_linear(model, x[:1].to(device_of(model)))
    if isinstance(layer, str) or any(layer is module for module in model.modules()):
        return find_module(model, layer)  # type: ignore[arg-type]  # a name or a module of the model
    return None


def _spread(rows: Tensor, usable: Tensor) -> Tensor:
    full = torch.full((len(usable), rows.shape[1]), torch.nan)
    full[usable] = rows.float().cpu()
    return full


class _named_failures:
    """Turn whatever a user's model raises into an error that names the argument and keeps the cause."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, AidefendError):
            cure = "Call it on one batch of the data set yourself and repair what it reports"
            raise IncompatibleModel(expected("a model that runs on the data", "model", error, cure)) from error


def predictor(model: Model, batch_size: int = 512) -> Callable[[Tensor], Tensor]:
    """A function from inputs (n, ...) to predicted classes (n,) on the CPU; leaves the model as it was."""

    def predict(x: Tensor) -> Tensor:
        return _through(model, x, lambda rows: rows.flatten(1)[:, :1].float(), batch_size)[1].argmax(dim=1)

    return predict
