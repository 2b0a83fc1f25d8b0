"""Distance to the k-th nearest clean row in feature space."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from aidefend._core.checks import check_int, check_tensor, refuse
from aidefend.validate.detector import as_array, check_fit, check_outputs, check_width, in_numpy, wide

_LARGEST_BLOCK = 2**24  # similarities in memory at once
_FEW = 1024  # numbers
_SHORTEST, _LONGEST = 1e-15, 1e15


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
        queries = wide(features).to(bank.dtype)
        size = max(1, _LARGEST_BLOCK // bank.shape[0])
        distances = self._quick_distances if in_numpy(queries) else self._distances
        if queries.shape[0] <= size:
            return distances(queries, bank)
        return torch.cat([distances(part, bank) for part in queries.split(size)])

    def _distances(self, queries: Tensor, bank: Tensor) -> Tensor:
        """Any device, with gradients."""
        similar = _unit(queries) @ bank.T
        return (1 - similar.topk(self.k, dim=1).values[:, -1]).clamp(min=0)

    def _quick_distances(self, queries: Tensor, bank: Tensor) -> Tensor:
        """The same on the CPU, where numpy selects one number several times as fast as topk: float64.

        The length of a query does not change which row is nearest: one number a row is divided by it, at the end.
        """
        lengths = _lengths(queries)
        if extreme := [i for i, length in enumerate(lengths) if not _SHORTEST < length < _LONGEST]:
            queries = queries.index_copy(0, torch.tensor(extreme), _unit(queries[extreme]))  # products could overflow
            lengths = [1.0 if i in extreme else length for i, length in enumerate(lengths)]
        similar = as_array(queries @ bank.T)
        place = similar.shape[1] - self.k
        similar.partition(place, axis=1)
        cosines = zip(similar[:, place].tolist(), lengths, strict=True)
        return torch.tensor([max(0.0, 1 - product / length) for product, length in cosines], dtype=torch.float64)

    def settings(self) -> Mapping[str, Any]:
        """Its configuration as JSON types."""
        return {"k": self.k}

    def arrays(self) -> Mapping[str, Tensor]:
        """The bank."""
        return {"bank": cast(Tensor, self.bank)}


def _lengths(rows: Tensor) -> list[float]:
    """Euclidean lengths, in float64; of few numbers in plain Python, which is done before a tensor operation starts."""
    if rows.numel() <= _FEW:
        return [math.hypot(*row) for row in rows.tolist()]
    found: list[float] = vector_norm(rows, dim=1, dtype=torch.float64).tolist()
    return found


def _unit(rows: Tensor) -> Tensor:
    """Rows of length one; a zero row stays zero. Largest entry first, so that no square overflows or vanishes."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1.0)
    lengths: Tensor = vector_norm(scaled, dim=1, keepdim=True)
    return scaled / lengths.clamp(min=1.0)
