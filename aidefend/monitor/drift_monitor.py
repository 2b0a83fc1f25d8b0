"""Has the input changed? A two-sample test for each feature, and a bet on the stream of p-values."""

import dataclasses
import threading
from typing import Any

import numpy as np
import torch
from scipy.stats import ks_2samp
from torch import Tensor

from aidefend._core.checks import check_not_empty, check_probability, check_tensor, refuse
from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend.monitor.martingale import CalibrationMartingale, DriftState


@dataclasses.dataclass(frozen=True)
class FeatureDrift:
    """The verdict on one batch of features.

    Args:
        drifted: At least one feature has drifted at family-wise level alpha.
        features: Numbers of the drifted features, ascending.
        statistics: (d,) Kolmogorov-Smirnov distances in [0, 1].
        p_values: (d,) adjusted for the number of features (Holm), so each compares with alpha directly.
        rows: Rows that were used; rows with NaN or infinity are left out and counted in `dropped`.
        dropped: Rows left out.
        alpha: The level.
    """

    drifted: bool
    features: tuple[int, ...]
    statistics: Tensor
    p_values: Tensor
    rows: int
    dropped: int
    alpha: float

    def to_evidence(self) -> Evidence:
        """One finding: the number of drifted features."""
        setting = {
            "alpha": self.alpha,
            "features": self.features[:50],
            "dropped_rows": self.dropped,
            "test": "KS, Holm",
        }
        finding = Finding(
            id="monitor.drifted_features",
            title="Features whose distribution changed",
            severity=Severity.MEDIUM if self.drifted else Severity.INFO,
            value=len(self.features),
            n=self.rows,
            setting=setting,
            limits="Marginal distributions only: a change in how features depend on one another is not seen.",
        )
        return Evidence([finding])


class DriftMonitor:
    """Compares new data with reference data, and watches a guard's p-values.

    Guarantee: `check` flags anything on rows drawn like the reference with probability at most alpha for one call
        (Holm, under every dependence of the features); many calls need their own correction. `observe` raises a false
        alarm with probability at most alpha over its whole life, restarts with `state_dict` included; see
        `CalibrationMartingale`.
    Args:
        reference: (n, ...) float, n >= 20; flattened to (n, d). None if only p-values are watched.
        alpha: Level of each of the two, in (0, 1).
        calibration_n: Number of calibration rows behind the p-values.
    Raises: ConfigurationError: fewer than 20 reference rows, values not finite.
    Cost: check: one sort for each feature.
    Example:
        >>> stream = torch.Generator().manual_seed(0)
        >>> monitor = DriftMonitor(torch.randn(500, 3, generator=stream))
        >>> shifted = torch.randn(500, 3, generator=stream) + torch.tensor([0.0, 0.0, 1.0])
        >>> monitor.check(shifted).features
        (2,)
    """

    def __init__(
        self, reference: Tensor | None = None, *, alpha: float = 0.01, calibration_n: int | None = None
    ) -> None:
        self.alpha, self.calibration_n = check_probability(alpha, "alpha"), calibration_n
        self._reference: Tensor | None = None
        if reference is not None:
            rows = _rows(check_tensor(reference, "reference", floating=True), "reference")
            if len(rows) < 20:
                raise refuse("at least 20 reference rows", "reference", reference, "Pass more rows of known good data")
            self._reference = rows.detach().double().cpu()
        self._stream = CalibrationMartingale(alpha, calibration_n)
        self._lock = threading.Lock()

    def check(self, x: Tensor) -> FeatureDrift:
        """Test a batch (N, ...) against the reference, feature by feature."""
        if self._reference is None:
            raise refuse("a monitor with reference data", "reference", None, "Pass reference= when you build it")
        rows = _rows(check_tensor(x, "x", floating=True, finite=False), "x").detach().double().cpu()
        if rows.shape[1] != self._reference.shape[1]:
            raise refuse(f"{self._reference.shape[1]} features a row", "x", x, "Pass rows of the reference's shape")
        good = rows[torch.isfinite(rows).all(dim=1)]
        check_not_empty(len(good), "x (finite rows)")
        tests = [ks_2samp(self._reference[:, j].numpy(), good[:, j].numpy()) for j in range(good.shape[1])]
        adjusted = _holm(np.array([test.pvalue for test in tests]))
        features = tuple(int(j) for j in np.flatnonzero(adjusted <= self.alpha))
        statistics = torch.tensor([float(test.statistic) for test in tests], dtype=torch.float64)
        p_values = torch.from_numpy(adjusted)
        dropped = len(rows) - len(good)
        return FeatureDrift(bool(features), features, statistics, p_values, len(good), dropped, self.alpha)

    def observe(self, p_values: Tensor) -> DriftState:
        """Add p-values (N,) of newly served rows. Any number of threads may; a `Guard` with drift= does it by itself.

        By hand: of `decision.p_values["combined"]` those that are not NaN, where the guard's promise is "marginal".
        """
        with self._lock:
            return self._stream.observe(p_values)

    def state_dict(self) -> dict[str, Any]:
        """The bet on the p-values as JSON values, to go on after a restart: an alarm that was raised stays raised."""
        with self._lock:
            return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises: ConfigurationError: something else, or of a monitor with another alpha or calibration_n.
        """
        with self._lock:
            self._stream.load_state_dict(state)


def _rows(values: Tensor, name: str) -> Tensor:
    """(N, d) with at least one feature."""
    if values.ndim < 2 or (not values[:1].numel() and len(values)):
        raise refuse(f"{name} of shape (N, ...) with at least one feature", name, values, "Add the batch dimension")
    return values.flatten(1)


def _holm(p_values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """p-values adjusted by Holm's step-down rule: valid under every dependence."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    return adjusted
