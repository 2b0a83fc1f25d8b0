"""The one interface of detectors: `fit` once, then `score` rows, higher = stranger."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_labels, check_not_empty, check_same_rows, check_tensor, refuse
from aidefend._core.modules import Model

_LARGEST = 1e150


class FittedDetector(Protocol):
    """What `Detector.fit` returns: judges rows and never changes."""

    @property
    def name(self) -> str:
        """Lower-case words with hyphens; the key of its scores and p-values."""

    @property
    def uses_features(self) -> bool:
        """Whether `score` looks at the features; if no detector does, the guard needs no layer."""

    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """(N,) float, higher = stranger; differentiable in its arguments wherever possible.

        Args:
            features: (N, d) float, finite; d may be 0 if `uses_features` is false.
            logits: (N, K) float, finite, K >= 2; None for a regression model, where the detector reads features only.
        """


class FittedInputDetector(Protocol):
    """A fitted detector that looks at the inputs themselves, mostly by asking the model again; `score_rows` serves it.

    Such a class has `uses_inputs = True`; a detector without this attribute never sees inputs or model.
    """

    @property
    def name(self) -> str:
        """Lower-case words with hyphens; the key of its scores and p-values."""

    @property
    def uses_features(self) -> bool:
        """Whether `score` looks at the features."""

    @property
    def uses_inputs(self) -> bool:
        """True."""

    def score(
        self, features: Tensor, logits: Tensor | None = None, *, x: Tensor | None = None, model: Model | None = None
    ) -> Tensor:
        """(N,) float, higher = stranger; differentiable in x where its steps are.

        Args:
            features: (N, d) float, finite.
            logits: (N, K) of the rows as they are.
            x: (N, ...) the rows as the model sees them.
            model: Returns logits; in eval mode.
        """


class Detector(Protocol):
    """A configuration of a detector: frozen, and reusable for several models."""

    def fit(self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> FittedDetector:
        """Learn from clean rows.

        Args:
            features: (N, d) float, finite, N >= 1.
            logits: (N, K) float, finite; None for a regression model.
            labels: (N,) int64 class indices; None = the predicted classes stand in where labels are needed, and one
                class for all where there are no logits either.
        """


def is_detector(value: object) -> bool:
    """Whether it is a configuration: not the class of one, which has `fit`, too."""
    return not isinstance(value, type) and callable(getattr(value, "fit", None))


class Rows(NamedTuple):
    """Everything that a detector may look at, for the same N rows: features, logits, inputs, and the model.

    `checked`: features (N, d) and logits (N, K) are known to be finite, and of the layer at the fit.
    """

    features: Tensor
    logits: Tensor | None = None
    x: Tensor | None = None
    model: Model | None = None
    checked: bool = False


def score_rows(detector: FittedDetector | FittedInputDetector, rows: Rows) -> Tensor:
    """Scores (N,) of any fitted detector: gives each what it looks at.

    One with `quick_score` computes the same without looking for faults that whoever ran the model has ruled out.
    """
    if rows.checked and hasattr(detector, "quick_score"):
        scores: Tensor = detector.quick_score(rows.features, rows.logits)
    elif getattr(detector, "uses_inputs", False):
        scores = detector.score(rows.features, rows.logits, x=rows.x, model=rows.model)  # type: ignore[call-arg]
    else:
        scores = detector.score(rows.features, rows.logits)
    if scores.shape != rows.features.shape[:1]:
        raise refuse(f"scores of shape ({len(rows.features)},)", "score", scores, "Return one score for each row")
    return scores


def score_columns(detectors: Iterable[FittedDetector | FittedInputDetector], rows: Rows) -> Tensor:
    """Scores of all detectors: (N, D) float64."""
    return torch.stack([score_rows(detector, rows).double() for detector in detectors]).T


def in_numpy(values: Tensor) -> bool:
    """Whether numpy may compute with these numbers: on the CPU, where nobody asks for gradients.

    Its functions give the same as those of torch, and cost a fraction where there are few numbers.
    """
    return not torch.is_grad_enabled() and values.device.type == "cpu"


def as_array(values: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Numbers on the CPU as an array over the same memory; those of half precision as float32."""
    return wide(values.detach()).numpy()


class StorableDetector(FittedDetector, Protocol):
    """A fitted detector of this package, which `Guard.save` can write."""

    def settings(self) -> Mapping[str, Any]:
        """Its configuration as JSON types."""

    def arrays(self) -> Mapping[str, Tensor]:
        """What it learned."""


def unique_names(detectors: Iterable[FittedDetector | FittedInputDetector]) -> tuple[str, ...]:
    """The detectors' names; the second of a kind gets "-2"."""
    counts: dict[str, int] = {}
    names = []
    for detector in detectors:
        counts[detector.name] = count = counts.get(detector.name, 0) + 1
        names.append(detector.name if count == 1 else f"{detector.name}-{count}")
    return tuple(names)


def check_outputs(features: Tensor, logits: Tensor | None) -> None:
    """Features (N, d) and, unless there are none, logits (N, K) of the same rows, finite."""
    check_tensor(features, "features", ndim=2, floating=True)
    if logits is not None:
        check_tensor(logits, "logits", ndim=2, floating=True)
        check_same_rows(("features", "logits"), len(features), len(logits))


def check_wide_logits(features: Tensor, logits: Tensor | None) -> Tensor:
    """Logits (N, K) of the rows of these features, at least float32, for a detector that cannot do without."""
    check_outputs(features, logits)
    if logits is None:
        raise refuse("logits", "logits", None, "For a regression model take detectors of features alone")
    return wide(logits)


def check_width(features: Tensor, width: int) -> None:
    """As many features a row as the detector was fitted on."""
    if features.shape[1] != width:
        raise refuse(f"{width} features a row, as at the fit", "features", features, "Use the same layer")


def check_fit(features: Tensor, logits: Tensor | None, labels: Tensor | None) -> Tensor:
    """The rows to fit on; returns their classes: labels, else predicted ones, else one class for all."""
    check_outputs(features, logits)
    check_not_empty(len(features), "features")
    if labels is not None:
        return check_labels(labels, len(features), name="labels")
    if logits is None:
        return torch.zeros(len(features), dtype=torch.int64, device=features.device)
    return logits.argmax(dim=1)


def check_squares(features: Tensor) -> Tensor:
    """Features (N, d) in float64, without gradients, small enough for a covariance."""
    rows = features.detach().double()
    if rows.numel() and float(rows.abs().max()) > _LARGEST:
        cure = "Choose another layer, scale it, or take NearestNeighbours"
        raise refuse(f"features of at most {_LARGEST:g}: the covariance has their squares", "features", features, cure)
    return rows


def wide(values: Tensor) -> Tensor:
    """At least float32: half precision would tie the scores that matter."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
