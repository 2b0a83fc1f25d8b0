"""Distance to the nearest class in whitened feature space."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_tensor, refuse
from aidefend.validate.detector import check_fit, check_outputs, check_squares, check_width, wide

_SMALLEST_SHRINKAGE = 1e-6
_SMALLEST_SHARE = 1e-12  # of the variance between classes, below which a direction is rounding
_MOST_FEATURES = 10_000


@dataclasses.dataclass(frozen=True)
class Mahalanobis:
    """Squared Mahalanobis distance to the nearest class mean, one covariance shared by all classes.

    Guarantee: none under attack. Any scale of the features gives the same order (the shrinkage scales with them);
        singular covariances, dead features and classes with one row are safe.
    Cost: fit O(M d^2 + d^3); score one N x d x d and one N x C x d product, whatever the number of classes C.
    Source: Lee, Lee, Lee, Shin 2018, the last layer alone. Differs: the covariance is shrunk towards a multiple of
        the identity by the amount of Chen, Wiesel, Eldar, Hero 2010 (OAS), and at least by 1e-6 of its scale.
    Example:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 2.0], [9.0, 0.0], [9.0, 2.0]])
        >>> fitted = Mahalanobis().fit(x, x, torch.tensor([0, 0, 1, 1]))
        >>> score = fitted.score(torch.tensor([[9.0, 1.0], [4.5, 1.0]]), torch.zeros(2, 2))
        >>> bool(score[0] < 0.01 < score[1])
        True
    """

    def fit(self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> "FittedMahalanobis":
        """Learn class means and the shared covariance; without labels from the predicted classes."""
        classes = check_fit(features, logits, labels)
        rows = _wide_rows(features)
        centre = rows.mean(dim=0)
        whitening, means = _whitened(rows - centre, classes)
        return _stored(features, centre, whitening, means)


@dataclasses.dataclass(frozen=True)
class RelativeMahalanobis:
    """Mahalanobis distance to the nearest class minus the distance to the data as a whole.

    What all classes share (background, brightness) cancels: only directions in which the class means differ count.
    A row that is strange in the other directions is `Mahalanobis`' to find. With one class there is nothing to compare
    with, and the score is that of `Mahalanobis` (the difference would be 0).
    Guarantee: none under attack.
    Cost: fit as `Mahalanobis`; score one N x d x r and one N x C x r product, r below the number of classes C.
    Source: Ren et al. 2021. Differs: the covariance within classes is shrunk as in `Mahalanobis`, and that of the whole
        is this one plus the covariance of the class means. Two covariances that are shrunk each by an amount of its own
        no longer cancel, and the score is partly the plain distance.
    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> fitted = RelativeMahalanobis().fit(x, x, torch.arange(200) % 2)
        >>> fitted.score(x[:4], x[:4]).shape
        torch.Size([4])
    """

    def fit(
        self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None
    ) -> "FittedRelativeMahalanobis":
        """Learn the covariance within classes and of their means; without labels from the predicted classes."""
        classes = check_fit(features, logits, labels)
        rows = _wide_rows(features)
        centre = rows.mean(dim=0)
        whitening, means = _whitened(rows - centre, classes)
        counts = classes.unique(return_counts=True)[1].to(rows)
        left, sizes, _ = torch.linalg.svd((means * (counts / len(rows)).sqrt()[:, None]).T, full_matrices=False)
        apart = sizes.square() > _SMALLEST_SHARE * sizes.square().sum().clamp(min=1.0)
        if not bool(apart.any()):
            arrays = (centre, whitening, means, torch.ones_like(centre))
        else:
            left, between = left[:, apart], sizes[apart].square()
            arrays = (centre, left.T @ whitening, means @ left, between / (1 + between))
        return FittedRelativeMahalanobis(*(array.to(wide(features).dtype) for array in arrays))


class FittedMahalanobis(nn.Module):
    """Centre (d,), whitening matrix (d, d) and whitened class means (C, d); see `Mahalanobis`."""

    name: ClassVar[str] = "mahalanobis"
    uses_features: ClassVar[bool] = True

    def __init__(self, centre: Tensor, whitening: Tensor, means: Tensor) -> None:
        super().__init__()
        d = len(check_tensor(centre, "centre", ndim=1, floating=True))
        for array, name in ((whitening, "whitening"), (means, "means")):
            check_tensor(array, name, ndim=2, floating=True)
        if whitening.shape != (d, d) or means.shape[1] != d or len(means) < 1:
            raise refuse("centre (d,), whitening (d, d), means (C, d)", "means", means, "Use what fit returned")
        self.register_buffer("centre", centre)
        self.register_buffer("whitening", whitening.contiguous())
        self.register_buffer("means", means)

    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """Squared distance to the nearest class: (N,), higher = stranger."""
        check_outputs(features, logits)
        centre, whitening, means = (cast(Tensor, getattr(self, name)) for name in ("centre", "whitening", "means"))
        check_width(features, centre.shape[-1])
        return _nearest((wide(features).to(means.dtype) - centre) @ whitening.T, means)

    def settings(self) -> Mapping[str, Any]:
        """Its configuration as JSON types: there is none."""
        return {}

    def arrays(self) -> Mapping[str, Tensor]:
        """What it learned."""
        return dict(self.named_buffers())


class FittedRelativeMahalanobis(nn.Module):
    """Centre (d,), whitened directions (r, d) in which class means differ, means (C, r) and shares (r,) along them.

    A share is the part of the variance along a direction that lies between classes. See `RelativeMahalanobis`.
    """

    name: ClassVar[str] = "relative-mahalanobis"
    uses_features: ClassVar[bool] = True

    def __init__(self, centre: Tensor, directions: Tensor, means: Tensor, shares: Tensor) -> None:
        super().__init__()
        for array, name, rank in ((centre, "centre", 1), (directions, "directions", 2), (means, "means", 2)):
            check_tensor(array, name, ndim=rank, floating=True)
        check_tensor(shares, "shares", ndim=1, floating=True)
        if directions.shape != (len(shares), len(centre)) or means.shape[1] != len(shares) or len(means) < 1:
            rule = "centre (d,), directions (r, d), means (C, r), shares (r,)"
            raise refuse(rule, "directions", directions, "Use what fit returned")
        for name, array in (("centre", centre), ("directions", directions), ("means", means), ("shares", shares)):
            self.register_buffer(name, array.contiguous())

    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """Squared distance to the nearest class minus that to the whole: (N,), higher = stranger."""
        check_outputs(features, logits)
        centre, directions, means, shares = (
            cast(Tensor, getattr(self, name)) for name in ("centre", "directions", "means", "shares")
        )
        check_width(features, len(centre))
        rows = (wide(features).to(means.dtype) - centre) @ directions.T
        # |z - m|^2 - z^T (1 - share) z: what all classes share never enters, so that nothing cancels in rounding
        gaps: Tensor = (means.square().sum(dim=1) - 2 * rows @ means.T).amin(dim=1)
        return _beyond(gaps + rows.square() @ shares)

    def settings(self) -> Mapping[str, Any]:
        """Its configuration as JSON types: there is none."""
        return {}

    def arrays(self) -> Mapping[str, Tensor]:
        """What it learned."""
        return dict(self.named_buffers())


def _stored(features: Tensor, *arrays: Tensor) -> FittedMahalanobis:
    """Fitted in float64, used in the precision of the features: a whitening matrix is read whole at every call."""
    return FittedMahalanobis(*(array.to(wide(features).dtype) for array in arrays))


def _nearest(rows: Tensor, means: Tensor) -> Tensor:
    """Smallest squared distance by the expanded square: rows and means are centred, so little cancels."""
    gap = rows.square().sum(dim=1, keepdim=True) - 2 * rows @ means.T + means.square().sum(dim=1)
    return _beyond(gap.amin(dim=1)).clamp(min=0)


def _beyond(scores: Tensor) -> Tensor:
    """Infinity where squares of finite features overflow to a difference of infinities."""
    return scores.nan_to_num(nan=math.inf, posinf=math.inf)


def _wide_rows(features: Tensor) -> Tensor:
    if not 1 <= features.shape[1] <= _MOST_FEATURES:
        rule = f"1 to {_MOST_FEATURES} features: the covariance has their square"
        raise refuse(rule, "features", features, "Choose a layer with fewer, or NearestNeighbours")
    return check_squares(features)


def _whitened(rows: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Whitening W (d, d) with W^T W = covariance within classes ^-1, and whitened class means (C, d), in float64."""
    present, index = classes.unique(return_inverse=True)
    counts = torch.bincount(index, minlength=len(present)).to(rows)
    means = rows.new_zeros(len(present), rows.shape[1]).index_add(0, index, rows) / counts[:, None]
    gaps = rows - means[index]
    lower = torch.linalg.cholesky(_shrunk(gaps.T @ gaps / len(rows), len(rows)))
    whitening = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
    return whitening, means @ whitening.T


def _shrunk(covariance: Tensor, n: int) -> Tensor:
    """OAS shrinkage towards the mean variance; the identity if nothing varies."""
    d = len(covariance)
    trace, square = covariance.trace(), covariance.square().sum()
    if float(trace) <= 0:
        return torch.eye(d).to(covariance)
    spread = square - trace.square() / d
    above = (1 - 2 / d) * square + trace.square()
    share = float(above / ((n + 1 - 2 / d) * spread)) if float(spread) > 0 else 1.0
    share = min(1.0, max(share, _SMALLEST_SHRINKAGE))
    return (1 - share) * covariance + share * trace / d * torch.eye(d).to(covariance)
