"""Confident learning: which labels are wrong, from what a model that never saw the row predicts for it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aidefend._core.checks import check_int, check_tensor, refuse
from aidefend.sanitize.block import check_kin, read_block
from aidefend.sanitize.sample import ClassSample

_SHRINKAGE = 1.0  # of each confusion towards the mean of all: cells of a few rows say little
_LARGEST = 0.9  # of a confusion, over the share of right labels of its class
_PART = 4096  # rows at a time: what a step makes is then still in the cache for the next one
_FLOOR = 1e-3  # least weight of a class, where the inverse of the confusion gives less


class _NoiseModel(NamedTuple):
    """How labels came about: confusion (true class, given label), its inverse, and what follows for the sample."""

    confusion: Tensor
    inverse: Tensor
    error_share: float
    threshold: float


class ConfidentLearning:
    """How likely a label is wrong, given which labels are confused with which in this data.

    Blocks carry "logits" (N, K), column j for label j (log-probabilities will do), of a model that was not trained on
    the row: predictions of cross-validation. A model that has learnt the wrong labels by heart finds none of them.
    How often a row of class i is labelled j is counted among the rows that are predicted with more than the usual
    confidence of their class; rare classes and over-confident models keep their own measure that way. Bayes' rule
    turns prediction and confusion into a score in [0, 1], a probability as far as the predictions are calibrated. The
    share of errors in the data follows from the same counts, and `issues` are the rows that score highest, as many as
    that share, without those whose label is what was predicted. In no class may another label be given as often as the
    right one: counts that say so, as a few rows of two much confused classes can, are reduced.

    Guarantee: none. A row of two classes at once, or of none, looks like an error, too.
    Args:
        limit: Rows a class from which the confusion is counted, the same for any sharding; all, if no class has more.
        seed: Chooses them.
    A row with NaN or infinity, or of a class that was never seen, scores NaN (no opinion) and is no issue.
    Cost: O(N K + K^3), and (C limit) x K numbers in memory. Fitting is one pass, scoring another.
    Source: Northcutt, Jiang, Chuang 2021 (class thresholds, confident joint, calibrated to the label counts). Differs:
        rows are ranked by the posterior that the joint implies, with its cells shrunk towards their mean, in place of
        margins or self-confidence.

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
        self._noise: _NoiseModel | None = None

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
        """Estimated share of wrong labels in all rows seen, in [0, 1]."""
        return self._noise_model().error_share

    def score(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) float64 in [0, 1], up = the label is more likely wrong."""
        return self._judged(block)[0]

    def issues(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) bool: the rows whose label is taken for wrong; never one whose label is the prediction itself."""
        return self._judged(block)[1]

    def _judged(self, block: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        _, logits, labels, usable = self._read(block)
        if not self.counts:
            return torch.full((len(labels),), torch.nan, dtype=torch.float64), torch.zeros(
                len(labels), dtype=torch.bool
            )
        seen = torch.zeros(logits.shape[1], dtype=torch.bool)
        seen[list(self.counts)] = True
        noise = self._noise_model()
        parts = zip(logits.split(_PART), labels.split(_PART), strict=True)
        scores = torch.cat([_wrong(_softmax(part), given, noise) for part, given in parts])
        scores = torch.where(usable & seen[labels], scores, torch.nan)
        contested = logits.gather(1, labels[:, None])[:, 0] < logits.amax(dim=1)
        return scores, (scores > noise.threshold) & contested

    def suggestions(self, block: Mapping[str, Any]) -> Tensor:
        """(N,) int64: the most likely true class, which may be the label."""
        _, logits, labels, _ = self._read(block)
        return _weights(_softmax(logits), labels, self._noise_model()).argmax(dim=1)

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
        return self.sample.of(seen[0])[1].shape[1] if seen else None

    def _noise_model(self) -> _NoiseModel:
        if self._noise is None:
            if not self.counts:
                raise refuse("a detector that has seen rows", "partial_fit", "no rows", "Call partial_fit first")
            self._noise = self._counted()
        return self._noise

    def _counted(self) -> _NoiseModel:
        """The confusion among confident rows, as many for each given label as there are rows with it."""
        parts = {label: _softmax(self.sample.of(label)[1]) for label in self.sample.classes()}
        size = next(iter(parts.values())).shape[1]
        usual = torch.full((size,), torch.inf, dtype=torch.float64)
        for label, chances in parts.items():
            usual[label] = chances[:, label].mean()
        joint = torch.zeros(size, size, dtype=torch.float64)  # (given, true)
        for label, chances in parts.items():
            highest, guesses = torch.where(chances >= usual, chances, -1.0).max(dim=1)
            guesses = guesses[highest >= 0]
            counted = torch.bincount(guesses, minlength=size).double()
            counted[label] += 0.0 if len(guesses) else 1.0
            joint[label] = counted / counted.sum() * self.counts[label]
        joint /= joint.sum()
        noise = _NoiseModel(*_confusion(joint, sorted(parts)), float(1 - joint.trace()), 1.0)
        return noise._replace(threshold=self._threshold(parts, noise))

    def _threshold(self, parts: Mapping[int, Tensor], noise: _NoiseModel) -> float:
        """The score that the estimated share of all rows exceeds; each sampled row stands for those of its class."""
        scores, standing = [], []
        for label, chances in parts.items():
            labels = torch.full((len(chances),), label, dtype=torch.int64)
            scores.append(_wrong(chances, labels, noise))
            standing.append(torch.full((len(chances),), self.counts[label] / len(chances), dtype=torch.float64))
        every = torch.cat(scores).numpy()
        places = np.argsort(-every)  # which of two equal scores comes first changes nothing
        beyond = np.cumsum(torch.cat(standing).numpy()[places]) / sum(self.counts.values())
        first = int((beyond <= noise.error_share + 1e-12).sum())
        return float(every[places[first]]) if first < len(places) else -1.0


def _softmax(logits: Tensor) -> Tensor:
    """(N, K); over a handful of columns this is several times faster than `torch.softmax` in float64."""
    chances = (logits - logits.amax(dim=1, keepdim=True)).exp_()
    return chances.div_(chances.sum(dim=1, keepdim=True))


def _wrong(chances: Tensor, labels: Tensor, noise: _NoiseModel) -> Tensor:
    weights = _weights(chances, labels, noise)
    return 1 - weights.gather(1, labels[:, None])[:, 0] / weights.sum(dim=1)


def _weights(chances: Tensor, labels: Tensor, noise: _NoiseModel) -> Tensor:
    """(N, K), in proportion to the probability of each true class, given the prediction and the label."""
    given = noise.confusion.T.contiguous().index_select(0, labels)
    true = torch.from_numpy(chances.numpy() @ noise.inverse.numpy())  # torch takes twice as long for narrow matrices
    return true.clamp_(min=_FLOOR).mul_(given)


def _confusion(joint: Tensor, seen: list[int]) -> tuple[Tensor, Tensor]:
    """P(given | true) from the joint of (given, true), between classes that were seen; and its inverse."""
    size = len(joint)
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[torch.tensor(seen)[:, None], torch.tensor(seen)[None, :]] = True
    inside.fill_diagonal_(False)
    wrong = torch.where(inside, joint, 0.0)
    mean = wrong.sum() / max(1, int(inside.sum()))
    wrong = torch.where(inside, (wrong + _SHRINKAGE * mean) / (1 + _SHRINKAGE), 0.0)
    by_true = (wrong + torch.diag(joint.diagonal())).T
    masses = by_true.sum(dim=1, keepdim=True)
    confusion = torch.where(masses > 0, by_true / masses.clamp(min=1e-300), torch.eye(size, dtype=torch.float64))
    confusion = _mostly_right(confusion)
    return confusion, torch.linalg.pinv(confusion)


def _mostly_right(confusion: Tensor) -> Tensor:
    """Errors of each class scaled down until the largest is `_LARGEST` of its right labels; else nothing is known.

    With scale t and errors e: t max(e) <= _LARGEST (1 - t sum(e)). A confusion beyond that is singular near by, and its
    inverse would call the right labels wrong.
    """
    wrong = confusion - torch.diag(confusion.diagonal())
    scale = (_LARGEST / (wrong.amax(dim=1) + _LARGEST * wrong.sum(dim=1)).clamp(min=1e-12)).clamp(max=1)
    wrong = wrong * scale[:, None]
    return wrong + torch.diag(1 - wrong.sum(dim=1))
