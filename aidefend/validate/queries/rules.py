"""What a query monitor was calibrated to: everything but the state, as one JSON value."""

import base64
import dataclasses
import math
from typing import Any

import numpy as np
from torch import Tensor

from aidefend._core.checks import check_int, check_number, check_probability, check_tensor, refuse
from aidefend.validate.queries.norms import Answered, Array, Norms
from aidefend.validate.queries.sketch import Floats, Sketcher
from aidefend.validate.queries.trail import STATISTICS

SHARED = np.array([name.startswith("shared") for name in STATISTICS])


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """How queries are read, what is usual, and where an account stops being usual.

    Args:
        sketcher: Holds the secret key.
        norms: Of benign queries.
        usual: (S, 2) for each statistic the median of its peaks over benign principals, and what counts as one unit
            beyond it.
        threshold: Of the joint score.
        alpha: Share of benign principals that may be flagged.
        principals: How many of them the threshold was read off.
        rank: It is the rank-th largest of their scores.
        shape: Of one row.
        ttl: Seconds after which evidence has faded to 1 / e, and the life of an entry.
        ring: Queries of a principal that are kept.
    """

    sketcher: Sketcher
    norms: Norms
    usual: Array
    threshold: float
    alpha: float
    principals: int
    rank: int
    shape: tuple[int, ...]
    ttl: float
    ring: int

    def __post_init__(self) -> None:
        check_number(self.threshold, "threshold")
        check_probability(self.alpha, "alpha")
        check_int(self.principals, "principals")
        check_int(self.rank, "rank", 1, self.principals)
        check_number(self.ttl, "ttl", 1.0, 1e9)
        check_int(self.ring, "ring", 8, 4096)
        if self.usual.shape != (len(STATISTICS), 2) or not bool((self.usual[:, 1] > 0).all()):
            raise refuse(f"usual of shape ({len(STATISTICS)}, 2)", "usual", self.usual.shape, "Calibrate again")

    def read(self, x: Tensor, outputs: Tensor) -> Answered:
        """Rows (n, ...) and their logits (n, K) as the monitor sees them."""
        flat, logits = read_rows(x, outputs)
        if tuple(x.shape[1:]) != self.shape:
            raise refuse(f"rows of shape {self.shape}", "x", x, "Calibrate a monitor for rows of this shape")
        if logits.shape[1] != self.norms.num_classes:
            raise refuse(f"outputs with {self.norms.num_classes} classes", "outputs", outputs, "Calibrate again")
        return answer(self.sketcher, flat, logits)

    def score(self, statistics: Array, *, own: bool = False) -> float:
        """The joint score: how many benign units the statistics together lie beyond the benign median."""
        units = np.maximum(statistics - self.usual[:, 0], 0.0) / self.usual[:, 1]
        return float(join(units[~SHARED] if own else units))

    def leading(self, statistics: Array) -> str:
        """The two statistics that say most, for the operator."""
        units = np.maximum(statistics - self.usual[:, 0], 0.0) / self.usual[:, 1]
        return ", ".join(STATISTICS[i] for i in np.argsort(-units)[:2] if units[i] > 0)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, exact; the key is among them."""
        sketcher = self.sketcher
        return {
            "key": base64.b64encode(sketcher.key).decode(),
            "centre": sketcher.centre.tolist(),
            "scale": sketcher.scale.tolist(),
            "unit": sketcher.unit,
            "step": sketcher.step,
            "norms": self.norms.to_dict(),
            "usual": self.usual.tolist(),
            "statistics": list(STATISTICS),
            **{name: getattr(self, name) for name in ("threshold", "alpha", "principals", "rank", "ttl", "ring")},
            "shape": list(self.shape),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Rules":
        """Back from `to_dict`.

        Raises: KeyError, TypeError, ValueError: it is something else.
        """
        if data["statistics"] != list(STATISTICS):
            raise ValueError("statistics of another version")
        centre, scale = (np.array(data[name], dtype=np.float32) for name in ("centre", "scale"))
        shape = tuple(int(size) for size in data["shape"])
        if centre.shape != scale.shape or centre.shape != (int(np.prod(shape)),) or not bool((scale > 0).all()):
            raise ValueError("centre and scale do not fit the shape")
        key = base64.b64decode(data["key"], validate=True)
        sketcher = Sketcher(key, centre, scale, float(data["unit"]), float(data["step"]))
        rest = {name: data[name] for name in ("threshold", "alpha", "principals", "rank", "ttl", "ring")}
        usual = np.array(data["usual"], dtype=np.float64)
        return cls(sketcher, Norms.from_dict(data["norms"]), usual, shape=shape, **rest)


def join(units: Array) -> Array:
    """One number for the statistics of a principal (..., S): their root of squares."""
    found: Array = np.sqrt((units**2).sum(axis=-1))
    return found


def read_rows(x: Tensor, outputs: Tensor) -> tuple[Floats, Array]:
    """Flattened rows (n, F) and logits (n, K) with zeros for what is not finite.

    Raises: ConfigurationError: not tensors, or not one row of outputs for each row.
    """
    check_tensor(x, "x", finite=False)
    check_tensor(outputs, "outputs", ndim=2, finite=False, floating=True, rows=len(x))
    if outputs.shape[1] < 2:
        raise refuse("outputs to be logits (n, K >= 2)", "outputs", outputs, "Pass the logits of the model")
    flat = x.detach().reshape(len(x), math.prod(x.shape[1:])).float().nan_to_num(nan=0.0).cpu().numpy()
    logits = outputs.detach().double().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30).cpu().numpy()
    return flat, logits


def answer(sketcher: Sketcher, flat: Floats, logits: Array) -> Answered:
    """Rows and logits as the monitor sees them."""
    top = np.sort(logits, axis=1)[:, -2:]
    labels = logits.argmax(axis=1) if len(logits) else np.zeros(0, dtype=np.int64)
    return Answered(sketcher.sketch(flat), sketcher.contents(flat), labels, top[:, 1] - top[:, 0])
