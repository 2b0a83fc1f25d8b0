"""Local intrinsic dimension: how fast the number of clean rows grows with the distance from a row."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_int, check_tensor, refuse
from aidefend._core.neighbours import k_nearest
from aidefend.validate.detector import check_fit, check_outputs, check_width, wide

_LARGEST = 1e6
_SAME = 1e-5  # of the largest number of a row: what rounding makes of the distance of equal rows, with room


@dataclasses.dataclass(frozen=True)
class LocalDimension:
    """Maximum-likelihood estimate of the local intrinsic dimension (LID) around a row, among clean rows.

    A row off the clean data sees all of them at about the same distance, which reads as a high dimension.
    Guarantee: none under attack. Rows on top of a clean row, but for rounding, have a low dimension, never NaN; on top
        of k of them it is 0.
    Args:
        k: Neighbours of the estimate, >= 2. The bank (the rows given to `fit`) must hold at least k rows.
    Cost: One N x M x d matrix product against the M rows of the bank.
    Source: Ma et al. 2018, equation 4 (estimator of Amsaleg et al. 2015). Differs: neighbours come from the whole bank
        in place of a minibatch, of one layer and without a classifier on top; values end at 1e6, and distances
        begin at 1e-5 of the largest number of a usual row: those of equal rows are rounding, whose ratios say anything.
    Example:
        >>> line = torch.linspace(0, 1, 101)[:, None] * torch.ones(1, 3)
        >>> fitted = LocalDimension(k=20).fit(line)
        >>> score = fitted.score(torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.9, 0.1]]))
        >>> bool(score[0] < 2 < score[1])
        True
    """

    k: int = 20

    def __post_init__(self) -> None:
        check_int(self.k, "k", 2)

    def fit(
        self, features: Tensor, logits: Tensor | None = None, labels: Tensor | None = None
    ) -> "FittedLocalDimension":
        """Keep the features as the bank: (M, d), M >= k."""
        check_fit(features, logits, labels)
        return FittedLocalDimension(wide(features.detach()).clone(), self.k)


class FittedLocalDimension(nn.Module):
    """A bank of clean rows (M, d) and the number of neighbours; see `LocalDimension`."""

    name: ClassVar[str] = "local-dimension"
    uses_features: ClassVar[bool] = True

    def __init__(self, bank: Tensor, k: int) -> None:
        super().__init__()
        check_int(k, "k", 2)
        check_tensor(bank, "bank", ndim=2, floating=True)
        if len(bank) < k or bank.shape[1] == 0:
            cure = "Fit on more rows, or take a smaller k"
            raise refuse(f"at least k={k} rows of at least one feature to fit on", "features", bank, cure)
        self.k = k
        self.register_buffer("bank", bank)
        self.register_buffer("least", _SAME * bank.double().abs().amax(dim=1).median(), persistent=False)

    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """-1 / mean log(r_i / r_k): (N,) in [0, 1e6], higher = stranger."""
        check_outputs(features, logits)
        bank = cast(Tensor, self.bank)
        check_width(features, bank.shape[1])
        distances = k_nearest(wide(features).to(bank.dtype), bank, self.k)[0]
        tiny = torch.finfo(distances.dtype).tiny
        least = max(tiny, float(cast(Tensor, self.least)))
        apart = distances.clamp(min=least)
        # all of one length where they are beyond numbers: the highest dimension
        ratios = (apart / apart[:, -1:]).nan_to_num(nan=1.0).clamp(min=tiny)
        dimension = 1 / (-ratios.log().mean(dim=1)).clamp(min=1 / _LARGEST)
        return torch.where(distances[:, -1] > least, dimension, 0.0)

    def settings(self) -> Mapping[str, Any]:
        """Its configuration as JSON types."""
        return {"k": self.k}

    def arrays(self) -> Mapping[str, Tensor]:
        """The bank."""
        return {"bank": cast(Tensor, self.bank)}
