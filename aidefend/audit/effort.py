"""What each budget of a robustness evaluation buys."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

Budget = Literal["quick", "standard", "thorough"]


@dataclasses.dataclass(frozen=True)
class Effort:
    """Steps of each stage (0 = the stage is left out), restarts, rows of the curve, rows and draws of the checks."""

    pgd_steps: int
    apgd_steps: int
    margin_steps: int
    norm_steps: int
    targeted_steps: int
    targets: int
    queries: int
    more_queries: int
    restarts: int
    curve_rows: int
    curve_steps: int
    check_rows: int
    noise_draws: int
    decision_rows: int


EFFORTS: Mapping[Budget, Effort] = {
    "quick": Effort(
        pgd_steps=10, apgd_steps=20, margin_steps=30, norm_steps=0, targeted_steps=0, targets=0, queries=100,
        more_queries=1000, restarts=1, curve_rows=50, curve_steps=30, check_rows=100, noise_draws=10,
        decision_rows=0,
    ),
    "standard": Effort(
        pgd_steps=20, apgd_steps=50, margin_steps=100, norm_steps=100, targeted_steps=50, targets=4, queries=500,
        more_queries=2500, restarts=1, curve_rows=100, curve_steps=30, check_rows=200, noise_draws=20,
        decision_rows=0,
    ),
    "thorough": Effort(
        pgd_steps=50, apgd_steps=100, margin_steps=100, norm_steps=300, targeted_steps=100, targets=9, queries=5000,
        more_queries=10_000, restarts=5, curve_rows=1000, curve_steps=100, check_rows=1000, noise_draws=50,
        decision_rows=100,
    ),
}  # fmt: skip
