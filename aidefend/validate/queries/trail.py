"""What one principal asked lately, and the evidence that it adds up to: bounded memory, one pass, no input kept."""

import dataclasses
import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aidefend.validate.queries.norms import BINS, Answered, Array, Norms
from aidefend.validate.queries.sketch import WIDTH

STATISTICS = (
    *("near", "burst", "crowd", "haze", "lateral", "flips", "lows"),
    *("drift", "odd", "thin", "classes", "volume", "shared", "shared flips"),
)
_SUMS = ("near", "lateral", "flips", "lows", "volume", "odd", "thin", "fresh")
_PEAKS = ("burst", "crowd", "haze", "shared", "shared flips")
_HEAD = struct.Struct("<4sHHddd")
_MAGIC = b"aqt1"
_ENTRY = np.dtype(
    [
        *(("sketch", np.float16, (WIDTH,)), ("step", np.float16, (WIDTH,)), ("content", "S8"), ("time", np.float64)),
        *(("margin", np.float32), ("label", np.int16), ("hits", np.uint16)),
    ]
)


class Shared(NamedTuple):
    """The crowd around a query: how many different rows other principals put in, and how often their class changed."""

    size: float = 0.0
    flips: float = 0.0


@dataclasses.dataclass(eq=False)
class Trail:
    """The latest queries of a principal and its running evidence; everything fades with e-folding time `ttl`.

    Args:
        entries: (n,) of the ring, oldest first.
        sums: By `_SUMS`.
        peaks: By `_PEAKS`.
        bins: (BINS,) distances to the nearest earlier query, by benign quantile.
        classes: (K,) counts of top classes.
        updated: When the principal last asked, seconds.
        flagged: When it was flagged, 0 if it was not.
        acts: From when on it gets no answers; infinite as long as its own queries do not speak against it.
    """

    entries: npt.NDArray[np.void]
    sums: Array
    peaks: Array
    bins: Array
    classes: Array
    updated: float = 0.0
    flagged: float = 0.0
    acts: float = np.inf

    @classmethod
    def new(cls, num_classes: int) -> "Trail":
        """Of a principal that nobody has seen."""
        sums, peaks, bins, classes = (np.zeros(n) for n in (len(_SUMS), len(_PEAKS), BINS, num_classes))
        return cls(np.zeros(0, dtype=_ENTRY), sums, peaks, bins, classes)

    def to_bytes(self) -> bytes:
        """For a store."""
        head = _HEAD.pack(_MAGIC, len(self.classes), len(self.entries), self.updated, self.flagged, self.acts)
        numbers = np.concatenate([self.sums, self.peaks, self.bins, self.classes]).astype("<f4")
        return head + numbers.tobytes() + self.entries.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, num_classes: int) -> "Trail":
        """Back from a store.

        Raises: ValueError: it is of another kind, length or number of classes.
        """
        magic, classes, count, updated, flagged, acts = _HEAD.unpack_from(data)
        places = np.cumsum([len(_SUMS), len(_PEAKS), BINS, classes])
        begin = _HEAD.size + 4 * int(places[-1])
        if magic != _MAGIC or classes != num_classes or len(data) != begin + count * _ENTRY.itemsize:
            raise ValueError("a state of another kind")
        numbers = np.frombuffer(data, dtype="<f4", count=int(places[-1]), offset=_HEAD.size).astype(np.float64)
        entries = np.frombuffer(data, dtype=_ENTRY, offset=begin).copy()
        sums, peaks, bins, counts = np.split(numbers, places[:-1])
        return cls(entries, sums, peaks, bins, counts, updated, flagged, acts)

    def fade(self, now: float, ttl: float) -> None:
        """Let time pass. A clock that went back changes nothing."""
        share = np.exp(-max(0.0, now - self.updated) / ttl) if self.updated else 1.0
        for numbers in (self.sums, self.peaks, self.bins, self.classes):
            numbers *= share
        if len(self.entries) and self.entries["time"][0] < now - ttl:
            self.entries = self.entries[self.entries["time"] >= now - ttl]
        self.updated = max(now, self.updated)

    def knows(self, content: bytes) -> bool:
        """Whether the very same row is among the latest ones."""
        return bool((self.entries["content"] == np.array(content, dtype="S8")).any())

    def add(
        self, rows: Answered, i: int, norms: Norms, surprise: tuple[float, float], shared: Shared, ring: int
    ) -> float:
        """Take note of row i; returns its distance to the nearest earlier one (NaN if there is none or it is the same).

        A row that is asked again, bit for bit, tells its sender nothing new: it counts into the volume alone.
        """
        self._sum("volume", 1.0)
        content = rows.contents[i]
        self.peaks[3:] = np.maximum(self.peaks[3:], shared)
        if self.knows(content):
            return np.nan
        label, margin, sketch = int(rows.labels[i]), float(rows.margins[i]), rows.sketches[i]
        self.classes[label] += 1
        self._sum("fresh", 1.0)
        self._sum("odd", surprise[0])
        self._sum("thin", surprise[1])
        step, nearest = np.zeros(WIDTH, dtype=np.float32), np.nan
        if len(self.entries):
            steps = sketch - self.entries["sketch"].astype(np.float32)
            distances = np.sqrt(np.einsum("ij,ij->i", steps, steps))
            parent = int(distances.argmin())
            nearest = float(distances[parent])
            self.bins[np.searchsorted(norms.edges, nearest)] += 1
            if nearest <= norms.radii[2]:
                step = self._near(distances, parent, steps[parent], label, margin, norms)
        entry = np.zeros(1, dtype=_ENTRY)
        entry[0] = (sketch, step, content, self.updated, margin, label, 0)
        self.entries = np.concatenate([self._room(ring), entry])
        return nearest

    def statistics(self, norms: Norms) -> Array:
        """The evidence, by `STATISTICS`, each >= 0 and higher for an attack."""
        near, lateral, flips, lows, volume, odd, thin, fresh = self.sums
        root = np.sqrt(fresh + 16)
        drift = _divergence(self.bins, np.full(BINS, 1 / BINS)) / root
        classes = _divergence(self.classes, norms.shares) / root
        burst, crowd, haze, shared, shared_flips = self.peaks
        own = (near, burst, crowd, haze, lateral, flips, lows)
        rest = (drift, (odd - fresh) / root, (thin - fresh) / root, classes, volume, shared, shared_flips)
        found: Array = np.maximum(np.array([*own, *rest]), 0.0)
        return found

    def _sum(self, name: str, value: float) -> None:
        self.sums[_SUMS.index(name)] += value

    def _near(
        self, distances: Array, parent: int, step: npt.NDArray[np.float32], label: int, margin: float, norms: Norms
    ) -> npt.NDArray[np.float32]:
        """A row close to earlier ones: how many, in which direction, with which answers. Returns its step."""
        inside = distances[None, :] <= norms.radii[:, None]
        self.peaks[:3] = np.maximum(self.peaks[:3], inside.sum(axis=1))
        around = inside[1]
        if not around.any():
            return np.zeros_like(step)
        self.entries["hits"][around] = np.minimum(self.entries["hits"][around], 65_534) + 1
        before = self.entries["step"][parent].astype(np.float32)
        length = float(np.linalg.norm(before) * np.linalg.norm(step))
        self._sum("near", 1.0)
        self._sum("lateral", 1.0 - max(0.0, float(before @ step) / length) if length > 0 else 0.5)
        self._sum("flips", float(label != self.entries["label"][parent]))
        crowd = self.entries[around]
        same = crowd["label"] == label
        self._sum("lows", float(same.sum() >= 2 and margin < crowd["margin"][same].min()))
        return step

    def _room(self, ring: int) -> npt.NDArray[np.void]:
        """The ring with room for one more: of its older half the entry goes that the fewest queries came close to."""
        if len(self.entries) < ring:
            return self.entries
        return np.delete(self.entries, int(self.entries["hits"][: max(1, ring // 2)].argmin()))


def _divergence(counts: Array, shares: Array) -> float:
    """The likelihood ratio statistic of counts against shares, less what chance makes of it."""
    total = counts.sum()
    if total <= 0:
        return 0.0
    some = counts > 0
    return float(2 * (counts[some] * np.log(counts[some] / (total * shares[some]))).sum() - (len(shares) - 1))
