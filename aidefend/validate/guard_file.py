"""A guard on disk: one safetensors file with a JSON header, written whole or not at all; no code in it."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_path, refuse
from aidefend._core.errors import AidefendError
from aidefend._core.modules import Model
from aidefend._core.storage import atomic_path, canonical_json
from aidefend.validate.autoencoders import Autoencoders
from aidefend.validate.calibrating import Calibrated, Facts
from aidefend.validate.calibration import JointCalibration
from aidefend.validate.collaborators import Collaborators
from aidefend.validate.detector import FittedDetector, unique_names
from aidefend.validate.ensemble import KINDS
from aidefend.validate.judging import Mode
from aidefend.validate.keyed_noise import KeyedNoise
from aidefend.validate.model_identity import check_identity
from aidefend.validate.outputs import LabelOnly, Output, Rounded, Tempered, TopK
from aidefend.validate.reverse_sigmoid import ReverseSigmoid
from aidefend.validate.spec import InputSpec
from aidefend.validate.stored import describe_detector, detector_arrays, rebuild_detector, with_prefix

_SCHEMA = "aidefend.guard/2"
_CALIBRATION = ("scores", "knots", "heights", "slopes", "classes")
_OUTPUTS: dict[str, type[Any]] = {kind.__name__: kind for kind in (LabelOnly, TopK, Rounded, Tempered, ReverseSigmoid)}


def write_guard(
    path: str | os.PathLike[str], parts: Calibrated, mode: Mode, output: Output | None, collaborators: Collaborators
) -> None:
    """Everything but the model and the collaborators; see `Guard.save`."""
    header = {
        "schema": _SCHEMA,
        "mode": mode,
        "spec": parts.spec.to_dict(),
        "facts": dataclasses.asdict(parts.facts),
        "history": list(parts.calibration.history),
        "output": None if output is None else _described_output(output),
        "detectors": [describe_detector(detector, KINDS) for detector in parts.detectors],
        "collaborators": list(collaborators.present()),
        "resource": collaborators.resource,
    }
    arrays = {f"calibration/{name}": getattr(parts.calibration, name) for name in _CALIBRATION}
    for i, detector in enumerate(parts.detectors):
        arrays |= {f"detector-{i}/{name}": array for name, array in detector_arrays(detector).items()}
    tensors = {name: array.detach().cpu().contiguous().clone() for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, {"guard": canonical_json(header)})


def read_guard(
    path: str | os.PathLike[str],
    model: Model,
    given: Collaborators,
    output: Output | None = None,
    autoencoder: Any = None,
) -> tuple[Calibrated, Mode, Output | None, Collaborators]:
    """The parts back from `write_guard`, checked against the model and the collaborators that are given."""
    header, arrays = _open(path)
    autoencoders = Autoencoders(autoencoder)
    try:
        facts = Facts(**header["facts"])
        check_identity(model, facts.identity)
        parts = Calibrated(
            InputSpec.from_dict(header["spec"]),
            *_restored(header["detectors"], arrays, facts, header["history"], autoencoders),
            facts,
        )
        mode = check_choice(header["mode"], ("enforce", "monitor", "shadow"), "mode")
        shown = _rebuilt_output(header["output"], output)
        wanted, resource = list(header["collaborators"]), str(header["resource"])
    except AidefendError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(path, error) from error
    autoencoders.check_all_used()
    if missing := [name for name in wanted if name not in given.present()]:
        cure = (
            f"Pass {', '.join(f'{name}=' for name in missing)}: without it the guard would let more through than before"
        )
        raise refuse(f"the collaborators {wanted} that the guard was saved with", "given", given.present(), cure)
    return parts, mode, shown, dataclasses.replace(given, resource=resource)


def _open(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    place = check_path(path)
    try:
        with safetensors.safe_open(place, framework="pt") as file:
            header = json.loads((file.metadata() or {})["guard"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if header["schema"] != _SCHEMA:
            raise KeyError(header["schema"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise _damaged(path, error) from error
    return header, arrays


def _damaged(path: str | os.PathLike[str], error: Exception) -> AidefendError:
    return refuse("a file written by Guard.save", "path", str(path), f"Could not read it ({error!r})")


def _described_output(output: Output) -> list[Any]:
    """[kind, settings]; of a secret key the fingerprint alone."""
    kind = type(output).__name__
    if type(output) is KeyedNoise:
        return [kind, _without_key(output)]
    if _OUTPUTS.get(kind) is not type(output):
        cure = "Apply your own function to decision.outputs instead"
        rule = f"an output of this package to save ({', '.join(sorted([*_OUTPUTS, KeyedNoise.__name__]))})"
        raise refuse(rule, "output", kind, cure)
    return [kind, dataclasses.asdict(output)]  # type: ignore[call-overload]  # all kinds are dataclasses


def _rebuilt_output(described: list[Any] | None, given: Output | None) -> Output | None:
    """The output back; one with a key must be given again, the same, and no other may be given."""
    kind, settings = described or ("", {})
    if kind == KeyedNoise.__name__:
        if type(given) is not KeyedNoise or _without_key(given) != settings:
            rule = f"output=KeyedNoise(...) with the key and the settings of the guard ({settings})"
            raise refuse(rule, "output", given, "Pass it with the same key: the file does not hold the key")
        return given
    if given is not None:
        raise refuse("no output: this guard's file holds its own", "output", given, "Leave output= out")
    return _OUTPUTS[kind](**settings) if described else None


def _without_key(output: KeyedNoise) -> dict[str, Any]:
    return {"fingerprint": output.fingerprint, "scale": output.scale, "step": output.step, "argmax": output.argmax}


def _restored(
    described: list[Any], arrays: Mapping[str, Tensor], facts: Facts, history: list[Any], given: Autoencoders
) -> tuple[tuple[FittedDetector, ...], JointCalibration]:
    detectors = [
        rebuild_detector(one, with_prefix(arrays, f"detector-{i}/"), KINDS, given) for i, one in enumerate(described)
    ]
    fields: dict[str, Any] = {name: arrays[f"calibration/{name}"] for name in _CALIBRATION}
    fields |= {"alpha": facts.alpha, "mode": facts.promise, "delta": facts.delta, "history": history}
    return tuple(detectors), JointCalibration(unique_names(detectors), **fields)
