"""A bet against calibration: capital that grows only if a stream of p-values is no longer uniform."""

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_number, check_probability, check_tensor, refuse
from aidefend._core.storage import canonical_json

_THRESHOLDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)
_STAKES = (0.1, 0.3, 0.6)
_STARTS = 40


@dataclasses.dataclass(frozen=True)
class DriftState:
    """Where the bet stands.

    Args:
        alarm: The capital has reached 1 / alpha at some time: calibration no longer holds.
        capital: Current capital, 1 at the start; small values mean no evidence, not a proof of calibration.
        count: p-values seen.
        alarm_at: Number of p-values seen at the first alarm, or None.
    """

    alarm: bool
    capital: float
    count: int
    alarm_at: int | None


class CalibrationMartingale:
    """Watches p-values one batch after the other and raises an alarm when they stop being uniform.

    Guarantee: while rows are exchangeable with the calibration rows, the probability that an alarm is ever raised, over
        an endless stream, is at most alpha. With `calibration_n`, this covers that one fixed calibration set makes
        p-values deviate from uniform by up to the Dvoretzky-Kiefer-Wolfowitz band; without it, p-values must be
        independent and uniform, as from recalibrating with every row. No alarm is not a proof: a drift smaller than the
        band is never found. Voided by dependent rows (one client that repeats a query) and, with sides="both", by ties.
    Args:
        alpha: Probability of ever raising a false alarm, in (0, 1).
        calibration_n: Number of rows behind the p-values, >= 1.
        sides: "low" bets on p-values that become small (strange inputs) and holds for every valid p-value; "both" also
            on ones that become large (inputs that collapse), and needs scores without ties.
    Cost: O(batch x 72), constant memory.
    Source: Vovk 2021 (testing randomness online); Ville 1939; Massart 1990. The bets are on the share of p-values
        below and above fixed thresholds, mixed over stakes and over starting times.
    Example:
        >>> watch = CalibrationMartingale(alpha=0.01, calibration_n=1000)
        >>> watch.observe(torch.linspace(0.001, 1, 1000)[torch.randperm(1000)]).alarm
        False
        >>> watch.observe(torch.full((200,), 0.02)).alarm
        True
    """

    def __init__(
        self, alpha: float = 0.01, calibration_n: int | None = None, sides: Literal["low", "both"] = "low"
    ) -> None:
        check_choice(sides, ("low", "both"), "sides")
        self.alpha, self.calibration_n = check_probability(alpha, "alpha"), calibration_n
        band = 0.0
        if calibration_n is not None:
            check_int(calibration_n, "calibration_n")
            band = math.sqrt(math.log(4 / alpha) / (2 * calibration_n)) + 1 / (calibration_n + 1)
        self._level = alpha if calibration_n is None else alpha / 2
        below = torch.tensor(_THRESHOLDS, dtype=torch.float64)
        # mean of the indicator under the null, at most: P(p <= u) <= u + band and P(p > u) <= 1 - u + band
        mean = torch.cat([below, 1 - below]) + band
        self._useful = mean < 1
        if sides == "low":
            self._useful[len(below) :] = False
        self._mean = mean.clamp(max=1.0)
        self._below = below
        self._log_capital = torch.zeros(1, len(mean), len(_STAKES), dtype=torch.float64)
        self._count = 0
        self._capital = 1.0
        self._alarm_at: int | None = None

    def observe(self, p_values: Tensor) -> DriftState:
        """Bet on a batch of p-values (N,) in (0, 1], in their order; an empty batch changes nothing."""
        p = check_tensor(p_values, "p_values", ndim=1, floating=True).double().cpu()
        if bool((p <= 0).any()) or bool((p > 1).any()):
            raise refuse("p_values in (0, 1]", "p_values", p_values, "Pass conformal p-values")
        with torch.inference_mode(False), torch.no_grad():  # the capital outlives the caller's mode
            for part in _cuts(p, self._count):
                self._bet(part)
        return self.state

    def _bet(self, part: Tensor) -> None:
        self._start_anew()
        hits = (part[:, None] <= self._below).sum(dim=0).double()
        wins = torch.cat([hits, len(part) - hits])
        self._log_capital += self._gain(wins, len(part))
        self._count += len(part)
        self._capital = self._mixture()
        if self._alarm_at is None and self._capital >= 1 / self._level:
            self._alarm_at = self._count

    @property
    def state(self) -> DriftState:
        """Where the bet stands."""
        return DriftState(self._alarm_at is not None, self._capital, self._count, self._alarm_at)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a restart, as plain values."""
        return {
            "level": self._level,
            "mean": self._mean.tolist(),
            "log_capital": self._log_capital.tolist(),
            "count": self._count,
            "capital": self._capital,
            "alarm_at": self._alarm_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; a state with another alpha or calibration size is refused."""
        cure = "Pass what state_dict returned"
        if not isinstance(state, dict) or set(state) != set(self.state_dict()):
            raise refuse("a state of this class", "state", type(state).__name__, cure)
        if canonical_json([state["level"], state["mean"]]) != canonical_json([self._level, self._mean.tolist()]):
            raise refuse("a state with the same alpha and calibration_n", "state", "another setting", "Start anew")
        count = check_int(state["count"], "count", 0)
        capital = check_number(state["capital"], "capital", 0.0)
        alarm_at = None if state["alarm_at"] is None else check_int(state["alarm_at"], "alarm_at", 1, max(1, count))
        try:
            bets = torch.tensor(state["log_capital"], dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise refuse("log_capital of numbers", "log_capital", type(error).__name__, cure) from error
        if bets.shape[1:] != self._log_capital.shape[1:] or not len(bets) or not bool(torch.isfinite(bets).all()):
            raise refuse("finite log_capital of the shape of these bets", "log_capital", bets, cure)
        self._log_capital, self._count, self._capital, self._alarm_at = bets, count, capital, alarm_at

    def _gain(self, wins: Tensor, n: int) -> Tensor:
        """Log growth of each bet: a stake s pays 1 + s * (hit - mean) / mean, which has mean <= 1 under the null."""
        stake = torch.tensor(_STAKES, dtype=torch.float64)
        won = torch.log1p(stake * (1 - self._mean[:, None]) / self._mean[:, None])
        lost = torch.log1p(-stake).expand_as(won)
        return wins[:, None] * won + (n - wins)[:, None] * lost

    def _start_anew(self) -> None:
        """One more copy of all bets each time the count passes a power of two, so that late drift is found as well."""
        wanted = min(_STARTS, 1 + self._count.bit_length())
        fresh = wanted - len(self._log_capital)
        if fresh > 0:
            zeros = torch.zeros(fresh, *self._log_capital.shape[1:], dtype=torch.float64)
            self._log_capital = torch.cat([self._log_capital, zeros])

    def _mixture(self) -> float:
        """Capital of the whole: start k has weight 1 / ((k + 1) (k + 2)); what has not started yet keeps its weight."""
        started = torch.arange(1, len(self._log_capital) + 1, dtype=torch.float64)
        weight = 1 / (started * (started + 1))
        bets = self._log_capital[:, self._useful].flatten(1)
        each = torch.logsumexp(bets, dim=1) - math.log(bets.shape[1])
        waiting = 1 - float(weight.sum())
        total = torch.logsumexp(torch.log(weight) + each, dim=0).exp()
        return min(float(total) + waiting, 1e300)


def _cuts(p: Tensor, count: int) -> list[Tensor]:
    """Cut a batch where the count passes a power of two, so that starting times do not depend on batching."""
    parts, position = [], 0
    while position < len(p):
        seen = count + position
        following = 1 << seen.bit_length()
        size = min(len(p) - position, following - seen)
        parts.append(p[position : position + size])
        position += size
    return parts
