"""What a robustness evaluation found, and how it reads."""

import dataclasses
import math
from typing import Any, Literal

from torch import Tensor

from aidefend._core.evidence import Evidence, Finding, Severity
from aidefend._core.stats import Interval
from aidefend._core.threat import Threat

Outcome = Literal["pass", "fail", "not shown"]
_LIMITS = (
    "An upper bound: a stronger or adaptive attack may break more. Holds for this threat, these rows and this model "
    "in the mode in which it was given."
)


@dataclasses.dataclass(frozen=True)
class MaskingCheck:
    """One check: its outcome, the number measured, the limit that it was held against, and one sentence."""

    name: str
    outcome: Outcome
    value: float | None
    limit: float | None
    detail: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """One attack of the cascade: rows that it met, rows that it broke, accuracy afterwards, passes (sums over rows)."""

    name: str
    attacked: int
    broken: int
    accuracy: float
    forwards: int
    backwards: int


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """Worst-case accuracy at one radius, on the rows of the curve."""

    eps: float
    accuracy: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True)
class NormQuantile:
    """The distance within which this share of the rows was fooled, an upper bound of the true one; inf = never."""

    share: float
    distance: float
    n: int


@dataclasses.dataclass(frozen=True, eq=False)
class Robustness:
    """The result of `evaluate_robustness`.

    Args:
        clean_accuracy: Share of rows that are right without an attack.
        robust_accuracy: Share of rows that no attack broke: the worst case by row, not by attack.
        interval: Wilson interval (95 %) of the robust accuracy.
        clean_interval: The same of the clean accuracy.
        n: Number of rows.
        masking: Check name -> MaskingCheck.
        robust: (N,) bool, rows that stand.
        x_adv: (N, ...), the row itself where it is wrong already, the point that broke it, or the worst point found.
        ids: Content id of each row.
        stages: The cascade in order, the clean pass first.
        curve: Accuracy over eps, ascending; empty where eps is a tensor or the data has no finite range.
        smallest: Quantiles of the smallest distance that fools the model, on a part of the rows; empty for "quick".
        threat, budget, seed: The setting.
    """

    clean_accuracy: float
    robust_accuracy: float
    interval: Interval
    clean_interval: Interval
    n: int
    masking: dict[str, MaskingCheck]
    robust: Tensor
    x_adv: Tensor
    ids: tuple[str, ...]
    stages: tuple[Stage, ...]
    curve: tuple[CurvePoint, ...]
    smallest: tuple[NormQuantile, ...]
    threat: Threat
    budget: str
    seed: int

    @property
    def failed_checks(self) -> tuple[MaskingCheck, ...]:
        """The masking checks that failed."""
        return tuple(check for check in self.masking.values() if check.outcome == "fail")

    @property
    def trustworthy(self) -> bool:
        """Whether no masking check failed."""
        return not self.failed_checks

    def summary(self) -> str:
        """The verdict in words, the reasons for doubt first."""
        doubts = [f"NOT TRUSTWORTHY: {check.name}: {_measured(check)}" for check in self.failed_checks]
        low, high = self.interval.low, self.interval.high
        doubt = "" if self.trustworthy else ", an upper bound that may be far off"
        lines = [
            f"Threat: {self.threat}; n = {self.n}, budget {self.budget}, seed {self.seed}.",
            f"Clean accuracy {self.clean_accuracy:.1%}; worst-case accuracy {self.robust_accuracy:.1%} "
            f"(95 % interval {low:.1%} to {high:.1%}){doubt}.",
        ]
        stages = [
            f"  {stage.name}: {stage.broken} of {stage.attacked} rows broken, {stage.accuracy:.1%} left"
            for stage in self.stages
        ]
        open_checks = [check.name for check in self.masking.values() if check.outcome == "not shown"]
        tail = [f"Not shown: {', '.join(open_checks)}."] if open_checks else []
        return "\n".join([*doubts, *lines, *stages, *self._norm_line(), *tail])

    def _norm_line(self) -> list[str]:
        if not self.smallest:
            return []
        parts = ", ".join(f"{quantile.share:.0%} {quantile.distance:.3g}" for quantile in self.smallest)
        return [f"Smallest {self.threat.norm} distance that fools a share of {self.smallest[0].n} rows: {parts}."]

    def to_evidence(self) -> Evidence:
        """Findings `evasion.robust_accuracy`, `.clean_accuracy`, `.masking.*`, `.curve.<i>`, `.smallest.<percent>`."""
        findings = [self._robust_finding(), self._clean_finding()]
        findings += [self._check_finding(check) for check in self.masking.values()]
        findings += [self._curve_finding(i, point) for i, point in enumerate(self.curve)]
        findings += [self._smallest_finding(quantile) for quantile in self.smallest]
        return Evidence(findings, {"threat": self.threat.to_dict(), "budget": self.budget, "seed": self.seed})

    def _robust_finding(self) -> Finding:
        return Finding(
            "evasion.robust_accuracy",
            "Worst-case accuracy under attack",
            self._severity(),
            self.robust_accuracy,
            self.interval.low,
            self.interval.high,
            self.n,
            {**self._setting(), "stages": [dataclasses.asdict(stage) for stage in self.stages]},
            str(self.threat),
            _LIMITS if self.trustworthy else f"Masking checks failed: the value is not reliable. {_LIMITS}",
            {"atlas": "AML.T0043"},
            "measured" if self.trustworthy else "not shown",
        )

    def _clean_finding(self) -> Finding:
        return Finding(
            "evasion.clean_accuracy",
            "Accuracy without attack",
            value=self.clean_accuracy,
            low=self.clean_interval.low,
            high=self.clean_interval.high,
            n=self.n,
            setting=self._setting(),
        )

    def _check_finding(self, check: MaskingCheck) -> Finding:
        failed = check.outcome == "fail"
        return Finding(
            f"evasion.masking.{check.name}",
            f"Masking check: {check.name.replace('_', ' ')}",
            Severity.HIGH if failed else Severity.INFO,
            check.outcome if check.value is None else check.value,
            n=self.n,
            setting={**self._setting(), "limit": check.limit, "outcome": check.outcome},
            threat=str(self.threat),
            limits=check.detail,
            status="not shown" if check.outcome == "not shown" else "measured",
        )

    def _curve_finding(self, index: int, point: CurvePoint) -> Finding:
        return Finding(
            f"evasion.curve.{index}",
            f"Worst-case accuracy at eps {point.eps:g}",
            value=point.accuracy,
            low=point.low,
            high=point.high,
            n=point.n,
            setting={**self._setting(), "eps": point.eps},
            threat=str(self.threat),
        )

    def _smallest_finding(self, quantile: NormQuantile) -> Finding:
        return Finding(
            f"evasion.smallest.{100 * quantile.share:g}",
            f"Distance that fools {quantile.share:.0%} of the rows",
            value=quantile.distance if math.isfinite(quantile.distance) else "never fooled",
            n=quantile.n,
            setting={**self._setting(), "norm": self.threat.norm},
            threat=str(self.threat),
            limits="An upper bound: a smaller perturbation may exist.",
        )

    def _severity(self) -> Severity:
        """By the share of the clean accuracy that an adversary can take away."""
        kept = self.interval.low / self.clean_accuracy if self.clean_accuracy else 0.0
        if not self.trustworthy or kept < 0.5:
            return Severity.HIGH
        return Severity.MEDIUM if kept < 0.8 else Severity.LOW

    def _setting(self) -> dict[str, Any]:
        return {"budget": self.budget, "seed": self.seed}


def _measured(check: MaskingCheck) -> str:
    if check.value is None or check.limit is None:
        return check.detail
    return f"{check.detail}: {check.value:.3g} (limit {check.limit:g})"
