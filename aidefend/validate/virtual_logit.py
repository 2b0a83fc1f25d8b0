"""Virtual-logit matching: the part of the features that clean rows do not have, held against the logits."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_int, check_kind, check_tensor, refuse
from aidefend.validate.detector import check_fit, check_outputs, check_wide_logits, check_width, wide

_MOST_FEATURES = 10_000


@dataclasses.dataclass(frozen=True)
class ViM:
    """Norm of the features outside the principal subspace of clean rows, scaled to the logits, minus their energy.

    Guarantee: none under attack. Features that never vary and heads of any rank are safe.
    Args:
        dimension: Of the principal subspace, below the number of features d. None = 1000 for d > 1500, else 512 for
            d > 768, else d // 2.
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
        d = features.shape[1]
        dimension = self._dimension(features)
        rows = features.detach().double()
        origin = -_offset(rows, given, self.head)
        gaps = rows - origin
        directions = torch.linalg.eigh(gaps.T @ gaps / len(rows)).eigenvectors[:, : d - dimension]  # ascending
        residual = torch.linalg.vector_norm(gaps @ directions, dim=1).mean()
        least = 1e-4 * torch.linalg.vector_norm(gaps, dim=1).mean().clamp(min=1e-30)
        scale = given.amax(dim=1).mean().abs() / residual.clamp(min=least)
        return FittedViM(*(array.to(wide(features).dtype) for array in (origin, directions.contiguous(), scale[None])))

    def _dimension(self, features: Tensor) -> int:
        d = features.shape[1]
        if not 1 <= d <= _MOST_FEATURES:
            rule = f"1 to {_MOST_FEATURES} features: the covariance has their square"
            raise refuse(rule, "features", features, "Choose a layer with fewer, or NearestNeighbours")
        if self.dimension is None:
            return 1000 if d > 1500 else 512 if d > 768 else d // 2
        if self.dimension >= d:
            raise refuse(f"dimension below the {d} features", "dimension", self.dimension, "Take a smaller one or None")
        return self.dimension


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
