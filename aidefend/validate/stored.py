"""Fitted detectors as JSON and tensors, and back: a file may name a kind of the list that its reader has, no other."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aidefend._core.checks import refuse
from aidefend.validate.autoencoders import Autoencoders
from aidefend.validate.consistency import Consistency
from aidefend.validate.detector import FittedDetector, FittedInputDetector
from aidefend.validate.feature_squeezing import FeatureSqueezing
from aidefend.validate.local_dimension import FittedLocalDimension
from aidefend.validate.logit_scores import GEN, Energy, Entropy, MaxLogit, MaxSoftmax
from aidefend.validate.mahalanobis import FittedMahalanobis, FittedRelativeMahalanobis
from aidefend.validate.nearest_neighbours import FittedNearestNeighbours
from aidefend.validate.reconstruction import Reconstruction
from aidefend.validate.virtual_logit import FittedViM

SINGLE: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        *(Energy, MaxLogit, MaxSoftmax, Entropy, GEN),
        *(FittedMahalanobis, FittedRelativeMahalanobis, FittedNearestNeighbours, FittedLocalDimension, FittedViM),
        *(Consistency, FeatureSqueezing, Reconstruction),
    )
}


def describe_detector(
    detector: FittedDetector | FittedInputDetector, kinds: Mapping[str, type[Any]] = SINGLE
) -> list[Any]:
    """[kind, settings] of a fitted detector of one of these kinds.

    Raises: ConfigurationError: it is of another kind.
    """
    kind = type(detector).__name__
    if kinds.get(kind) is not type(detector):
        rule = f"detectors of this package to save ({', '.join(sorted(kinds))})"
        raise refuse(rule, "detectors", kind, "Keep the fitted detector yourself and calibrate again")
    return [kind, dict(detector.settings())]  # type: ignore[union-attr]  # checked by kind


def detector_arrays(detector: FittedDetector | FittedInputDetector) -> Mapping[str, Tensor]:
    """What a detector that `describe_detector` takes has learned."""
    found: Mapping[str, Tensor] = detector.arrays()  # type: ignore[union-attr]  # of a kind of ours, see above
    return found


def rebuild_detector(
    described: list[Any],
    arrays: Mapping[str, Tensor],
    kinds: Mapping[str, type[Any]] = SINGLE,
    autoencoders: Autoencoders | None = None,
) -> Any:
    """The fitted detector back from its description, its arrays, and the autoencoders that were given."""
    kind, settings = described
    if kind not in kinds:
        raise refuse(f"one of the kinds {sorted(kinds)}", "detector", kind, "Read it with the version that wrote it")
    if hasattr(kinds[kind], "rebuild"):
        return kinds[kind].rebuild(autoencoders or Autoencoders(), **settings, **arrays)
    return kinds[kind](**arrays, **settings)


def with_prefix(arrays: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays whose names begin so, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
