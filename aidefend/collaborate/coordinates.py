"""Robust means that work coordinate by coordinate, in blocks, and sums around the coordinate-wise median."""

import torch
from torch import Tensor

from aidefend.collaborate.updates import Updates, add_rows


def median(rows: Updates) -> Tensor:
    """Coordinate-wise median; the mean of the two middle values for an even number."""
    return torch.cat([_middle(block) for block in rows.blocks()])


def trimmed_mean(rows: Updates, trim: int) -> Tensor:
    """Mean of what is left after the `trim` smallest and the `trim` largest values of each coordinate."""
    kept = slice(trim, len(rows) - trim)
    return torch.cat([_mean_of_sorted(block.sort(dim=0).values[kept]) for block in rows.blocks()])


def mean_around_median(rows: Updates, chosen: Tensor, hostile: int) -> Tensor:
    """Bulyan's second stage: of the chosen rows, the mean of the values nearest to their median, 2 f fewer."""
    count = len(chosen) - 2 * hostile
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    parts = []
    for block in rows.blocks():
        values = block[chosen].sort(dim=0).values
        nearest = (values - _middle(values)).abs().sort(dim=0, stable=True).indices[:count]
        parts.append(add_rows(values.gather(0, nearest), weights))
    return torch.cat(parts)


def centred_gram(rows: Updates) -> Tensor:
    """Inner products of the rows less their coordinate-wise median.

    The median is as near to the honest rows as they are to one another, so their distances are exact however far the
    rows are from the origin, and however long the hostile ones are.
    """
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for block in rows.blocks():
        centred = block - _middle(block)
        total += centred @ centred.T
    return (total + total.T) / 2


def sum_around_median(rows: Updates, weights: Tensor) -> Tensor:
    """The coordinate-wise median plus the weighted sum of what the rows differ from it."""
    parts = []
    for block in rows.blocks():
        middle = _middle(block)
        parts.append(middle + add_rows(block - middle, weights))
    return torch.cat(parts)


def _mean_of_sorted(ordered: Tensor) -> Tensor:
    """The mean of each column, kept inside the column's range whatever the rounding."""
    mean = add_rows(ordered, torch.ones(len(ordered), dtype=torch.float64)) / len(ordered)
    return torch.minimum(torch.maximum(mean, ordered[0]), ordered[-1])


def _middle(block: Tensor) -> Tensor:
    ordered = block.sort(dim=0).values
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
