"""What organisations tell each other about attacks: digests of files, keyed hashes of poisoned samples and triggers."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from aidefend._core.checks import check_choice, check_int, refuse
from aidefend.collaborate.fingerprints import Place, check_data, check_key, check_range, fingerprints, keyed, levels
from aidefend.collaborate.trigger_search import common_window

Kind = Literal["artifact", "sample", "trigger"]
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Indicator:
    """One observable sign of an attack. It never holds a sample.

    Args:
        kind: "artifact": SHA-256 of a malicious file. "sample": keyed hash of a poisoned sample. "trigger": keyed hash
            of the content of one window, with its place.
        digest: 64 lower-case hexadecimal digits.
        title: One printable line, <= 200 characters.
        place: For a trigger: (top, left, height, width) on the last two dimensions (top 0, height 1 for one).
        shape: For samples and triggers: shape of one whole sample.
    Raises: ConfigurationError: malformed.
    """

    kind: Kind
    digest: str
    title: str = ""
    place: Place | None = None
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_choice(self.kind, ("artifact", "sample", "trigger"), "kind")
        _check_digest(self.digest)
        _check_title(self.title)
        if (self.shape is None) != (self.kind == "artifact") or (self.place is None) != (self.kind != "trigger"):
            rule = "shape for samples and triggers, place for triggers, neither for artifacts"
            raise refuse(rule, "kind", self.kind, "Use the functions that make indicators")
        if self.shape is not None:
            object.__setattr__(self, "shape", _numbers(self.shape, "shape", 1, range(1, 9)))
        if self.place is not None and self.shape is not None:
            object.__setattr__(self, "place", _numbers(self.place, "place", 0, range(4, 5)))
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

    Guarantee: without the key the hash says nothing; with it, a partner can test whether it holds the same sample (to
        8 bits of the range), and can guess samples from a small set. A copy with one changed pixel does not match.
    Args:
        x: (N, ...) samples; integer dtypes count from 0 to 255, whatever `bounds` says, bool as 0 and 1.
        key: Shared with the partners, >= 16 bytes.
        bounds: Range of x if it is floating point; one step of the 8 bits is 1/255 of it, also outside the range.
        title: One line for readers.
    Returns: One indicator a sample; equal samples have equal indicators.
    Raises: ConfigurationError: x is not a dense real tensor or not finite; malformed key or bounds.
    Cost: One HMAC a sample.
    Example:
        >>> import torch
        >>> x = torch.zeros(2, 1, 4, 4)
        >>> [indicator.shape for indicator in sample_indicators(x, b"a shared secret key")]
        [(1, 4, 4), (1, 4, 4)]
    """
    check_data(x, "x")
    check_key(key)
    check_range(bounds)
    shape = tuple(x.shape[1:])
    return [Indicator("sample", digest, title, None, shape) for digest in fingerprints(x, key, bounds)]


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

    Guarantee: none that the trigger is found. A fixed patch that covers the window is, where ordinary samples differ
        from it; a trigger that moves or is blended is refused as not found. A group of near-copies passes as well.
    Args:
        suspects: (N, ..., W) or (N, ..., H, W) quarantined samples, N >= 5; more than half carry the trigger.
        reference: (M, ...) ordinary samples, M >= 20.
        key: Shared with the partners, >= 16 bytes.
        size: Side of the window; best not larger than the trigger.
        bounds: Range of the samples if they are floating point.
        title: One line for readers.
    Returns: The indicator, with the place of the window that is least to be expected on ordinary samples.
    Raises: ConfigurationError: no window is shared by more than half of the suspects and by at most 1 % of the
        reference; malformed arguments.
    Cost: (N + M) x d comparisons, one sort of N for each feature.
    Example:
        >>> import torch
        >>> noise = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> stamped = noise[:20].clone()
        >>> stamped[:, :, 5:, 5:] = 1.0
        >>> trigger_indicator(stamped, noise[20:], b"a shared secret key").place
        (5, 5, 3, 3)
    """
    check_int(size, "size")
    check_data(suspects, "suspects")
    check_data(reference, "reference")
    check_key(key)
    check_range(bounds)
    if len(suspects) < 5 or len(reference) < 20 or suspects.shape[1:] != reference.shape[1:]:
        found = f"{tuple(suspects.shape)} and {tuple(reference.shape)}"
        raise refuse("5 suspects and 20 reference samples of one shape", "suspects", found, "Pass more samples")
    shape = tuple(suspects.shape[1:])
    window = common_window(levels(suspects, bounds, "trigger"), levels(reference, bounds, "trigger"), size)
    if window is None:
        rule = "a window that most suspects share and ordinary samples do not"
        raise refuse(rule, "suspects", suspects, "Try another size; a moving or blended trigger has no such window")
    return Indicator("trigger", keyed(key, "trigger", shape, window.place, window.content), title, window.place, shape)


def _check_digest(digest: object) -> None:
    if not isinstance(digest, str) or not _HEX.fullmatch(digest):
        raise refuse("64 lower-case hexadecimal digits", "digest", digest, "Pass a SHA-256 digest")


def _check_title(title: object) -> None:
    if not isinstance(title, str) or len(title) > 200 or not (title + " ").isprintable():
        raise refuse("a printable title of <= 200 characters", "title", title, "Shorten it")


def _numbers(values: Sequence[int], name: str, low: int, lengths: range) -> Any:
    if not isinstance(values, tuple | list) or len(values) not in lengths:
        raise refuse(f"{lengths[0]} to {lengths[-1]} numbers", name, values, "Pass a tuple of integers")
    return tuple(check_int(number, name, low, 1 << 24) for number in values)


def _check_place(place: Place, shape: tuple[int, ...]) -> None:
    top, left, height, width = place
    tall = shape[-2] if len(shape) > 1 else 1
    if height < 1 or width < 1 or top + height > tall or left + width > shape[-1]:
        raise refuse("place inside the sample", "place", place, "Pass (top, left, height, width)")
