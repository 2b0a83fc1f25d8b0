"""Beatrix: how features go together inside a row, beside how they go together in its class."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aidefend._core.checks import check_int
from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.block import check_kin, read_block, score_by_class
from aidefend.sanitize.sample import ClassSample

_SMALLEST = 3
_SCALE = 1.4826
_ORDINARY = 3.0


class _Usual(NamedTuple):
    """Of one class: the centre of its features, and median and spread of each entry of the Gram vectors."""

    centre: Tensor
    median: Tensor
    spread: Tensor


class Beatrix:
    """How far the products of a row's features, two at a time and in several powers, lie outside those of its class.

    Triggers that are made for each input move no single feature alike in all rows, but move how features go together.
    Median and spread of every product come from the class itself, so less than half of a class may be poison; fit on
    blocks of trusted rows instead, where there are some, and score the rest.

    Guarantee: none. A rare honest style scores high as well.
    Args:
        powers: Orders 1 .. powers of the products.
        dimensions: Features are turned into this many random orthogonal combinations first, if there are more.
        limit: Rows a class that tell what is usual, the same for any sharding; every row is scored.
        seed: Chooses them and the combinations.
    About 0 for ordinary rows: the mean excess over three robust standard deviations. A class with fewer than 3 rows
    scores 0; an unfitted class, or a row with NaN or infinity, NaN (no opinion).
    Cost: N powers r^2 / 2 operations and C limit powers r^2 / 2 for the medians. Fitting is one pass, scoring another.
    Source: Ma, Wang, Sun, Xue, Wang, Yang 2023 (Gram matrices of order p, deviation by the median absolute deviation).
        Differs: features are flat, centred by their class median; no trusted set is needed; random combinations bound
            the cost.

    Example:
        >>> stream = torch.Generator().manual_seed(0)
        >>> features = torch.randn(60, 4, generator=stream)
        >>> features[7] = torch.tensor([4.0, 4.0, -4.0, -4.0])
        >>> block = {"ids": tuple(map(str, range(60))), "features": features, "labels": torch.zeros(60).long()}
        >>> Beatrix().partial_fit(block).score(block).argmax().item()
        7
    """

    def __init__(self, powers: int = 3, dimensions: int = 24, limit: int = 1000, seed: int = 0) -> None:
        self.powers, self.dimensions = check_int(powers, "powers", 1, 9), check_int(dimensions, "dimensions")
        self.limit, self.seed = check_int(limit, "limit", _SMALLEST), check_int(seed, "seed", 0)
        self.sample = ClassSample(limit, seed)
        self._known: dict[int, _Usual] | None = None

    def partial_fit(self, block: Mapping[str, Any]) -> "Beatrix":
        """Add the rows of a block; returns self."""
        self.sample.add(*read_block(block, self._features()).finite())
        self._known = None
        return self

    def merge(self, other: "Beatrix") -> "Beatrix":
        """A new detector that has seen what both have seen."""
        check_kin(self, other, ("powers", "dimensions", "limit", "seed"))
        total = Beatrix(self.powers, self.dimensions, self.limit, self.seed)
        total.sample = self.sample.merged(other.sample)
        return total

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64 >= 0, up = suspicious."""
        rows = read_block(block, self._features())
        if self._known is None:
            self._known = {label: self._usual(self.sample.of(label)[1]) for label in self.sample.classes()}
        return score_by_class(rows, {label: partial(self._excess, usual) for label, usual in self._known.items()})

    def _usual(self, features: Tensor) -> _Usual:
        centre = features.median(dim=0).values
        grams = self._gram(features - centre)
        median = grams.median(dim=0).values
        spread = _SCALE * (grams - median).abs().median(dim=0).values
        return _Usual(centre, median, spread if len(features) >= _SMALLEST else torch.zeros_like(spread))

    def _excess(self, usual: _Usual, features: Tensor) -> Tensor:
        known = usual.spread > 1e-9 * usual.spread.max()
        if not bool(known.any()):
            return torch.zeros(len(features), dtype=torch.float64)
        parts = []
        for rows in features.split(512):
            gap = (self._gram(rows - usual.centre)[:, known] - usual.median[known]).abs() / usual.spread[known]
            parts.append((gap - _ORDINARY).clamp(min=0).mean(dim=1))
        return torch.cat(parts)

    def _gram(self, features: Tensor) -> Tensor:
        """(n, powers r (r + 1) / 2): signed roots of the products of powers of all pairs of features."""
        points = features @ self._combinations(features.shape[1])
        first, second = torch.triu_indices(points.shape[1], points.shape[1])
        parts = []
        for power in range(1, self.powers + 1):
            raised = points.pow(power)
            product = raised[:, first] * raised[:, second]
            parts.append(product.sign() * product.abs().pow(1 / power))
        return torch.cat(parts, dim=1)

    def _combinations(self, width: int) -> Tensor:
        if width <= self.dimensions:
            return torch.eye(width, dtype=torch.float64)
        stream = make_generator(seed=derive_seed(self.seed, "beatrix") % 2**63)
        draws = torch.randn(width, self.dimensions, generator=stream, dtype=torch.float64)
        basis: Tensor = torch.linalg.qr(draws).Q
        return basis

    def _features(self) -> int | None:
        classes = self.sample.classes()
        return self.sample.of(classes[0])[1].shape[1] if classes else None
