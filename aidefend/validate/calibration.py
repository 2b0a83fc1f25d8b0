"""Turns detector scores into p-values and one decision whose rate of false positives is exact."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from aidefend._core.checks import check_tensor, refuse
from aidefend._core.stats import Interval
from aidefend.validate.conformal import WHOLE, Calibration
from aidefend.validate.conformal_law import Mode, least_calibration_rows
from aidefend.validate.few_rows import Lookup
from aidefend.validate.tail_surprise import Tails, rounding_of

COMBINED = "combined"


class Judged(NamedTuple):
    """What a calibration says about N rows.

    Args:
        numbers: 2 D + 2 of (N,): scores of each detector and the joint statistic (of scores less `slack`), then
            p-values: of each detector among all calibration rows, and last of the decision, by its mode.
        ranks: (N,) p-value of the joint statistic among all calibration rows: what watches for drift.
        refused: (N,) bool.
        some: Whether any is refused.
    """

    numbers: tuple[Tensor, ...]
    ranks: Tensor
    refused: Tensor
    some: bool


class JointCalibration(nn.Module):
    """The scores of rows that were used for nothing else, and the statistic that joins several detectors.

    Each score s becomes a surprise -log P(score >= s), read off the reference rows as a piecewise linear function with
    an exponential tail; the surprises are joined by log-sum-exp (the harmonic mean of the tail probabilities). This
    function is fixed before the calibration rows are looked at, so the joint statistic is as exchangeable as the rows:
    its conformal threshold is exact, whatever the dependence between the detectors.
    Inputs that come again and again, such as an empty form, tie with their copies among the calibration rows but for
    rounding, which the size of a batch changes. So new scores are compared less `slack`, a bound on this rounding: what
    ties is not refused, in a batch or alone, and the rate of rows that do not tie falls by less than a share of 1 %.
    Guarantee: that of `Calibration` in the same mode, for the joint statistic: `law` is that calibration.
    Args:
        names: Names of the D detectors.
        scores: (n, D) calibration scores, finite.
        knots: (D, Q) ascending scores at tail probabilities `heights`, from the reference rows; Q = 0 for one detector.
        heights: (Q,) surprise at the knots.
        slopes: (D, Q) surprise for each unit of score behind each knot, > 0.
        alpha: Rate of false positives, in (0, 1).
        mode: As in `Calibration`.
        delta: As in `Calibration`.
        classes: (n,) predicted classes of the calibration rows, in the mode "class-conditional".
        history: As in `Calibration`.
    """

    law: Calibration
    scores: Tensor
    knots: Tensor
    heights: Tensor
    slopes: Tensor
    classes: Tensor
    joined: Tensor
    threshold: Tensor
    slack: Tensor
    ordered: Tensor
    table: Tensor
    by_place: Tensor

    def __init__(
        self,
        names: Sequence[str],
        scores: Tensor,
        knots: Tensor,
        heights: Tensor,
        slopes: Tensor,
        alpha: float,
        mode: Mode = "marginal",
        delta: float = 0.05,
        classes: Tensor | None = None,
        history: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__()
        _check_arrays(len(names), scores, knots, heights, slopes)
        self.names = tuple(names)
        self.alpha, self.mode, self.delta, self.history = alpha, mode, delta, tuple(history)
        for name, array in (("scores", scores), ("knots", knots), ("heights", heights), ("slopes", slopes)):
            self.register_buffer(name, array.double())
        whole = torch.full((len(scores),), WHOLE, device=scores.device)
        self.register_buffer("classes", whole if mode != "class-conditional" or classes is None else classes.long())
        for name in ("joined", "threshold"):
            self.register_buffer(name, None)
        for name in ("slack", "ordered", "table", "by_place"):
            self.register_buffer(name, None, persistent=False)
        self._derive()
        self.register_load_state_dict_post_hook(_derive_again)  # type: ignore[no-untyped-call]

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        scores: Tensor,
        reference: Tensor,
        alpha: float,
        mode: Mode = "marginal",
        delta: float = 0.05,
        classes: Tensor | None = None,
    ) -> "JointCalibration":
        """From calibration scores (n, D) and reference scores (m, D); one detector needs no reference rows."""
        if len(names) == 1:
            nothing = scores.new_zeros(1, 0)
            return cls(names, scores, nothing, nothing[0], nothing, alpha, mode, delta, classes)
        return cls(names, scores, *Tails.of(reference), alpha, mode, delta, classes)

    def replaced(
        self, scores: Tensor, classes: Tensor | None, history: Sequence[Mapping[str, Any]]
    ) -> "JointCalibration":
        """The same statistic and mode, calibrated on other rows."""
        tails = (self.knots, self.heights, self.slopes)
        return JointCalibration(self.names, scores, *tails, self.alpha, self.mode, self.delta, classes, history)

    @property
    def n(self) -> int:
        """Number of calibration rows."""
        return len(self.scores)

    @property
    def device(self) -> torch.device:
        """Where the calibration scores are."""
        return self.scores.device

    @property
    def level(self) -> float:
        """The rate of false positives that n rows can express, at most alpha; the mean over classes by their size."""
        return self.law.interval().value

    def interval(self, confidence: float = 0.95) -> Interval:
        """The rate of false positives given this very calibration set: where it lies with this confidence (Beta)."""
        return self.law.interval(confidence)

    def join(self, scores: Tensor) -> Tensor:
        """The joint statistic of scores (N, D): (N,) float64, higher = stranger; differentiable."""
        tails = Tails(self.knots, self.heights, self.slopes)
        if tails.knots.shape[1] == 0:
            return scores.to(tails.knots.device).double()[:, 0]
        return tails.surprises(scores).logsumexp(dim=1)

    def margin(self, scores: Tensor, classes: Tensor | None = None) -> Tensor:
        """Joint statistic (of scores less `slack`) minus threshold: > 0 exactly for refused rows; NaN is strangest.

        Args:
            scores: (N, D).
            classes: (N,) predicted classes, which the mode "class-conditional" needs.
        """
        return self.join(self._lowered(scores)).nan_to_num(nan=math.inf) - self._limit(classes)

    def judge(self, scores: Tensor, classes: Tensor | None = None) -> Judged:
        """Decision and p-values for scores (N, D); see `margin`."""
        lowered = self._lowered(scores)
        joined = self.join(lowered)
        columns = torch.cat([lowered.T, joined[None]])
        place = torch.searchsorted(self.ordered, columns, side="left")  # NaN comes last, as the strangest
        p_values = self.by_place[place]
        refused = (joined <= self._limit(classes)).logical_not_()
        ranks = p_values[-1]
        if self.mode != "marginal":
            own = self.law.p_values(joined, classes) if self.mode == "class-conditional" else self.table[place[-1]]
            p_values = torch.cat([p_values[:-1], own[None]])
        return Judged((*scores.to(joined).T, joined, *p_values), ranks, refused, bool(refused.any()))

    def judge_few(self, scores: Sequence[Sequence[float]]) -> Judged:
        """The same for a few rows on the CPU, from D scores each; not in the mode "class-conditional"."""
        found, ranks, n, limit = [], [], self._n, self._few_limit
        for row in scores:
            lowered = [score - slack for score, slack in zip(row, self._few_slack, strict=True)]
            joined = self._lookup.join(lowered)
            places = self._lookup.places([*lowered, joined])
            p_values = [(1 + n - place) / (n + 1) for place in places]
            ranks.append(p_values[-1])
            if self.mode != "marginal":
                p_values[-1] = self.table[places[-1]].item()
            found.append([*row, joined, *p_values])
        refused = [not row[len(self.names)] <= limit for row in found]
        numbers = torch.tensor(found, dtype=torch.float64).unbind(1)
        marks = torch.tensor(refused, dtype=torch.bool)
        return Judged(numbers, torch.tensor(ranks, dtype=torch.float64), marks, True in refused)

    def p_values(self, scores: Tensor, classes: Tensor | None = None) -> dict[str, Tensor]:
        """P-value of each detector and of the decision, by name, each (N,) float64."""
        numbers = self.judge(scores, classes).numbers
        return dict(zip((*self.names, COMBINED), numbers[len(self.names) + 1 :], strict=True))

    def _lowered(self, scores: Tensor) -> Tensor:
        """New scores (N, D) as they are compared: (N, D) float64."""
        return scores.to(self.slack) - self.slack

    def _limit(self, classes: Tensor | None) -> Tensor:
        """The threshold, of each row in the mode "class-conditional": -infinity without calibration rows."""
        if self.mode != "class-conditional":
            return self.threshold
        if classes is None:
            raise refuse("classes in the mode 'class-conditional'", "classes", None, "Pass the predicted classes")
        return self.threshold[classes.to(self.threshold.device).clamp(max=len(self.threshold) - 1)]

    def _derive(self) -> None:
        """Everything that follows from the scores."""
        scores, classes = self.scores, self.classes
        self.slack = rounding_of(scores)
        joined = self.join(scores)
        self.law = Calibration(joined, classes, self.alpha, self.mode, self.delta, self.history)
        self.joined = joined
        if self.mode == "class-conditional":
            known = {int(label): self.law.threshold(int(label)) for label in classes.unique()}
            values = [known.get(label, -math.inf) for label in range(int(classes.max()) + 2)]
            self.threshold = joined.new_tensor(values)
        else:
            self.threshold = joined.new_tensor(self.law.threshold())
        self.ordered = torch.cat([scores.T, joined[None]]).sort(dim=1).values.contiguous()
        self.table = self.law.p_by_count().flip(0).to(joined.device)
        counts = torch.arange(len(joined), -1, -1, dtype=torch.float64, device=joined.device)
        self.by_place = (1 + counts) / (len(joined) + 1)
        if self.mode != "class-conditional":
            self._n = len(joined)
            self._lookup = Lookup.of(self.knots, self.heights, self.slopes, scores)
            self._few_slack = self.slack.tolist()
            self._few_limit = float(self._lookup.ordered[-1][-round(self.law.level() * (self._n + 1))])


def _derive_again(module: nn.Module, _: object) -> None:
    cast(JointCalibration, module)._derive()


class Shares(NamedTuple):
    """How many rows serve which purpose."""

    fit: int
    reference: int
    calibration: int


def share_rows(
    n: int, own_fit: bool, detectors: int, alpha: float, mode: Mode = "marginal", delta: float = 0.05
) -> Shares:
    """Split n rows: 40 % to fit (none if there is other data for it), some for reference, the rest to calibrate.

    Several detectors need reference rows: a fifth of what remains after the fit, 20 to 500, but never so many that too
    few are left to calibrate at alpha.
    Raises: ConfigurationError: too few rows for alpha; names how many are needed.
    """
    least, least_reference = least_calibration_rows(alpha, mode, delta), 20 if detectors > 1 else 0
    fit = 0 if own_fit else round(0.4 * n)
    free = n - fit - least
    if free < least_reference:
        needed = least + least_reference if own_fit else math.ceil((least + least_reference) / 0.6 + 1)
        rule = f"at least {needed} different rows to calibrate at alpha={alpha:g} in mode {mode!r} ({least} after"
        rule += f" {least_reference} reference rows{'' if own_fit else ' and 40 % to fit the detectors'})"
        cure = "Calibrate on more rows" + ("" if own_fit else ", pass fit=") + ", or raise alpha"
        raise refuse(rule, "calibration_loader", f"{n} rows", cure)
    wanted = min(500, (n - fit) // 5) if detectors > 1 else 0
    reference = max(least_reference, min(wanted, free))
    return Shares(fit, reference, n - fit - reference)


def _check_arrays(detectors: int, scores: Tensor, knots: Tensor, heights: Tensor, slopes: Tensor) -> None:
    check_tensor(scores, "scores", ndim=2, floating=True)
    check_tensor(heights, "heights", ndim=1, floating=True)
    check_tensor(knots, "knots", ndim=2, floating=True, rows=detectors)
    check_tensor(slopes, "slopes", ndim=2, floating=True, rows=detectors)
    count = len(heights)
    if scores.shape[1] != detectors or knots.shape[1] != count or slopes.shape[1] != count:
        raise refuse(f"one column for each of {detectors} detectors", "scores", scores, "Score with the same detectors")
    if (detectors != 1 and count == 0) or bool((knots.diff(dim=1) <= 0).any()) or bool((slopes <= 0).any()):
        raise refuse("ascending knots and rising slopes", "knots", knots, "Calibrate on scores that vary")
