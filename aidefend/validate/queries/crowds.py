"""Rows close to one another over all principals: found by fingerprints, confirmed by distance, counted once each."""

import dataclasses
import secrets
import struct
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aidefend.validate.queries.sketch import WIDTH
from aidefend.validate.queries.trail import Shared

_HEAD = struct.Struct("<4sffhd")
_MAGIC = b"aqc1"
_KNOWN = 8  # contents that a crowd remembers
_SHARED = "shared"


class Session(Protocol):
    """What a store shows to one call; all of it happens, or nothing."""

    def get(self, table: str, name: bytes) -> bytes | None:
        """The value, or None."""

    def put(self, table: str, name: bytes, value: bytes, weight: int = 0) -> None:
        """Keep a value; where room is short, those of lower weight go first."""


@dataclasses.dataclass(eq=False)
class Crowd:
    """A chain of rows, each close to the first or to the last one."""

    first: npt.NDArray[np.float32]
    last: npt.NDArray[np.float32]
    label: int
    updated: float
    size: float = 1.0
    flips: float = 0.0
    contents: bytes = b""

    def to_bytes(self) -> bytes:
        """For a store."""
        head = _HEAD.pack(_MAGIC, self.size, self.flips, self.label, self.updated)
        return head + np.stack([self.first, self.last]).astype("<f2").tobytes() + self.contents

    @classmethod
    def from_bytes(cls, data: bytes) -> "Crowd":
        """Back from a store."""
        magic, size, flips, label, updated = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("a state of another kind")
        ends = np.frombuffer(data, dtype="<f2", count=2 * WIDTH, offset=_HEAD.size).astype(np.float32)
        return cls(ends[:WIDTH], ends[WIDTH:], label, updated, size, flips, data[_HEAD.size + 4 * WIDTH :])

    def distance(self, sketch: npt.NDArray[np.float32]) -> float:
        """To the nearer end."""
        return float(min(np.linalg.norm(sketch - self.first), np.linalg.norm(sketch - self.last)))

    def knows(self, content: bytes) -> bool:
        """Whether this very row is among the latest different ones."""
        return content in (self.contents[i : i + 8] for i in range(0, len(self.contents), 8))

    def join(self, sketch: npt.NDArray[np.float32], content: bytes, label: int) -> None:
        """One more row, unless it is one of the latest again."""
        if self.knows(content):
            return
        self.size += 1
        self.flips += label != self.label
        self.label, self.last = label, sketch
        self.contents = (self.contents + content)[-8 * _KNOWN :]


def join_crowd(
    session: Session,
    marks: list[bytes],
    sketch: npt.NDArray[np.float32],
    content: bytes,
    label: int,
    now: float,
    radius: float,
    ttl: float,
) -> Shared:
    """Put a row into the crowd around it, or begin one; returns the crowd without the row that began it."""
    best, name, closest = None, b"", radius
    for found in {value for mark in marks if (value := session.get(_SHARED, mark)) is not None}:
        data = session.get(_SHARED, found)
        crowd = None if data is None else Crowd.from_bytes(data)
        if crowd is not None and crowd.updated >= now - ttl and (distance := crowd.distance(sketch)) <= closest:
            best, name, closest = crowd, found, distance
    if best is None:
        best, name = Crowd(sketch, sketch, label, now, contents=content), b"crowd" + secrets.token_bytes(8)
    else:
        share = float(np.exp(-max(0.0, now - best.updated) / ttl))
        best.size, best.flips, best.updated = 1 + (best.size - 1) * share, best.flips * share, max(now, best.updated)
        best.join(sketch, content, label)
    session.put(_SHARED, name, best.to_bytes(), weight=int(best.size >= 4))
    for mark in marks:
        session.put(_SHARED, mark, name, weight=int(best.size >= 4))
    return Shared(best.size - 1, best.flips)
