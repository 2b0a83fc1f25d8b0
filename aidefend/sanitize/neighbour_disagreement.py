"""Neighbour disagreement: a row that lies closer to another class than to the class of its label."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.approximate import ApproximateIndex
from aidefend._core.checks import check_choice, check_int
from aidefend._core.neighbours import k_nearest
from aidefend._core.stats import Interval
from aidefend.sanitize.block import check_kin, read_block
from aidefend.sanitize.sample import ClassSample

_APPROXIMATE_FROM = 5000


class NeighbourDisagreement:
    """Log ratio of the distances to the k-th neighbour of the own label and of the nearest other label.

    Each distance is first divided by what is usual inside that class, so that dense classes attract nobody. Above
    zero: the row fits another class better than its own. Blocks may carry "view" (N, v), features of an independent
    view such as the inputs themselves; "features" are used where they do not. In features of a model that was trained
    on the poison the sign can turn, because poison sits in a tight cluster of its own: prefer an independent view.

    Guarantee: none. Honest rows near a class boundary score high too.
    Args:
        k: Which neighbour; a class with fewer rows in the bank uses its last one, and one with fewer than 3 is left
            out. More than k rows of poison that lie together vouch for each other: choose k above the number that you
            look for (of 25 feature collisions .00 was found at k = 10, .92 at 30, with 2 % of honest rows:
            `benchmarks.sanitize_collisions`).
        limit: Rows a class that are kept as bank, the same for any sharding. Exact while no class is larger.
        seed: Chooses the bank.
        index: "exact"; or "faiss" for large banks (needs the extra `ann`): classes with at least 5,000 rows in the bank
            are searched approximately, with at least 95 % of the k nearest found on rows of the bank; `recall()` says
            what was measured. A class with fewer rows is searched exactly, which is faster there.
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

    def __init__(
        self, k: int = 10, limit: int = 2000, seed: int = 0, *, index: Literal["exact", "faiss"] = "exact"
    ) -> None:
        self.k, self.limit, self.seed = check_int(k, "k"), check_int(limit, "limit", 3), check_int(seed, "seed", 0)
        self.index: Literal["exact", "faiss"] = check_choice(index, ("exact", "faiss"), "index")
        self.sample = ClassSample(limit, seed)
        self._indices: dict[int, tuple[ApproximateIndex, Tensor]] = {}

    def partial_fit(self, block: Mapping[str, Any]) -> "NeighbourDisagreement":
        """Add the rows of a block to the bank; returns self."""
        rows = read_block(block, self._features(), key="view")
        self.sample.add(*rows.finite())
        self._indices = {}
        return self

    def recall(self) -> dict[int, Interval]:
        """Of each class that is searched approximately: the share of true neighbours that is found, measured."""
        banks = {label: self.sample.of(label)[1] for label in self.sample.classes()} if self.index == "faiss" else {}
        for label, bank in banks.items():
            if len(bank) >= _APPROXIMATE_FROM:
                self._indexed(label, bank)
        return {label: found[0].measured for label, found in self._indices.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": {}}  # made anew where they are needed

    def merge(self, other: "NeighbourDisagreement") -> "NeighbourDisagreement":
        """A new detector with the bank of both."""
        check_kin(self, other, ("k", "limit", "seed", "index"))
        total = NeighbourDisagreement(self.k, self.limit, self.seed, index=self.index)
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
            ratio = self._ratio(label, rows.features, [place.get(row_id, -1) for row_id in rows.ids], bank)
            mine = rows.labels == label
            ratios[mine, 0] = ratio[mine]
            ratios[~mine, 1] = torch.minimum(ratios[~mine, 1], ratio[~mine])
        scores = ratios[:, 0] - ratios[:, 1]
        return torch.where(rows.usable & torch.isfinite(scores), scores, torch.nan)

    def _ratio(self, label: int, queries: Tensor, place: list[int], bank: Tensor) -> Tensor:
        """Log of the distance to the k-th row of one class, relative to the class's own median."""
        own = torch.tensor(place, dtype=torch.int64)
        if self.index == "faiss" and len(bank) >= _APPROXIMATE_FROM:
            index, usual = self._indexed(label, bank)
            distance = _kth_found(index.nearest(queries.nan_to_num(), self.k + 1), own, self.k)
            return (distance / usual).clamp(min=1e-12).log()
        k = min(self.k, len(bank) - 1)
        usual = _kth_found(k_nearest(bank, bank, k + 1), torch.arange(len(bank)), k).median().clamp(min=1e-12)
        distance = _kth_found(k_nearest(queries.nan_to_num(0.0, 0.0, 0.0), bank, k + 1), own, k)
        return (distance / usual).clamp(min=1e-12).log()

    def _indexed(self, label: int, bank: Tensor) -> tuple[ApproximateIndex, Tensor]:
        """The index of a class and its own median distance, made once after the last row came in."""
        if label not in self._indices:
            index = ApproximateIndex(bank, self.k, seed=self.seed)
            found = index.nearest(bank, self.k + 1)
            usual = _kth_found(found, torch.arange(len(bank)), self.k).median().clamp(min=1e-12)
            self._indices[label] = index, usual
        return self._indices[label]

    def _features(self) -> int | None:
        classes = self.sample.classes()
        return self.sample.of(classes[0])[1].shape[1] if classes else None


def _kth_found(nearest: tuple[Tensor, Tensor], place: Tensor, k: int) -> Tensor:
    """(N,) distance to the k-th of k + 1 rows (distances, row numbers), without the query's own row at `place`."""
    distances, rows = nearest
    distances = torch.where(rows == place.unsqueeze(1), torch.inf, distances).sort(dim=1).values[:, :k]
    found = distances.isfinite().sum(dim=1).clamp(min=1)  # fewer than k where the cells that were searched hold no more
    return distances.gather(1, found.unsqueeze(1) - 1)[:, 0]


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
