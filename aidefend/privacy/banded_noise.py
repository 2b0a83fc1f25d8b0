"""Noise that takes back part of itself in the next steps: correlated over a band of steps (matrix factorisation)."""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.signal import lfilter
from torch import Tensor

Array = npt.NDArray[np.float64]
_HORIZON = 4096  # steps; the best coefficients hardly change beyond


@lru_cache(maxsize=64)
def band_coefficients(bands: int, steps: int) -> tuple[float, ...]:
    """The first column (c_0, ..., c_{bands-1}) of the Toeplitz strategy matrix C, of Euclidean length one.

    Of all columns of this width it is the one (to the optimiser's precision) whose noise C^-1 z moves the running sum
    of the gradients, which is what the weights are, the least in mean square over the run.

    Source: Choquette-Choo, Ganesh, McKenna, McMahan, Rush, Thakurta, Xu 2023 ("(Amplified) banded matrix
    factorization"), Toeplitz form; the search starts at the banded square root of Kalinin, Lampert 2024.
    """
    horizon = min(steps, _HORIZON)
    remaining = np.arange(horizon, 0, -1, dtype=np.float64)

    def error(rest: Array) -> float:
        column = np.concatenate([[1.0], rest])
        impulse = np.zeros(horizon)
        impulse[0] = 1.0
        response = np.cumsum(lfilter([1.0], column, impulse))
        found = float(np.log(column @ column) + np.log(remaining @ response**2))
        return found if math.isfinite(found) else 1e9

    root: Array = np.cumprod([(2 * k - 1) / (2 * k) for k in range(1, bands)], dtype=np.float64)
    best: Array = minimize(error, root, method="L-BFGS-B", bounds=[(0.0, 1.0)] * (bands - 1)).x
    column = np.concatenate([[1.0], best if error(best) <= error(root) else root])
    return tuple(float(value) for value in column / np.linalg.norm(column) * (1 - 1e-12))


class BandedNoise:
    """Turns independent noise z_t into y = C^-1 z, one parameter and step at a time.

    A step that was skipped (an aborted batch) starts a new block: C is then block-diagonal, its columns are no longer,
    and whatever came before has no part in it.
    """

    def __init__(self, coefficients: tuple[float, ...]) -> None:
        self._coefficients = coefficients
        self._recent: dict[str, list[Tensor]] = {}
        self._last: dict[str, int] = {}

    def correlated(self, fresh: Tensor, name: str, step: int) -> Tensor:
        """Y of this step from the z of this step, which is used up."""
        if self._last.get(name) != step - 1:
            self._recent[name] = []
        recent = self._recent[name]
        for coefficient, before in zip(self._coefficients[1:], reversed(recent), strict=False):
            fresh.sub_(before, alpha=coefficient)
        fresh.div_(self._coefficients[0])
        self._recent[name] = [*recent, fresh.clone()][-(len(self._coefficients) - 1) :]
        self._last[name] = step
        return fresh


def participations(steps: int, bands: int) -> int:
    """How often a row can take part in so many steps, if it may join one step of each cycle of `bands`."""
    return -(-steps // bands)


def groups_of(uniforms: Array, bands: int) -> npt.NDArray[np.int64]:
    """The step of each cycle in which each row may take part, independent and uniform."""
    return np.minimum((uniforms * bands).astype(np.int64), bands - 1)
