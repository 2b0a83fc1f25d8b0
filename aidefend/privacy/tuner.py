"""The best of a random number of private runs, and what that costs in the whole."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from scipy.optimize import brentq

from aidefend._core.checks import check_callable, check_choice, check_items, check_kind, check_number, refuse
from aidefend._core.random import secure_uniform
from aidefend.privacy.accounting import approximate_delta, approximate_epsilon, renyi_curve
from aidefend.privacy.config import PrivacyConfig
from aidefend.privacy.ledger import PrivacyLedger
from aidefend.privacy.statement import PrivacyStatement, make_statement
from aidefend.privacy.step_book import refused

Runs = Literal["geometric", "logarithmic", "poisson"]
RUNS = ("geometric", "logarithmic", "poisson")
_COMPARED = ("unit", "sampler", "sample_rate", "noise_multiplier", "neighboring", "steps_planned", "insecure")
_LONGEST = 100_000  # runs: beyond any that a distribution of a sensible mean can give


class Tuned(NamedTuple):
    """The best run, what it was made with, its score, and how many there were. `best` is None if there were none."""

    best: Any
    candidate: Any
    score: float
    runs: int


class PrivateTuner:
    """Searches hyperparameters with private runs and pays for the search, not for each run.

    A random number of runs is made, each with a random candidate; only the best is released. What that costs depends on
    the distribution of the number, and grows far slower than the runs' epsilons would add up.

    Guarantee: the released run and its score are (epsilon(), config.delta)-DP for config.neighboring, if every run is a
        private training with this configuration, its score is computed from its released weights and public data (or
        costs nothing for another reason), and all other runs, their number of steps or scores among them, are thrown
        away. Candidates chosen after a look at the data, and stopping by the results, void it.
    Args:
        candidates: What to choose from, at least one: learning rates, models, dictionaries. Public.
        config: Of each run. Its steps, noise and sample rate are the same for all candidates.
        runs: Distribution of the number of runs: "geometric", "logarithmic" (cheapest, often few runs), or "poisson"
            (concentrated around its mean; may be none).
        mean_runs: Its mean, > 1 (Poisson: > 0).
        ledger: Charged when `run` begins; None: count it yourself. The runs themselves must not be in a ledger.
    Raises: ConfigurationError: an argument out of range.

    Source: Papernot, Steinke 2022, "Hyperparameter tuning with Renyi differential privacy", theorems 2 and 6.

    Example:
        >>> config = PrivacyConfig(
        ...     expected_batch_size=256,
        ...     public_size=60_000,
        ...     steps=14_062,
        ...     max_grad_norm=1.0,
        ...     delta=1e-5,
        ...     noise_multiplier=1.1,
        ... )
        >>> tuner = PrivateTuner([0.1, 1.0], config, runs="geometric", mean_runs=10)
        >>> round(config.spent(config.steps).epsilon, 2), round(tuner.epsilon(), 1)
        (2.38, 5.0)
    """

    def __init__(
        self,
        candidates: Sequence[Any],
        config: PrivacyConfig,
        *,
        runs: Runs = "geometric",
        mean_runs: float = 10.0,
        ledger: PrivacyLedger | None = None,
    ) -> None:
        self.candidates = tuple(check_items(candidates, object, "candidates", "Pass a list of what to try"))
        if not self.candidates:
            raise refuse("at least one candidate", "candidates", candidates, "Pass a list of what to try")
        self.config = check_kind(config, PrivacyConfig, "config", "Pass the PrivacyConfig of each run")
        check_choice(runs, RUNS, "runs")
        self.runs: Runs = runs
        least = 0.0 if runs == "poisson" else 1.0
        self.mean_runs = check_number(mean_runs, "mean_runs", least, _LONGEST / 100, open_low=True)
        if ledger is not None:
            check_kind(ledger, PrivacyLedger, "ledger", "Open PrivacyLedger(path)")
        self._ledger = ledger
        self._gamma = self._log_parameter() if runs == "logarithmic" else 1 / self.mean_runs

    def epsilon(self) -> float:
        """Of the whole search, at config.delta."""
        return self._at(self.config.delta)

    def _at(self, delta: float) -> float:
        history = self.config.history(self.config.steps)
        if self.config.insecure:
            return math.inf
        orders, costs = renyi_curve(history, self.config.neighboring)
        whole = self._poisson(orders, costs) if self.runs == "poisson" else self._negative_binomial(orders, costs)
        return approximate_epsilon(orders, whole, delta)

    def run(self, train: Callable[[Any, PrivacyConfig], tuple[Any, float]]) -> Tuned:
        """Charge the ledger, make the runs, keep the best.

        Args:
            train: `(candidate, config) -> (run, score)`: makes one private run to its end, with make_private and this
                configuration and without a ledger, and returns it (anything with a `statement()`) and its score; the
                highest wins.
        Raises: BudgetExceeded: the ledger has no room; nothing ran. PrivacyError: a run with another guarantee than
            config's, or a score that is no number.
        """
        check_callable(train, "train", "Pass a function (candidate, config) -> (private run, score)")
        if self._ledger is not None:
            name = f"PrivateTuner ({self.runs}, mean {self.mean_runs:g}) of {self.config.steps} steps"
            delta = min(self.config.delta, self._ledger.delta / 2)  # what else is in the ledger needs some, too
            self._ledger.charge(
                name,
                epsilon=self._at(delta),
                delta=delta,
                for_neighboring=self.config.neighboring,
                unit=self.config.unit,
            )
        asked = make_statement(self.config, self.config.steps)
        count = self._draw()
        best = Tuned(None, None, -math.inf, count)
        for _ in range(count):
            candidate = self.candidates[int(secure_uniform(1)[0] * len(self.candidates))]
            made, score = train(candidate, self.config)
            _check_run(made, asked)
            if not isinstance(score, int | float) or math.isnan(score):
                raise refused("a score that is a number", "score", score, "Return (run, float)")
            if best.best is None or score > best.score:
                best = Tuned(made, candidate, float(score), count)
        return best

    def _negative_binomial(self, orders: Sequence[float], costs: Sequence[float]) -> list[float]:
        """Theorem 2, with the shape eta 1 (geometric) or 0 (logarithmic), at the best second order."""
        eta, log = 1.0 if self.runs == "geometric" else 0.0, -math.log(self._gamma)
        added = min((1 - 1 / order) * cost + log / order for order, cost in zip(orders, costs, strict=True))
        mean = math.log(self.mean_runs)
        return [cost + (1 + eta) * added + mean / (order - 1) for order, cost in zip(orders, costs, strict=True)]

    def _poisson(self, orders: Sequence[float], costs: Sequence[float]) -> list[float]:
        """Theorem 6."""
        whole = []
        for order, cost in zip(orders, costs, strict=True):
            delta = approximate_delta(orders, costs, math.log1p(1 / (order - 1)))
            whole.append(cost + self.mean_runs * delta + max(0.0, math.log(self.mean_runs)) / (order - 1))
        return whole

    def _log_parameter(self) -> float:
        """Gamma of the logarithmic distribution with this mean."""

        def excess(log: float) -> float:  # of 1 / gamma
            return math.expm1(log) / log - self.mean_runs

        return math.exp(-float(brentq(excess, 1e-12, 60.0, xtol=1e-14)))

    def _draw(self) -> int:
        """The number of runs, from the secure stream, by inversion."""
        uniform = float(secure_uniform(1)[0])
        number, total = 0, 0.0
        while number < _LONGEST:
            total += self._probability(number)
            if uniform <= total:
                return number
            number += 1
        return _LONGEST

    def _probability(self, number: int) -> float:
        if self.runs == "poisson":
            return math.exp(number * math.log(self.mean_runs) - self.mean_runs - math.lgamma(number + 1))
        if number == 0:
            return 0.0
        if self.runs == "geometric":
            return (1 - self._gamma) ** (number - 1) * self._gamma
        return (1 - self._gamma) ** number / (-number * math.log(self._gamma))


def _check_run(made: Any, asked: PrivacyStatement) -> None:
    """A run has the guarantee that is paid for, or it is refused."""
    statement = getattr(made, "statement", None)
    if not callable(statement):
        cure = "Return what make_private returned, with the score"
        raise refused("a private run from train", "run", type(made).__name__, cure)
    told = statement()
    differ = [name for name in _COMPARED if getattr(told, name) != getattr(asked, name)]
    if differ:
        found = {name: getattr(told, name) for name in differ}
        cure = "Use the config that train was given"
        raise refused("runs with the configuration of the tuner", "run", found, cure)
