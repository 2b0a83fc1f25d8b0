"""Partners' indicators at work on one's own data and files."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from aidefend._core.batches import iterate
from aidefend._core.checks import refuse
from aidefend._core.report import Report
from aidefend.collaborate.fingerprints import Place, check_data, check_key, check_range, fingerprints
from aidefend.collaborate.indicators import Indicator

_MOST_PLACES = 256
_TOO_COMMON = 0.01


@dataclasses.dataclass(frozen=True)
class IndicatorDetector:
    """Indicators at work: `judge` gives a verdict on data, `deny` is for `inspect_artifact`, and `screen` takes it too.

    In `screen(detectors=[...])` the scores (1 for a match, else 0) propose rows, and `screen` has its own tests for
    what it quarantines: join the verdicts with `screen(data) & detector.judge(data)`.

    Guarantee: exact copies and windows are found, nothing else. Whoever holds the key can make indicators that match
        ordinary samples: `apply_indicators(reference=)` leaves such indicators out.
    Args:
        indicators: What to look for; at most 256 different trigger windows.
        key: The key shared with the partners, >= 16 bytes.
        bounds: Range of one's own samples if they are floating point.
        left_out: Indicators that match too many ordinary samples; they are not looked for.
    """

    indicators: tuple[Indicator, ...]
    key: bytes = dataclasses.field(repr=False)
    bounds: tuple[float, float] = (0.0, 1.0)
    left_out: tuple[Indicator, ...] = ()

    name: ClassVar[str] = "shared-indicators"

    def __post_init__(self) -> None:
        object.__setattr__(self, "indicators", tuple(dict.fromkeys(_checked(self.indicators))))
        object.__setattr__(self, "bounds", check_range(self.bounds))
        check_key(self.key)
        places = {(one.shape, one.place) for one in self.indicators if one.place is not None}
        if len(places) > _MOST_PLACES:
            rule = f"at most {_MOST_PLACES} different trigger windows"
            raise refuse(rule, "indicators", f"{len(places)} windows", "Each costs a pass over the data: choose some")

    @property
    def deny(self) -> frozenset[str]:
        """SHA-256 digests of malicious files, for `inspect_artifact(path, deny=)`."""
        return frozenset(one.digest for one in self.indicators if one.kind == "artifact")

    def partial_fit(self, block: Mapping[str, Any]) -> "IndicatorDetector":
        """Nothing is learned from data."""
        return self

    def merge(self, other: "IndicatorDetector") -> "IndicatorDetector":
        """The indicators of both, which must have one key and one range."""
        if not isinstance(other, IndicatorDetector) or (other.key, other.bounds) != (self.key, self.bounds):
            raise refuse("a detector with the same key and bounds", "other", type(other).__name__, "Use two detectors")
        left_out = tuple(dict.fromkeys([*self.left_out, *other.left_out]))
        unwanted = set(left_out)
        wanted = tuple(one for one in (*self.indicators, *other.indicators) if one not in unwanted)
        return dataclasses.replace(self, indicators=wanted, left_out=left_out)

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64: 1 where a row matches an indicator, else 0; NaN (no opinion) for a row that is not finite."""
        x = _inputs(block)
        found = torch.tensor([float(bool(row)) for row in self.matches(x)], dtype=torch.float64)
        return found.where(_finite(x), torch.nan)

    def matches(self, x: Tensor) -> list[tuple[str, ...]]:
        """For each row the titles of the indicators it matches; none for a row that is not finite."""
        return [tuple(dict.fromkeys(one.title or one.kind for one in row)) for row in self.found(x)]

    def found(self, x: Tensor) -> list[tuple[Indicator, ...]]:
        """For each row the indicators it matches."""
        check_data(x, "x", finite=False)
        rows: list[list[Indicator]] = [[] for _ in range(len(x))]
        good = _finite(x)
        usable, numbers = x[good], good.nonzero().flatten().tolist()
        for place, wanted in self._by_place(tuple(x.shape[1:])):
            digests = fingerprints(usable, self.key, self.bounds, place)
            for number, digest in zip(numbers, digests, strict=True):
                rows[number] += wanted.get(digest, ())
        return [tuple(row) for row in rows]

    def judge(self, data: Any) -> Report:
        """A verdict on every row of a data set: keep False for a match, and for a row that is not finite.

        The rows are named as `screen` names them, so `judge(data) & screen(data)` joins both verdicts.

        Args:
            data: Tensors, a pair (x, y), a Dataset or a DataLoader.
        Returns: A report with the score "shared_indicators"; row i is sample i.
        Example:
            >>> x = torch.arange(8.0).reshape(2, 4) / 8
            >>> detector = apply_indicators([Indicator("sample", "0" * 64, shape=(4,))], bytes(16))
            >>> detector.judge(x).summary()
            'shared-indicators: 2 of 2 rows kept, 0 not'
        """
        ids: list[str] = []
        reasons: list[tuple[str, ...]] = []
        scores = [torch.zeros(0, dtype=torch.float64)]
        for batch in iterate(data):
            score = self.score({"x": batch.x})
            names = [tuple(f"shared indicator: {title}" for title in row) for row in self.matches(batch.x)]
            bad = score.isnan().tolist()
            reasons += [("not finite",) if unknown else row for row, unknown in zip(names, bad, strict=True)]
            ids += batch.ids
            scores.append(score)
        found = torch.cat(scores)
        return Report(
            tuple(ids),
            found == 0,
            {"shared_indicators": found},
            {},
            tuple(reasons),
            self.name,
            {"indicators": len(self.indicators), "left_out": len(self.left_out), "bounds": list(self.bounds)},
            "samples or triggers that partners have seen in an attack",
            "Exact copies and windows only; nothing is said about attacks that no partner has reported.",
        )

    def _by_place(self, shape: tuple[int, ...]) -> Iterator[tuple[Place | None, dict[str, list[Indicator]]]]:
        """Indicators that fit samples of this shape, by place (None: the whole sample), then by digest."""
        fitting = [one for one in self.indicators if one.shape == shape]
        for place in dict.fromkeys(one.place for one in fitting):
            wanted: dict[str, list[Indicator]] = {}
            for one in fitting:
                if one.place == place:
                    wanted.setdefault(one.digest, []).append(one)
            yield place, wanted


