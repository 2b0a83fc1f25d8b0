"""Cutting the rows of one class in two: whitening, linear discriminants, and cuts that settle."""

import math

import torch
from torch import Tensor

_SMALLEST = 6


def whiten(features: Tensor, dimensions: int = 64) -> Tensor:
    """Rows (n, d) in their principal directions, largest last, each of about unit variance; small ones are damped."""
    return whitened(features, whitening(features, dimensions))


Whitening = tuple[Tensor, Tensor, Tensor]


def whitened(features: Tensor, by: Whitening) -> Tensor:
    """Rows (n, d) in the directions that `whitening` found in others."""
    mean, vectors, scale = by
    found: Tensor = (features - mean).double() @ vectors / scale
    return found


def whitening(features: Tensor, dimensions: int = 64) -> Whitening:
    """Mean (d,), directions (d, r) and scale (r,) of rows (n, d)."""
    mean = features.mean(dim=0)
    centred = (features - mean).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / max(len(centred), 1))
    values, vectors = values[-dimensions:].clamp(min=0), vectors[:, -dimensions:]
    top = values[-1] if len(values) and values[-1] > 0 else torch.ones((), dtype=torch.float64)
    return mean, vectors, (values + 0.01 * top).sqrt()


def cut(scores: Tensor, smallest: int = _SMALLEST) -> Tensor:
    """(n,) bool: the upper part of the cut that separates the two means best (Otsu 1979)."""
    n = len(scores)
    if n < 2 * smallest:
        return torch.zeros(n, dtype=torch.bool)
    ordered = scores.double().sort().values
    below = torch.arange(smallest, n - smallest + 1)
    totals = ordered.cumsum(0)
    low, high = totals[below - 1] / below, (totals[-1] - totals[below - 1]) / (n - below)
    best = below[(below * (n - below) * (low - high).square()).argmax()]
    upper: Tensor = scores.double() >= ordered[best]
    return upper


def inverse_covariance(points: Tensor) -> Tensor:
    """(r, r) inverse of the damped covariance of rows (n, r): what all discriminants of the same rows share."""
    centred = points - points.mean(dim=0)
    covariance = centred.T @ centred / len(points)
    damping = (0.1 * covariance.trace() / len(covariance)).clamp(min=1e-9)
    inverse: Tensor = torch.linalg.inv(covariance + damping * torch.eye(len(covariance), dtype=points.dtype))
    return inverse


def discriminant(points: Tensor, side: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Direction (r,) and offset of the linear log-odds of being on the side, with one covariance for both parts.

    The covariance within the parts is the total one less a rank-one term, so its inverse follows from `inverse`
    (Sherman, Morrison 1950): a step costs n r operations.
    """
    ours, rest = points[side].mean(dim=0), points[~side].mean(dim=0)
    gap, share = ours - rest, float(side.double().mean())
    raw = inverse @ gap
    direction = raw / (1 - share * (1 - share) * (gap @ raw)).clamp(min=1e-9)
    return direction, math.log(share / (1 - share)) - direction @ (ours + rest) / 2


def settle(points: Tensor, side: Tensor, inverse: Tensor, steps: int = 12) -> Tensor | None:
    """The side moved until its own discriminant reproduces it; None where a part dies out."""
    for _ in range(steps):
        if not _SMALLEST <= int(side.sum()) <= len(side) - _SMALLEST:
            return None
        direction, offset = discriminant(points, side, inverse)
        moved = points @ direction + offset > 0
        if torch.equal(moved, side):
            return side
        side = moved
    return side if _SMALLEST <= int(side.sum()) <= len(side) - _SMALLEST else None


def held_out_log_odds(points: Tensor, side: Tensor, stream: torch.Generator, folds: int = 5) -> Tensor:
    """(n,) log-odds of being on the side, each row judged by a discriminant that did not see it."""
    fold = torch.randperm(len(points), generator=stream) % folds
    odds = torch.zeros(len(points), dtype=torch.float64)
    for number in range(folds):
        out = fold == number
        part = side[~out]
        if bool(part.any()) and not bool(part.all()):
            known = points[~out]
            direction, offset = discriminant(known, part, inverse_covariance(known))
            odds[out] = points[out] @ direction + offset
    return odds


def valley_counts(log_odds: Tensor, inside: Tensor) -> tuple[int, int]:
    """Rows in the valley between the two parts, and rows at the thinner of the two peaks.

    Windows of one third of the distance between the two medians, around each median and halfway between them.
    """
    high, low = float(log_odds[inside].median()), float(log_odds[~inside].median())
    width, middle = (high - low) / 3, (high + low) / 2
    if not width > 0 or not math.isfinite(width):
        return len(log_odds), 0
    between, ours, rest = (int(((log_odds - at).abs() <= width / 2).sum()) for at in (middle, high, low))
    return between, min(ours, rest)


def held_out_regression(points: Tensor, target: Tensor, stream: torch.Generator, folds: int = 5) -> Tensor:
    """(n,) ridge predictions of the target, each row predicted by a fit that did not see it."""
    fold = torch.randperm(len(points), generator=stream) % folds
    fitted = torch.zeros(len(points), dtype=torch.float64)
    for number in range(folds):
        out = fold == number
        known, wanted = points[~out], target[~out].double()
        mean, level = known.mean(dim=0), wanted.mean()
        damped = (known - mean).T @ (known - mean) + 0.01 * len(known) * torch.eye(known.shape[1], dtype=known.dtype)
        weights = torch.linalg.solve(damped, (known - mean).T @ (wanted - level))
        fitted[out] = (points[out] - mean) @ weights + level
    return fitted


def bisections(points: Tensor, depth: int = 4, smallest: int = 8) -> list[Tensor]:
    """Row numbers of every node of a tree of two-means cuts."""
    nodes: list[Tensor] = []

    def split(rows: Tensor, level: int) -> None:
        if level == 0 or len(rows) < 2 * smallest:
            return
        side = _halves(points[rows])
        for part in (rows[side], rows[~side]):
            if smallest <= len(part) < len(rows):
                nodes.append(part)
                split(part, level - 1)

    split(torch.arange(len(points)), depth)
    return nodes


def _halves(points: Tensor) -> Tensor:
    centred = points - points.mean(dim=0)
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors
    side: Tensor = centred @ vectors[:, -1] > 0
    for _ in range(10):
        if bool(side.all()) or not bool(side.any()):
            break
        gaps = [(points - points[part].mean(dim=0)).square().sum(dim=1) for part in (side, ~side)]
        side = gaps[0] < gaps[1]
    return side
