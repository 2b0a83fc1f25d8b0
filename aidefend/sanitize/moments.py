"""Count, mean and scatter of features per class: float64, mergeable, the same for any sharding."""

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from aidefend._core.checks import refuse
from aidefend._core.random import derive_seed, make_generator

_EQUAL = 1e-9  # of the largest: eigenvalues, and entries of a direction, that only rounding tells apart


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Sufficient statistics of one class: count, mean (d,), scatter (d, d) = sum of outer products about the mean."""

    count: int
    mean: Tensor
    scatter: Tensor

    def covariance(self) -> Tensor:
        """(d, d), divided by the count; zero for a class of one row."""
        return self.scatter / self.count


ClassMoments = dict[int, Moments]


def moments_of(features: Tensor, labels: Tensor) -> ClassMoments:
    """Statistics of one block: features (N, d) float64, labels (N,)."""
    found: ClassMoments = {}
    for label in labels.unique().tolist():
        rows = features[labels == label]
        mean = rows.mean(dim=0)
        centred = rows - mean
        found[int(label)] = Moments(len(rows), mean, centred.T @ centred)
    return found


def merged(left: ClassMoments, right: ClassMoments) -> ClassMoments:
    """Statistics of both parts together; neither is changed.

    Source: Chan, Golub, LeVeque 1983: the means are never squared, so that far-off features lose no digits.
    """
    total = dict(left)
    for label, part in right.items():
        total[label] = _pooled(total[label], part) if label in total else part
    return total


def _pooled(a: Moments, b: Moments) -> Moments:
    if a.mean.shape != b.mean.shape:
        found = f"{len(a.mean)} and {len(b.mean)} features"
        raise refuse("statistics over the same features", "other", found, "Merge detectors of one feature extractor")
    count, gap = a.count + b.count, b.mean - a.mean
    mean = a.mean + gap * (b.count / count)
    scatter = a.scatter + b.scatter + torch.outer(gap, gap) * (a.count * b.count / count)
    return Moments(count, mean, scatter)


def top_directions(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (r,) and directions (d, r) of the `count` largest, largest first, fixed by the content alone.

    Where variances are equal, any basis of their span would do, and rounding would choose it: there the basis is the
    one nearest to fixed random directions. The sign makes the first of the largest entries positive.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    for first, last in _equal(values, count):
        vectors[:, first:last] = _fixed_basis(vectors[:, first:last])
    values, vectors = values[:count].clamp(min=0), vectors[:, :count]
    sizes = vectors.abs()
    lead = (sizes >= (1 - _EQUAL) * sizes.amax(dim=0)).to(torch.uint8).argmax(dim=0, keepdim=True)
    return values, vectors * torch.where(vectors.gather(0, lead) < 0, -1.0, 1.0)


def spread_along_top(moments: Moments) -> tuple[float, Tensor]:
    """Variance and directions (d, r) of the widest direction of a class: r = 1, but where several are equally wide."""
    values, directions = top_directions(moments.covariance(), len(moments.mean))
    width = int((values >= (1 - _EQUAL) * values[0]).sum())
    return float(values[0]), directions[:, :width]


def _equal(values: Tensor, count: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of each run of eigenvalues (d,), descending, that are equal but for rounding."""
    apart = (values[:-1] - values[1:] > _EQUAL * values[:1].abs()).nonzero().flatten() + 1
    edges = [0, *apart.tolist(), len(values)]
    return ((a, b) for a, b in itertools.pairwise(edges) if b - a > 1 and a < count)


def _fixed_basis(span: Tensor) -> Tensor:
    """An orthonormal basis (d, r) of the span of orthonormal columns (d, r), the same for any such columns."""
    stream = make_generator(seed=derive_seed(0, "directions") % 2**63)
    draws = torch.randn(*span.shape, generator=stream, dtype=span.dtype)
    basis: Tensor = torch.linalg.qr(span @ (span.T @ draws)).Q
    return basis
