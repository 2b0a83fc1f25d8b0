"""From scores to p-values: how many rows that are known, or as good as known, to be harmless score as high."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ENOUGH = 20  # trusted rows, for p-values down to 1 / 21

MEANING = (
    "H: the row is exchangeable with its reference. Reference 'trusted': for an honest row that trusted rows stand for "
    "P(p <= a) <= a, and more small values than that speak against the data. Reference 'own class': at most a share a "
    "of a class has p <= a, whatever the data are, so they rank rows and say nothing about whether there is poison."
)


def references(labels: Tensor, usable: Tensor, trusted: Tensor) -> dict[int, str]:
    """For each class what its scores are compared with.

    "trusted rows of the class" where there are twenty, else "trusted rows" where there are twenty in all, else
    "own class".
    """
    good = trusted & usable
    pooled = "trusted rows" if int(good.sum()) >= ENOUGH else "own class"
    return {
        label: "trusted rows of the class" if int((good & (labels == label)).sum()) >= ENOUGH else pooled
        for label in labels[usable].unique().tolist()
    }


def calibrated(scores: Tensor, labels: Tensor, usable: Tensor, trusted: Tensor) -> Tensor:
    """(N,) float64 p-values in (0, 1] of scores (N,), NaN where there is no score.

    (1 + number of reference rows that score at least as high) / (1 + number of reference rows), the row itself left
    out of its reference. See `MEANING` for what they promise.

    Args:
        scores: Up = suspicious, NaN = no opinion.
        labels: (N,) int64.
        usable: (N,) bool.
        trusted: (N,) bool, rows that are known to be good.
    Cost: one sort for each class.
    Source: Vovk, Gammerman, Shafer 2005 (conformal p-values).
    """
    found = torch.full((len(scores),), torch.nan, dtype=torch.float64)
    known = usable & ~scores.isnan()
    for label, kind in references(labels, usable, trusted).items():
        rows = known & (labels == label)
        of_class = known if kind == "trusted rows" else rows
        reference = of_class if kind == "own class" else of_class & trusted
        found[rows] = _p_values(scores, rows, reference)
    return found


def _p_values(scores: Tensor, rows: Tensor, reference: Tensor) -> Tensor:
    usual = scores[reference].sort().values
    at_least = len(usual) - torch.searchsorted(usual, scores[rows].contiguous())
    own = reference[rows].long()  # a row counts itself once, as the 1 in front of the sum
    return (1 + at_least - own).double() / (1 + len(usual) - own).double()


def facts_of_p_values(labels: Tensor, usable: Tensor, trusted: Tensor) -> Mapping[str, Any]:
    """JSON types: what the p-values of detectors mean, and the reference of each class."""
    kinds = references(labels, usable, trusted)
    return {"meaning": MEANING, "reference": {str(label): kind for label, kind in kinds.items()}}
