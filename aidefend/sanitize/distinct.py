"""Equal rows count once where groups are tested: a copy is no further evidence."""

import dataclasses

import torch
from torch import Tensor

from aidefend._core.batches import sample_id
from aidefend.sanitize.decide import Decision, Verdict
from aidefend.sanitize.features import Features


class Distinct:
    """The first of equal rows (input and label) among the usable ones of a data set.

    The tests of a screen count rows as independent draws. In data in which each row stands several times, as after a
    rare class was repeated, a few odd rows would look like a group.

    Args:
        found: All rows.
    """

    def __init__(self, found: Features) -> None:
        contents = [sample_id(row_id) for row_id in found.ids]
        usable = found.usable.nonzero().flatten().tolist()
        place: dict[str, int] = {}
        twins = [place.setdefault(contents[row], len(place)) for row in usable]
        self.twins = torch.tensor(twins, dtype=torch.int64)  # of each usable row, its number among the distinct ones
        first = torch.full((len(place),), len(usable))
        self.rows = first.scatter_reduce(0, self.twins, torch.arange(len(usable)), "amin")  # the other way round
        kept = torch.zeros(len(found), dtype=torch.bool)
        kept[torch.tensor(usable, dtype=torch.int64)[self.rows]] = True
        self.features = dataclasses.replace(found, usable=kept)

    def among_all(self, decision: Decision) -> Decision:
        """A decision on the distinct rows with the row numbers of all usable ones; copies are not in its groups."""
        poison, harmless = (tuple(map(self._moved, part)) for part in (decision.poison, decision.harmless))
        mislabelled: Tensor = decision.mislabelled[self.twins]
        return dataclasses.replace(decision, poison=poison, harmless=harmless, mislabelled=mislabelled)

    def _moved(self, verdict: Verdict) -> Verdict:
        group = verdict.group
        moved = dataclasses.replace(group, rows=self.rows[group.rows], matched=self.rows[group.matched])
        return dataclasses.replace(verdict, group=moved)
