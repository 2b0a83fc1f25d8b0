"""Per-example gradients of multinomial logistic regression in closed form: a step costs two matrix products."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from aidefend.privacy.clipping import ClippedSum, row_factors
from aidefend.privacy.config import Clipping
from aidefend.privacy.gradient_parts import guarded, wide

BLOCK_ROWS = 8192


class LinearExamples:
    """Rows of features, each in K versions, whose gradients are averaged before they are clipped.

    The gradient of a row is the mean over its versions of (p - y) outer (x, 1), where p are the class probabilities; so
    its length follows from inner products of features, taken once, and of residuals, taken in each step.
    Args:
        features: (N, K, d), floating point; 16 bits are widened a block at a time.
        labels: (N,) class indices; rows with one outside of 0 .. classes - 1 never count.
        classes: How many.
        block: Rows in memory at a time, beside the features.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, block: int = BLOCK_ROWS) -> None:
        self._features, self._labels, self._classes, self._block = features, labels, classes, block
        products = [self._products(features[rows]) for rows in self._blocks(len(features))]
        self._inner = torch.cat(products) if products else features.new_zeros(0, 1, 1)
        known = (labels >= 0) & (labels < classes)
        self._usable = known & self._inner.flatten(1).isfinite().all(dim=1)
        self._all_usable = bool(self._usable.all())

    def __len__(self) -> int:
        return len(self._features)

    @torch.no_grad()
    def clipped_sum(self, layer: nn.Linear, drawn: Tensor | None, bound: float, clipping: Clipping) -> ClippedSum:
        """The clipped gradients of the drawn rows, summed; `drawn` is a mask (N,), None for all rows.

        Guarantee: one row more or less moves the result by at most `bound` in Euclidean norm, exchanging one by at most
            twice that. A row whose gradient is not finite counts as zero.
        """
        total = ClippedSum(self._zeros(layer))
        rows: Tensor | None = None
        if drawn is not None or not self._all_usable:
            chosen = self._usable if drawn is None else drawn.to(self._usable.device) & self._usable
            total.masked = (len(self) if drawn is None else int(drawn.sum())) - int(chosen.sum())
            rows = torch.nonzero(chosen)[:, 0]
        for part in self._blocks(len(self) if rows is None else len(rows)):
            self._add(layer, part if rows is None else rows[part], bound, clipping, total)
        return total

    def _add(self, layer: nn.Linear, rows: slice | Tensor, bound: float, clipping: Clipping, total: ClippedSum) -> None:
        x, labels = wide(self._features[rows]), self._labels[rows]
        residuals = self._residuals(layer, x, labels)
        squared = _norms_squared(self._inner[rows], residuals)
        finite = squared.isfinite()
        if not bool(finite.all()):  # weights so large that a product overflows: such a row counts as zero
            total.masked += int((~finite).sum())
            x, residuals, squared = x[finite], residuals[finite], squared[finite]
        weighted = residuals * row_factors(squared.sqrt(), bound, clipping)[:, None, None]
        flat = weighted.flatten(0, 1)
        total.add({"weight": flat.T @ x.flatten(0, 1), "bias": flat.sum(dim=0)})

    def _residuals(self, layer: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
        """(n, K, classes): what each version adds to the gradient, before the product with its features."""
        residuals = torch.softmax(layer(x), dim=2)
        residuals -= nn.functional.one_hot(labels, self._classes).to(residuals)[:, None, :]
        return residuals / x.shape[1]

    @staticmethod
    def _products(features: Tensor) -> Tensor:
        """(n, K, K): inner products of (x, 1) between the versions of each row."""
        x = wide(features)
        if x.shape[1] == 1:
            return x.square().sum(dim=2, keepdim=True) + 1
        return x.double() @ x.double().mT + 1

    def _zeros(self, layer: nn.Linear) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) for name, p in layer.named_parameters()}

    def _blocks(self, rows: int) -> Iterator[slice]:
        step = max(1, self._block // max(1, self._features.shape[1]))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _norms_squared(inner: Tensor, residuals: Tensor) -> Tensor:
    """Squared length of each row's gradient, never below the true one by more than rounding, (n,)."""
    if inner.shape[1] == 1:
        return (inner[:, 0, 0] * residuals[:, 0].double().square().sum(dim=1)).to(residuals.dtype)
    r = residuals.double()
    squared = (inner * (r @ r.mT)).sum(dim=(1, 2)).clamp(min=0)
    size = (inner.diagonal(dim1=1, dim2=2).sqrt() * r.norm(dim=2)).sum(dim=1)
    return guarded(squared, size, r.dtype, inner.shape[1] + r.shape[2], residuals.dtype)[0]
