"""How much an audit does: three sizes, or your own."""

import dataclasses
from typing import Literal

from aidefend._core.checks import check_choice, check_int, check_items, refuse

Part = Literal[
    "evasion", "poisoning", "membership", "inversion", "extraction", "privacy", "artifacts", "storage", "guard"
]
PlanName = Literal["quick", "standard", "thorough"]
PARTS: tuple[Part, ...] = (
    "evasion",
    "poisoning",
    "membership",
    "inversion",
    "extraction",
    "privacy",
    "artifacts",
    "storage",
    "guard",
)


@dataclasses.dataclass(frozen=True)
class AuditPlan:
    """The effort of each part. The default values are those of "quick".

    Args:
        name: What the report calls it.
        parts: Which parts run, in this order; the others are reported as not tested.
        budget: Of `evaluate_robustness`: "quick", "standard" or "thorough".
        samples: Held-out samples under attack (evasion, guard), >= 1.
        comparisons: Samples compared in membership, poisoning and inversion.
        shadows: Shadow models of the likelihood-ratio attack, even, >= 4.
        inversion_steps: Steps of the class inversion.
        per_class: Reconstructions of each class.
        queries: Query budgets of the extraction.
        privacy_runs: Trainings with, and as many without, the canary.
        guard_steps: Steps of the attacks on the guard.
    Raises: ConfigurationError: numbers out of range, unknown or repeated parts.

    Example:
        >>> AuditPlan(parts=("membership",)).shadows
        4
    """

    name: str = "custom"
    parts: tuple[Part, ...] = PARTS
    budget: Literal["quick", "standard", "thorough"] = "quick"
    samples: int = 256
    comparisons: int = 1000
    shadows: int = 4
    inversion_steps: int = 100
    per_class: int = 1
    queries: tuple[int, ...] = (100, 400)
    privacy_runs: int = 20
    guard_steps: int = 20

    def __post_init__(self) -> None:
        check_choice(self.budget, ("quick", "standard", "thorough"), "budget")
        for part in check_items(self.parts, str, "parts", "Pass names of parts"):
            check_choice(part, PARTS, "parts")
        if len(set(self.parts)) != len(self.parts):
            raise refuse("parts without repetition", "parts", self.parts, "Name each part once")
        numbers = ("samples", "comparisons", "inversion_steps", "per_class", "guard_steps")
        for name in numbers:
            check_int(getattr(self, name), name)
        check_int(self.privacy_runs, "privacy_runs", 4)
        check_int(self.shadows, "shadows", 4)
        if self.shadows % 2:
            raise refuse("an even number of shadow models", "shadows", self.shadows, "Halves come in pairs")
        for budget in check_items(self.queries, int, "queries", "Pass whole numbers"):
            check_int(budget, "queries")
        if not self.queries:
            raise refuse("at least one query budget", "queries", self.queries, "Pass whole numbers")


_PLANS = {
    "quick": AuditPlan("quick"),
    "standard": AuditPlan(
        "standard",
        budget="standard",
        samples=1000,
        comparisons=4000,
        shadows=16,
        inversion_steps=300,
        per_class=3,
        queries=(100, 400, 1600),
        privacy_runs=100,
        guard_steps=100,
    ),
    "thorough": AuditPlan(
        "thorough",
        budget="thorough",
        samples=10_000,
        comparisons=20_000,
        shadows=64,
        inversion_steps=1000,
        per_class=10,
        queries=(100, 400, 1600, 6400),
        privacy_runs=500,
        guard_steps=200,
    ),
}


def plan_of(plan: PlanName | AuditPlan) -> AuditPlan:
    """The plan behind a name, or the plan itself."""
    return plan if isinstance(plan, AuditPlan) else _PLANS[check_choice(plan, tuple(_PLANS), "plan")]
