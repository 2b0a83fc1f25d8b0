"""One update out of many, some of which may be hostile: means that hold, and the number of attackers each bears."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_number, refuse
from aidefend._core.report import Report, reasons_by_row
from aidefend.collaborate import coordinates, selection
from aidefend.collaborate.updates import Update, Updates

Method = Literal[
    "mean",
    "median",
    "trimmed-mean",
    "geometric-median",
    "krum",
    "multi-krum",
    "bulyan",
    "centered-clipping",
    "fltrust",
]
# Number of clients that bears f hostile ones: n >= slope * f + offset.
_NEEDED: Mapping[str, tuple[int, int]] = {
    "mean": (0, 1),
    "median": (2, 1),
    "trimmed-mean": (2, 1),
    "geometric-median": (2, 1),
    "krum": (2, 3),
    "multi-krum": (2, 3),
    "bulyan": (4, 3),
    "centered-clipping": (2, 1),
    "fltrust": (1, 1),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Aggregation:
    """The joined update and what became of each client's.

    Args:
        value: In the form of the updates: a tensor, or a state dict.
        report: One row for each client (ids "update-0", ...): keep False for updates that were dropped or, by a method
            that selects, not used. Score "weight_deficit": 1 - weight / (largest weight), NaN for methods that work
            coordinate by coordinate.
    """

    value: Update
    report: Report


def aggregate(
    updates: Sequence[Update] | Tensor,
    method: Method = "trimmed-mean",
    *,
    byzantine: int,
    max_norm: float | None = None,
    trusted: Update | None = None,
) -> Aggregation:
    """Join the updates of clients.

    Guarantee: with at most `byzantine` hostile updates, each coordinate of "median" and "trimmed-mean" lies within the
        range of the honest ones; "geometric-median", "krum", "multi-krum", "bulyan", "centered-clipping" stay within a
        bounded distance of the honest mean (Source). "mean" bears none. Voided by more hostile clients than stated; none
        stops a hostile minority from a small steady bias, nor protects a minority of honest clients whose data differ.
    Args:
        updates: n flat or shaped float tensors, one (n, ...) tensor, or n state dicts. Differences to the shared model,
            not the models themselves, if max_norm is used.
        method: How to join. "fltrust" weighs by agreement with `trusted`.
        byzantine: Largest number f of hostile clients to bear, >= 0. An update that is malformed or not finite is
            dropped and counts against f.
        max_norm: Longer updates are scaled down to this Euclidean length first.
        trusted: The server's own update for "fltrust", in the same form.
    Returns: The joined update with one report row a client.
    Raises: ConfigurationError: n is too small for f with this method; more than f updates were dropped; "mean" with
        f > 0; trusted missing or superfluous.
    Cost: n x d for mean and norms; n^2 x d for geometric-median, krum, multi-krum, bulyan, centered-clipping; one sort
        of n for each coordinate for median, trimmed-mean, bulyan. Memory: blocks of n x 65,536 and the result.
    Source: Yin et al. 2018 (median, trimmed mean); Blanchard et al. 2017 (Krum; multi-Krum averages n - f - 2);
        El Mhamdi et al. 2018 (Bulyan); Pillutla et al. 2019 (geometric median); Karimireddy et al. 2021 (centered
        clipping, 5 rounds from the coordinate-wise median, radius = median distance to it); Cao et al. 2021 (FLTrust).
    Example:
        >>> honest = [torch.tensor([1.0, 1.0]), torch.tensor([1.2, 0.8]), torch.tensor([0.8, 1.2])]
        >>> aggregate([*honest, torch.tensor([1e9, -1e9])], "median", byzantine=1).value
        tensor([1.1000, 0.9000])
    """
    check_choice(method, tuple(_NEEDED), "method")
    check_int(byzantine, "byzantine", 0)
    if max_norm is not None:
        check_number(max_norm, "max_norm", 0.0, open_low=True)
    rows = Updates(updates, max_norm)
    hostile = _check_counts(rows, method, byzantine)
    if (trusted is None) == (method == "fltrust"):
        rule = 'trusted= with method="fltrust", and only with it'
        raise refuse(rule, "trusted", type(trusted).__name__, "Pass the server's own update")
    value, weights = _joined(rows, method, hostile, trusted)
    return Aggregation(rows.restore(value), _report(rows, weights, method, byzantine, max_norm))


def _check_counts(rows: Updates, method: str, byzantine: int) -> int:
    """The number of hostile clients that may still be among the rows that were not dropped."""
    if len(rows.dropped) > byzantine:
        found = f"{len(rows.dropped)} updates ({', '.join(f'{i}: {why}' for i, why in rows.dropped.items())})"
        raise refuse(f"at most byzantine={byzantine} bad updates", "dropped", found, "Look at these clients")
    hostile = byzantine - len(rows.dropped)
    slope, offset = _NEEDED[method]
    if method == "mean" and hostile:
        raise refuse('byzantine=0 with "mean"', "byzantine", byzantine, 'Use "trimmed-mean" or another robust method')
    if len(rows) < slope * hostile + offset:
        rule = f"at least {slope} x byzantine + {offset} usable updates for {method}"
        raise refuse(rule, "updates", f"{len(rows)} with byzantine={hostile}", "Ask more clients or choose median")
    return hostile


def _joined(rows: Updates, method: str, hostile: int, trusted: Update | None) -> tuple[Tensor, Tensor]:
    """The flat result, and the weight of each row (NaN where there is no such thing)."""
    unknown = torch.full((len(rows),), math.nan, dtype=torch.float64)
    if method == "median":
        return coordinates.median(rows), unknown
    if method == "trimmed-mean":
        return coordinates.trimmed_mean(rows, hostile), unknown
    if method == "bulyan":
        chosen = selection.bulyan_choice(rows.gram(), hostile)
        return coordinates.mean_around_median(rows, chosen, hostile), unknown
    if method == "centered-clipping":
        centre = coordinates.median(rows)
        weights = selection.centered_clipping(rows.gram([centre]))
        return rows.weighted_sum(weights, [centre]), weights[:-1]
    if method == "fltrust" and trusted is not None:
        weights = _trust(rows, trusted)
    elif method == "mean":
        weights = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    elif method == "geometric-median":
        weights = selection.geometric_median(rows.gram())
    else:
        count = 1 if method == "krum" else len(rows) - hostile - 2
        weights = selection.krum(rows.gram(), hostile, count)
    return rows.weighted_sum(weights), weights


def _trust(rows: Updates, trusted: Update) -> Tensor:
    """FLTrust: weights by the positive part of the cosine with the trusted update, each row scaled to its length."""
    own = Updates([trusted], None)
    if own.form != rows.form or not len(own):
        raise refuse("trusted in the form of the updates, finite", "trusted", type(trusted).__name__, "Match them")
    flat = own.weighted_sum(torch.ones(1, dtype=torch.float64))
    gram = rows.gram([flat])
    lengths = gram.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    trust = (gram[:-1, -1] / lengths[:-1] / lengths[-1]).clamp(min=0)
    if float(trust.sum()) == 0:
        raise refuse("an update that agrees with trusted", "updates", "none", "Keep the model of the last round")
    return trust / trust.sum() * lengths[-1] / lengths[:-1]


def _report(rows: Updates, weights: Tensor, method: str, byzantine: int, max_norm: float | None) -> Report:
    n = len(rows) + len(rows.dropped)
    keep, deficit = torch.ones(n, dtype=torch.bool), torch.full((n,), math.nan, dtype=torch.float64)
    remarks = [(i, f"dropped: {why}") for i, why in rows.dropped.items()]
    keep[list(rows.dropped)] = False
    largest = weights.max() if not bool(torch.isnan(weights).any()) else torch.tensor(math.nan)
    for place, i in enumerate(rows.numbers):
        deficit[i] = 1 - weights[place] / largest
        if weights[place] == 0:
            keep[i] = False
            remarks.append((i, f"not used by {method}"))
        if rows.scale[place] < 1:
            remarks.append((i, f"scaled down from length {float(rows.norms[place]):.4g}"))
    return Report(
        tuple(f"update-{i}" for i in range(n)),
        keep,
        {"weight_deficit": deficit},
        {},
        reasons_by_row(n, remarks),
        "aggregate",
        {"method": method, "byzantine": byzantine, "max_norm": max_norm},
        f"at most {byzantine} of {n} clients send anything they like, knowing the method and all other updates",
        "A small steady bias by the hostile minority remains possible; honest outliers may be left out.",
    )
