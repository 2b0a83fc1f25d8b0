"""Spectral signatures: poison of one class moves along the direction in which the class varies most."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aidefend.sanitize.block import check_kin, read_block
from aidefend.sanitize.moments import ClassMoments, merged, moments_of, spread_along_top


class SpectralSignature:
    """Distance of a row from its class mean along the class's top singular direction, in standard deviations.

    Where several directions vary equally much, as the categories of a table can, the distance in their span counts.

    Guarantee: none under adaptive attack. The score ranks poison first where poison and clean rows of a class differ by
        more than the class's own variation (Source, Lemma 3.1: squared shift >= 6 sigma^2 / rate). A broad clean class
        hides small shifts; a poison that is most of its class is not told from the clean part by this score.
    `partial_fit` takes blocks in any order and number; `merge` joins shards: the statistics agree within 1e-9 relative.
    A class with one row scores 0; a class that was never fitted, or a row with NaN or infinity, scores NaN (no
    opinion).
    Cost: N d^2 + C d^3 operations, C d^2 numbers of memory, one pass.
    Source: Tran, Li, Madry 2018, Algorithm 1. Differs: the feature is centred before it meets the direction (several
        public copies project the uncentred one, which is blind on one side); no rate is assumed, nothing is removed.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [8.0, 0.0]])
        >>> block = {"ids": tuple("abcd"), "features": features, "labels": torch.zeros(4, dtype=torch.int64)}
        >>> SpectralSignature().partial_fit(block).score(block).argmax().item()
        3
    """

    def __init__(self) -> None:
        self.moments: ClassMoments = {}

    def partial_fit(self, block: Mapping[str, Any]) -> "SpectralSignature":
        """Add the rows of a block; returns self."""
        rows = read_block(block, self._dimensions())
        self.moments = merged(self.moments, moments_of(rows.features[rows.usable], rows.labels[rows.usable]))
        return self

    def merge(self, other: "SpectralSignature") -> "SpectralSignature":
        """A new detector that has seen what both have seen."""
        check_kin(self, other, ())
        total = SpectralSignature()
        total.moments = merged(self.moments, other.moments)
        return total

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64, up = suspicious."""
        rows = read_block(block, self._dimensions())
        scores = torch.full((len(rows.ids),), torch.nan, dtype=torch.float64)
        for label, moments in self.moments.items():
            mine = (rows.labels == label) & rows.usable
            if bool(mine.any()):
                variance, directions = spread_along_top(moments)
                along = ((rows.features[mine] - moments.mean) @ directions).norm(dim=1)
                unit = (variance * directions.shape[1]) ** 0.5
                scores[mine] = along / unit if unit > 0 else torch.zeros_like(along)
        return scores

    def _dimensions(self) -> int | None:
        return next((len(moments.mean) for moments in self.moments.values()), None)
