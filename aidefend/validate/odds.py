"""What tells shifted rows from clean ones, one rule for each kind of shift, and all of them as one score."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import softplus

from aidefend._core.checks import check_tensor, refuse

_LEAST_WEIGHT = 0.05
_PENALTY = 3e-3


class Odds(NamedTuple):
    """For K kinds of shift the log odds that a row is shifted so, linear in the standard scores of D detectors.

    Args:
        centre: (D,) medians of clean scores.
        spread: (D,) their standard deviations.
        weights: (K, D), at least .05: no score that rises lowers the odds, and none can be ignored for good.
        offsets: (K,).
    """

    centre: Tensor
    spread: Tensor
    weights: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, clean: Tensor, shifted: Mapping[str, Tensor]) -> "Odds":
        """Logistic regression of each kind's scores (m, D) against the clean ones (n, D), both counted alike."""
        given = clean.double()
        centre, spread = given.median(dim=0).values, given.std(dim=0)
        spread = torch.where(spread > 0, spread, centre.abs().clamp(min=1.0))
        fits = [
            _regression(((given - centre) / spread).cpu().numpy(), ((one.double() - centre) / spread).cpu().numpy())
            for one in shifted.values()
        ]
        weights, offsets = (torch.as_tensor(np.stack(part)).to(given) for part in zip(*fits, strict=True))
        return cls(centre, spread, weights, offsets)

    def checked(self, width: int) -> "Odds":
        """Itself, if its tensors are of `width` detectors and keep the score rising."""
        check_tensor(self.weights, "weights", ndim=2, floating=True)
        for array, name, size in (
            (self.centre, "centre", width),
            (self.spread, "spread", width),
            (self.offsets, "offsets", len(self.weights)),
        ):
            check_tensor(array, name, ndim=1, floating=True, rows=size)
        if self.weights.shape[1] != width or not bool((self.spread > 0).all() and (self.weights > 0).all()):
            raise refuse(f"weights (K, {width}) and spreads above 0", "weights", self.weights, "Use what fit returned")
        return self

    def surprise(self, scores: Tensor) -> Tensor:
        """Sum over the kinds of -log P(clean), of scores (N, D): (N,) float64, rising in each."""
        standard = (scores.to(self.centre) - self.centre) / self.spread
        return softplus(standard @ self.weights.T + self.offsets, threshold=30).sum(dim=1)


def _regression(
    clean: np.ndarray[tuple[int, int], np.dtype[np.float64]], shifted: np.ndarray[tuple[int, int], np.dtype[np.float64]]
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], np.float64]:
    """Weights (D,) and offset with the least mean log loss over both sets, with a small penalty on the squares."""
    rows = np.concatenate([clean, shifted])
    truth = np.repeat([0.0, 1.0], [len(clean), len(shifted)])
    share = np.repeat([0.5 / len(clean), 0.5 / len(shifted)], [len(clean), len(shifted)])
    width = rows.shape[1]

    def loss(found: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, object]:
        weights, odds = found[:-1], rows @ found[:-1] + found[-1]
        error = share * (np.exp(-np.logaddexp(0, -odds)) - truth)
        value = share @ (np.logaddexp(0, odds) - truth * odds) + _PENALTY * (weights @ weights) / width
        return value, np.append(rows.T @ error + 2 * _PENALTY * weights / width, error.sum())

    begin, bounds = np.append(np.full(width, 1 / width), 0.0), [(_LEAST_WEIGHT, None)] * width + [(None, None)]
    found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds).x
    return found[:-1], found[-1]