def apply_indicators(
    indicators: Iterable[Indicator],
    key: bytes,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    reference: Tensor | None = None,
) -> IndicatorDetector:
    """Make partners' indicators usable on one's own data and files.

    Args:
        indicators: From `from_stix(bundle).indicators`, or own ones.
        key: The key shared with the partners, >= 16 bytes.
        bounds: Range of one's own samples if they are floating point.
        reference: (M, ...) own samples that are known to be good, where there are some. Indicators that match more
            than 1 % of them are left out: a careless or hostile partner could have anything quarantined with them.
    Returns: A detector with `.score(block)`, `.matches(x)`, `.judge(data)`, `.deny` and `.left_out`.
    Raises: ConfigurationError: malformed key, bounds or indicators; more than 256 different trigger windows.
    Cost: For each block one HMAC a row for samples, and one for each different trigger window.
    Example:
        >>> x, key = torch.arange(8.0).reshape(2, 4) / 8, b"a shared secret key"
        >>> detector = apply_indicators([Indicator("sample", "0" * 64, shape=(4,))], key)
        >>> detector.score({"x": x}).tolist()
        [0.0, 0.0]
    """
    detector = IndicatorDetector(tuple(_checked(indicators)), key, bounds)
    if reference is None:
        return detector
    hits: dict[Indicator, int] = {}
    for row in detector.found(reference):
        for one in row:
            hits[one] = hits.get(one, 0) + 1
    common = {one for one, count in hits.items() if count > _TOO_COMMON * len(reference)}
    kept, left_out = (tuple(one for one in detector.indicators if (one in common) is out) for out in (False, True))
    return dataclasses.replace(detector, indicators=kept, left_out=left_out)


def _checked(indicators: Any) -> list[Indicator]:
    if isinstance(indicators, Indicator | str | bytes | Mapping | Tensor) or not isinstance(indicators, Iterable):
        raise refuse("a collection of indicators", "indicators", type(indicators).__name__, "Pass a list of Indicator")
    found = list(indicators)
    for one in found:
        if not isinstance(one, Indicator):
            raise refuse("indicators", "indicators", type(one).__name__, "Pass from_stix(bundle).indicators")
    return found


def _inputs(block: Any) -> Tensor:
    if not isinstance(block, Mapping) or "x" not in block:
        found = sorted(map(str, block)) if isinstance(block, Mapping) else type(block).__name__
        raise refuse('a block with "x"', "block", found, "Pass the samples themselves")
    try:
        x = torch.as_tensor(block["x"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise refuse("numbers that fit a tensor", "x", type(block["x"]).__name__, "Convert the samples") from error
    check_data(x, "x", finite=False)
    if "ids" in block and len(block["ids"]) != len(x):
        raise refuse(f"{len(x)} ids", "ids", f"{len(block['ids'])} ids", "Pass one id for each sample")
    return x


def _finite(x: Tensor) -> Tensor:
    return torch.isfinite(x).flatten(1).all(dim=1).cpu()
