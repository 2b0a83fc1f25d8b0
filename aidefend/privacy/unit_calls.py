"""Users in place of rows: what a layer saw and got of all rows of a user, as if the user were one row."""

import torch
from torch import Tensor

from aidefend.privacy.layer_gradients import Call, Summed
from aidefend.privacy.recorder import Calls


def calls_by_unit(calls: Calls, units: Tensor) -> Calls:
    """The calls of rows as calls of units: gradients of a unit's rows are averaged, and clipped as one.

    A layer's gradients over several calls add up; so the first rows of all units make one call, the second rows
    another, and a unit without such a row takes part in it with a gradient of zero.
    Args:
        calls: By layer, one row for each example.
        units: (rows,) the unit of each row, 0 .. units - 1.
    """
    table, shares = _places(units)
    return {
        path: [made for call in each for made in _of_call(call, units, table, shares)] for path, each in calls.items()
    }


def _places(units: Tensor) -> tuple[Tensor, Tensor]:
    """(most rows of a unit, units): the row at each place or -1; and for each row one over the rows of its unit."""
    counts = torch.bincount(units)
    order = torch.argsort(units, stable=True)
    starts = torch.cumsum(counts, 0) - counts
    places = torch.empty_like(units)
    places[order] = torch.arange(len(units), device=units.device) - starts[units[order]]
    table = units.new_full((int(counts.max()), len(counts)), -1)
    table[places, units] = torch.arange(len(units), device=units.device)
    return table, 1.0 / counts[units]


def _of_call(call: Call | Summed, units: Tensor, table: Tensor, shares: Tensor) -> list[Call | Summed]:
    if isinstance(call, Summed):
        return [Summed(*(_averaged(part, units, shares, table.shape[1]) for part in call))]
    weighted = call._replace(gradient=call.gradient * _along(shares, call.gradient))
    made: list[Call | Summed] = []
    for rows in table:
        missing = rows < 0  # the unit's own first row stands in: no other value may meet its layers
        part = weighted.rows(torch.where(missing, table[0], rows))
        made.append(part._replace(gradient=_blank(part.gradient, missing)))
    return made


def _averaged(values: Tensor, units: Tensor, shares: Tensor, count: int) -> Tensor:
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, units, values * _along(shares, values))


def _blank(values: Tensor, missing: Tensor) -> Tensor:
    """Zeros in the rows that are missing, whatever stood there."""
    return values.masked_fill(missing.reshape(-1, *[1] * (values.ndim - 1)), 0)


def _along(shares: Tensor, values: Tensor) -> Tensor:
    return shares.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
