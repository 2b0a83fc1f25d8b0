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
_SHORTEST = 1e-150  # squares of shorter updates underflow: they have no direction


@dataclasses.dataclass(frozen=True, eq=False)
class Aggregation:
    """The joined update and what became of each client's.

    Args:
        value: In the form of the updates: a tensor, or a state dict.
        report: One row for each client (ids "update-0", ...): keep False for updates that were dropped or, by a method
            that selects, not used. Scores: "distance", Euclidean, to the joined update, after max_norm;
            "weight_deficit", 1 - weight / (largest weight), NaN for methods that work coordinate by coordinate. Both
            NaN for dropped updates.
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

    Guarantee: at most f = `byzantine` hostile updates among n, of any content, chosen with knowledge of all others.
        Let B be the smallest box that holds the honest updates, |B| its diagonal, D their diameter. "median",
        "trimmed-mean": inside B. "bulyan": inside B widened by its own width on each side. "geometric-median": within
        D (1 - a) / sqrt(1 - 2a) of the honest mean, a = f / n. "krum", "multi-krum": within
        D (1 + sqrt((n - f - 2) / (n - 2f - 1))). "centered-clipping": within 6 |B|. "fltrust": no longer than `trusted`
        and not against it. "mean": none. Void with more hostile clients than stated. None stops a hostile minority
        from a small steady bias, or protects a minority of honest clients whose data differ.
    Args:
        updates: n flat or shaped float tensors, one (n, ...) tensor, or n state dicts. Differences to the shared model,
            not the models themselves, if max_norm is used.
        method: How to join. "fltrust" weighs by agreement with `trusted`.
        byzantine: Largest number f of hostile clients to bear, >= 0. An update that is malformed (of another form than
            most, or than `trusted`), not finite, or longer than 1e150 is dropped and counts against f.
        max_norm: Longer updates are scaled down to this Euclidean length first (integer entries do not count).
        trusted: The server's own update for "fltrust", in the form of the clients' updates.
    Returns: The joined update with one report row a client. Integer entries of state dicts: lower median over the
        clients, or those of `trusted`.
    Raises: ConfigurationError: n is too small for f with this method; more than f updates were dropped; "mean" with
        f > 0; trusted missing or superfluous; no update agrees with trusted.
    Cost: n x d for mean, norms and fltrust; a sort of n for each coordinate for all others; and n^2 x d for
        geometric-median, krum, multi-krum, bulyan, centered-clipping. Memory: a few blocks of 32 MiB, the result in
        float64, and n x n numbers.
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
    if (trusted is None) == (method == "fltrust"):
        rule = 'trusted= with method="fltrust", and only with it'
        raise refuse(rule, "trusted", type(trusted).__name__, "Pass the server's own update")
    rows = Updates(updates, trusted)
    _check_counts(rows, method, byzantine)
    if trusted is None and len(rows) <= byzantine:
        cure = "Ask more clients: these may all be hostile"
        raise refuse(f"more than byzantine={byzantine} updates of one form", "updates", f"{len(rows)} alike", cure)
    rows.measure(max_norm)
    hostile = _check_counts(rows, method, byzantine)
    value, weights = _joined(rows, method, hostile, trusted)
    return Aggregation(rows.restore(value), _report(rows, value, weights, method, byzantine, max_norm))


def _check_counts(rows: Updates, method: str, byzantine: int) -> int:
    """The number of hostile clients that may still be among the rows that were not dropped."""
    if len(rows.dropped) > byzantine:
        some = "; ".join(f"{i}: {why}" for i, why in list(rows.dropped.items())[:5])
        found = f"{len(rows.dropped)} updates ({some})"
        raise refuse(f"at most byzantine={byzantine} bad updates", "dropped", found, "Look at these clients")
    hostile = byzantine - len(rows.dropped)
    slope, offset = _NEEDED[method]
    if method == "mean" and hostile:
        raise refuse('byzantine=0 with "mean"', "byzantine", byzantine, 'Use "trimmed-mean" or another robust method')
    if len(rows) < slope * hostile + offset:
        rule = f"at least {slope} x byzantine + {offset} usable updates for {method}"
        cure = "Ask more clients, or choose median if it bears so many"
        raise refuse(rule, "updates", f"{len(rows)} with byzantine={hostile}", cure)
    return hostile


def _joined(rows: Updates, method: str, hostile: int, trusted: Update | None) -> tuple[Tensor, Tensor]:
    """The flat result, and how much each row counted (NaN where that differs by coordinate)."""
    unknown = torch.full((len(rows),), math.nan, dtype=torch.float64)
    if method == "median":
        return coordinates.median(rows), unknown
    if method == "trimmed-mean":
        return coordinates.trimmed_mean(rows, hostile), unknown
    if method == "mean":
        weights = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
        return rows.weighted_sum(weights), weights
    if trusted is not None:
        return _by_trust(rows, trusted)
    return _by_distances(rows, method, hostile)


def _by_distances(rows: Updates, method: str, hostile: int) -> tuple[Tensor, Tensor]:
    gram = coordinates.centred_gram(rows)
    if method == "bulyan":
        chosen = selection.bulyan_choice(gram, hostile)
        weights = torch.zeros(len(rows), dtype=torch.float64).index_fill(0, chosen, 1 / len(chosen))
        return coordinates.mean_around_median(rows, chosen, hostile), weights
    if method == "centered-clipping":
        weights = selection.centered_clipping(gram)
        return coordinates.sum_around_median(rows, weights), weights
    if method == "geometric-median":
        weights = selection.geometric_median(gram)
    else:
        weights = selection.krum(gram, hostile, 1 if method == "krum" else len(rows) - hostile - 2)
    return rows.weighted_sum(weights), weights


def _by_trust(rows: Updates, trusted: Update) -> tuple[Tensor, Tensor]:
    """FLTrust: the mean of the rows, each scaled to the length of `trusted`, by the positive part of their cosine."""
    own = Updates([trusted])
    own.measure()
    if not len(own):
        raise refuse("a finite trusted update", "trusted", "not finite", "Train the server's own update again")
    flat = own.weighted_sum(torch.ones(1, dtype=torch.float64))
    lengths, length = rows.norms * rows.scale, own.norms[0]
    usable = (lengths > _SHORTEST) & (length > _SHORTEST)
    cosine = rows.inner(flat) / lengths.where(usable, 1.0) / length.clamp(min=_SHORTEST)
    trust = torch.where(usable, cosine.clamp(0, 1), 0.0)
    if float(trust.sum()) == 0:
        raise refuse("an update that agrees with trusted", "updates", "none", "Keep the model of the last round")
    trust = trust / trust.sum()
    return rows.weighted_sum(trust * length / lengths.where(usable, 1.0)), trust


def _report(
    rows: Updates, value: Tensor, weights: Tensor, method: str, byzantine: int, max_norm: float | None
) -> Report:
    n = len(rows) + len(rows.dropped)
    used = torch.tensor(rows.numbers)
    keep, blank = torch.zeros(n, dtype=torch.bool), torch.full((n,), math.nan, dtype=torch.float64)
    keep[used] = weights != 0
    scores = {"distance": rows.distances(value), "weight_deficit": 1 - weights / weights.max()}
    remarks = [(i, f"dropped: {why}") for i, why in rows.dropped.items()]
    for place, i in enumerate(rows.numbers):
        if weights[place] == 0:
            remarks.append((i, f"not used by {method}"))
        if rows.scale[place] < 1:
            remarks.append((i, f"scaled down from length {float(rows.norms[place]):.4g}"))
    return Report(
        tuple(f"update-{i}" for i in range(n)),
        keep,
        {name: blank.index_copy(0, used, score) for name, score in scores.items()},
        {},
        reasons_by_row(n, remarks),
        "aggregate",
        {"method": method, "byzantine": byzantine, "max_norm": max_norm},
        f"at most {byzantine} of {n} clients send anything they like, knowing the method and all other updates",
        "A small steady bias by the hostile minority remains possible; honest outliers may be left out.",
    )
