"""How the allowed chance of a false verdict is spent: a little on each proposal, most on the groups that are left."""

import dataclasses
from collections.abc import Sequence

_GATE = 0.1
_KIN = 0.2
FIRST = 0.75


@dataclasses.dataclass(frozen=True)
class Levels:
    """Shares of the chance `alpha` of calling a harmless group poison.

    Args:
        alpha: All of it.
        gate: Level of each of the tests that every proposal takes (transfer, nearness, company, a gap with rows in
            it): a tenth of alpha, divided by the number of proposals.
        rest: What the tests of foreign rows and of an empty gap may take together, for groups that are past the gate.
            It is divided among the classes that have such groups: most proposals do not get there and cost nothing.
        kin: The same for groups that carry a trigger which was proven in another class.
    """

    alpha: float
    gate: float
    rest: float
    kin: float

    @classmethod
    def of(cls, alpha: float, tests: int) -> "Levels":
        """For this number of proposals."""
        return cls(alpha, _GATE * alpha / max(tests, 1), (1 - _GATE - _KIN) * alpha, _KIN * alpha)


def in_turn(p_values: Sequence[float], level: float) -> list[float]:
    """The level of each of some hypotheses in a fixed order; they err with a chance of at most `level` together.

    The first gets three quarters, each further one three quarters of what is left, the last one all of that; and a
    hypothesis that falls passes its level on to the next. The order may not depend on the p-values.

    Source: fallback procedure, Wiens 2003; exact under any dependence, Wiens, Dmitrienko 2005.
    """
    found, passed, left = [], 0.0, level
    for number, p_value in enumerate(p_values):
        own = left if number == len(p_values) - 1 else FIRST * left
        left -= own
        found.append(own + passed)
        passed = found[-1] if p_value <= found[-1] else 0.0
    return found
