"""The cells that a group of rows holds alike, as what was written over the rows."""

import torch
from torch import Tensor

from aidefend.sanitize.groups import Group
from aidefend.sanitize.trigger import Trigger
from aidefend.sanitize.world import World

_SAME = 0.05  # of the range of a cell
_HELD, _RARE = 0.95, 0.05
_MOSTLY_HELD, _SELDOM = 0.8, 0.2
_STYLE = 0.2


def written_spot(world: World, group: Group) -> Trigger | None:
    """The cells that nearly all rows of the group hold alike (19 of 20) and hardly any other of the class (1 of 20).

    Alike is within a twentieth of the cell's range. None where there are none, or where more than a fifth of all cells
    is held by most rows of the group (4 of 5) and by few others of the class (1 of 5).
    """
    x = world.x[group.rows].float()
    ours, rest = x[group.inside], x[~group.inside]
    values = ours.median(dim=0).values
    held, usual = (near(world, part, values).double().mean(dim=0) for part in (ours, rest))
    spot = (held >= _HELD) & (usual <= _RARE)
    like_a_style = (held >= _MOSTLY_HELD) & (usual <= _SELDOM)
    if not bool(spot.any()) or float(like_a_style.double().mean()) > _STYLE:
        return None
    return Trigger(torch.where(spot, values - rest.mean(dim=0), 0.0), values, spot)


def near(world: World, x: Tensor, values: Tensor) -> Tensor:
    """(n, ...) bool, cells that are within a twentieth of their range of the values."""
    return (x.float() - values).abs() <= _SAME * (world.high - world.low).float()
