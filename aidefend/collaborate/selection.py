"""Robust means that need the updates' inner products only: each returns one weight for each row."""

import torch
from torch import Tensor

_ROUNDS = 5


def krum(gram: Tensor, hostile: int, count: int) -> Tensor:
    """Equal weights on the `count` rows that lie nearest to their n - f - 2 nearest neighbours."""
    scores = _krum_scores(_distances(gram), hostile)
    chosen = scores.sort(stable=True).indices[:count]
    weights = torch.zeros(len(gram), dtype=torch.float64)
    weights[chosen] = 1 / count
    return weights


def bulyan_choice(gram: Tensor, hostile: int) -> Tensor:
    """Bulyan's first stage: n - 2f rows, taken one at a time by Krum among those left. Row numbers, ascending."""
    distances = _distances(gram)
    left = list(range(len(gram)))
    chosen: list[int] = []
    for _ in range(len(gram) - 2 * hostile):
        among = torch.tensor(left)
        best = int(_krum_scores(distances[among][:, among], hostile).argmin())
        chosen.append(left.pop(best))
    return torch.tensor(sorted(chosen))


def geometric_median(gram: Tensor, rounds: int = 200, tolerance: float = 1e-10) -> Tensor:
    """Weiszfeld's iteration from the row with the smallest sum of distances to the others."""
    weights = torch.zeros(len(gram), dtype=torch.float64)
    weights[_distances(gram).sqrt().sum(dim=1).argmin()] = 1.0
    floor = 1e-9 * _distances(gram).sqrt().median().clamp(min=torch.finfo(torch.float64).tiny)
    for _ in range(rounds):
        nearness = 1 / _to_point(gram, weights).clamp(min=floor)
        following = nearness / nearness.sum()
        if float((following - weights).abs().max()) <= tolerance:
            break
        weights = following
    return weights


def centered_clipping(gram: Tensor) -> Tensor:
    """Rounds of v += mean of (row - v), each shortened to the radius, from the last row of `gram` as the start."""
    n = len(gram) - 1
    weights = torch.zeros(n + 1, dtype=torch.float64)
    weights[n] = 1.0
    radius = _to_point(gram, weights)[:n].median()
    for _ in range(_ROUNDS):
        length = _to_point(gram, weights)[:n].clamp(min=torch.finfo(torch.float64).tiny)
        share = (radius / length).clamp(max=1.0) / n
        weights = weights * (1 - share.sum())
        weights[:n] += share
    return weights


def _distances(gram: Tensor) -> Tensor:
    """Squared distances between rows."""
    square = gram.diagonal()
    found: Tensor = (square[:, None] + square[None] - 2 * gram).clamp(min=0).fill_diagonal_(0.0)
    return found


def _krum_scores(distances: Tensor, hostile: int) -> Tensor:
    """Sum of squared distances to the n - f - 2 nearest other rows (at least one, while Bulyan's set shrinks)."""
    n = len(distances)
    if n == 1:
        return torch.zeros(1, dtype=torch.float64)
    others = distances.clone().fill_diagonal_(torch.inf).sort(dim=1).values
    total: Tensor = others[:, : min(n - 1, max(1, n - hostile - 2))].sum(dim=1)
    return total


def _to_point(gram: Tensor, weights: Tensor) -> Tensor:
    """Distance of each row to the weighted sum of rows."""
    along = gram @ weights
    square = gram.diagonal() - 2 * along + weights @ along
    return square.clamp(min=0).sqrt()
