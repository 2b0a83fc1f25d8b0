"""A fitted detector on disk: one safetensors file with a JSON header, written whole or not at all; no code in it."""

import json
import os
from collections.abc import Sequence
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from aidefend._core.checks import check_path, refuse
from aidefend._core.errors import AidefendError
from aidefend._core.storage import atomic_path, canonical_json, unique_fields
from aidefend.validate.autoencoders import Autoencoders
from aidefend.validate.detector import FittedDetector, FittedInputDetector
from aidefend.validate.ensemble import KINDS
from aidefend.validate.stored import describe_detector, detector_arrays, rebuild_detector

_SCHEMA = "aidefend.detector/1"


def save_detector(detector: FittedDetector | FittedInputDetector, path: str | os.PathLike[str]) -> None:
    """Write a fitted detector of this package, ensembles too, to one safetensors file.

    The file holds what was learned from clean rows: `NearestNeighbours` and `LocalDimension` keep their features.
    Args:
        detector: What `fit` returned.
        path: Of the file, in an existing folder.
    Raises: ConfigurationError: a detector of another kind; `Reconstruction` around a callable that is no module.
    Example:
        >>> import tempfile, torch
        >>> from aidefend.validate import Mahalanobis
        >>> rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> fitted = Mahalanobis().fit(rows)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_detector(fitted, f"{folder}/detector.safetensors")
        ...     back = load_detector(f"{folder}/detector.safetensors")
        >>> bool((back.score(rows) == fitted.score(rows)).all())
        True
    """
    header = {"schema": _SCHEMA, "detector": describe_detector(detector, KINDS)}
    write_tensors(path, header, dict(detector_arrays(detector)))


def load_detector(path: str | os.PathLike[str], *, autoencoder: nn.Module | Sequence[nn.Module] | None = None) -> Any:
    """The fitted detector back from `save_detector`; nothing in the file is executed.

    Args:
        path: A file written by `save_detector`.
        autoencoder: Of `Reconstruction`, with the same weights; a list where an ensemble has several.
    Raises: ConfigurationError: a file of another kind, or a damaged one; another autoencoder, none, or one too many.
    Example:
        >>> load_detector("/nowhere/detector.safetensors")
        Traceback (most recent call last):
        aidefend._core.errors.ConfigurationError: ...
    """
    header, arrays = read_tensors(path, _SCHEMA, "save_detector")
    given = Autoencoders(autoencoder)
    try:
        detector = rebuild_detector(header["detector"], arrays, KINDS, given)
    except AidefendError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(path, "save_detector", error) from error
    given.check_all_used()
    return detector


def write_tensors(path: str | os.PathLike[str], header: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    """A JSON header with its schema, and tensors."""
    tensors = {name: array.detach().cpu().contiguous().clone() for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, {"header": canonical_json(header)})


def read_tensors(path: str | os.PathLike[str], schema: str, writer: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors back; refuses what `writer` has not written."""
    place = check_path(path)
    try:
        with safetensors.safe_open(place, framework="pt") as file:
            header = json.loads((file.metadata() or {})["header"], object_pairs_hook=unique_fields)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if header["schema"] != schema:
            raise KeyError(header["schema"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise _damaged(path, writer, error) from error
    return header, arrays


def _damaged(path: str | os.PathLike[str], writer: str, error: Exception) -> AidefendError:
    return refuse(f"a file written by {writer}", "path", str(path), f"Could not read it ({error!r})")
