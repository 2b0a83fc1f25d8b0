"""Poison with right labels whose rows were changed beyond the mark: the constant part alone is judged."""

import math
from typing import NamedTuple

from scipy import stats

from aidefend.sanitize.group_evidence import valley_depth
from aidefend.sanitize.groups import Group
from aidefend.sanitize.own_marks import asked_rows, turns
from aidefend.sanitize.spot import near, written_spot
from aidefend.sanitize.world import World

SPOT_TURNED = 0.05
_ELSEWHERE = 0.05


class SpotEvidence(NamedTuple):
    """What speaks against a group whose labels are right, by the cells that it holds constant alone.

    Each p-value belongs to one way of being harmless.

    Args:
        valley, p_valley, transfer, scrambled, p_scrambled: As in `MarkEvidence`, for the spot alone.
        p_transfer: Of H: it turns at most one in twenty. Rows that a strong perturbation has made hard are learned by
            that, too, so their mark need not turn a fifth; no cells that are natural or in another order do as much.
        elsewhere: Share of rows of other classes that hold the spot's values, too; `p_elsewhere`: of H: one in twenty
            at least, as it is where the values are a natural thing (a blank centre) or a mark that all classes have.
        cells: How many cells the spot has.
    """

    valley: float
    p_valley: float
    transfer: float
    p_transfer: float
    scrambled: float
    p_scrambled: float
    elsewhere: float
    p_elsewhere: float
    cells: int

    @property
    def p_value(self) -> float:
        """Of H: harmless in at least one of the four ways (intersection-union test)."""
        return max(self.p_valley, self.p_transfer, self.p_scrambled, self.p_elsewhere)


def examine_spot(world: World, group: Group, threshold: float) -> SpotEvidence | None:
    """All four tests of the spot; None where the group holds no cells of its own, or so many that it is a style.

    Rows that were made hard to learn differ from their class by more than the mark, each in its own way: neither does
    the mark make the rest of the class look like them, nor is what they have in common on average all mark. What was
    written over them is the part that does not vary. A style that is constant somewhere (the edges of a negative) is
    constant in much of the picture.
    """
    spot = written_spot(world, group)
    if spot is None:
        return None
    cells = int(spot.spot.sum())
    valley, p_valley = valley_depth(group.log_odds, group.inside)
    if p_valley > threshold:
        return SpotEvidence(valley, p_valley, math.nan, 1.0, math.nan, 1.0, math.nan, 1.0, cells)
    others = world.x[world.labels != group.label]
    count = int(near(world, others, spot.values).flatten(1)[:, spot.spot.flatten()].all(dim=1).sum())
    p_elsewhere = float(stats.binom.cdf(count, len(others), _ELSEWHERE))
    shares = turns(world, spot, group.label, *asked_rows(world, group.label), SPOT_TURNED)
    return SpotEvidence(valley, p_valley, *shares, count / len(others), p_elsewhere, cells)
