"""The one interface of detectors: `fit` once, then `score` rows, higher = stranger."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from aidefend._core.checks import check_labels, check_not_empty, check_same_rows, check_tensor, refuse


class FittedDetector(Protocol):
    """What `Detector.fit` returns: judges rows and never changes."""

    @property
    def name(self) -> str:
        """Lower-case words with hyphens; the key of its scores and p-values."""

    @property
    def uses_features(self) -> bool:
        """Whether `score` looks at the features; if no detector does, the guard needs no layer."""

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """(N,) float, higher = stranger; differentiable in its arguments wherever possible.

        Args:
            features: (N, d) float, finite; d may be 0 if `uses_features` is false.
            logits: (N, K) float, finite, K >= 2.
        """


class Detector(Protocol):
    """A configuration of a detector: frozen, and reusable for several models."""

    def fit(self, features: Tensor, logits: Tensor, labels: Tensor | None = None) -> FittedDetector:
        """Learn from clean rows.

        Args:
            features: (N, d) float, finite, N >= 1.
            logits: (N, K) float, finite.
            labels: (N,) int64 class indices; None = the predicted classes stand in where labels are needed.
        """


class StorableDetector(FittedDetector, Protocol):
    """A fitted detector of this package, which `Guard.save` can write."""

    def settings(self) -> Mapping[str, Any]:
        """Its configuration as JSON types."""

    def arrays(self) -> Mapping[str, Tensor]:
        """What it learned."""


def check_outputs(features: Tensor, logits: Tensor) -> None:
    """Features (N, d) and logits (N, K) of the same rows, finite."""
    check_tensor(features, "features", ndim=2, floating=True)
    check_tensor(logits, "logits", ndim=2, floating=True)
    check_same_rows(("features", "logits"), len(features), len(logits))


def check_width(features: Tensor, width: int) -> None:
    """As many features a row as the detector was fitted on."""
    if features.shape[1] != width:
        raise refuse(f"{width} features a row, as at the fit", "features", features, "Use the same layer")


def check_fit(features: Tensor, logits: Tensor, labels: Tensor | None) -> Tensor:
    """The rows to fit on; returns their classes, predicted ones where there are no labels."""
    check_outputs(features, logits)
    check_not_empty(len(features), "features")
    return logits.argmax(dim=1) if labels is None else check_labels(labels, len(features), name="labels")


def wide(values: Tensor) -> Tensor:
    """At least float32: half precision would tie the scores that matter."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
