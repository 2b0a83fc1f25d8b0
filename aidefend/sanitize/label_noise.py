"""How wrong labels came about: from predictions for rows that the model never saw, and the labels they were given."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_SHRINKAGE = 1.0  # of each counted confusion towards the mean of all: cells of a few rows say little
_LARGEST = 0.9  # of a confusion, over the share of right labels of its class
_FLOOR = 1e-3  # least chance of a class, where the inverse of the confusion gives less
_EXPONENTS = tuple(2 ** (step / 4) for step in range(-4, 18))  # among which the likeliest is looked for
_AGREEING = 2048  # rows, over all classes, whose label is what was predicted: they are many and much alike
_COLUMNS = 32  # up to so many, the largest of a row is found faster column by column
_PART = 4096  # rows at a time: what a step makes is then still in the cache for the next one


class LabelNoise(NamedTuple):
    """A row's true class follows from its prediction, the label that it was given from its true class.

    The chance of a true class is in proportion to (q / usual) ** exponent, where q is what the prediction says of the
    true classes: the prediction itself or, where this explains the labels better, times the inverse of the confusion,
    as for a model that predicts the labels as they are given, with their errors.

    Args:
        inverse: (K, K) float64, q = prediction @ inverse; of the confusion, or the identity.
        usual: (K,) float64, logarithm of the mean of q over the rows labelled so; infinite where there are none.
        exponent: Above 1 where a prediction is less sure than it may be, below 1 where it is too sure.
        confusion: (true class, given label) float64; each row sums to one.
        error_share: Expected share of wrong labels, in [0, 1].
        threshold: The score above which a label is called wrong, where it is not the prediction itself.
    """

    inverse: Tensor
    usual: Tensor
    exponent: float
    confusion: Tensor
    error_share: float = 0.0
    threshold: float = 1.0

    def scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(N,) probability that a label is wrong; logits (N, K), labels (N,) of classes that were seen."""
        parts = zip(logits.split(_PART), labels.split(_PART), strict=True)
        return torch.cat([self._wrong(part, given) for part, given in parts])

    def likely(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(N,) int64: the most likely true class."""
        parts = zip(logits.split(_PART), labels.split(_PART), strict=True)
        return torch.cat([self._weights(part, given).max(dim=0).indices for part, given in parts])

    def _wrong(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = self._weights(logits, labels)
        return 1 - _own(weights, labels) / weights.sum(dim=0)

    def _weights(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(K, N), in proportion to the probability of each true class, given the prediction and the label."""
        chances = _softmax(logits.T.clone(memory_format=torch.contiguous_format))
        true = _sharpened(_relative(_unmixed(chances, self.inverse), self.usual), self.exponent)
        return true.mul_(self.confusion.index_select(1, labels))


def contests(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: another label than the given one is predicted; logits (N, K) float64, labels (N,)."""
    return logits.gather(1, labels[:, None])[:, 0] < _highest(logits)


def _highest(logits: Tensor) -> Tensor:
    if logits.shape[1] > _COLUMNS:
        return logits.amax(dim=1)
    highest = np.empty(len(logits))
    for start in range(0, len(logits), _PART):
        part, largest = logits[start : start + _PART].numpy(), highest[start : start + _PART]
        largest[:] = part[:, 0]
        for column in range(1, part.shape[1]):
            np.maximum(largest, part[:, column], out=largest)
    return torch.from_numpy(highest)


class _Sample(NamedTuple):
    """Rows: columns (K, n), labels (n,), how many rows each stands for (n,), whether another label is predicted (n,).

    `rows` (K,): how many rows all those of a label stand for.
    """

    columns: Tensor
    labels: Tensor
    standing: Tensor
    contested: Tensor
    rows: Tensor


class _Fit(NamedTuple):
    """A model, the sample with logarithms of q / usual in place of predictions, and the likelihood of its labels."""

    noise: LabelNoise
    relative: _Sample
    likelihood: float = 0.0


def estimate(logits: Mapping[int, Tensor], counts: Mapping[int, float]) -> LabelNoise:
    """The model of the labels, from a sample of each.

    Args:
        logits: For each label that was given: finite logits (n, K) float64, n >= 1.
        counts: For each label, how many rows its sample stands for.

    The confusion is first counted, among rows that are predicted with more than the usual confidence of a class. Then
    the exponent becomes the one that makes the given labels likeliest, the confusion what is expected under it, and
    the exponent the likeliest again. The threshold is the one beyond which the expected F1 is highest. All rows count
    whose label is not what was predicted; of the others, the first of each label stand for the rest.
    Cost: about 30 passes over these rows.
    """
    sample = _sampled(logits, counts)
    counted = _counted(sample)
    plain = _sharper(_based(sample, torch.eye(len(counted), dtype=torch.float64), counted, 1.0), (4, 2, 1))
    unmixed = _sharper(_based(sample, torch.linalg.pinv(counted), counted, 1.0), (4, 2, 1))
    better = max(plain, unmixed, key=lambda fit: fit.likelihood)
    confusion = _expected(better.relative, better.noise)
    inverse = better.noise.inverse if better is plain else torch.linalg.pinv(confusion)
    return _decided(_sharper(_based(sample, inverse, confusion, better.noise.exponent), (1,)))


def _sampled(logits: Mapping[int, Tensor], counts: Mapping[int, float]) -> _Sample:
    rows, sizes = torch.cat(list(logits.values())), torch.tensor([len(part) for part in logits.values()])
    places = torch.arange(len(sizes)).repeat_interleave(sizes)
    labels = torch.tensor(list(logits))[places]
    contested = contests(rows, labels)
    agreeing = torch.bincount(places, ~contested, minlength=len(sizes)).long()
    numbers = (~contested).cumsum(dim=0) - (agreeing.cumsum(dim=0) - agreeing)[places]  # from 1, in each label
    most = max(1, _AGREEING // len(sizes))
    kept = (contested | (numbers <= most)).nonzero()[:, 0]
    places, contested = places[kept], contested[kept]
    standing = torch.tensor([counts[label] for label in logits], dtype=torch.float64) / sizes
    standing = torch.where(contested, standing[places], (standing * (agreeing / most).clamp(min=1))[places])
    columns, labels = rows.index_select(0, kept).T.clone(memory_format=torch.contiguous_format), labels[kept]
    return _Sample(_softmax(columns), labels, standing, contested, torch.bincount(labels, standing, len(columns)))


def _based(sample: _Sample, inverse: Tensor, confusion: Tensor, exponent: float) -> _Fit:
    true = _unmixed(sample.columns, inverse)
    usual = _usual(sample, true).log_()
    return _Fit(LabelNoise(inverse, usual, exponent, confusion), sample._replace(columns=_relative(true, usual)))


def _usual(sample: _Sample, columns: Tensor) -> Tensor:
    """(K,) mean of each class's column over the rows with its label; infinite where there are none."""
    sums = torch.bincount(sample.labels, _own(columns, sample.labels) * sample.standing, len(columns))
    return torch.where(sample.rows > 0, sums / sample.rows, torch.inf)


def _own(columns: Tensor, labels: Tensor) -> Tensor:
    """(n,) of the columns (K, n), the entry of each row's label."""
    return columns.gather(0, labels[None])[0]


def _softmax(columns: Tensor) -> Tensor:
    """(K, n), written into `columns`."""
    chances = columns.sub_(columns.amax(dim=0)).exp_()
    return chances.div_(chances.sum(dim=0))


def _unmixed(chances: Tensor, inverse: Tensor) -> Tensor:
    return (inverse.T @ chances).clamp_(min=_FLOOR)


def _relative(true: Tensor, usual: Tensor) -> Tensor:
    """(K, n) logarithms, less the usual ones and so that the largest of each row is 0; written into `true`."""
    true.log_().sub_(usual[:, None])
    return true.sub_(true.amax(dim=0))


def _sharpened(relative: Tensor, exponent: float) -> Tensor:
    return (relative * exponent).exp_()


def _counted(sample: _Sample) -> Tensor:
    """P(given | true) among confident rows, as many for each given label as there are rows with it."""
    size = len(sample.columns)
    usual = _usual(sample, sample.columns)
    highest, guesses = torch.where(sample.columns >= usual[:, None], sample.columns, -1.0).max(dim=0)
    joint = torch.bincount(sample.labels * size + guesses, sample.standing * (highest >= 0), minlength=size * size)
    joint = joint.reshape(size, size)  # (given, true)
    joint.diagonal().add_((sample.rows > 0) & (joint.sum(dim=1) == 0))
    joint *= (sample.rows / joint.sum(dim=1).clamp(min=1e-300))[:, None]
    return _confusion(joint / joint.sum(), sample.rows > 0)


def _confusion(joint: Tensor, seen: Tensor) -> Tensor:
    """P(given | true) from the joint of (given, true), between classes that were seen, (K,) bool."""
    inside = (seen[:, None] & seen).fill_diagonal_(False)
    wrong = torch.where(inside, joint, 0.0)
    mean = wrong.sum() / max(1, int(inside.sum()))
    wrong = torch.where(inside, (wrong + _SHRINKAGE * mean) / (1 + _SHRINKAGE), 0.0)
    return _mostly_right((wrong + torch.diag(joint.diagonal())).T)


def _mostly_right(masses: Tensor) -> Tensor:
    """Masses (true, given) as shares of each true class, the errors at most `_LARGEST` of the right labels.

    With scale t and errors e: t max(e) <= _LARGEST (1 - t sum(e)). A confusion beyond that is singular near by, and its
    inverse would call the right labels wrong. A class without any mass has no errors.
    """
    whole = masses.sum(dim=1, keepdim=True)
    wrong = torch.where(whole > 0, masses / whole.clamp(min=1e-300), 0.0).fill_diagonal_(0.0)
    scale = (_LARGEST / (wrong.amax(dim=1) + _LARGEST * wrong.sum(dim=1)).clamp(min=1e-12)).clamp(max=1)
    wrong *= scale[:, None]
    return wrong + torch.diag(1 - wrong.sum(dim=1))


def _sharper(fit: _Fit, steps: tuple[int, ...]) -> _Fit:
    """With the exponent of the highest likelihood, from the present one by steps up or down."""
    columns, standing = fit.relative.columns, fit.relative.standing
    given = fit.noise.confusion.index_select(1, fit.relative.labels)
    known: dict[int, float] = {}

    def likelihood(place: int) -> float:
        if place not in known:
            true = _sharpened(columns, _EXPONENTS[place])
            whole = true.sum(dim=0)
            known[place] = float(true.mul_(given).sum(dim=0).div_(whole).log_() @ standing)
        return known[place]

    best = _EXPONENTS.index(fit.noise.exponent)
    for step in steps:
        place = -1
        while best != place:
            place = best
            best = max((max(0, place - step), place, min(len(_EXPONENTS) - 1, place + step)), key=likelihood)
    return _Fit(fit.noise._replace(exponent=_EXPONENTS[best]), fit.relative, known[best])


def _posterior(sample: _Sample, noise: LabelNoise) -> Tensor:
    """(K, n) probability of each true class."""
    weights = _sharpened(sample.columns, noise.exponent).mul_(noise.confusion.index_select(1, sample.labels))
    return weights.div_(weights.sum(dim=0))


def _expected(sample: _Sample, noise: LabelNoise) -> Tensor:
    """The confusion that is expected under the present one; one row more for each true class, of all labels alike."""
    masses = torch.zeros_like(noise.confusion).index_add_(1, sample.labels, _posterior(sample, noise) * sample.standing)
    seen = sample.rows > 0
    return _mostly_right(masses + (seen[:, None] & seen) / seen.sum())


def _decided(fit: _Fit) -> LabelNoise:
    """With the share of errors, and the threshold that gives the highest expected F1."""
    sample = fit.relative
    scores = 1 - _own(_posterior(sample, fit.noise), sample.labels)
    errors = float(scores @ sample.standing)
    threshold = _threshold(scores[sample.contested], sample.standing[sample.contested], errors)
    return fit.noise._replace(error_share=errors / float(sample.standing.sum()), threshold=threshold)


def _threshold(scores: Tensor, standing: Tensor, errors: float) -> float:
    """Halfway between the last score that is in and the first that is not, of the choice with the highest expected F1.

    F1 = 2 right / (chosen + errors); a row with score s adds `standing` to chosen and s times that to right.
    """
    if not len(scores):
        return 1.0
    ordered, places = scores.sort(descending=True)
    chosen = standing[places].cumsum(dim=0)
    right = (ordered * standing[places]).cumsum(dim=0)
    last = int((right / (chosen + errors)).argmax())
    return float((ordered[last] + ordered[last + 1]) / 2) if last + 1 < len(ordered) else -1.0
