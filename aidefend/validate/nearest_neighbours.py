"""Distance to the k-th nearest clean row in feature space."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from aidefend._core.checks import check_int, check_tensor, refuse
from aidefend.validate.detector import check_fit, check_outputs, check_width, wide

_LARGEST_BLOCK = 2**24  # similarities in memory at once


@dataclasses.dataclass(frozen=True)
class NearestNeighbours:
    """Cosine distance to the k-th nearest row of a bank of clean rows.

    Guarantee: none under attack: whoever can move the features towards the bank passes. Through `Guard` the rate of
        false positives holds for rows that are exchangeable with the calibration rows.
    Args:
        k: Which neighbour, >= 1. The bank (the rows given to `fit`) must hold at least k rows.
    Cost: One N x M x d matrix product against the M rows of the bank.
    Source: Sun, Ming, Zhu, Li 2022. Differs: cosine distance in place of the Euclidean one between normalised rows
        (the same order), and a zero vector has distance 1 to everything.
    Example:
        >>> fitted = NearestNeighbours(k=1).fit(torch.eye(2), torch.eye(2))
        >>> fitted.score(torch.tensor([[5.0, 0.0], [-1.0, 0.0]]), torch.zeros(2, 2)).tolist()
        [0.0, 1.0]
    """

    k: int = 50

    def __post_init__(self) -> None:
        check_int(self.k, "k")

    def fit(
        self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None
    ) -> "FittedNearestNeighbours":
        """Keep the features as the bank: (M, d), M >= k."""
        check_fit(features, logits, labels)
        return FittedNearestNeighbours(_unit(wide(features.detach())), self.k)


class FittedNearestNeighbours(nn.Module):
    """A bank of clean rows of length one and the number of the neighbour; see `NearestNeighbours`."""

    name: ClassVar[str] = "nearest-neighbours"
    uses_features: ClassVar[bool] = True

    def __init__(self, bank: Tensor, k: int) -> None:
        super().__init__()
        check_int(k, "k")
        if len(bank) < k or bank.shape[1] == 0:
            cure = "Fit on more rows, or take a smaller k"
            raise refuse(f"at least k={k} rows of at least one feature to fit on", "features", bank, cure)
        check_tensor(bank, "bank", ndim=2, floating=True)
        self.k = k
        self.register_buffer("bank", bank)

    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """1 - cosine similarity to the k-th nearest bank row: (N,) in [0, 2], higher = stranger."""
        check_outputs(features, logits)
        check_width(features, cast(Tensor, self.bank).shape[1])
        return self.quick_score(features, logits)

    def quick_score(self, features: Tensor, _: Tensor | None = None) -> Tensor:
        """As `score`, for features (N, d) that are known to be finite and as wide as at the fit."""
        bank = cast(Tensor, self.bank)
        queries = _unit(wide(features).to(bank.dtype))
        size = max(1, _LARGEST_BLOCK // bank.shape[0])
        if queries.shape[0] <= size:
            return self._distances(queries, bank)
        return torch.cat([self._distances(part, bank) for part in queries.split(size)])

    def _distances(self, queries: Tensor, bank: Tensor) -> Tensor:
        similar = queries @ bank.T
        if similar.device.type == "cpu" and not similar.requires_grad:
            place = similar.shape[1] - self.k  # numpy selects the same number several times as fast as topk
            chosen = torch.from_numpy(np.partition(similar.numpy(), place, axis=1)[:, place])
        else:
            chosen = similar.topk(self.k, dim=1).values[:, -1]
        return (1 - chosen).clamp(min=0)

    def settings(self) -> Mapping[str, Any]:
        """Its configuration as JSON types."""
        return {"k": self.k}

    def arrays(self) -> Mapping[str, Tensor]:
        """The bank."""
        return {"bank": cast(Tensor, self.bank)}


def _unit(rows: Tensor) -> Tensor:
    """Rows of length one; a zero row stays zero. Largest entry first, so that no square overflows or vanishes."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1.0)
    lengths: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / lengths.clamp(min=1.0)
