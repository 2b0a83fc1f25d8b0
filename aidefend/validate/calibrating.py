"""From a model and clean data to everything that a guard needs."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aidefend._core.batches import Batch, input_id, iterate
from aidefend._core.checks import check_choice, check_int, check_items, check_kind, check_not_empty, refuse
from aidefend._core.errors import IncompatibleModel, Offender
from aidefend._core.modules import (
    Model,
    device_of,
    find_module,
    last_linear,
    looks_like_probabilities,
    naming_the_model,
    preserve,
    training_layers,
)
from aidefend._core.progress import progress
from aidefend._core.random import derive_seed
from aidefend.validate.calibration import JointCalibration, share_rows
from aidefend.validate.conformal_law import MODES
from aidefend.validate.conformal_law import Mode as Promise
from aidefend.validate.detector import Detector, FittedDetector, Rows, is_detector, score_columns, unique_names
from aidefend.validate.ensemble import Ensemble, fit_detector
from aidefend.validate.features import PassCapture, healthy_rows
from aidefend.validate.model_identity import identify, plain_modules, served, unwrapped
from aidefend.validate.row_reuse import count_inputs, frequent_inputs, reused_inputs
from aidefend.validate.spec import InputSpec
from aidefend.validate.tasks import TASKS, Task, check_task

_PURPOSES = ("fit", "reference", "calibration")
_MOST_CLASSES = 2**24  # a file may claim any number, and one row of it is held


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was calibrated, on how much, for which model; JSON types only. `promise` is a mode of `Calibration`.

    For a regression model, `num_classes` is K of outputs (N, K), and 0 for outputs (N,).
    """

    alpha: float
    promise: Promise
    delta: float
    seed: int
    own_fit: bool
    fit_n: int
    reference_n: int
    calibration_n: int
    refused_n: int
    layer: str | None
    num_classes: int
    logits_dtype: str
    identity: dict[str, str]
    task: Task = "classification"

    def __post_init__(self) -> None:
        check_choice(self.task, TASKS, "task")
        check_choice(self.promise, MODES, "promise")
        check_int(self.num_classes, "num_classes", 2 if self.task == "classification" else 0, _MOST_CLASSES)
        check_choice(self.logits_dtype, ("float16", "bfloat16", "float32", "float64"), "logits_dtype")

    @property
    def classes(self) -> int:
        """Number of classes of the attackable view: 1 where the model has none."""
        return self.num_classes if self.task == "classification" else 1


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Everything that a guard is made of, apart from the model."""

    spec: InputSpec
    detectors: tuple[FittedDetector, ...]
    calibration: JointCalibration
    facts: Facts


@dataclasses.dataclass(frozen=True)
class CleanRows:
    """Outputs of the model on the rows of one purpose, and how many rows the specification refused.

    The inputs themselves are kept only where a detector looks at them.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor | None
    x: Tensor | None
    refused: int
    task: Task = "classification"

    @property
    def for_detectors(self) -> Tensor | None:
        """The logits, or None where the outputs are numbers."""
        return self.logits if self.task == "classification" else None


