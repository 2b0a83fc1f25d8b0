"""Robust means that need inner products only: each returns one weight for each row.

Every function takes the Gram matrix of the rows less their coordinate-wise median, see `coordinates.centred_gram`.
"""

import torch
from torch import Tensor

CLIPPING_ROUNDS = 5
_SMOOTHING = 1e-6
_SMALLEST = 1e-100


def krum(gram: Tensor, hostile: int, count: int) -> Tensor:
    """Equal weights on the `count` rows that lie nearest to their n - f - 2 nearest neighbours."""
    weights = torch.zeros(len(gram), dtype=torch.float64)
    weights[_krum_order(_distances(gram), hostile)[:count]] = 1 / count
    return weights


def bulyan_choice(gram: Tensor, hostile: int) -> Tensor:
    """Bulyan's first stage: n - 2f rows, taken one at a time by Krum among those left. Row numbers, ascending."""
    distances = _distances(gram)
    left = list(range(len(gram)))
    chosen: list[int] = []
    for _ in range(len(gram) - 2 * hostile):
        among = torch.tensor(left)
        best = int(_krum_order(distances[among][:, among], hostile)[0])
        chosen.append(left.pop(best))
    return torch.tensor(sorted(chosen))


def geometric_median(gram: Tensor, rounds: int = 1000, tolerance: float = 1e-12) -> Tensor:
    """Weiszfeld's iteration from the coordinate-wise median.

    Distances below a millionth of the usual one count as that, so that the iteration does not stick to a row.
    """
    lengths = gram.diagonal().clamp(min=0).sqrt()
    floor = max(_SMOOTHING * float(lengths.median()), _SMALLEST)
    weights = _nearness(lengths, floor)
    for _ in range(rounds):
        following = _nearness(_to_point(gram, weights), floor)
        moved = float((following - weights).abs().max())
        weights = following
        if moved <= tolerance:
            break
    return weights


def centered_clipping(gram: Tensor) -> Tensor:
    """Rounds of v += mean of (row - v), each shortened to the radius, from the coordinate-wise median as the start.

    The weights are those of the rows less that median; they sum to less than one.
    """
    n = len(gram)
    weights = torch.zeros(n, dtype=torch.float64)
    radius = gram.diagonal().clamp(min=0).sqrt().median()
    for _ in range(CLIPPING_ROUNDS):
        length = _to_point(gram, weights)
        share = torch.where(length <= radius, 1.0, radius / length) / n
        weights = weights * (1 - share.sum()) + share
    return weights


def _nearness(lengths: Tensor, floor: float) -> Tensor:
    nearness = 1 / lengths.clamp(min=floor)
    return nearness / nearness.sum()


def _distances(gram: Tensor) -> Tensor:
    """Squared distances between rows."""
    square = gram.diagonal()
    found: Tensor = (square[:, None] + square[None] - 2 * gram).clamp(min=0).fill_diagonal_(0.0)
    return found


def _krum_order(distances: Tensor, hostile: int) -> Tensor:
    """Rows by the sum of squared distances to their n - f - 2 nearest others, at least one while Bulyan's set shrinks.

    Two rows that are each other's only neighbour tie by construction; the one nearer to all others comes first, so that
    the order in which clients are listed does not matter.
    """
    n = len(distances)
    others = distances.clone().fill_diagonal_(torch.inf).sort(dim=1).values
    score = others[:, : min(n - 1, max(1, n - hostile - 2))].sum(dim=1)
    by_total = distances.sum(dim=1).sort(stable=True).indices
    return by_total[score[by_total].sort(stable=True).indices]


def _to_point(gram: Tensor, weights: Tensor) -> Tensor:
    """Distance of each row to the weighted sum of rows."""
    along = gram @ weights
    square = gram.diagonal() - 2 * along + weights @ along
    return square.clamp(min=0).sqrt()
