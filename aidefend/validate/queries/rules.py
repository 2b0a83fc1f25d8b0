"""What a query monitor was calibrated to: everything but the state, as one JSON value."""

import base64
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_number, check_probability, check_tensor, refuse
from aidefend.validate.queries.norms import Answered, Array, Norms
from aidefend.validate.queries.sketch import Floats, Sketcher
from aidefend.validate.queries.trail import STATISTICS

SHARED = np.array([name.startswith("shared") for name in STATISTICS])
COUNTED = SHARED | np.isin(STATISTICS, ("near", "burst", "crowd", "haze", "lateral", "flips", "lows"))
_VOLUME = STATISTICS.index("volume")
_NUMBERS = ("weight", "threshold", "alpha", "principals", "rank", "ttl", "ring")
_SOME = 64  # queries; fewer say too little of an account's habits to count on


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """How queries are read, what is usual, and where an account stops being usual.

    Args:
        sketcher: Holds the secret key.
        norms: Of benign queries.
        usual: (2, S, 2) for each statistic, as it is and `paced`, the median of its peaks over benign principals, and
            what counts as one unit beyond it.
        weight: Of the score of paced statistics beside that of the others.
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
    weight: float
    threshold: float
    alpha: float
    principals: int
    rank: int
    shape: tuple[int, ...]
    ttl: float
    ring: int

    def __post_init__(self) -> None:
        check_number(self.weight, "weight", 0.0, open_low=True)
        check_number(self.threshold, "threshold")
        check_probability(self.alpha, "alpha")
        check_int(self.principals, "principals")
        check_int(self.rank, "rank", 1, self.principals)
        check_number(self.ttl, "ttl", 1.0, 1e9)
        check_int(self.ring, "ring", 8, 4096)
        if self.usual.shape != (2, len(STATISTICS), 2) or not bool((self.usual[..., 1] > 0).all()):
            raise refuse(f"usual of shape (2, {len(STATISTICS)}, 2)", "usual", self.usual.shape, "Calibrate again")

    def read(self, x: Tensor, outputs: Tensor) -> Answered:
        """Rows (n, ...) and their logits (n, K) as the monitor sees them."""
        flat, logits = read_rows(x, outputs)
        if tuple(x.shape[1:]) != self.shape:
            raise refuse(f"rows of shape {self.shape}", "x", x, "Calibrate a monitor for rows of this shape")
        if logits.shape[1] != self.norms.num_classes:
            raise refuse(f"outputs with {self.norms.num_classes} classes", "outputs", outputs, "Calibrate again")
        return answer(self.sketcher, flat, logits)

    def units(self, statistics: Array) -> Array:
        """(..., 2, S) from (..., S): how many benign units each lies beyond the benign median, as it is and `paced`."""
        both = np.stack([statistics, paced(statistics)], axis=-2)
        found: Array = np.maximum(both - self.usual[..., 0], 0.0) / self.usual[..., 1]
        return found

    def scores(self, statistics: Array, *, own: bool = False) -> Array:
        """The joint score (...) of statistics (..., S): the larger one of the roots of squares of both kinds of units.

        What is paced is sooner sure of a quick attack, what is not does not mind queries in between.

        Args:
            statistics: By `STATISTICS`.
            own: Without what others have asked.
        """
        roots = join(self.units(statistics)[..., ~SHARED if own else slice(None)])
        found: Array = np.maximum(roots[..., 0], self.weight * roots[..., 1])
        return found

    def leading(self, statistics: Array) -> str:
        """The two statistics that say most, for the operator."""
        units = (self.units(statistics) * np.array([[1.0], [self.weight]])).max(axis=0)
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
            **{name: getattr(self, name) for name in _NUMBERS},
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
        rest = {name: data[name] for name in _NUMBERS}
        usual = np.array(data["usual"], dtype=np.float64)
        return cls(sketcher, Norms.from_dict(data["norms"]), usual, shape=shape, **rest)


def paced(statistics: Array) -> Array:
    """Statistics (..., S) of which what is counted near earlier queries is held against the root of the volume.

    A benign account collects it as it asks on, so that otherwise the busy ones set a threshold that a quick attack does
    not reach in time. The volume itself is not, or natural queries in between would hide an attack.
    """
    pace = np.sqrt(1 + statistics[..., _VOLUME, None] / _SOME)
    found: Array = np.where(COUNTED, statistics / pace, statistics)
    return found


def join(units: Array) -> Array:
    """One number for the statistics of a principal (..., S): their root of squares."""
    found: Array = np.sqrt((units**2).sum(axis=-1))
    return found


def read_rows(x: Tensor, outputs: Tensor) -> tuple[Floats, Array]:
    """Flattened rows (n, F) and logits (n, K) with zeros for what is not finite; rows of 64 bits keep all of them.

    Rows that rounding to 32 bits made equal would pass for one row that is asked again: gradients are found so.

    Raises: ConfigurationError: not tensors, or not one row of outputs for each row.
    """
    check_tensor(x, "x", finite=False)
    check_tensor(outputs, "outputs", ndim=2, finite=False, floating=True, rows=len(x))
    if outputs.shape[1] < 2:
        raise refuse("outputs to be logits (n, K >= 2)", "outputs", outputs, "Pass the logits of the model")
    exact = torch.float64 if x.dtype in (torch.float64, torch.int64) else torch.float32
    flat = x.detach().reshape(len(x), math.prod(x.shape[1:])).to(exact).nan_to_num(nan=0.0).cpu().numpy()
    logits = outputs.detach().double().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30).cpu().numpy()
    return flat, logits


def answer(sketcher: Sketcher, flat: Floats, logits: Array) -> Answered:
    """Rows and logits as the monitor sees them."""
    top = np.sort(logits, axis=1)[:, -2:]
    labels = logits.argmax(axis=1) if len(logits) else np.zeros(0, dtype=np.int64)
    return Answered(sketcher.sketch(flat), sketcher.contents(flat), labels, top[:, 1] - top[:, 0])
