"""What single rows have against them beside structured poison: wrong labels, copies, outliers, in words."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aidefend.sanitize.confident_learning import ConfidentLearning
from aidefend.sanitize.near_duplicates import NearDuplicates
from aidefend.sanitize.outliers import Outliers

LIKELY = 0.95
FAR = 6.0


@dataclasses.dataclass(frozen=True, eq=False)
class Remarks:
    """What one detector says of the rows of one block of all data.

    Args:
        flagged: (N,) bool.
        words: For each flagged row, in order, the reason.
        weights: For each flagged row what it should count, in [0, 1]; the rules are those of `Decisions`.
        proposed: For each flagged row the label that fits better; empty where none is proposed.
    """

    flagged: Tensor
    words: tuple[str, ...]
    weights: tuple[float, ...]
    proposed: tuple[int, ...] = ()


def remarks_of(detector: Any, block: Mapping[str, Any], scores: Tensor) -> Remarks | None:
    """Rows that a fitted detector would have looked at, with reasons; None for a detector that judges groups only.

    Wrong labels: the issues of confident learning with a score of at least .95, with the label that fits better.
    Copies: every member of a group of near duplicates but the one whose id comes first. Outliers: six robust standard
    deviations beyond the median of the class.
    """
    if isinstance(detector, ConfidentLearning):
        return _wrong_labels(detector, block, scores)
    if isinstance(detector, NearDuplicates):
        return _copies(detector, block, scores)
    if isinstance(detector, Outliers):
        return _outliers(block["labels"], scores)
    return None


def _wrong_labels(detector: ConfidentLearning, block: Mapping[str, Any], scores: Tensor) -> Remarks:
    if not detector.counts:
        return Remarks(torch.zeros(len(scores), dtype=torch.bool), (), ())
    flagged, better = likely_wrong(detector, block, scores)
    words = (
        words_of_wrong_label(int(block["labels"][row]), int(better[row]), float(scores[row]))
        for row in flagged.nonzero().flatten().tolist()
    )
    weights = (1 - scores[flagged]).clamp(0.0, 1.0).tolist()
    return Remarks(flagged, tuple(words), tuple(weights), tuple(better[flagged].tolist()))


def _copies(detector: NearDuplicates, block: Mapping[str, Any], scores: Tensor) -> Remarks:
    groups = detector.groups()
    first = {row_id: group[0] for group in groups for row_id in group[1:]}
    size = {group[0]: len(group) for group in groups}
    flagged = torch.tensor([row_id in first for row_id in block["ids"]], dtype=torch.bool)
    words = (
        f"near duplicate of row {first[block['ids'][row]]} (similarity {float(scores[row]):.3f})"
        for row in flagged.nonzero().flatten().tolist()
    )
    weights = (1 / size[first[block["ids"][row]]] for row in flagged.nonzero().flatten().tolist())
    return Remarks(flagged, tuple(words), tuple(weights))


def _outliers(labels: Tensor, scores: Tensor) -> Remarks:
    gaps = robust_gaps(labels, scores)
    flagged = gaps >= FAR
    words = (words_of_outlier(int(labels[row]), float(gaps[row])) for row in flagged.nonzero().flatten().tolist())
    return Remarks(flagged, tuple(words), tuple((FAR / gaps[flagged]).tolist()))


def likely_wrong(detector: ConfidentLearning, block: Mapping[str, Any], scores: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) bool, rows whose label is likely to be wrong, and (N,) the labels that fit better."""
    better = detector.suggestions(block)
    return detector.issues(block) & (scores >= LIKELY) & (better != block["labels"]), better


def robust_gaps(labels: Tensor, scores: Tensor) -> Tensor:
    """(N,) robust deviations beyond the median of the class, in the dtype of the scores; 0 where a score is NaN."""
    gaps = torch.zeros_like(scores)
    for label in labels.unique().tolist():
        mine = (labels == label) & ~scores.isnan()
        if bool(mine.any()):
            middle = scores[mine].median()
            spread = 1.4826 * (scores[mine] - middle).abs().median()
            if float(spread) > 0:
                gaps[mine] = (scores[mine] - middle) / spread
    return gaps


def words_of_wrong_label(label: int, better: int, score: float) -> str:
    """The remark on a row that is likely to have a wrong label."""
    return f"wrong label: labelled {label}, proposed {better} (score {score:.2f})"


def words_of_outlier(label: int, gap: float) -> str:
    """The remark on an outlier of a class."""
    return f"outlier: {gap:.1f} robust deviations beyond the usual distance in class {label}"
