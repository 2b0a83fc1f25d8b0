"""What is usual: distances, classes and margins of benign queries, against which a principal's own are held."""

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BINS = 16
_STEPS = 32
_LEAST_IN_CLASS = 20
_RADII = (0.5, 1.0, 1.6)  # of the distance that one unrelated pair in a thousand is closer than


class Answered(NamedTuple):
    """Queries as the monitor sees them: n rows.

    Args:
        sketches: (n, 32) float32.
        contents: n keyed hashes of the rows.
        labels: (n,) top classes.
        margins: (n,) logit of the top class minus the next one's.
    """

    sketches: npt.NDArray[np.float32]
    contents: list[bytes]
    labels: npt.NDArray[np.int64]
    margins: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Norms:
    """Read off the queries of benign principals.

    Args:
        radii: (3,) distances within which rows count as near; the second is the rule, the others finer and coarser. The
            first holds between accounts: a wider one finds more unrelated rows the more traffic there is.
        edges: (BINS - 1,) quantiles of the distance of a query to the nearest earlier one of its principal.
        shares: (K,) of the classes, with a prior, summing to 1.
        centres: (K, 32) mean sketch of each class.
        spreads: (K, 32) variance of each class, > 0.
        oddness: (33,) quantiles of the distance to the centre of the class, in variances.
        margins: (K, 33) quantiles of the margin by class.
    """

    radii: Array
    edges: Array
    shares: Array
    centres: Array
    spreads: Array
    oddness: Array
    margins: Array

    @classmethod
    def of(cls, rows: Answered, unrelated: Array, nearest: Array, num_classes: int) -> "Norms":
        """From benign rows, distances of unrelated pairs, and distances to the nearest earlier query."""
        levels = np.linspace(0, 1, _STEPS + 1)
        positive = unrelated[unrelated > 0]
        radius = float(np.quantile(positive, 0.001)) if len(positive) else 1e-6
        edges = np.quantile(nearest, np.arange(1, BINS) / BINS) if len(nearest) else np.linspace(0, 1, BINS - 1)
        counts = np.bincount(rows.labels, minlength=num_classes).astype(np.float64)
        wide = rows.sketches.astype(np.float64)
        all_spread = np.maximum(wide.var(axis=0), 1e-12)
        centres = np.tile(wide.mean(axis=0), (num_classes, 1))
        spreads = np.tile(all_spread, (num_classes, 1))
        margins = np.tile(np.quantile(rows.margins, levels), (num_classes, 1))
        for label in np.flatnonzero(counts >= _LEAST_IN_CLASS):
            own = rows.labels == label
            centres[label] = wide[own].mean(axis=0)
            spreads[label] = np.maximum(wide[own].var(axis=0), 1e-3 * all_spread)
            margins[label] = np.quantile(rows.margins[own], levels)
        odd = ((wide - centres[rows.labels]) ** 2 / spreads[rows.labels]).mean(axis=1)
        shares = (counts + 1) / (counts.sum() + num_classes)
        return cls(radius * np.array(_RADII), edges, shares, centres, spreads, np.quantile(odd, levels), margins)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.shares)

    def surprises(self, rows: Answered) -> tuple[Array, Array]:
        """How far each row lies from its class, and how thin its margin is, as -log of a benign tail share: (n,) twice.

        About 1 on average for benign rows; at most 8, and more than log 32 only beyond all benign rows.
        """
        odd = ((rows.sketches - self.centres[rows.labels]) ** 2 / self.spreads[rows.labels]).mean(axis=1)
        beyond = np.searchsorted(self.oddness, odd) / (_STEPS + 1)
        below = np.array([np.searchsorted(self.margins[k], m) for k, m in zip(rows.labels, rows.margins, strict=True)])
        far = -np.log(np.maximum(1 - beyond, 0.5 / (_STEPS + 1)))
        past = np.maximum(odd / max(self.oddness[-1], 1e-12), 1.0) - 1.0
        thin = -np.log(np.maximum(below, 0.5) / (_STEPS + 1))
        return np.minimum(far + past, 8.0), thin

    def to_dict(self) -> dict[str, list[float]]:
        """JSON values, exact."""
        return {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, list[float]]) -> "Norms":
        """Back from `to_dict`."""
        return cls(**{field.name: np.array(data[field.name], dtype=np.float64) for field in dataclasses.fields(cls)})
