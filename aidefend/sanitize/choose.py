"""Which detectors a screen uses: those that were named, or those for which this data has what they need."""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from aidefend._core.checks import refuse
from aidefend._core.modules import Model
from aidefend.sanitize.activation_clustering import ActivationClustering
from aidefend.sanitize.confident_learning import ConfidentLearning
from aidefend.sanitize.features import Features
from aidefend.sanitize.influence import Influence
from aidefend.sanitize.near_duplicates import NearDuplicates
from aidefend.sanitize.neighbour_disagreement import NeighbourDisagreement
from aidefend.sanitize.outliers import Outliers
from aidefend.sanitize.scan import Scan
from aidefend.sanitize.source_evidence import SourceEvidence
from aidefend.sanitize.spectral_signature import SpectralSignature
from aidefend.sanitize.spectre import Spectre
from aidefend.sanitize.trigger_consistency import TriggerConsistency

OVERLAID_AT_MOST = 10_000  # rows; each costs 20 forward passes


class Detector(Protocol):
    """What `detectors=` takes: fitted block by block, then asked for scores, up = suspicious."""

    def partial_fit(self, block: Mapping[str, Any]) -> Any:
        """Add a block."""

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) scores of a block."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """The detectors of one screen.

    Args:
        detectors: By name, not fitted.
        why: For each what it is there for; and for those that were left out, why.
        named: Whether the caller named them: then what they say of single rows quarantines.
    """

    detectors: Mapping[str, Detector]
    why: Mapping[str, str]
    named: bool


def chosen_for(
    detectors: Any,
    found: Features,
    model: Model,
    trusted: Tensor,
    sources: Sequence[str] | None,
    overlaid: bool = True,
) -> Chosen:
    """What the caller named, copied; or what the data allows. `overlaid`: whether inputs can be laid over each other.

    Raises: ConfigurationError: neither "auto" nor a list of detectors.
    """
    if isinstance(detectors, str) and detectors == "auto":
        return _automatic(found, model, trusted, sources, overlaid)
    named = named_detectors(detectors)
    return Chosen(named, dict.fromkeys(named, "named by the caller"), True)


def _automatic(found: Features, model: Model, trusted: Tensor, sources: Sequence[str] | None, overlaid: bool) -> Chosen:
    picked: list[tuple[Detector, str]] = [
        (SpectralSignature(), "labels and features: the widest direction of a class"),
        (ActivationClustering(), "labels and features: two clusters in a class"),
        (NeighbourDisagreement(), "labels and an independent view: rows at home in another class"),
        (Scan(), "labels and features: classes that are mixtures"),
        (Spectre(), "labels and features: what stands out of a whitened class"),
        (Outliers(), "labels and features: far from the class (a remark)"),
        (ConfidentLearning(), "labels and an independent view: wrong labels, with proposals (a remark)"),
        (NearDuplicates(), "copies of a row (a remark)"),
    ]
    why = {}
    if not overlaid:
        why["trigger_consistency"] = "left out: texts cannot be laid over each other"
    elif len(found) <= OVERLAID_AT_MOST:
        picked.append((TriggerConsistency(model), "a model: answers that overlays do not change"))
    else:
        cost = f"left out: 20 forward passes for each of more than {OVERLAID_AT_MOST:,} rows; name it to have it"
        why["trigger_consistency"] = cost
    if sources is not None:
        picked.append((SourceEvidence(), "sources: each held out as a block (a remark)"))
    rows = trusted & found.usable & (found.labels < found.logits.shape[1])
    if bool(rows.any()):
        block = {name: getattr(found, name)[rows] for name in ("features", "labels", "logits")}
        ids = tuple(row_id for row_id, good in zip(found.ids, rows.tolist(), strict=True) if good)
        if bool((found.labels[found.usable] < found.logits.shape[1]).all()):
            picked.append((Influence({**block, "ids": ids}), "trusted rows: steps that would harm them (a remark)"))
    named = named_detectors([detector for detector, _ in picked], copied=False)
    return Chosen(named, dict(zip(named, (reason for _, reason in picked), strict=True)) | why, False)


def named_detectors(detectors: Any, copied: bool = True) -> dict[str, Detector]:
    """Fresh copies by name; two of one kind get a number."""
    rule, cure = 'detectors to be "auto" or a list of detector objects', "Pass for example [SpectralSignature()]"
    if isinstance(detectors, str) or not isinstance(detectors, Sequence):
        raise refuse(rule, "detectors", detectors, cure)
    named: dict[str, Detector] = {}
    for detector in detectors:
        if isinstance(detector, type) or not all(
            callable(getattr(detector, m, None)) for m in ("partial_fit", "score")
        ):
            raise refuse(rule, "detectors", detector, cure)
        plain = re.sub(r"(?<!^)(?=[A-Z])", "_", type(detector).__name__).lower()
        free = (name for count in range(1, len(detectors) + 1) if (name := f"{plain}_{count}" if count > 1 else plain))
        named[next(name for name in free if name not in named)] = copy.deepcopy(detector) if copied else detector
    return named
