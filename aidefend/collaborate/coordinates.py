"""Robust means that work coordinate by coordinate, in blocks."""

import torch
from torch import Tensor

from aidefend.collaborate.updates import Updates


def median(rows: Updates) -> Tensor:
    """Coordinate-wise median; the mean of the two middle values for an even number."""
    return torch.cat([_middle(block) for block in rows.blocks()])


def trimmed_mean(rows: Updates, trim: int) -> Tensor:
    """Mean of what is left after the `trim` smallest and the `trim` largest values of each coordinate."""
    kept = slice(trim, len(rows) - trim)
    return torch.cat([block.sort(dim=0).values[kept].mean(dim=0) for block in rows.blocks()])


def mean_around_median(rows: Updates, chosen: Tensor, hostile: int) -> Tensor:
    """Bulyan's second stage: of the chosen rows, the mean of the values nearest to their median, `hostile` * 2 fewer."""
    count = len(chosen) - 2 * hostile
    parts = []
    for block in rows.blocks():
        values = block[chosen]
        nearest = (values - _middle(values)).abs().sort(dim=0, stable=True).indices[:count]
        parts.append(values.gather(0, nearest).mean(dim=0))
    return torch.cat(parts)


def _middle(block: Tensor) -> Tensor:
    ordered = block.sort(dim=0).values
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
