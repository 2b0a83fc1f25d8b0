"""What organisations tell each other about attacks: digests of files, keyed hashes of poisoned samples and triggers."""

import dataclasses
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_not_empty, check_number, check_tensor, refuse
from aidefend._core.storage import canonical_json

Kind = Literal["artifact", "sample", "trigger"]
_HEX = re.compile(r"[0-9a-f]{64}")
_LEVELS = {"sample": 255, "trigger": 15}


@dataclasses.dataclass(frozen=True)
class Indicator:
    """One observable sign of an attack. It never holds a sample.

    Args:
        kind: "artifact": SHA-256 of a malicious file. "sample": keyed hash of a poisoned sample. "trigger": keyed hash of
            the content of one window, with its place.
        digest: 64 lower-case hexadecimal digits.
        title: One printable line, <= 200 characters.
        place: For a trigger: (top, left, height, width) on the last two dimensions (top 0, height 1 for one).
        shape: For samples and triggers: shape of one whole sample.
    Raises: ConfigurationError: malformed.
    """

    kind: Kind
    digest: str
    title: str = ""
    place: tuple[int, int, int, int] | None = None
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_choice(self.kind, ("artifact", "sample", "trigger"), "kind")
        if not isinstance(self.digest, str) or not _HEX.fullmatch(self.digest):
            raise refuse("64 lower-case hexadecimal digits", "digest", self.digest, "Pass a SHA-256 digest")
        if not isinstance(self.title, str) or len(self.title) > 200 or not (self.title + " ").isprintable():
            raise refuse("a printable title of <= 200 characters", "title", self.title, "Shorten it")
        if (self.shape is None) != (self.kind == "artifact") or (self.place is None) != (self.kind != "trigger"):
            rule = "shape for samples and triggers, place for triggers, neither for artifacts"
            raise refuse(rule, "kind", self.kind, "Use the functions that make indicators")
        for name in ("shape", "place"):
            numbers = getattr(self, name)
            if numbers is not None:
                object.__setattr__(self, name, tuple(check_int(number, name, 0, 1 << 24) for number in numbers))
        if self.shape is not None and not 1 <= len(self.shape) <= 8:
            raise refuse("shape of 1 to 8 dimensions", "shape", self.shape, "Pass the shape of one sample")
        if self.place is not None and self.shape is not None:
            _check_place(self.place, self.shape)

    def to_dict(self) -> dict[str, Any]:
        """The indicator as JSON types."""
        fields = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items() if v not in (None, "")}


def artifact_indicator(digest: str, title: str = "") -> Indicator:
    """The sign of a malicious file.

    Args:
        digest: Its SHA-256, 64 lower-case hexadecimal digits.
        title: What it is, in a line.
    Example:
        >>> artifact_indicator("0" * 64).kind
        'artifact'
    """
    return Indicator("artifact", digest, title)


def sample_indicators(
    x: Tensor, key: bytes, *, bounds: tuple[float, float] = (0.0, 1.0), title: str = "poisoned sample"
) -> list[Indicator]:
    """Keyed hashes of poisoned samples: a partner with the key recognises exact copies, nobody learns their content.

    Guarantee: without the key the hash says nothing; with it, a partner can test whether it holds the same sample (to 8
        bits), and can guess samples from a small set. A copy with one changed pixel does not match.
    Args:
        x: (N, ...) samples in `bounds`; integer dtypes count as 0 to 255.
        key: Shared with the partners, >= 16 bytes.
        bounds: Range of x.
        title: One line for readers.
    Returns: One indicator a sample.
    Cost: One HMAC a sample.
    Example:
        >>> x = torch.zeros(2, 1, 4, 4)
        >>> [indicator.shape for indicator in sample_indicators(x, b"a shared secret key")]
        [(1, 4, 4), (1, 4, 4)]
    """
    shape = tuple(check_tensor(x, "x").shape[1:])
    return [Indicator("sample", digest, title, None, shape) for digest in _digests(x, key, bounds, "sample", shape)]


