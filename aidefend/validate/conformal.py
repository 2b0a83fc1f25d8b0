"""Calibration: from scores of clean rows to p-values and a decision whose rate of false alarms is known."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aidefend._core.checks import (
    check_choice,
    check_kind,
    check_labels,
    check_not_empty,
    check_number,
    check_probability,
    check_same_rows,
    check_tensor,
    refuse,
)
from aidefend._core.errors import AidefendError
from aidefend._core.evidence import Evidence
from aidefend._core.stats import Interval, false_positive_interval, wilson
from aidefend.validate.collaborators import Log
from aidefend.validate.conformal_evidence import conformal_evidence
from aidefend.validate.conformal_law import (
    MODES,
    Mode,
    at_most,
    least_calibration_rows,
    p_of_counts,
    rank_of,
    rate_interval,
)
from aidefend.validate.detector_file import read_tensors, write_tensors
from aidefend.validate.row_reuse import check_not_reused

_SCHEMA = "aidefend.calibration/1"
WHOLE = -1


class _Group(NamedTuple):
    """One class, or all rows: scores ascending, the p-value for each count of them, the rank of the threshold."""

    scores: Tensor
    p_values: Tensor
    rank: int


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of clean rows that were used for nothing else, and what they say about a new score.

    | mode | a clean row is refused with probability | over what |
    |---|---|---|
    | marginal | floor(alpha (n + 1)) / (n + 1), at most alpha | new rows and calibration sets together |
    | class-conditional | the same within each (predicted) class, n of that class | the same, class by class |
    | calibration-conditional | at most alpha, for this very calibration set | new rows; confidence 1 - delta |

    Guarantee: the table, for rows that are exchangeable with the calibration rows; for the first two modes the rate is
        below the value only where scores tie. Drift and attack void it; so do calibration rows on which the model was
        trained or a detector fitted. Choose alpha before you look at the p-values. A row of a class that has no
        calibration rows, or with a score that is NaN, is refused, and nothing is promised for it. Scores are compared
        to the last digit, which the size of a batch changes: where inputs come again and again, take a `Guard`, which
        allows for it, or score every row alone.
    Args:
        scores: (n,) float64, higher = stranger; any detector's or the joint score of an `Ensemble`.
        classes: (n,) int64, the predicted class of each row; -1 in the modes that take no classes.
        alpha: Rate of false alarms, in (0, 1).
        mode: See the table.
        delta: Of the mode "calibration-conditional": how often over calibration sets the promise may fail, in (0, 1).
        history: One entry for each calibration that this one follows, oldest first.
    Cost: A sort of the scores; O(log n) a row.
    Source: Vovk, Gammerman, Shafer 2005 (p-values, classes); Vovk 2012 and Wilks 1941 (given the calibration set).
    Example:
        >>> calibration = Calibration.of(torch.arange(199.0), alpha=0.05)
        >>> calibration.p_values(torch.tensor([50.0, 500.0])).tolist()
        [0.75, 0.005]
        >>> calibration.refused(torch.tensor([50.0, 500.0])).tolist()
        [False, True]
        >>> [round(count) for count in calibration.alarms_a_day(10_000)]
        [500, 244, 841]
    """

    scores: Tensor
    classes: Tensor
    alpha: float
    mode: Mode = "marginal"
    delta: float = 0.05
    history: tuple[Mapping[str, Any], ...] = ()
    _groups: dict[int, _Group] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_probability(self.alpha, "alpha")
        check_probability(self.delta, "delta")
        check_choice(self.mode, MODES, "mode")
        check_tensor(self.scores, "scores", ndim=1, floating=True)
        check_tensor(self.classes, "classes", ndim=1, floating=False, rows=len(self.scores))
        check_not_empty(len(self.scores), "scores")
        object.__setattr__(self, "scores", self.scores.detach().double().cpu().clone())
        object.__setattr__(self, "classes", self.classes.detach().long().cpu().clone())
        groups = {int(c): self._made(self.scores[self.classes == c]) for c in self.classes.unique()}
        object.__setattr__(self, "_groups", groups)
        if short := {c: len(group.scores) for c, group in groups.items() if not group.rank}:
            least = least_calibration_rows(self.alpha, self.mode, self.delta)
            where = "" if self.mode != "class-conditional" else f" in each class (too few in {sorted(short)[:9]})"
            rule = f"at least {least} calibration rows{where} for alpha={self.alpha:g} in mode {self.mode!r}"
            cure = "Calibrate on more rows, or raise alpha"
            raise refuse(rule, "scores", f"{min(short.values())} rows", cure)

    @classmethod
    def of(
        cls,
        scores: Tensor,
        alpha: float = 0.01,
        *,
        mode: Mode = "marginal",
        delta: float = 0.05,
        classes: Tensor | None = None,
        ids: Collection[str] | None = None,
        used_ids: Collection[str] | None = None,
    ) -> "Calibration":
        """Calibrate on the scores of clean rows.

        Args:
            scores: (n,) finite, higher = stranger.
            alpha: Rate of false alarms, in (0, 1).
            mode: See the class.
            delta: See the class.
            classes: (n,) class indices for the mode "class-conditional": what is known of a row in service, so the
                predicted classes, not the labels.
            ids: Content ids of the calibration rows (`aidefend._core.batches.content_ids`).
            used_ids: Content ids of all rows that trained the model or fitted a detector; rows in both are refused.
        Raises: ConfigurationError: too few rows for alpha (says how many), rows that were used before, scores that are
            not finite.
        """
        check_tensor(scores, "scores", ndim=1, floating=True)
        check_choice(mode, MODES, "mode")
        check_not_reused(ids, used_ids, len(scores))
        if (classes is not None) != (mode == "class-conditional"):
            rule = "classes in the mode 'class-conditional', and in no other"
            raise refuse(rule, "classes", classes, "Pass mode= and classes= together")
        groups = torch.full((len(scores),), WHOLE) if classes is None else check_labels(classes, len(scores))
        return cls(scores, groups, alpha, mode, delta)

    @property
    def n(self) -> int:
        """Number of calibration rows."""
        return len(self.scores)

    def p_values(self, scores: Tensor, classes: Tensor | None = None) -> Tensor:
        """P-values (N,) float64 in (0, 1] of scores (N,); a row is refused where its p-value is at most alpha.

        "calibration-conditional" gives, for the k-th strangest place, the upper 1 - delta bound of the rate at which
        clean rows land there or higher: a bound on the p-value that this very calibration set would deserve. NaN where
        the class has no calibration rows; a NaN score counts as strangest.
        """
        check_tensor(scores, "scores", ndim=1, floating=True, finite=False)
        groups, place = self._of_new(scores, classes), scores.detach().double().cpu().nan_to_num(nan=math.inf)
        found = torch.full((len(scores),), torch.nan, dtype=torch.float64)
        for label, own in self._groups.items():
            here = groups == label
            at_least = len(own.scores) - torch.searchsorted(own.scores, place[here].contiguous(), side="left")
            found[here] = own.p_values[at_least]
        return found.to(scores.device)

    def refused(self, scores: Tensor, classes: Tensor | None = None) -> Tensor:
        """Which rows are refused: (N,) bool."""
        p = self.p_values(scores, classes)
        return at_most(p, self.alpha) | p.isnan()

    def p_by_count(self) -> Tensor:
        """The p-value of a score that k of the n calibration scores reach, k = 0 .. n, whatever the class: (n + 1,)."""
        return p_of_counts(self.n, self.mode, self.delta)

    def threshold(self, label: int | None = None) -> float:
        """The score above which a row is refused; of one class in the mode "class-conditional"."""
        own = self._group(label)
        return float(own.scores[-own.rank])

    def level(self, label: int | None = None) -> float:
        """The rate of false alarms over calibration sets, r / (n + 1): at most alpha."""
        own = self._group(label)
        return own.rank / (len(own.scores) + 1)

    def interval(self, confidence: float = 0.95, label: int | None = None) -> Interval:
        """The rate of false alarms of this very calibration set, and where it lies with this confidence.

        It is Beta(r, n + 1 - r) distributed over calibration sets. Of the whole in the mode "class-conditional": the
        lowest and the highest end over the classes, together at this confidence, whatever mix of classes comes.
        """
        check_probability(confidence, "confidence")
        if self.mode != "class-conditional" or label is not None:
            own = self._group(label)
            return rate_interval(own.rank, len(own.scores), confidence)
        groups = self._groups.values()
        each = 1 - (1 - confidence) / len(groups)
        ends = [rate_interval(group.rank, len(group.scores), each) for group in groups]
        mean = sum(end.value * len(group.scores) for end, group in zip(ends, groups, strict=True)) / self.n
        return Interval(mean, min(end.low for end in ends), max(end.high for end in ends))

    def alarms_a_day(self, rows_a_day: float, confidence: float = 0.95) -> Interval:
        """False alarms a day to expect at this traffic of clean rows, with the range that the calibration leaves open.

        Args:
            rows_a_day: Clean rows a day, >= 0.
            confidence: Of the range.
        """
        check_number(rows_a_day, "rows_a_day", 0.0)
        return Interval(*(rows_a_day * rate for rate in self.interval(confidence)))

    def expected_share(self, rows: int, confidence: float = 0.95) -> Interval:
        """The share of refused rows that a test on this many clean rows shows, if all is well (beta-binomial).

        Raises: ConfigurationError: in the mode "class-conditional", where it depends on the mix of classes.
        """
        if self.mode == "class-conditional":
            cure = "Test the rows of one class against a calibration of that class"
            raise refuse("one law for all rows", "mode", self.mode, cure)
        level = self.level()
        range_ = false_positive_interval(level * (1 + 1e-12), self.n, rows, confidence)
        return Interval(level, range_.low, range_.high)

    def detection(self, scores: Tensor, classes: Tensor | None = None, confidence: float = 0.95) -> Interval:
        """Share of these (strange) rows that is refused at the operating point, with its Wilson interval."""
        refused = self.refused(scores, classes)
        return wilson(int(refused.sum()), check_not_empty(len(refused), "scores"), confidence)

    def to_evidence(
        self, rows_a_day: float | None = None, strange: Mapping[str, Tensor] | None = None, *, confidence: float = 0.95
    ) -> Evidence:
        """The rate of false alarms, alarms a day, and the share that is found of each kind of strange rows.

        Args:
            rows_a_day: Clean rows a day; None leaves the alarms out.
            strange: Name to scores (N,) of rows that should be refused; not in the mode "class-conditional", where
                `detection` takes their classes.
            confidence: Of all intervals.
        """
        if strange is not None:
            check_kind(strange, Mapping, "strange", "Pass {name: scores}")
        return conformal_evidence(self, rows_a_day, {} if strange is None else strange, confidence)

    def recalibrate(
        self,
        scores: Tensor,
        *,
        reason: str,
        log: Log | None,
        classes: Tensor | None = None,
        ids: Collection[str] | None = None,
        used_ids: Collection[str] | None = None,
    ) -> "Calibration":
        """A new calibration in the same mode on newer rows; never happens by itself.

        Args:
            scores: (n,) of clean rows. Rows that this detector accepted in service are no sample of clean rows.
            reason: Why, in words; kept in `history` and in the log.
            log: Takes the event before the new calibration is handed out; None = none is kept beyond `history`.
            classes: As in `of`.
            ids: As in `of`.
            used_ids: As in `of`.
        Raises: ConfigurationError: as `of`; or no reason.
        """
        if not check_kind(reason, str, "reason", "Say why in words").strip():
            raise refuse("a reason", "reason", reason, "Say why in words")
        if log is not None and not callable(getattr(log, "append", None)):
            raise refuse("log with .append()", "log", log, "Pass an AuditLog, or None")
        kept: dict[str, Any] = {"alpha": self.alpha, "mode": self.mode, "delta": self.delta}
        new = self.of(scores, classes=classes, ids=ids, used_ids=used_ids, **kept)
        entry = {"reason": reason, "before": self.summary(), "after": new.summary()}
        if log is not None:
            log.append({"event": "calibration.replaced", **entry})
        return dataclasses.replace(new, history=(*self.history, entry))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration to one safetensors file with a JSON header."""
        header: dict[str, Any] = {"schema": _SCHEMA, "alpha": self.alpha, "mode": self.mode, "delta": self.delta}
        header["history"] = list(self.history)
        write_tensors(path, header, {"scores": self.scores, "classes": self.classes})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """The calibration back from `save`; nothing in the file is executed."""
        header, arrays = read_tensors(path, _SCHEMA, "Calibration.save")
        try:
            history = tuple(header["history"])
            return cls(arrays["scores"], arrays["classes"], header["alpha"], header["mode"], header["delta"], history)
        except AidefendError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            cure = f"Could not read it ({error!r})"
            raise refuse("a file written by Calibration.save", "path", str(path), cure) from error

    def _made(self, scores: Tensor) -> _Group:
        n = len(scores)
        rank = rank_of(n, self.alpha, self.mode, self.delta)
        return _Group(scores.sort().values, p_of_counts(n, self.mode, self.delta), rank)

    def _group(self, label: int | None) -> _Group:
        key = WHOLE if label is None else label
        if key not in self._groups:
            rule = "label to be a calibrated class" if self.mode == "class-conditional" else "no label in this mode"
            raise refuse(rule, "label", label, f"Calibrated classes: {sorted(self._groups)[:20]}")
        return self._groups[key]

    def _of_new(self, scores: Tensor, classes: Tensor | None) -> Tensor:
        if (classes is not None) != (self.mode == "class-conditional"):
            rule = "classes in the mode 'class-conditional', and in no other"
            raise refuse(rule, "classes", classes, "Pass the predicted classes, or none")
        if classes is None:
            return torch.full((len(scores),), WHOLE)
        check_same_rows(("scores", "classes"), len(scores), len(classes))
        return check_labels(classes, len(scores)).cpu()

    def summary(self) -> dict[str, Any]:
        """Size, setting, thresholds and a digest of the scores, as JSON types: what a log keeps of a calibration."""
        thresholds = {str(label): float(own.scores[-own.rank]) for label, own in self._groups.items()}
        data = hashlib.sha256(self.scores.numpy().tobytes() + self.classes.numpy().tobytes()).hexdigest()
        return {"n": self.n, "alpha": self.alpha, "mode": self.mode, "thresholds": thresholds, "digest": data}
