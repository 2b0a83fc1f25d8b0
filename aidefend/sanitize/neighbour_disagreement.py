"""Neighbour disagreement: a row that lies closer to another class than to the class of its label."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_int
from aidefend.sanitize.block import check_kin, read_block
from aidefend.sanitize.sample import ClassSample


class NeighbourDisagreement:
    """Log ratio of the distances to the k-th neighbour of the own label and of the nearest other label.

    Each distance is first divided by what is usual inside that class, so that dense classes attract nobody. Above
    zero: the row fits another class better than its own. Blocks may carry "view" (N, v), features of an independent
    view such as the inputs themselves; "features" are used where they do not. In features of a model that was trained
    on the poison the sign can turn, because poison sits in a tight cluster of its own: prefer an independent view.

    Guarantee: none. Honest rows near a class boundary score high too.
    Args:
        k: Which neighbour; a class with fewer rows in the bank uses its last one, and one with fewer than 3 is left
            out.
        limit: Rows a class that are kept as bank, the same for any sharding. Exact while no class is larger.
        seed: Chooses the bank.
    A row whose class has no bank, or with NaN or infinity, scores NaN (no opinion).
    Cost: one N x (C limit) x d matrix product; the bank is held in memory. Fitting is one pass, scoring another.
    Source: after Peri, Gupta, Huang, Fowl, Zhu, Feizi, Goldstein, Dickerson 2020 (deep k-NN). Differs: calibrated
        distances instead of a vote, so that rare classes are not outvoted.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2], [5.05]])
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1, 0])
        >>> block = {"ids": tuple("abcdefg"), "features": features, "labels": labels}
        >>> NeighbourDisagreement(k=2).partial_fit(block).score(block).argmax().item()
        6
    """

    def __init__(self, k: int = 10, limit: int = 2000, seed: int = 0) -> None:
        self.k, self.limit, self.seed = check_int(k, "k"), check_int(limit, "limit", 3), check_int(seed, "seed", 0)
        self.sample = ClassSample(limit, seed)

    def partial_fit(self, block: Mapping[str, Any]) -> "NeighbourDisagreement":
        """Add the rows of a block to the bank; returns self."""
        rows = read_block(block, self._features(), key="view")
        self.sample.add(*rows.finite())
        return self

    def merge(self, other: "NeighbourDisagreement") -> "NeighbourDisagreement":
        """A new detector with the bank of both."""
        check_kin(self, other, ("k", "limit", "seed"))
        total = NeighbourDisagreement(self.k, self.limit, self.seed)
        total.sample = self.sample.merged(other.sample)
        return total

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64, up = suspicious."""
        rows = read_block(block, self._features(), key="view")
        ratios = torch.full((len(rows.ids), 2), torch.inf, dtype=torch.float64)  # own class, nearest other class
        for label in self.sample.classes():
            ids, bank = self.sample.of(label)
            if len(bank) < 3:
                continue
            place = {row_id: i for i, row_id in enumerate(ids)}
            ratio = self._ratio(rows.features, [place.get(row_id, -1) for row_id in rows.ids], bank)
            mine = rows.labels == label
            ratios[mine, 0] = ratio[mine]
            ratios[~mine, 1] = torch.minimum(ratios[~mine, 1], ratio[~mine])
        scores = ratios[:, 0] - ratios[:, 1]
        return torch.where(rows.usable & torch.isfinite(scores), scores, torch.nan)

    def _ratio(self, queries: Tensor, place: list[int], bank: Tensor) -> Tensor:
        """Log of the distance to the k-th row of one class, relative to the class's own median."""
        usual = kth_distance(bank, bank, self.k, torch.arange(len(bank))).median().clamp(min=1e-12)
        distance = kth_distance(queries, bank, self.k, torch.tensor(place, dtype=torch.int64))
        return (distance / usual).clamp(min=1e-12).log()

    def _features(self) -> int | None:
        classes = self.sample.classes()
        return self.sample.of(classes[0])[1].shape[1] if classes else None


def kth_distance(queries: Tensor, bank: Tensor, k: int, place: Tensor, block: int = 2048) -> Tensor:
    """Distance (N,) to the k-th nearest bank row; `place` (N,) is a query's own row in the bank, -1 for none."""
    k, parts = min(k, len(bank) - 1), []
    centre = bank.mean(dim=0)  # far-off features would lose their digits in the squares
    queries, bank = queries.nan_to_num() - centre, bank - centre
    for part, own in zip(queries.split(block), place.split(block), strict=True):
        gap = torch.cdist(part, bank)
        inside = (own >= 0).nonzero().flatten()
        gap[inside, own[inside]] = torch.inf
        parts.append(gap.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(parts) if parts else queries.new_zeros(0)