def trigger_indicator(
    suspects: Tensor,
    reference: Tensor,
    key: bytes,
    *,
    size: int = 3,
    bounds: tuple[float, float] = (0.0, 1.0),
    title: str = "trigger window",
) -> Indicator:
    """The keyed hash of the window that quarantined samples share and ordinary samples do not have.

    Guarantee: none that the trigger is found; a fixed patch that covers the window is, a trigger that moves or is blended
        is refused as not found.
    Args:
        suspects: (N, ..., W) or (N, ..., H, W) quarantined samples, N >= 5; most of them carry the trigger.
        reference: (M, ...) ordinary samples, M >= 20.
        key: Shared with the partners, >= 16 bytes.
        size: Side of the window.
        bounds: Range of the samples.
        title: One line for readers.
    Returns: The indicator, with the window's place.
    Raises: ConfigurationError: no window is shared by at least half of the suspects and by at most 1 % of the reference.
    Cost: One comparison of all windows.
    Example:
        >>> noise = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> stamped = noise[:20].clone()
        ... stamped[:, :, 5:, 5:] = 1.0
        >>> trigger_indicator(stamped, noise[20:], b"a shared secret key").place
        (5, 5, 3, 3)
    """
    check_int(size, "size")
    if len(suspects) < 5 or len(reference) < 20 or suspects.shape[1:] != reference.shape[1:]:
        found = f"{tuple(suspects.shape)} and {tuple(reference.shape)}"
        raise refuse("5 suspects and 20 reference samples of one shape", "suspects", found, "Pass more samples")
    shape = tuple(suspects.shape[1:])
    best: tuple[float, Indicator] | None = None
    marks, ordinary = _levels(suspects, bounds, "trigger"), _levels(reference, bounds, "trigger")
    for place in _places(shape, size):
        shared = _window(marks, place)
        common = _commonest(shared)
        here = float((shared == common).all(axis=1).mean())
        elsewhere = float((_window(ordinary, place) == common).all(axis=1).mean())
        if here >= 0.5 and elsewhere <= 0.01 and (best is None or here - elsewhere > best[0]):
            digest = _keyed(key, "trigger", shape, place, common)
            best = here - elsewhere, Indicator("trigger", digest, title, place, shape)
    if best is None:
        rule = "a window that half of the suspects share and ordinary samples do not"
        raise refuse(rule, "suspects", suspects, "Try another size; a moving or blended trigger has no such window")
    return best[1]


