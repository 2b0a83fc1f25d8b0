"""Rows close to one another over all principals: found by fingerprints, confirmed by distance, counted once each."""

import dataclasses
import secrets
import struct
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aidefend.validate.queries.sketch import WIDTH
from aidefend.validate.queries.trail import Shared

_HEAD = struct.Struct("<4sffhdB")
_MAGIC = b"aqc2"
_KNOWN = 8  # contents that a crowd remembers
_OWNERS = 16  # principals whose part of a crowd is known: those with the largest
_OWNER = struct.Struct("<8sff")
_SHARED = "shared"


class Session(Protocol):
    """What a store shows to one call; all of it happens, or nothing."""

    def get(self, table: str, name: bytes) -> bytes | None:
        """The value, or None."""

    def put(self, table: str, name: bytes, value: bytes, weight: int = 0) -> None:
        """Keep a value; where room is short, those of lower weight go first."""


@dataclasses.dataclass(eq=False)
class Crowd:
    """A chain of rows, each close to the first or to the last one.

    `owners` maps the tag of a principal to its part of `size` and `flips`. Of many principals those with the smallest
    part are forgotten, which counts that little as somebody else's.
    """

    first: npt.NDArray[np.float32]
    last: npt.NDArray[np.float32]
    label: int
    updated: float
    size: float = 1.0
    flips: float = 0.0
    contents: bytes = b""
    owners: dict[bytes, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """For a store."""
        head = _HEAD.pack(_MAGIC, self.size, self.flips, self.label, self.updated, len(self.owners))
        ends = np.stack([self.first, self.last]).astype("<f2").tobytes()
        return head + ends + b"".join(_OWNER.pack(tag, *part) for tag, part in self.owners.items()) + self.contents

    @classmethod
    def from_bytes(cls, data: bytes) -> "Crowd":
        """Back from a store."""
        magic, size, flips, label, updated, count = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("a state of another kind")
        ends = np.frombuffer(data, dtype="<f2", count=2 * WIDTH, offset=_HEAD.size).astype(np.float32)
        start = _HEAD.size + 4 * WIDTH
        rest = start + count * _OWNER.size
        owners = {tag: (rows, turns) for tag, rows, turns in _OWNER.iter_unpack(data[start:rest])}
        return cls(ends[:WIDTH], ends[WIDTH:], label, updated, size, flips, data[rest:], owners)

    def distance(self, sketch: npt.NDArray[np.float32]) -> float:
        """To the nearer end."""
        return float(min(np.linalg.norm(sketch - self.first), np.linalg.norm(sketch - self.last)))

    def knows(self, content: bytes) -> bool:
        """Whether this very row is among the latest different ones."""
        return content in (self.contents[i : i + 8] for i in range(0, len(self.contents), 8))

    def fade(self, now: float, ttl: float) -> None:
        """Let time pass; the row that began the crowd stays."""
        share = float(np.exp(-max(0.0, now - self.updated) / ttl))
        self.size, self.flips, self.updated = 1 + (self.size - 1) * share, self.flips * share, max(now, self.updated)
        self.owners = {tag: (rows * share, turns * share) for tag, (rows, turns) in self.owners.items()}

    def join(self, sketch: npt.NDArray[np.float32], content: bytes, label: int, owner: bytes) -> None:
        """One more row, unless it is one of the latest again."""
        if self.knows(content):
            return
        turned = float(label != self.label)
        rows, turns = self.owners.pop(owner, (0.0, 0.0))
        while len(self.owners) >= _OWNERS:
            del self.owners[min(self.owners, key=lambda tag: self.owners[tag])]
        self.owners[owner] = (rows + 1, turns + turned)
        self.size += 1
        self.flips += turned
        self.label, self.last = label, sketch
        self.contents = (self.contents + content)[-8 * _KNOWN :]

    def of_others(self, owner: bytes) -> Shared:
        """What other principals than this one put in, without the row that this one has just sent."""
        rows, turns = self.owners.get(owner, (0.0, 0.0))
        return Shared(max(0.0, self.size - max(1.0, rows)), max(0.0, self.flips - turns))


def join_crowd(
    session: Session,
    marks: list[bytes],
    sketch: npt.NDArray[np.float32],
    content: bytes,
    label: int,
    now: float,
    radius: float,
    ttl: float,
    principal: bytes,
) -> Shared:
    """Put a row of a principal into the crowd around it, or begin one; returns what others put into it."""
    owner = principal[:8].ljust(8, b"\0")
    best, name, closest = None, b"", radius
    for found in {value for mark in marks if (value := session.get(_SHARED, mark)) is not None}:
        data = session.get(_SHARED, found)
        crowd = None if data is None else Crowd.from_bytes(data)
        if crowd is not None and crowd.updated >= now - ttl and (distance := crowd.distance(sketch)) <= closest:
            best, name, closest = crowd, found, distance
    if best is None:
        name = b"crowd" + secrets.token_bytes(8)
        best = Crowd(sketch, sketch, label, now, contents=content, owners={owner: (1.0, 0.0)})
    else:
        best.fade(now, ttl)
        best.join(sketch, content, label, owner)
    session.put(_SHARED, name, best.to_bytes(), weight=int(best.size >= 4))
    for mark in marks:
        session.put(_SHARED, mark, name, weight=int(best.size >= 4))
    return best.of_others(owner)
