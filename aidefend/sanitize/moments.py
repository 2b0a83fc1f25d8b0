"""Count, mean and scatter of features per class: float64, mergeable, the same for any sharding."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.checks import refuse


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
    """Eigenvalues (r,) and directions (d, r) of the `count` largest, largest first, signs fixed by their content."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count]
    lead = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return values, vectors * torch.where(lead < 0, -1.0, 1.0)