@dataclasses.dataclass(frozen=True)
class IndicatorDetector:
    """Indicators as a detector for `screen` (score 1 for a match, else 0) and as a deny-list for `inspect_artifact`.

    `deny` holds the SHA-256 digests of known malicious files. Blocks need "x". A row that is not finite scores 1.
    """

    indicators: tuple[Indicator, ...]
    key: bytes = dataclasses.field(repr=False)
    bounds: tuple[float, float] = (0.0, 1.0)

    name = "shared-indicators"

    @property
    def deny(self) -> frozenset[str]:
        """SHA-256 digests of malicious files."""
        return frozenset(one.digest for one in self.indicators if one.kind == "artifact")

    def partial_fit(self, block: Mapping[str, Any]) -> "IndicatorDetector":
        """Nothing is learned from data."""
        return self

    def merge(self, other: "IndicatorDetector") -> "IndicatorDetector":
        """The indicators of both."""
        return dataclasses.replace(self, indicators=tuple(dict.fromkeys([*self.indicators, *other.indicators])))

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64: 1 where a row matches an indicator, else 0."""
        if "x" not in block:
            raise refuse('a block with "x"', "block", sorted(block), "Pass the samples themselves")
        x = check_tensor(torch.as_tensor(block["x"]), "x", finite=False)
        return torch.tensor([float(bool(row)) for row in self.matches(x)], dtype=torch.float64)

    def matches(self, x: Tensor) -> list[tuple[str, ...]]:
        """For each row the titles of the indicators it matches."""
        found: list[list[str]] = [[] for _ in range(len(x))]
        shape = tuple(x.shape[1:])
        good = torch.isfinite(x.flatten(1).double()).all(dim=1) if len(x) else torch.zeros(0, dtype=torch.bool)
        clean = x.clone()
        clean[~good] = 0
        for wanted in {(one.kind, one.place) for one in self.indicators if one.shape == shape}:
            titles = {one.digest: one.title for one in self.indicators if (one.kind, one.place) == wanted}
            digests = _digests(clean, self.key, self.bounds, wanted[0], shape, wanted[1])
            for row, digest in enumerate(digests):
                if digest in titles:
                    found[row].append(titles[digest])
        return [tuple(row) if fine else ("not finite",) for row, fine in zip(found, good.tolist(), strict=True)]


def apply_indicators(
    indicators: Iterable[Indicator], key: bytes, *, bounds: tuple[float, float] = (0.0, 1.0)
) -> IndicatorDetector:
    """Make partners' indicators usable on one's own data and files.

    Args:
        indicators: From `from_stix(bundle).indicators`, or own ones.
        key: The key shared with the partners, >= 16 bytes.
        bounds: Range of one's own samples.
    Returns: A detector with `.score(block)`, `.matches(x)` and `.deny`.
    Example:
        >>> x = torch.arange(8.0).reshape(2, 4) / 8
        >>> detector = apply_indicators(
        ...     sample_indicators(x[:1], b"a shared secret key"), b"a shared secret key"
        ... )
        >>> detector.score({"x": x}).tolist()
        [1.0, 0.0]
    """
    _check_key(key)
    _check_range(bounds)
    return IndicatorDetector(tuple(indicators), key, bounds)


def _digests(
    x: Tensor,
    key: bytes,
    bounds: tuple[float, float],
    kind: Kind,
    shape: tuple[int, ...],
    place: tuple[int, int, int, int] | None = None,
) -> list[str]:
    levels = _levels(x, bounds, kind)
    content = levels.reshape(len(levels), -1) if place is None else _window(levels, place)
    return [_keyed(key, kind, shape, place, row) for row in content]


def _levels(x: Tensor, bounds: tuple[float, float], kind: Kind) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Samples on 256 levels, triggers on 16: the same for a byte image and its float copy."""
    low, high = (0.0, 255.0) if not x.is_floating_point() else _check_range(bounds)
    scaled = ((x.detach().cpu().double() - low) / (high - low)).clamp(0, 1)
    levels: np.ndarray[Any, np.dtype[np.uint8]] = (scaled * _LEVELS[kind]).round().to(torch.uint8).numpy()
    return levels


def _keyed(key: bytes, kind: str, shape: Sequence[int], place: Sequence[int] | None, content: Any) -> str:
    header = canonical_json([kind, list(shape), None if place is None else list(place)]).encode()
    return hmac.digest(_check_key(key), header + b"\n" + np.ascontiguousarray(content).tobytes(), "sha256").hex()


def _window(levels: Any, place: tuple[int, int, int, int]) -> Any:
    top, left, height, width = place
    rows = levels if levels.ndim >= 3 else levels[:, None]
    return rows[..., top : top + height, left : left + width].reshape(len(levels), -1)


def _places(shape: tuple[int, ...], size: int) -> list[tuple[int, int, int, int]]:
    height, width = (shape[-2] if len(shape) > 1 else 1), shape[-1]
    tall, wide = min(size, height), min(size, width)
    return [(top, left, tall, wide) for top in range(height - tall + 1) for left in range(width - wide + 1)]


def _commonest(rows: Any) -> Any:
    """The row that occurs most often."""
    unique, counts = np.unique(rows, axis=0, return_counts=True)
    return unique[counts.argmax()]


def _check_key(key: object) -> bytes:
    if not isinstance(key, bytes) or len(key) < 16:
        raise refuse("key of at least 16 bytes", "key", type(key).__name__, "Share secrets.token_bytes(32)")
    return key


def _check_range(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = (check_number(bound, "bounds") for bound in bounds)
    if low >= high:
        raise refuse("bounds with low < high", "bounds", bounds, "Pass the range of x")
    return low, high


def _check_place(place: tuple[int, ...], shape: tuple[int, ...]) -> None:
    check_not_empty(len(place), "place")
    height = shape[-2] if len(shape) > 1 else 1
    inside = len(place) == 4 and place[2] >= 1 and place[3] >= 1
    if not inside or place[0] + place[2] > height or place[1] + place[3] > shape[-1]:
        raise refuse("place inside the sample", "place", place, "Pass (top, left, height, width)")
