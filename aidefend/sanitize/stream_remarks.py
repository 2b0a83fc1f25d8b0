"""Remarks on single rows of a stream: wrong labels, copies, outliers and sources, from what a feature store holds."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aidefend._core.batches import input_id
from aidefend._core.random import derive_seed, make_generator
from aidefend.sanitize.confident_learning import ConfidentLearning
from aidefend.sanitize.decisions import WEAK
from aidefend.sanitize.feature_store import FeatureStore
from aidefend.sanitize.id_keys import id_keys
from aidefend.sanitize.moments import ClassMoments, merged, moments_of
from aidefend.sanitize.out_of_fold import FOLDS, FoldedHeads, fold_of
from aidefend.sanitize.outliers import Outliers
from aidefend.sanitize.remarks import FAR, likely_wrong, robust_gaps, words_of_outlier, words_of_wrong_label
from aidefend.sanitize.source_evidence import SourceEvidence

_WIDEST = 64  # features; wider ones are projected, so that sums over a class stay small
_BLOCK = 4096
_KEYS_AT_ONCE = 8_000_000  # 64 MB


@dataclasses.dataclass(frozen=True, eq=False)
class StreamRemarks:
    """What was said of single rows, some 20 bytes each.

    Args:
        wrong: (N,) float32 score of a wrong label, see `ConfidentLearning`; NaN for rows that are not usable.
        proposed: (N,) int32, the label that fits better where one is proposed, else -1.
        copies: (N,) int32, rows with equal input where the row is not the first of them, else 0.
        first: (N,) int64, the row that it is equal to, else -1.
        contradicted: (N,) bool: a row with equal input has another label.
        gaps: (N,) float32, robust deviations beyond the usual distance of the class.
        sources: Evidence for each source, JSON types.
    """

    wrong: Tensor
    proposed: Tensor
    copies: Tensor
    first: Tensor
    contradicted: Tensor
    gaps: Tensor
    sources: Mapping[str, Any]

    def weights(self) -> Tensor:
        """(N,) float32 of kept rows, by the rules of `Decisions`."""
        found = torch.ones(len(self.wrong))
        found = torch.where(self.proposed >= 0, (1 - self.wrong).clamp(0.0, 1.0), found)
        found = torch.minimum(found, torch.where(self.copies > 1, 1 / self.copies.clamp(min=1), 1.0))
        found = torch.minimum(found, torch.where(self.contradicted, WEAK, 1.0))
        return torch.minimum(found, torch.where(self.gaps >= FAR, FAR / self.gaps.clamp(min=FAR), 1.0))

    def words(self, row: int, label: int) -> list[str]:
        """What is said of one row that is kept."""
        said = []
        if int(self.proposed[row]) >= 0:
            said.append(words_of_wrong_label(label, int(self.proposed[row]), float(self.wrong[row])))
        if int(self.copies[row]):
            said.append(f"copy of row {int(self.first[row])} (one of {int(self.copies[row])} with equal input)")
        if bool(self.contradicted[row]):
            said.append("a row with equal input has another label")
        if float(self.gaps[row]) >= FAR:
            said.append(words_of_outlier(label, float(self.gaps[row])))
        return [f"kept: {words}" for words in said]

    def counts(self, keep: Tensor) -> dict[str, int]:
        """Kept rows with each kind of remark."""
        found = {"confident_learning": self.proposed >= 0, "near_duplicates": self.copies > 0}
        found |= {"contradicted": self.contradicted, "outliers": self.gaps >= FAR}
        return {name: int((rows & keep).sum()) for name, rows in found.items()}


def stream_remarks(store: FeatureStore, names: Sequence[str] | None, seed: int) -> StreamRemarks:
    """Read a store five times, block by block, and say of each row what `screen` says in its remarks.

    Wrong labels: normal classes in the model's features, fitted on four fifths of the rows (by the hash of the input)
    and asked about the last. Copies: equal inputs, by 64 bits of their hash. Outliers: as in `screen`, in the model's
    features. Sources: in the features. More than 64 features are first projected at random to 64.

    Args:
        store: Features, labels and ids of all rows.
        names: The source of each row, or None.
        seed: Of folds and projection.
    Cost: N d 64 operations a pass; sums of 64 x 64 numbers for each class and fold, and each class and source;
        about 30 bytes a row, and 64 MB of hashes at once (more passes over the ids beyond 8 million rows).
    """
    blocks = _Projected(store, names, seed)
    folds: list[ClassMoments] = [{} for _ in range(FOLDS)]
    outliers, evidence = Outliers(), SourceEvidence()
    for block in blocks:
        points, labels, fold = block["features"], block["labels"], block["fold"]
        for number in range(FOLDS):
            rows = fold == number
            folds[number] = merged(folds[number], moments_of(points[rows], labels[rows]))
        outliers.partial_fit(block)
        if names is not None:
            evidence.partial_fit(block)
    wrong, proposed = _wrong_labels(blocks, folds, seed)
    gaps = _gaps(blocks, outliers)
    copies, first, contradicted = _copies(store)
    said = {name: found._asdict() for name, found in evidence.evidence().items()} if names is not None else {}
    return StreamRemarks(wrong, proposed, copies, first, contradicted, gaps, said)


class _Projected:
    """The usable rows of a store, block by block, with their row numbers, folds and sources; may be read often."""

    def __init__(self, store: FeatureStore, names: Sequence[str] | None, seed: int) -> None:
        self.store, self.names, self.seed, self.n = store, names, seed, len(store)
        width = int(store.index["features"])
        stream = make_generator(seed=derive_seed(seed, "projection") % 2**63)
        wide = width > _WIDEST
        self._matrix = torch.randn(width, _WIDEST, generator=stream).double() / _WIDEST**0.5 if wide else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = 0
        for block in self.store.blocks(_BLOCK):
            rows = block["usable"] & block["features"].isfinite().all(dim=1)
            places = rows.nonzero().flatten()
            features = block["features"][rows].double()
            ids = [block["ids"][row] for row in places.tolist()]
            found = {
                "ids": ids,
                "features": features if self._matrix is None else features @ self._matrix,
                "labels": block["labels"][rows],
                "rows": places + start,
                "fold": torch.tensor([fold_of(row_id, self.seed) for row_id in ids], dtype=torch.int64),
            }
            if self.names is not None:
                found["sources"] = [self.names[row] for row in found["rows"].tolist()]
            start += len(block["ids"])
            if len(places):
                yield found


def _wrong_labels(blocks: _Projected, folds: Sequence[ClassMoments], seed: int) -> tuple[Tensor, Tensor]:
    """(N,) scores, NaN without opinion, and proposals, -1 without."""
    scores, proposed = torch.full((blocks.n,), torch.nan), torch.full((blocks.n,), -1, dtype=torch.int32)
    classes = max((label for part in folds for label in part), default=0) + 1
    detector, heads = ConfidentLearning(seed=seed), FoldedHeads(folds, max(classes, 2))

    def unseen(block: Mapping[str, Any]) -> dict[str, Any]:
        return {**block, "logits": heads.logits(block["features"], block["fold"])}

    for block in blocks:
        detector.partial_fit(unseen(block))
    for block in blocks if detector.counts else ():
        whole = unseen(block)
        score = detector.score(whole)
        flagged, better = likely_wrong(detector, whole, score)
        scores[block["rows"]] = score.float()
        proposed[block["rows"][flagged]] = better[flagged].int()
    return scores, proposed


def _gaps(blocks: _Projected, detector: Outliers) -> Tensor:
    """(N,) robust deviations of the distance from the usual one of the class; 0 without opinion."""
    scores, labels = torch.full((blocks.n,), torch.nan), torch.full((blocks.n,), -1, dtype=torch.int32)
    for block in blocks:
        scores[block["rows"]], labels[block["rows"]] = detector.score(block).float(), block["labels"].int()
    return robust_gaps(labels, scores)


def _copies(store: FeatureStore, at_once: int = _KEYS_AT_ONCE) -> tuple[Tensor, Tensor, Tensor]:
    """For each row that has equal ones before it how many there are in all and the first; and who is contradicted."""
    n = len(store)
    copies, first = torch.zeros(n, dtype=torch.int32), torch.full((n,), -1, dtype=torch.int64)
    contradicted = torch.zeros(n, dtype=torch.bool)
    parts = max(1, -(-n // at_once))
    for part in range(parts):
        keys, rows, labels = _keys(store, part, parts)
        if not len(keys):
            continue
        order = np.lexsort((rows, keys))
        keys, rows, labels = keys[order], rows[order], labels[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        sizes = np.diff(np.append(starts, len(keys)))
        leader, size = np.repeat(starts, sizes), np.repeat(sizes, sizes)
        mixed = np.repeat(np.maximum.reduceat(labels, starts) != np.minimum.reduceat(labels, starts), sizes)
        later = np.flatnonzero(np.arange(len(keys)) > leader)
        copies[torch.from_numpy(rows[later])] = torch.from_numpy(size[later].astype(np.int32))
        first[torch.from_numpy(rows[later])] = torch.from_numpy(rows[leader[later]])
        contradicted[torch.from_numpy(rows[mixed])] = True
    return copies, first, contradicted


def _keys(store: FeatureStore, part: int, parts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys of the inputs of usable rows, those of one part of all keys, with row numbers and labels."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    start = 0
    for block in store.blocks(_BLOCK):
        keys = id_keys([input_id(row_id) for row_id in block["ids"]], 0)
        mine = (keys % np.uint64(parts) == part) & block["usable"].numpy()
        found.append((keys[mine], np.flatnonzero(mine) + start, block["labels"].numpy()[mine]))
        start += len(block["ids"])
    keys, rows, labels = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return keys, rows, labels