def calibrate(
    model: Model,
    data: Any,
    spec: InputSpec | None,
    detectors: Sequence[Detector],
    alpha: float,
    fit: Any,
    layer: str | nn.Module | None,
    train_ids: Collection[str] | None,
    seed: int,
    batch_size: int,
    promise: Promise = "marginal",
    delta: float = 0.05,
    task: Task = "classification",
) -> Calibrated:
    """Split the data, run the model once over it, fit the detectors, calibrate. See `Guard.calibrate`."""
    check_int(seed, "seed", 0)
    check_int(batch_size, "batch_size")
    if spec is not None:
        check_kind(spec, InputSpec, "spec", "Pass InputSpec.infer(x), or None")
    if train_ids is not None:
        check_items(train_ids, str, "train_ids", "Pass the content ids of the training rows")
    check_detectors(detectors)
    check_task(task, promise, detectors)
    check_mode(model)
    model = served(model)
    order = _Order(fit is not None, len(detectors), alpha, promise, delta, seed)
    parts = _split(list(iterate(data, batch_size)), fit, order, train_ids, batch_size)
    rules = InputSpec.infer(batch.x for batch in parts["fit"]) if spec is None else spec
    with preserve(model), torch.no_grad():
        module = _find_layer(model, layer, detectors, parts["fit"], rules)
        capture = PassCapture(model, module, task)
        rows = {
            name: run_rows(model, capture, parts[name], rules, batch_size, name, needs_inputs(detectors))
            for name in _PURPOSES
            if parts[name]
        }
        fitted = tuple(_fitted(detector, rows["fit"], model, capture, batch_size) for detector in detectors)
    logits = rows["calibration"].logits
    if task == "classification":
        _check_logits(logits)
    with torch.no_grad():
        scores = score_rows_of(fitted, rows["calibration"], model, batch_size)
        basis = scores[:0] if "reference" not in rows else score_rows_of(fitted, rows["reference"], model, batch_size)
        classes = predicted_classes(rows["calibration"])
        calibration = JointCalibration.of(unique_names(fitted), scores, basis, alpha, promise, delta, classes)
    facts = Facts(
        alpha=float(alpha),
        promise=promise,
        delta=float(delta),
        seed=seed,
        own_fit=fit is not None,
        fit_n=len(rows["fit"].logits),
        reference_n=len(basis),
        calibration_n=len(scores),
        refused_n=rows["calibration"].refused,
        layer=_layer_name(model, module),
        num_classes=logits.shape[1] if logits.ndim == 2 else 0,
        logits_dtype=str(logits.dtype).removeprefix("torch."),
        identity=identify(model),
        task=task,
    )
    return Calibrated(rules, fitted, calibration, facts)


def needs_inputs(detectors: Iterable[Any]) -> bool:
    """Whether any detector looks at the inputs, asks the model again, or is fitted with shifted inputs."""
    return any(getattr(detector, "uses_inputs", False) for detector in detectors) or any(
        detector.shifts is not None or needs_inputs(detector.detectors)
        for detector in detectors
        if isinstance(detector, Ensemble)
    )


def _fitted(detector: Detector, rows: CleanRows, model: Model, capture: PassCapture, batch_size: int) -> FittedDetector:
    """`capture` must still be on the model: an ensemble may ask for the features of shifted inputs."""

    def outputs(x: Tensor) -> tuple[Tensor, Tensor | None]:
        with naming_the_model(x):
            parts = [capture.run(model, part) for part in x.split(batch_size)]
        logits = torch.cat([part.logits for part in parts]) if rows.task == "classification" else None
        return torch.cat([part.features for part in parts]), logits

    labels = rows.labels if rows.task == "classification" else None
    return fit_detector(detector, Rows(rows.features, rows.for_detectors, rows.x, model), labels, outputs)


def predicted_classes(rows: CleanRows) -> Tensor | None:
    """(N,) int64, or None where there are no classes."""
    return rows.logits.argmax(dim=1) if rows.task == "classification" else None


def score_rows_of(detectors: Sequence[FittedDetector], rows: CleanRows, model: Model, batch_size: int) -> Tensor:
    """Scores of all detectors, in slices: (N, D) float64."""
    parts = []
    for start in range(0, len(rows.logits), batch_size):
        part = slice(start, start + batch_size)
        x = None if rows.x is None else rows.x[part]
        logits = None if rows.for_detectors is None else rows.for_detectors[part]
        parts.append(score_columns(detectors, Rows(rows.features[part], logits, x, model)))
    return torch.cat(parts)


def check_detectors(detectors: Sequence[Detector]) -> None:
    """At least one configuration, each with `fit`."""
    if not isinstance(detectors, list | tuple) or not detectors or not all(map(is_detector, detectors)):
        raise refuse("a list of detectors", "detectors", detectors, "Pass for example [Energy(), NearestNeighbours()]")


