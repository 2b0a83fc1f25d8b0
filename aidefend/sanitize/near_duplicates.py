"""Near duplicates: rows that say the same, to the bit, to the eye, in words, or in features."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aidefend._core.approximate import ApproximateIndex
from aidefend._core.checks import check_choice, check_int, check_items, check_number, check_same_rows, refuse
from aidefend._core.stats import Interval
from aidefend.sanitize.block import check_kin, read_block
from aidefend.sanitize.sketches import BandIndex, BitIndex, min_hashes, perceptual_hashes

By = Literal["auto", "content", "image", "text", "features"]
_APPROXIMATE_FROM = 5000
_MOST_ALIKE = 16
_ROUNDING = 1e-5  # of a product in float32; pairs that near are looked at in float64
_PAIRS = 65_536  # of rows that are looked at together
_PERMUTATIONS = 128
_BAND = 8
_USUAL = {"content": 1.0, "image": 0.95, "text": 0.8, "features": 0.999}


class NearDuplicates:
    """Similarity of a row to the most similar other row that was seen, 0 where none reaches the threshold.

    Copies give one source more weight than it has rows, leak from training to test, and carry poison past filters that
    look at single rows; duplicates are also quite usual, so this is a remark and no verdict.

    Guarantee: "content": exactly the rows with equal bytes. "image": every pair within the radius that the threshold
        names is found. "text": a pair of similarity .8 is found with probability .95, one of .9 with .9999. "features":
        exact.
    Args:
        by: "content": bytes of "x" (of "features" where there is none); "image": a perceptual hash of "x" (N, C, H, W);
            "text": MinHash of "text" (N texts); "features": cosine similarity about the mean. "auto": "text" where
            blocks have the key, "image" where "x" looks like pictures of at least 8 x 8, else "features".
        threshold: Least similarity of near duplicates, in (0, 1]: share of equal bits (at least .75 for images), of
            word triples (at least .5 for text), or cosine. None: .95, .8 and .999.
        seed: Of the text hashes: give each deployment its own, so that nobody can prepare collisions.
        index: "exact"; or "faiss" for features of many rows (needs the extra `ann`): from 5,000 rows on, each row is
            compared with the 16 that are likely to be the most alike; `recall()` says what share of them is found.
    A row with NaN or infinity scores NaN (no opinion), and so does every row before `partial_fit`.
    Cost: memory per row: 16 bytes (content), 8 (image), 512 (text), 4 d (features). Time: N log N comparisons, but
        one N x N x d matrix product for features.
    Source: Broder 1997 (MinHash); Zauner 2010 (perceptual hash); Abbas et al. 2023 (duplicates in features).

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [5.0, 1.0], [1.0, 2.0]])
        >>> block = {"ids": tuple("abc"), "features": x, "labels": torch.zeros(3, dtype=torch.int64)}
        >>> found = NearDuplicates("content").partial_fit(block)
        >>> found.score(block).tolist(), found.groups()
        ([1.0, 0.0, 1.0], [('a', 'c')])
    """

    def __init__(
        self,
        by: By = "auto",
        threshold: float | None = None,
        seed: int = 0,
        *,
        index: Literal["exact", "faiss"] = "exact",
    ) -> None:
        self.by: By = check_choice(by, ("auto", "content", "image", "text", "features"), "by")
        if threshold is not None:
            low = {"image": 0.75, "text": 0.5}.get(by, 0.0)
            threshold = check_number(threshold, "threshold", low, 1.0, open_low=low == 0.0)
        self.threshold, self.seed = threshold, check_int(seed, "seed", 0)
        self.index: Literal["exact", "faiss"] = check_choice(index, ("exact", "faiss"), "index")
        self._kind: str | None = None if by == "auto" else by
        self._prints: dict[str, np.ndarray] = {}
        self._known: _Known | None = None

    def partial_fit(self, block: Mapping[str, Any]) -> "NearDuplicates":
        """Add the rows of a block; returns self. A row that comes again under its id counts once."""
        ids, prints, usable = self._read(block)
        self._prints.update((row_id, one) for row_id, one, fine in zip(ids, prints, usable, strict=True) if fine)
        self._known = None
        return self

    def merge(self, other: "NearDuplicates") -> "NearDuplicates":
        """A new detector that has seen what both have seen."""
        check_kin(self, other, ("by", "threshold", "seed", "index"))
        if self._kind and other._kind and self._kind != other._kind:
            raise refuse(f"a detector that compares {self._kind}", "other", other._kind, "Name what to compare in by=")
        total = NearDuplicates(self.by, self.threshold, self.seed, index=self.index)
        total._kind, total._prints = self._kind or other._kind, {**self._prints, **other._prints}
        return total

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64 in [0, 1], up = more alike."""
        ids, prints, usable = self._read(block)
        if not self._prints:
            return torch.full((len(ids),), torch.nan, dtype=torch.float64)
        known, best = self._index(), np.zeros(len(ids))
        own = np.array([known.place.get(row_id, -1) for row_id in ids], dtype=np.int64)
        for ours, theirs, similarity in known.pairs(prints) if len(ids) else ():
            fits = (theirs != own[ours]) & (similarity >= self._threshold())
            np.maximum.at(best, ours[fits], similarity[fits])
        return torch.from_numpy(np.where(usable, best, np.nan))

    def groups(self) -> list[tuple[str, ...]]:
        """Ids of rows that are near duplicates of one another, directly or by others; all sorted."""
        if not self._prints:
            return []
        known = self._index()
        roots = list(range(len(known.ids)))

        def root(place: int) -> int:
            while roots[place] != place:
                roots[place] = roots[roots[place]]
                place = roots[place]
            return place

        for ours, theirs, similarity in known.pairs(known.prints):
            fits = similarity >= self._threshold()
            for a, b in zip(ours[fits].tolist(), theirs[fits].tolist(), strict=True):
                roots[root(a)] = root(b)
        members: dict[int, list[str]] = {}
        for place, row_id in enumerate(known.ids):
            members.setdefault(root(place), []).append(row_id)
        return sorted(tuple(sorted(group)) for group in members.values() if len(group) > 1)

    def recall(self) -> dict[str, Interval]:
        """Where features are compared approximately: the share of the most alike rows that is found, measured."""
        found = self._index().approximate if self._prints else None
        return {} if found is None else {"features": found.measured}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}  # made anew where it is needed

    def _threshold(self) -> float:
        usual = _USUAL[self._kind or "features"]
        return (usual if self.threshold is None else self.threshold) - 1e-9

    def _index(self) -> "_Known":
        if self._known is None:
            self._known = _Known(self._prints, self._kind or "features", self._threshold(), self.index)
        return self._known

    def _read(self, block: Mapping[str, Any]) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """Ids, fingerprints (N, ...) and which rows have one."""
        width = len(next(iter(self._prints.values()))) if self._prints and self._kind == "features" else None
        rows = read_block(block, width)
        kind = self._kind or _kind_of(block)
        self._kind = kind
        if kind == "text":
            texts = check_items(block.get("text"), str, "text", "Add the texts, one a row")
            check_same_rows(("ids", "text"), len(rows.ids), len(texts))
            return rows.ids, min_hashes(texts, _PERMUTATIONS, self.seed), rows.usable.numpy()
        x = block.get("x") if kind == "image" or (kind == "content" and "x" in block) else block["features"]
        if not isinstance(x, Tensor) or len(x) != len(rows.ids) or (kind == "image" and x.ndim != 4):
            rule = "x of shape (N, C, H, W)" if kind == "image" else "x with one row for each id"
            raise refuse(rule, "x", x, "Pass the inputs as a tensor")
        x = x.detach().cpu()
        usable = torch.isfinite(x.flatten(1)).all(dim=1) if x.is_floating_point() else torch.ones(len(x)) > 0
        if kind == "features":
            return rows.ids, _single(rows.features, block["features"].dtype), usable.numpy()
        prints = perceptual_hashes(torch.nan_to_num(x)) if kind == "image" else _digests(x)
        return rows.ids, prints, usable.numpy()


