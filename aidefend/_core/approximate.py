"""Approximate nearest neighbours by faiss: few cells of the bank are looked at, and the recall is measured."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from aidefend._core.checks import check_choice, check_int, check_number, check_tensor, refuse
from aidefend._core.errors import MissingExtra
from aidefend._core.neighbours import k_nearest
from aidefend._core.random import make_generator
from aidefend._core.stats import Interval, wilson

_ASKED = 256  # bank rows whose true neighbours are looked up to measure the recall
_TRAINED_ON = 64  # bank rows for each cell that the cells are laid by


class ApproximateIndex:
    """The nearest bank rows of a query, most of them: cells around centres, of which the nearest few are searched.

    The number of cells that are searched is the smallest power of two for which, of the true k nearest of 256 bank rows
    drawn at random, at least the share `recall` is found. `measured` says how many were.

    Guarantee: none on single queries. Queries unlike the bank may be answered worse than measured; distances that are
        given are exact.
    Args:
        bank: (M, d) float32 or float64, finite, M > k.
        k: Neighbours that the recall is measured for.
        metric: As in `k_nearest`.
        recall: Wanted share, in (0, 1]; 1 searches everything.
        seed: Draws the rows of the measurement.
    Raises: MissingExtra: faiss is not installed (`ann`). ConfigurationError: see `k_nearest`.
    Cost: 4 sqrt(M) cells are laid over 64 times as many rows; then about M (4 sqrt(M) + M p / (4 sqrt(M))) d operations
        for M queries with p cells searched, in place of M M d.
    Source: inverted file, Jegou, Douze, Schmid 2011; the library is faiss.
    """

    def __init__(
        self,
        bank: Tensor,
        k: int,
        *,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        recall: float = 0.95,
        seed: int = 0,
    ) -> None:
        check_tensor(bank, "bank", ndim=2, floating=True)
        check_choice(metric, ("euclidean", "cosine"), "metric")
        check_int(k, "k")
        check_number(recall, "recall", 0.0, 1.0, open_low=True)
        if len(bank) <= k:
            raise refuse(f"a bank of more than {k} rows", "bank", bank, "Fit on more data")
        self.k, self.metric, self._bank = k, metric, bank
        self._centre = bank.mean(dim=0) if metric == "euclidean" else torch.zeros(bank.shape[1], dtype=bank.dtype)
        cells = max(1, min(int(4 * math.sqrt(len(bank))), len(bank) // 39))
        self._index = _laid(self._single(bank), cells)
        self.measured = self._tuned(cells, recall, seed)

    def nearest(self, queries: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Distances (N, k) and bank row numbers (N, k) int64, nearest first; -1 and infinity where fewer were found."""
        wanted = self.k if k is None else check_int(k, "k", 1, len(self._bank))
        rows = torch.from_numpy(self._index.search(self._single(queries), wanted)[1])
        near = self._bank[rows.clamp(min=0)]
        if self.metric == "euclidean":
            distances = (near - queries.unsqueeze(1)).norm(dim=2)
        else:
            distances = 1 - torch.nn.functional.cosine_similarity(near, queries.unsqueeze(1), dim=2).clamp(-1, 1)
        distances = torch.where(rows < 0, torch.inf, distances)
        order = distances.argsort(dim=1, stable=True)
        return distances.gather(1, order), rows.gather(1, order)

    def _tuned(self, cells: int, recall: float, seed: int) -> Interval:
        drawn = torch.randperm(len(self._bank), generator=make_generator(seed=seed))[:_ASKED]
        asked = self._bank[drawn]
        true = k_nearest(asked, self._bank, self.k, metric=self.metric)[1]
        searched = 1 if recall < 1 else cells
        while True:
            self._index.nprobe = min(searched, cells)
            found = self.nearest(asked)[1]
            hits = int((true.unsqueeze(2) == found.unsqueeze(1)).any(dim=2).sum())
            if hits >= recall * true.numel() or searched >= cells:
                return wilson(round(hits / self.k), len(drawn))  # neighbours of one row are found or lost together
            searched *= 2

    def _single(self, rows: Tensor) -> Any:
        moved = rows - self._centre
        if self.metric == "cosine":
            moved = torch.nn.functional.normalize(moved, dim=1)
        return moved.float().contiguous().numpy()


def _laid(rows: Any, cells: int) -> Any:
    """An inverted file over all rows; its cells depend on the rows alone (faiss starts k-means from a fixed seed)."""
    try:
        import faiss
    except ImportError as error:
        raise MissingExtra("faiss", "ann") from error
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(rows.shape[1]), rows.shape[1], cells)
    index.cp.max_points_per_centroid = _TRAINED_ON
    index.cp.min_points_per_centroid = 1
    index.train(rows)
    index.add(rows)
    return index
