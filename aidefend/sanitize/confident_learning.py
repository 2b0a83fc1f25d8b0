"""Confident learning: which labels are wrong, from what a model that never saw the row predicts for it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_tensor, refuse
from aidefend.sanitize.block import check_kin, read_block
from aidefend.sanitize.label_noise import LabelNoise, contests, estimate
from aidefend.sanitize.sample import ClassSample


class ConfidentLearning:
    """How likely a label is wrong, given which labels are confused with which in this data.

    Blocks carry "logits" (N, K), column j for label j (log-probabilities will do), of a model that was not trained on
    the row: predictions of cross-validation. A model that has learnt the wrong labels by heart finds none of them.
    How often a row of class i is labelled j is counted among the rows that are predicted with more than the usual
    confidence of their class; rare classes keep their own measure that way. Then the exponent of the predictions is
    chosen under which the given labels are likeliest, so that a model may be less or more sure than it should be, and
    the counts are replaced by what is expected under it. Bayes' rule turns prediction and confusion into a score in
    [0, 1], a probability as far as this model of the labels holds. `issues` are the rows with another label than the
    predicted one that score highest, as many as give the highest expected F1 under these probabilities. In no class
    may another label be given as often as the right one: counts that say so, as a few rows of two much confused
    classes can, are reduced.

    Guarantee: none. A row of two classes at once, or of none, looks like an error, too.
    Args:
        limit: Rows a class from which all this is estimated, the same for any sharding; all, if no class has more.
        seed: Chooses them.
    A row with NaN or infinity, or of a class that was never seen, scores NaN (no opinion) and is no issue.
    Cost: O(N K + K^3) and about 30 passes over a part of the sample; (C limit) x K numbers in memory. Fitting is one
        pass, scoring another.
    Source: Northcutt, Jiang, Chuang 2021 (class thresholds, confident joint, calibrated to the label counts); exponent:
        temperature scaling, Guo et al. 2017, here of the likelihood of noisy labels. Differs: the joint is where
        expectation and maximisation begin, rows are ranked by the posterior that follows, in place of margins or
        self-confidence, and the number of issues is the one that the expected F1 asks for, not the counted errors.

    Example:
        >>> sure = 4.0 * torch.nn.functional.one_hot(torch.arange(40) % 2, 2).double()
        >>> labels = torch.arange(40) % 2
        >>> labels[3] = 0
        >>> block = {"ids": tuple(map(str, range(40))), "features": sure, "labels": labels, "logits": sure}
        >>> found = ConfidentLearning().partial_fit(block)
        >>> found.issues(block).nonzero().flatten().tolist(), found.suggestions(block)[3].item()
        ([3], 1)
    """

    def __init__(self, limit: int = 2000, seed: int = 0) -> None:
        self.limit, self.seed = check_int(limit, "limit", 3), check_int(seed, "seed", 0)
        self.sample = ClassSample(limit, seed)
        self.counts: dict[int, int] = {}
        self._noise: LabelNoise | None = None

    def partial_fit(self, block: Mapping[str, Any]) -> "ConfidentLearning":
        """Count the rows of a block; returns self."""
        ids, logits, labels, usable = self._read(block)
        if not bool(usable.all()):
            ids = tuple(row_id for row_id, fits in zip(ids, usable.tolist(), strict=True) if fits)
            logits, labels = logits[usable], labels[usable]
        self.sample.add(ids, logits, labels)
        counts = torch.bincount(labels).tolist()
        for label, count in enumerate(counts):
            if count:
                self.counts[label] = self.counts.get(label, 0) + count
        self._noise = None
        return self

    def merge(self, other: "ConfidentLearning") -> "ConfidentLearning":
        """A new detector that has seen what both have seen."""
        check_kin(self, other, ("limit", "seed"))
        total = ConfidentLearning(self.limit, self.seed)
        total.sample = self.sample.merged(other.sample)
        labels = self.counts.keys() | other.counts.keys()
        total.counts = {label: self.counts.get(label, 0) + other.counts.get(label, 0) for label in sorted(labels)}
        return total

    @property
    def error_share(self) -> float:
        """Expected share of wrong labels in all rows seen, in [0, 1]."""
        return self._model().error_share

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64 in [0, 1], up = the label is more likely wrong."""
        _, logits, labels, usable = self._read(block)
        if not self.counts:
            return torch.full((len(labels),), torch.nan, dtype=torch.float64)
        return torch.where(usable & self._seen(logits, labels), self._model().scores(logits, labels), torch.nan)

    def issues(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) bool: the rows whose label is taken for wrong; never one whose label is the prediction itself."""
        _, logits, labels, usable = self._read(block)
        found = torch.zeros(len(labels), dtype=torch.bool)
        if self.counts:
            odd = (contests(logits, labels) & usable).nonzero()[:, 0]
            logits, labels = logits.index_select(0, odd), labels[odd]
            scores = self._model().scores(logits, labels)
            found[odd] = self._seen(logits, labels) & (scores > self._model().threshold)
        return found

    def suggestions(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) int64: the most likely true class, which may be the label."""
        _, logits, labels, _ = self._read(block)
        return torch.where(self._seen(logits, labels), self._model().likely(logits, labels), labels)

    def _seen(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(N,) bool: rows of classes that were fitted."""
        seen = torch.zeros(logits.shape[1], dtype=torch.bool)
        seen[list(self.counts)] = True
        return seen[labels]

    def _read(self, block: Mapping[str, Any]) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor]:
        """Ids, logits (N, K) float64, zero where they are not finite, labels, and which rows are finite."""
        if not isinstance(block, Mapping) or "logits" not in block:
            cure = "Add the predictions of cross-validation as block['logits'], (N, K)"
            raise refuse('a block with the key "logits"', "block", type(block).__name__, cure)
        rows = read_block({**block, "features": block["logits"]}, self._classes())
        logits = check_tensor(block["logits"], "logits", ndim=2, floating=True, finite=False)
        if len(rows.labels) and int(rows.labels.max()) >= logits.shape[1]:
            cure = "Give the logits one column for each label"
            raise refuse(f"labels below {logits.shape[1]}", "labels", int(rows.labels.max()), cure)
        finite = rows.features if bool(rows.usable.all()) else rows.features.nan_to_num(0.0, 0.0, 0.0)
        return rows.ids, finite, rows.labels, rows.usable

    def _classes(self) -> int | None:
        seen = self.sample.classes()
        return self.sample.features(seen[0]).shape[1] if seen else None

    def _model(self) -> LabelNoise:
        if self._noise is None:
            if not self.counts:
                raise refuse("a detector that has seen rows", "partial_fit", "no rows", "Call partial_fit first")
            self._noise = estimate({label: self.sample.features(label) for label in self.sample.classes()}, self.counts)
        return self._noise
