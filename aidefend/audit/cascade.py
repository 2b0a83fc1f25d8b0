"""Rows under a sequence of attacks: who stands, the worst point of each, what every stage did."""

import torch
from torch import Tensor

from aidefend._core.stats import wilson
from aidefend.audit.robustness_bench import Bench, MakeAttack
from aidefend.audit.robustness_result import CurvePoint, MaskingCheck, NormQuantile, Robustness, Stage


class Cascade:
    """Which rows stand, the worst point of each, the smallest distances, and the stages so far.

    `distance` (N,): the smallest one that is known to fool the model; inf: none was found; NaN: none was sought.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.correct = bench.correct
        self.robust = self.correct.clone()
        self.x_adv = bench.x.clone()
        self.distance = torch.full((len(bench.x),), torch.nan, dtype=torch.float64, device=bench.x.device)
        self.stages: list[Stage] = []
        self._log("clean", len(bench.x), int((~self.correct).sum()), len(bench.x), 0)

    @property
    def standing(self) -> Tensor:
        """Rows that nothing has broken yet."""
        return self.robust.nonzero()[:, 0]

    def attack(self, name: str, make: MakeAttack, rows: Tensor | None = None, begin_at: Tensor | None = None) -> Tensor:
        """One stage on the standing rows, or on these of them: which of them it broke."""
        rows = self.standing if rows is None else rows
        result = self.bench.attack(name, make, rows, begin_at=begin_at)
        self.x_adv[rows] = result.x_adv
        self.robust[rows] = ~result.success
        passes = int(result.forwards.sum()), int(result.backwards.sum())
        self._log(name, len(rows), int(result.success.sum()), *passes)
        return result.success

    def found(self, name: str, rows: Tensor, points: Tensor, broken: Tensor, forwards: int, backwards: int = 0) -> None:
        """Points that were found on the way to something else: standing rows that they break are broken."""
        newly = broken & self.robust[rows]
        self.x_adv[rows[newly]] = points[newly]
        self.robust[rows[newly]] = False
        self._log(name, len(rows), int(newly.sum()), forwards, backwards)

    def result(
        self,
        checks: dict[str, MaskingCheck],
        points: tuple[CurvePoint, ...],
        smallest: tuple[NormQuantile, ...],
        budget: str,
    ) -> Robustness:
        """The verdict."""
        bench, n = self.bench, len(self.robust)
        clean, robust = wilson(int(self.correct.sum()), n), wilson(int(self.robust.sum()), n)
        return Robustness(
            clean.value, robust.value, robust, clean, n, checks, self.robust, self.x_adv, bench.ids,
            tuple(self.stages), points, smallest, bench.threat, budget, bench.seed,
        )  # fmt: skip

    def _log(self, name: str, attacked: int, broken: int, forwards: int, backwards: int) -> None:
        accuracy = float(self.robust.double().mean())
        self.stages.append(Stage(name, attacked, broken, accuracy, forwards, backwards))