def check_mode(model: Model) -> None:
    """Refuse layers in train mode: they would make a row's verdict depend on its batch mates or on chance."""
    if offenders := training_layers(model):
        raise IncompatibleModel("Expected a model in eval mode.", offenders)


class _Order(NamedTuple):
    """How the rows are to be split."""

    own_fit: bool
    detectors: int
    alpha: float
    promise: Promise
    delta: float
    seed: int


def _split(
    batches: list[Batch], fit: Any, order: _Order, train_ids: Collection[str] | None, batch_size: int
) -> dict[str, list[Batch]]:
    """Rows by purpose. Equal inputs stay together, but for frequent ones; the split depends on content and seed."""
    counts = count_inputs(row_id for batch in batches for row_id in batch.ids)
    check_not_empty(len(counts), "calibration_loader")
    fit_batches = [] if fit is None else list(iterate(fit, batch_size))
    _check_apart(counts, (row_id for batch in fit_batches for row_id in batch.ids), "fit")
    _check_apart(counts, train_ids or (), "train_ids")
    share_rows(len(counts), *order[:-1])  # enough different rows
    frequent = frequent_inputs(counts)
    units = {_unit(row_id, frequent) for batch in batches for row_id in batch.ids}
    shares = share_rows(len(units), *order[:-1])
    ranked = sorted(units, key=lambda name: derive_seed(order.seed, "calibration", name))
    purpose = dict.fromkeys(ranked[: shares.fit], "fit")
    purpose |= dict.fromkeys(ranked[shares.fit : shares.fit + shares.reference], "reference")
    parts = {name: _of_purpose(batches, purpose, frequent, name) for name in _PURPOSES}
    if fit is not None:
        check_not_empty(sum(len(batch.ids) for batch in fit_batches), "fit")
        parts["fit"] = fit_batches
    return parts


def _unit(row_id: str, frequent: Collection[str]) -> str:
    """What the split moves as one: an input with all its copies, or one copy of a frequent input.

    Kept together, an input that is a fifth of the traffic could be missing in the calibration rows, and would be
    refused if it is unlike the others.
    """
    name = input_id(row_id)
    return row_id if name in frequent else name


def _of_purpose(batches: list[Batch], purpose: Mapping[str, str], frequent: Collection[str], name: str) -> list[Batch]:
    found = []
    for batch in batches:
        index = [i for i, row in enumerate(batch.ids) if purpose.get(_unit(row, frequent), "calibration") == name]
        if index:
            labels = None if batch.y is None else batch.y[index]
            found.append(Batch(tuple(batch.ids[i] for i in index), batch.x[index], labels))
    return found


def _check_apart(counts: Mapping[str, int], other: Iterable[str], name: str) -> None:
    if shared := reused_inputs(counts, other):
        rule = f"calibration rows that are not in {name}: rows that were used before score too low"
        found = f"{len(shared)} shared inputs"
        raise refuse(rule, name, found, "Calibrate on rows that were held out from training and fitting")


def _find_layer(
    model: Model,
    layer: str | nn.Module | None,
    detectors: Sequence[Detector],
    batches: list[Batch],
    spec: InputSpec,
) -> nn.Module | None:
    """The module whose input is the feature vector, or None if no detector looks at features."""
    inner = unwrapped(model)
    if layer is None and not any(getattr(detector, "uses_features", True) for detector in detectors):
        return None
    if not isinstance(inner, nn.Module):
        cure = "Wrap it in an nn.Module, or use detectors of logits such as Energy()"
        raise IncompatibleModel("Expected an nn.Module to read features from.", [Offender("", "a callable", cure)])
    if layer is not None:
        plain = plain_modules(inner)
        return plain[layer] if isinstance(layer, str) and layer in plain else find_module(inner, layer)
    first = next(iter(_slices(batches[0], rows_a_pass(spec, batches[0].x, len(batches[0].ids)))))
    good, _, _ = _checked(first, spec, device_of(model))
    return last_linear(inner, good if len(good) else batches[0].x.to(device_of(model)))


