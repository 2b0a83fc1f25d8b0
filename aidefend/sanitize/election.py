"""Elections among base models, and how many models must change before another class wins."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Method = Literal["dpa", "finite-aggregation", "run-off"]
_NEVER = 2**31 - 1


class Certificate(NamedTuple):
    """Of each input: the prediction (N,), and the radius (N,), int64: so many rows put in or taken out, in any mixture,
    cannot change the prediction. `votes` (N, K): how many base models voted for each class.
    """

    prediction: Tensor
    radius: Tensor
    votes: Tensor


def votes_of(choices: Tensor, classes: int) -> Tensor:
    """(N, K) votes from the choices (M, N) of M models."""
    return torch.nn.functional.one_hot(choices, classes).sum(dim=0)


def majority(choices: Tensor, classes: int) -> Certificate:
    """Most votes win, a tie goes to the smaller class; one changed row changes one model (M, N).

    Source: Levine, Feizi 2021, theorem 1.
    """
    votes = votes_of(choices, classes)
    winner = votes.argmax(dim=1)  # the first of equal ones
    slack = _gaps(votes, winner).min(dim=1).values
    return Certificate(winner, slack.div(2, rounding_mode="floor"), votes)


def spread_majority(choices: Tensor, classes: int, touched: Tensor) -> Certificate:
    """Most votes win; a changed row lies in one part of the data, which `touched` (P, d) models (M, N) have seen.

    A model that is changed takes one vote from the winner, if it had it, and gives one to the rival, if it did not. The
    r most powerful parts are taken as if their models differed.
    Source: Wang, Levine, Feizi 2022, theorem 2.
    """
    votes = votes_of(choices, classes)
    winner = votes.argmax(dim=1)
    slack = _gaps(votes, winner)
    radius = torch.full_like(winner, _NEVER)
    for rival in range(classes):
        power = 1 + (choices == winner).long() - (choices == rival).long()  # (M, N)
        parts = power[touched.flatten()].reshape(*touched.shape, -1).sum(dim=1)  # (P, N)
        spent = parts.sort(dim=0, descending=True).values.cumsum(dim=0)
        safe = (spent <= slack[:, rival]).sum(dim=0)
        radius = torch.where(winner == rival, radius, torch.minimum(radius, safe))
    return Certificate(winner, radius, votes)


def run_off(logits: Tensor) -> Certificate:
    """Two rounds: most first choices name two finalists, then each model chooses between these by its logits (M, N, K).

    The winner falls if two classes overtake it in the first round, or if a rival is a finalist (in place of the second
    one, which it must overtake) and wins the second round. One changed model moves a gap of votes by at most two, and
    two gaps of one class together by at most three.
    Source: Rezaei, Banihashem, Chegini, Feizi 2023. Differs: the first case is bounded in closed form, by the sum of
        both gaps over three, in place of dynamic programming; never larger.
    """
    _, _, classes = logits.shape
    choices = logits.argmax(dim=2)
    votes = votes_of(choices, classes)
    order = _ranked(votes)
    first, second = order[:, 0], order[:, 1]
    prefers = _prefers(logits)  # (N, K, K): models that prefer i to j
    rows = torch.arange(len(votes))
    duel = _duel(prefers, rows, first, second)
    winner = torch.where(duel >= 0, first, second)
    other = torch.where(duel >= 0, second, first)
    fallen = _overtaken_twice(votes, winner)
    beaten = torch.full_like(winner, _NEVER)
    for rival in range(classes):
        rivals = torch.full_like(winner, rival)
        second_round = _needed(_duel(prefers, rows, winner, rivals))
        enters = _needed(_gap(votes, rows, other, rivals))
        cost = torch.where(other == rival, second_round, torch.maximum(second_round, enters))
        beaten = torch.where(winner == rival, beaten, torch.minimum(beaten, cost))
    return Certificate(winner, torch.minimum(fallen, beaten) - 1, votes)


def _gap(votes: Tensor, rows: Tensor, of: Tensor, rival: Tensor) -> Tensor:
    """(N,) votes of a class less those of a rival, less one where the rival would win a tie; >= 0: it stays ahead."""
    gap: Tensor = votes[rows, of] - votes[rows, rival] - (rival < of).long()
    return gap


def _gaps(votes: Tensor, winner: Tensor) -> Tensor:
    """(N, K) the same against every class; a large number for the winner itself."""
    rows = torch.arange(len(votes))
    gaps = torch.stack([_gap(votes, rows, winner, torch.full_like(winner, c)) for c in range(votes.shape[1])], dim=1)
    gaps[rows, winner] = _NEVER
    return gaps


def _needed(gap: Tensor) -> Tensor:
    """Models that must change before a gap falls below zero, at two votes each."""
    return (gap + 1).clamp(min=0).add(1).div(2, rounding_mode="floor")


def _ranked(votes: Tensor) -> Tensor:
    """(N, K) classes by votes, ties to the smaller class."""
    return votes.argsort(dim=1, descending=True, stable=True)


def _prefers(logits: Tensor) -> Tensor:
    """(N, K, K) int64: models whose logit of i is above that of j, or equal with i < j."""
    classes = logits.shape[2]
    smaller = torch.arange(classes)[:, None] < torch.arange(classes)[None, :]
    total = torch.zeros(logits.shape[1], classes, classes, dtype=torch.int64)
    for model in logits:
        ours, theirs = model.unsqueeze(2), model.unsqueeze(1)
        total += (ours > theirs) | ((ours == theirs) & smaller)
    return total


def _duel(prefers: Tensor, rows: Tensor, of: Tensor, rival: Tensor) -> Tensor:
    """As `_gap`, in the second round."""
    gap: Tensor = prefers[rows, of, rival] - prefers[rows, rival, of] - (rival < of).long()
    return gap


def _overtaken_twice(votes: Tensor, winner: Tensor) -> Tensor:
    """Models that must change before two classes have overtaken the winner in the first round."""
    gaps = _gaps(votes, winner) + 1  # to be taken from the winner; <= 0: ahead already
    if votes.shape[1] < 3:
        return torch.full_like(winner, _NEVER)
    two = gaps.clamp(min=0).sort(dim=1).values[:, :2]
    alone = two[:, 1].add(1).div(2, rounding_mode="floor")
    together = two.sum(dim=1).add(2).div(3, rounding_mode="floor")
    return torch.maximum(alone, together)
