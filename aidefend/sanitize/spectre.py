"""SPECTRE: whiten a class by the covariance of its honest part, and what still stands out is the poison."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_number
from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.block import check_kin, read_block, score_by_class
from aidefend.sanitize.moments import ClassMoments, merged, moments_of, top_directions
from aidefend.sanitize.sample import ClassSample

_SHARPNESS = 4.0
_STEP = 0.01  # of the rows that a step of the filter lays aside
_SMALLEST = 10


class _Entropy(NamedTuple):
    """Rows meet `(row - centre) @ whitener`, then the quadratic form `form`, of trace 1."""

    centre: Tensor
    whitener: Tensor
    form: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        white = (features - self.centre) @ self.whitener
        score: Tensor = ((white @ self.form) * white).sum(dim=1)
        return score


class Spectre:
    """Quantum entropy score of a row, after its class was whitened by a covariance that outliers cannot shape.

    About 1 for an ordinary row. The robust covariance comes from a filter: as long as some quadratic form of the
    whitened rows varies more than it does for a normal distribution, the rows that drive it most are laid aside.

    Guarantee: none under adaptive attack. Poison that is more than about a fifth of its class is not found, whatever
        `max_share` says: two modes of such sizes vary less in their squares than a normal distribution does.
    Args:
        dimensions: Directions of largest variance of a class that are looked at; fewer in classes with few rows.
        max_share: Largest share of a class that the filter lays aside, in (0, 0.5).
        limit: Rows a class from which the robust covariance is estimated, the same for any sharding.
        seed: Chooses them, and starts the power iteration.
    A class with fewer than 10 rows, or without variation, scores 0; an unfitted class, or a row with NaN or infinity,
    NaN (no opinion).
    Cost: N d^2 + C d^3 operations for the fit, one pass; then about 15 limit r^2 operations a step and class, at most
        100 max_share steps: the d^2 x d^2 moment matrix is never formed. Scoring is a second pass.
    Source: Hayase, Kong, Somani, Oh 2021 (whitening, entropy score); the filter: Diakonikolas, Kamath, Kane, Li,
        Moitra, Stewart 2017. Differs: no poisoned share and no class is given; steps of 1 % in place of the tail
        comparison; the number of directions is fixed.

    Example:
        >>> stream = torch.Generator().manual_seed(0)
        >>> features = torch.randn(200, 8, generator=stream)
        >>> features[:12, 0] += 7.0
        >>> block = {
        ...     "ids": tuple(map(str, range(200))),
        ...     "features": features,
        ...     "labels": torch.zeros(200).long(),
        ... }
        >>> Spectre().partial_fit(block).score(block).topk(12).indices.max().item()
        11
    """

    def __init__(self, dimensions: int = 32, max_share: float = 0.3, limit: int = 4000, seed: int = 0) -> None:
        self.dimensions = check_int(dimensions, "dimensions")
        self.max_share = check_number(max_share, "max_share", 0.0, 0.5, open_low=True, open_high=True)
        self.limit, self.seed = check_int(limit, "limit", _SMALLEST), check_int(seed, "seed", 0)
        self.moments: ClassMoments = {}
        self.sample = ClassSample(limit, seed)
        self._judges: dict[int, Any] | None = None

    def partial_fit(self, block: Mapping[str, Any]) -> "Spectre":
        """Add the rows of a block; returns self."""
        ids, features, labels = read_block(block, self._features()).finite()
        self.moments = merged(self.moments, moments_of(features, labels))
        self.sample.add(ids, features, labels)
        self._judges = None
        return self

    def merge(self, other: "Spectre") -> "Spectre":
        """A new detector that has seen what both have seen."""
        check_kin(self, other, ("dimensions", "max_share", "limit", "seed"))
        total = Spectre(self.dimensions, self.max_share, self.limit, self.seed)
        total.moments = merged(self.moments, other.moments)
        total.sample = self.sample.merged(other.sample)
        return total

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64 >= 0, up = suspicious."""
        rows = read_block(block, self._features())
        if self._judges is None:
            self._judges = {label: self._judge(label) for label in self.moments}
        return score_by_class(rows, self._judges)

    def _judge(self, label: int) -> Any:
        moments, rows = self.moments[label], self.sample.of(label)[1]
        width = min(self.dimensions, len(moments.mean), len(rows) // 4)
        if len(rows) < _SMALLEST or not float(moments.scatter.trace()) > 0:
            return _nothing
        directions = top_directions(moments.covariance(), width)[1]
        stream = make_generator(seed=derive_seed(self.seed, "spectre", label) % 2**63)
        centre, covariance = robust_moments((rows - moments.mean) @ directions, self.max_share, stream)
        centre = moments.mean + directions @ centre
        whitener = directions @ _inverse_root(covariance)
        gap = moments.mean - centre
        whole = whitener.T @ (moments.covariance() + torch.outer(gap, gap)) @ whitener
        return _Entropy(centre, whitener, _entropy_form(whole))

    def _features(self) -> int | None:
        return next((len(moments.mean) for moments in self.moments.values()), None)


def _nothing(features: Tensor) -> Tensor:
    return torch.zeros(len(features), dtype=torch.float64)


def robust_moments(points: Tensor, max_share: float, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean (r,) and covariance (r, r) of the rows (n, r) that stay after those with undue influence are laid aside."""
    kept, n = points, len(points)
    while True:
        mean = kept.mean(dim=0)
        covariance = (kept - mean).T @ (kept - mean) / len(kept)
        white = (kept - mean) @ _inverse_root(covariance)
        form, variance = _most_variable_form(white, stream)
        pairs = points.shape[1] * (points.shape[1] + 1) / 2
        usual = 2 * (1 + (pairs / len(kept)) ** 0.5) ** 2  # of normal rows: the edge of the spectrum for n rows
        aside = max(1, round(_STEP * n))
        if variance <= usual or len(kept) - aside < (1 - max_share) * n:
            return mean, covariance
        drive = (((white @ form) * white).sum(dim=1) - form.trace()).abs()
        kept = kept[drive.argsort(stable=True)[: len(kept) - aside]]


def _most_variable_form(white: Tensor, stream: torch.Generator, steps: int = 15) -> tuple[Tensor, float]:
    """The symmetric form (r, r) of norm 1 whose value varies most over whitened rows, and its variance.

    Power iteration; a step is two products of (n, r) with (r, r).
    """
    width = white.shape[1]
    form = torch.randn(width, width, generator=stream, dtype=torch.float64)
    form, variance = (form + form.T) / (form + form.T).norm(), 0.0
    for _ in range(steps):
        values = ((white @ form) * white).sum(dim=1)
        image = (white * (values - values.mean())[:, None]).T @ white / len(white)
        variance = float((image * form).sum())
        norm = image.norm()
        if not float(norm) > 0:
            break
        form = image / norm
    return form, variance


def _inverse_root(covariance: Tensor) -> Tensor:
    """(r, r) symmetric inverse square root; directions without variance count as of a millionth of the largest."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = 1e-6 * float(values[-1]) if float(values[-1]) > 0 else 1.0
    root: Tensor = vectors @ torch.diag(values.clamp(min=floor).rsqrt()) @ vectors.T
    return root


def _entropy_form(covariance: Tensor) -> Tensor:
    """exp(4 (S - I) / (|S| - 1)) over its trace, for the whitened covariance S of all rows."""
    values, vectors = torch.linalg.eigh(covariance)
    excess = (values - 1) / (values[-1] - 1).clamp(min=1e-3)  # below: nothing stands out
    weights = torch.softmax(_SHARPNESS * excess.clamp(min=-1e3), dim=0)
    form: Tensor = vectors @ torch.diag(weights) @ vectors.T
    return form