class _Known:
    """All rows seen, in the order of their ids, ready to be searched."""

    def __init__(self, prints: Mapping[str, np.ndarray], kind: str, threshold: float, index: str) -> None:
        self.ids = sorted(prints)
        self.place = {row_id: place for place, row_id in enumerate(self.ids)}
        self.prints = np.stack([prints[row_id] for row_id in self.ids])
        self.kind, self.threshold = kind, threshold
        self.approximate: ApproximateIndex | None = None
        if kind == "features":
            self.centre = self.prints.mean(axis=0, dtype=np.float64)
            if index == "faiss" and len(self.ids) >= _APPROXIMATE_FROM:
                bank = torch.from_numpy(self.prints - self.centre)
                self.approximate = ApproximateIndex(bank, _MOST_ALIKE, metric="cosine")
            return
        self.distinct, self.which = np.unique(self.prints, axis=0, return_inverse=True)
        self.which = self.which.reshape(-1)
        self.members = np.argsort(self.which, kind="stable")
        self.starts = np.searchsorted(self.which[self.members], np.arange(len(self.distinct) + 1))
        radius = int((1 - threshold) * 8 * self.prints.shape[1]) if kind == "image" else 0
        self.index = BandIndex(self.distinct, _BAND) if kind == "text" else BitIndex(self.distinct, radius)

    def pairs(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Query numbers, row numbers and similarities; of rows with one fingerprint two stand for all."""
        if self.approximate is not None:
            yield from self._by_index(self.approximate, queries)
            return
        if self.kind == "features":
            yield from self._by_cosine(queries)
            return
        for ours, distinct, similarity in self.index.pairs(queries):
            first = self.starts[distinct]
            yield ours, self.members[first], similarity
            more = self.starts[distinct + 1] - first > 1
            yield ours[more], self.members[first[more] + 1], similarity[more]

    def _by_index(
        self, index: ApproximateIndex, queries: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        asked = torch.from_numpy(queries - self.centre).nan_to_num()
        for start in range(0, len(asked), 1024):
            distances, rows = index.nearest(asked[start : start + 1024], min(_MOST_ALIKE + 1, len(self.ids)))
            alike = (rows >= 0) & (1 - distances >= self.threshold)
            ours = alike.nonzero()[:, 0] + start
            yield ours.numpy(), rows[alike].numpy(), (1 - distances[alike]).clamp(max=1).float().numpy()

    def _by_cosine(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        bank, asked = (self._unit(rows) for rows in (self.prints, queries))
        for start in range(0, len(asked), 1024):
            for offset in range(0, len(bank), 8192):
                cosine = asked[start : start + 1024].float().nan_to_num() @ bank[offset : offset + 8192].float().T
                near = (cosine >= self.threshold - _ROUNDING).nonzero() + torch.tensor([start, offset])
                for ours, theirs in (part.T for part in near.split(_PAIRS)):
                    exact = self._cosine(queries, ours, theirs)
                    fits = exact >= self.threshold
                    yield ours[fits].numpy(), theirs[fits].numpy(), exact[fits].numpy()

    def _cosine(self, queries: np.ndarray, ours: Tensor, theirs: Tensor) -> Tensor:
        """(p,) float64 of pairs of rows."""
        left, right = self._unit(queries[ours.numpy()]), self._unit(self.prints[theirs.numpy()])
        return (left * right).sum(dim=1).clamp(max=1)

    def _unit(self, rows: np.ndarray) -> Tensor:
        """(n, d + 1) float64 of length one; rows in the centre, which have no direction, point along the last axis."""
        gap = torch.from_numpy(rows - self.centre).double()
        length = gap.norm(dim=1, keepdim=True)
        central = length <= 1e-12 * float(np.abs(self.centre).max(initial=0.0))
        return torch.cat([torch.where(central, 0.0, gap / length.clamp(min=1e-300)), central.double()], dim=1)


def _kind_of(block: Mapping[str, Any]) -> str:
    if "text" in block:
        return "text"
    x = block.get("x")
    pictures = isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] <= 4 and min(x.shape[2:]) >= 8
    return "image" if pictures else "features"


def _digests(x: Tensor) -> np.ndarray:
    """(N, 16) uint8 digests of the bytes of rows."""
    array = (
        x.contiguous().reshape(len(x), -1).view(torch.uint8).numpy() if x.numel() else np.zeros((len(x), 0), np.uint8)
    )
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in array)
    return np.frombuffer(digests, dtype=np.uint8).reshape(len(x), 16)


def _single(features: Tensor, given: torch.dtype) -> np.ndarray:
    found: np.ndarray = (features if given == torch.float64 else features.float()).numpy()
    return found
