"""Virtual-logit matching: the part of the features that clean rows do not have, held against the logits."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_int, check_kind, check_tensor, refuse
from aidefend.validate.detector import check_fit, check_outputs, check_squares, check_wide_logits, check_width, wide

_MOST_FEATURES = 10_000


@dataclasses.dataclass(frozen=True)
class ViM:
    """Norm of the features outside the principal subspace of clean rows, scaled to the logits, minus their energy.

    Guarantee: none under attack. Features that never vary and heads of any rank are safe.
    Args:
        dimension: Of the principal subspace, below the number of features d. None, or one that leaves no direction in
            which clean rows vary by more than rounding: by the number r of directions in which they do, 1000 for
            r > 1500, else 512 for r > 768, else r // 2.
        head: The model's last `nn.Linear`, from the features to the logits: its weights give the origin of the
            features. None recovers it from features and logits by least squares, which is the same where the features
            span their space.
    Cost: Fit O(M d^2 + d^3); score one N x d x (d - dimension) product.
    Source: Wang, Li, Feng, Zhang 2022, equations 4 to 7. Differs: the scale is |mean largest logit| / mean residual, so
        that logits that are log probabilities do not turn the score around.
    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [-2.0, 0.0]])
        >>> fitted = ViM().fit(x, x @ torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        >>> score = fitted.score(
        ...     torch.tensor([[1.0, 0.0], [1.0, 5.0]]), torch.tensor([[1.0, -1.0], [1.0, -1.0]])
        ... )
        >>> bool(score[0] < score[1])
        True
    """

    dimension: int | None = None
    head: nn.Linear | None = None
    uses_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dimension is not None:
            check_int(self.dimension, "dimension")
        if self.head is not None:
            check_kind(self.head, nn.Linear, "head", "Pass the model's last layer, or None")

    def fit(self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None) -> "FittedViM":
        """Find the origin, the subspace and the scale; labels are not used."""
        given = check_wide_logits(features, logits).detach().double()
        check_fit(features, logits, labels)
        self._check_width(features)
        rows = check_squares(features)
        origin = -_offset(rows, given, self.head)
        gaps = rows - origin
        squares, axes = torch.linalg.eigh(gaps.T @ gaps / len(rows))  # ascending
        dimension = self._dimension(_rank(squares, torch.finfo(features.dtype).eps))
        directions = axes[:, : len(axes) - dimension]
        residual = torch.linalg.vector_norm(gaps @ directions, dim=1).mean()
        least = 1e-4 * torch.linalg.vector_norm(gaps, dim=1).mean().clamp(min=1e-30)
        scale = given.amax(dim=1).mean().abs() / residual.clamp(min=least)
        return FittedViM(*(array.to(wide(features).dtype) for array in (origin, directions.contiguous(), scale[None])))

    def _check_width(self, features: Tensor) -> None:
        d = features.shape[1]
        if not 1 <= d <= _MOST_FEATURES:
            rule = f"1 to {_MOST_FEATURES} features: the covariance has their square"
            raise refuse(rule, "features", features, "Choose a layer with fewer, or NearestNeighbours")
        if self.dimension is not None and self.dimension >= d:
            raise refuse(f"dimension below the {d} features", "dimension", self.dimension, "Take a smaller one or None")

    def _dimension(self, rank: int) -> int:
        if self.dimension is not None and self.dimension < rank:
            return self.dimension
        return 1000 if rank > 1500 else 512 if rank > 768 else rank // 2


class FittedViM(nn.Module):
    """Origin (d,), the directions outside the subspace (d, r), and the scale (1,); see `ViM`."""

    name: ClassVar[str] = "vim"
    uses_features: ClassVar[bool] = True

    def __init__(self, origin: Tensor, directions: Tensor, scale: Tensor) -> None:
        super().__init__()
        for array, name, rank in ((origin, "origin", 1), (directions, "directions", 2), (scale, "scale", 1)):
            self.register_buffer(name, check_tensor(array, name, ndim=rank, floating=True))
        if len(directions) != len(origin) or len(scale) != 1:
            raise refuse(
                "origin (d,), directions (d, r), scale (1,)", "directions", directions, "Use what fit returned"
            )

    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """Scale |residual| - log sum exp(logits): (N,), higher = stranger."""
        given = check_wide_logits(features, logits)
        check_outputs(features, logits)
        origin, directions, scale = (cast(Tensor, getattr(self, name)) for name in ("origin", "directions", "scale"))
        check_width(features, len(origin))
        residual: Tensor = torch.linalg.vector_norm((wide(features).to(origin.dtype) - origin) @ directions, dim=1)
        return scale * residual - given.logsumexp(dim=1)

    def settings(self) -> Mapping[str, Any]:
        """Its configuration as JSON types: there is none."""
        return {}

    def arrays(self) -> Mapping[str, Tensor]:
        """What it learned."""
        return dict(self.named_buffers())


def _rank(squares: Tensor, eps: float) -> int:
    """How many of the mean squares (d,) along the axes are more than rounding, of the features or of the axes."""
    rounding = eps**2 * squares.sum() + len(squares) * torch.finfo(squares.dtype).eps * squares.amax()
    return int((squares > rounding).sum())


def _offset(rows: Tensor, logits: Tensor, head: nn.Linear | None) -> Tensor:
    """W^+ b of the head logits = W features + b: (d,)."""
    if head is None:
        centre, level = rows.mean(dim=0), logits.mean(dim=0)
        orthogonal, upper = torch.linalg.qr(rows - centre)
        weight = (torch.linalg.pinv(upper, rtol=1e-6) @ (orthogonal.T @ (logits - level))).T
        bias = level - weight @ centre
    else:
        weight = head.weight.detach().double()
        bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach().double()
        if weight.shape != (logits.shape[1], rows.shape[1]):
            rule = f"a head from {rows.shape[1]} features to {logits.shape[1]} logits"
            raise refuse(rule, "head", head, "Pass the layer that turns these features into logits")
    offset: Tensor = torch.linalg.pinv(weight, rtol=1e-7) @ bias
    return offset
