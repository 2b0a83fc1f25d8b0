"""Logistic regression of two classes by Newton's method, and how its errors follow from single training rows."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_NEWTON_STEPS = 50
_INTERCEPT_RIDGE = 1e-6  # so that the Hessian of separable classes has an inverse


class Rows(NamedTuple):
    """Rows x (n, d) float64 of classes y (n,) in {0, 1}."""

    x: Tensor
    y: Tensor

    @property
    def signs(self) -> Tensor:
        """-1 for class 0, 1 for class 1."""
        return 2.0 * self.y.to(self.x) - 1


def margins(theta: Tensor, rows: Rows) -> Tensor:
    """(n,) signed distances, > 0 where the model is right; theta (d + 1,) ends with the intercept."""
    return rows.signs * (rows.x @ theta[:-1] + theta[-1])


def fit_logistic(rows: Rows, mass: Tensor, ridge: float, start: Tensor) -> Tensor:
    """Weights that minimise the mean loss with row weights `mass` (n,), which sum to 1, and the ridge."""
    penalty, theta = _penalty(start, ridge), start

    def objective(theta: Tensor) -> Tensor:
        return (mass * -logsigmoid(margins(theta, rows))).sum() + (penalty * theta.square()).sum() / 2

    value = objective(theta)
    for _ in range(_NEWTON_STEPS):
        slope = _with_ones(rows.x).T @ (-mass * rows.signs * torch.sigmoid(-margins(theta, rows))) + penalty * theta
        if float(slope.norm()) < 1e-9:
            break
        move, size = torch.linalg.solve(curvature(theta, rows, mass, ridge), slope), 1.0
        while size > 1e-6 and objective(theta - size * move) > value - 1e-4 * size * (slope @ move):
            size /= 2
        theta = theta - size * move
        value = objective(theta)
    return theta


def curvature(theta: Tensor, rows: Rows, mass: Tensor, ridge: float) -> Tensor:
    """(d + 1, d + 1) second derivatives of the objective."""
    wide, chance = _with_ones(rows.x), torch.sigmoid(margins(theta, rows))
    return (wide.T * (mass * chance * (1 - chance))) @ wide + _penalty(theta, ridge).diag()


def smooth_error(theta: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean chance of a wrong answer on the rows, and its slope (d + 1,) in the weights."""
    wrong = torch.sigmoid(-margins(theta, rows))
    slope = _with_ones(rows.x).T @ (-rows.signs * wrong * (1 - wrong)) / len(rows.y)
    return wrong.mean(), slope


def effect_of_moving(theta: Tensor, points: Rows, back: Tensor) -> Tensor:
    """(p, d) slope, in each point, of what the trained model does; by implicit differentiation, up to its mass.

    Args:
        theta: Trained weights.
        points: Training rows that move.
        back: (d + 1,) inverse curvature times the slope of what is measured in the weights.
    """
    signs, wrong = points.signs, torch.sigmoid(-margins(theta, points))
    pull = points.x @ back[:-1] + back[-1]
    first = (signs * wrong)[:, None] * back[:-1]
    second = (wrong * (1 - wrong) * pull)[:, None] * theta[:-1]
    return first - second


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def _penalty(theta: Tensor, ridge: float) -> Tensor:
    penalty = torch.full_like(theta, ridge)
    penalty[-1] = _INTERCEPT_RIDGE
    return penalty