def _layer_name(model: Model, module: nn.Module | None) -> str | None:
    inner = unwrapped(model)
    if module is None or not isinstance(inner, nn.Module):
        return None
    return next(name for name, found in plain_modules(inner).items() if found is unwrapped(module))


def run_rows(
    model: Model,
    capture: PassCapture,
    batches: list[Batch],
    spec: InputSpec,
    batch_size: int,
    name: str,
    keep_inputs: bool,
) -> CleanRows:
    """One pass over all rows that satisfy the specification."""
    features: list[Tensor] = []
    inputs: list[Tensor] = []
    logits, labels, refused = [], [], 0
    for batch in progress(batches, f"guard: {name}", len(batches)):
        for part in _slices(batch, rows_a_pass(spec, batch.x, batch_size)):
            x, y, bad = _checked(part, spec, device_of(model))
            refused += bad
            if len(x):
                with naming_the_model(x):
                    outputs = capture.run(model, x)
                _check_width(outputs.features, features)
                features.append(outputs.features)
                logits.append(outputs.logits)
                labels.append(y)
                if keep_inputs:
                    _check_size(x, inputs)
                    inputs.append(x)
    check_not_empty(len(logits), f"rows for {name} that satisfy the input specification")
    known = [y for y in labels if y is not None]
    rows = CleanRows(
        torch.cat(features),
        torch.cat(logits),
        torch.cat(known) if len(known) == len(labels) else None,
        torch.cat(inputs) if keep_inputs else None,
        refused,
        capture.task,
    )
    healthy = healthy_rows(rows.features, rows.logits)
    if not bool(healthy.all()):
        reason = f"{int((~healthy).sum())} of {len(healthy)} clean rows give NaN or infinity"
        raise IncompatibleModel("Expected finite outputs.", [Offender("", reason, "Repair the model or the data")])
    return rows


def _check_width(found: Tensor, before: list[Tensor]) -> None:
    if before and found.shape[1] != before[0].shape[1]:
        reason = f"{found.shape[1]} features for these inputs, {before[0].shape[1]} for those before"
        cure = "Name a layer behind the pooling with layer=, or use detectors of logits"
        raise IncompatibleModel(
            "Expected as many features for every size of input.",
            [Offender("", reason, cure)],
        )


def _check_size(x: Tensor, before: list[Tensor]) -> None:
    if before and x.shape[1:] != before[0].shape[1:]:
        cure = "Take detectors of features and logits, or one guard for each size"
        rule = "inputs of one size, since a detector looks at the inputs themselves"
        raise refuse(rule, "calibration_loader", [tuple(before[0].shape[1:]), tuple(x.shape[1:])], cure)


def rows_a_pass(spec: InputSpec, x: Tensor, batch_size: int) -> int:
    """The batch size, or fewer where the caps on requests are lower: the caps are no reason to refuse a row."""
    row = max(1, x[:1].numel() * x.element_size())
    return max(1, min(batch_size, spec.max_rows, spec.max_bytes // row))


def _slices(batch: Batch, size: int) -> Iterable[Batch]:
    for start in range(0, len(batch.ids), size):
        part = slice(start, start + size)
        yield Batch(batch.ids[part], batch.x[part], None if batch.y is None else batch.y[part])


def _checked(batch: Batch, spec: InputSpec, device: torch.device) -> tuple[Tensor, Tensor | None, int]:
    """The rows that satisfy the specification, their labels, and how many do not."""
    result = spec.check(batch.x.to(device))
    if result.fault is not None or result.x is None:
        cure = "Give the specification of this data, or data of this specification"
        raise refuse("data that satisfies spec", "calibration_loader", result.fault, cure)
    keep = result.accepted
    labels = None if batch.y is None else batch.y.to(device)[keep]
    return result.x[keep], labels, int((~keep).sum())


def _check_logits(logits: Tensor) -> None:
    if looks_like_probabilities(logits):
        offender = Offender("", "every row of the outputs is a probability vector", "Return the logits, before softmax")
        raise IncompatibleModel("Expected a model that returns logits.", [offender])
